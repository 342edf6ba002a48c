"""Compiling in a hurry: these tests compile a thousand tiny programs."""

import jax
import pytest


@pytest.fixture(autouse=True, scope='module')
def _optimized(request):
  """Compiles as users do in modules that say `OPTIMIZED = True`.

  Those are about bits; the others would only wait for the compiler.
  """
  optimized = getattr(request.module, 'OPTIMIZED', False)
  if optimized:
    jax.clear_caches()
  jax.config.update('jax_disable_most_optimizations', not optimized)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
  if not optimized:
    # Who comes next on this worker may compare bits with programs of its own.
    jax.clear_caches()
