"""What keeps tests from waiting: for the compiler above all, and the disk."""

import os
import re
import sys

import hypothesis
import pytest

# An example may have to wait for the compiler. The same ones each time, so that
# what fails has to do with what was changed; to look for others, which wants
# doing at times: SURGERY_SEARCH=1 make test.
hypothesis.settings.register_profile(
  'surgery', deadline=None, derandomize='SURGERY_SEARCH' not in os.environ
)
hypothesis.settings.load_profile('surgery')

# Most of a test is compiling, and most tests are about values, which differ by
# rounding alone where a program is compiled in a hurry. Modules about the bits
# that users get say `OPTIMIZED = True`.
ALL = r'.*'
NOTHING = r'(?!)'


# Rooms in the order of their tests: who compiles alike works side by side, and
# short files are last, so that all workers end at one time.
ROOMS = (
  'tests/live', 'tests/factoring', 'plugins', 'tests/testing', 'tests/adapters',
  'tests/adapting', 'tests/passes', 'tests/editing', 'tests/looking',
  'tests/recipes', 'tests/docs', 'tests/model', 'tests/files', 'tests/cli',
  'tests', 'tests/host', 'tests/contract', 'tests/naming',
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
  """Sorts tests by rooms."""

  def room(item):
    path = item.path.relative_to(config.rootpath)
    found = next(str(p) for p in path.parents if str(p) in (*ROOMS, '.'))
    return ROOMS.index(found) if found in ROOMS else len(ROOMS)

  items.sort(key=room)


class _Compiler:
  """Gives JAX's compiler options for the programs that are in a hurry."""

  def __init__(self):
    self.hurried = re.compile(NOTHING)
    self.compile = None

  def install(self):
    """Stands in for JAX's function from now on."""
    from jax._src import compiler

    from surgery.testing import hurry

    found = getattr(compiler, 'compile_or_get_cached', None)
    if found is None:
      return  # Another JAX: tests take longer.
    # Asked for now, since asking compiles something.
    self.options = hurry.options()
    self.compile = found
    compiler.compile_or_get_cached = self

  def __call__(self, backend, computation, devices, options, *rest, **named):
    name = str(computation.operation.attributes['sym_name']).strip('"')
    if self.hurried.fullmatch(name):
      given = dict(options.env_option_overrides)
      options.env_option_overrides = [*{**self.options, **given}.items()]
    return self.compile(backend, computation, devices, options, *rest, **named)

  def hurry(self, programs):
    """Compiles programs of some names in a hurry, from now on."""
    if self.compile is None:
      self.install()
    if programs != self.hurried.pattern:
      # No program of one kind is compared with one of the other.
      sys.modules['jax'].clear_caches()
    self.hurried = re.compile(programs)


@pytest.fixture(scope='session')
def _compiler():
  return _Compiler()


@pytest.fixture(autouse=True, scope='module')
def _compiling(request, _compiler):
  """Compiles as users do in modules that say `OPTIMIZED = True`."""
  if 'jax' in sys.modules:  # Who needs none does not wait for it.
    optimized = getattr(request.module, 'OPTIMIZED', False)
    _compiler.hurry(NOTHING if optimized else ALL)


@pytest.fixture(autouse=True, scope='session')
def _disk():
  """Leaves to the system when it writes to the disk.

  Only a loss of power would show it. When `fsync` is called is tested.
  """
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(os, 'fsync', os.fstat)
    yield
