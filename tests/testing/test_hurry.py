"""What is compiled in a hurry answers alike, whatever the compiler knows."""

import jax
import jax.numpy as jnp
import numpy as np

from surgery.testing import hurry


def test_options_that_this_compiler_does_not_know_are_left_out(monkeypatch):
  known = {'xla_backend_optimization_level': 0}
  monkeypatch.setattr(hurry, '_OPTIONS', {**known, 'xla_no_such_option': True})
  assert known == hurry.options.__wrapped__()


def test_gradients_are_the_same_but_for_rounding():
  x = jnp.linspace(-2, 2, 15).reshape(3, 5)
  gradient = jax.grad(lambda x: (jnp.tanh(x @ x.T) ** 3).sum())
  expected = jax.jit(gradient)(x)
  assert np.any(expected)
  np.testing.assert_allclose(
    hurry.compiled(gradient)(x), expected, rtol=1e-5, atol=1e-6
  )
