"""What `surgery/live/params.py` takes from blox that blox does not promise.

If one of these fails, blox has moved. Interception rests on exactly this, and
in one module: look at what the test names, change `AdaptedParams` in
`surgery/live/params.py` accordingly, then the pin in `pyproject.toml`.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import pathlib
import subprocess
import sys
import tomllib

import blox as bx
import jax.numpy as jnp
import pytest

from surgery.live import params as live

MOVED = (
  'blox has changed {what}, on which interception rests. Update AdaptedParams '
  'in surgery/live/params.py, then this test and the pin in pyproject.toml.'
)


def _names(function):
  return list(inspect.signature(function).parameters)


def test_blox_is_of_the_series_that_was_checked():
  version = importlib.metadata.version('jax-blox')
  assert version.startswith('0.1.'), MOVED.format(what='its version')


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    (
      '_get',
      [
        'self',
        'path',
        'shape',
        'init',
        'dtype',
        'trainable',
        'metadata',
        'rng',
      ],
    ),
    ('_set', ['self', 'path', 'value', 'trainable', 'metadata']),
    ('_clone', ['self']),
    ('merge', ['self', 'other']),
    ('locked', ['self']),
    ('unlocked', ['self']),
    ('split', ['self', 'predicate']),
  ],
)
def test_methods_have_the_signature_that_is_overridden(name, expected):
  what = f'the signature of Params.{name}'
  assert expected == _names(getattr(bx.Params, name)), MOVED.format(what=what)
  assert expected == _names(getattr(live.AdaptedParams, name))


def test_defaults_of_get_are_the_same():
  defaults = lambda f: [
    p.default for p in inspect.signature(f).parameters.values()
  ]
  assert defaults(bx.Params._get) == defaults(live.AdaptedParams._get), (
    MOVED.format(what='the defaults of Params._get')
  )


def test_params_have_two_attributes():
  assert {'_data': {}, '_locked': False} == vars(bx.Params()), MOVED.format(
    what='the attributes of Params'
  )


def test_flattening_gives_one_dict_and_the_lock():
  params = bx.Params()
  params['a', 'b'] = bx.Param(jnp.ones(3))
  children, static = params.tree_flatten()
  assert [params._data] == list(children), MOVED.format(what='its children')
  assert (False,) == static, MOVED.format(what='its static data')


def test_children_of_adapted_params_are_those_of_blox():
  data: dict[tuple[str, ...], bx.Param] = {('a', 'b'): bx.Param(jnp.ones(3))}
  records = live.Records()
  children, static = live._make(data, True, records, {}).tree_flatten()
  assert data is children[0]
  assert (True, records) == static


def test_get_param_asks_params_positionally():
  asked = []

  class Spy(bx.Params):
    def _get(self, *args, **kwargs):
      asked.append((args, kwargs))
      return 'value', self

  layer = bx.Linear(bx.Graph('net').child('layer'), 3, None)
  value, _ = layer.get_param(Spy(), 'kernel', (1,), 'init')
  path = ('net', 'layer', 'kernel')
  assert 'value' == value
  assert [((path, (1,), 'init', jnp.float32, True, None, None), {})] == asked, (
    MOVED.format(what='how Module.get_param asks params')
  )


def test_set_param_asks_params_positionally():
  asked = []

  class Spy(bx.Params):
    def _set(self, *args, **kwargs):
      asked.append((args, kwargs))
      return self

  layer = bx.Linear(bx.Graph('net').child('layer'), 3, None)
  layer.set_param(Spy(), 'kernel', None, trainable=False)
  path = ('net', 'layer', 'kernel')
  assert [((path, None, False, None), {})] == asked, MOVED.format(
    what='how Module.set_param asks params'
  )


def test_params_copy_themselves_by_clone():
  """`locked`, `split`, `merge` and `_set` keep the class through `_clone`."""
  cloned = []

  class Spy(bx.Params):
    def _clone(self):
      cloned.append(True)
      return super()._clone()

  params = Spy()
  params['a', 'b'] = bx.Param(jnp.ones(3))
  for copy in (
    lambda: params.locked(),
    lambda: params.unlocked(),
    lambda: params.split(),
    lambda: params.merge(bx.Params()),
    lambda: params._set(('a', 'b'), None, False),
    lambda: params._get(('a', 'c'), (1,), lambda k, s, d: jnp.ones(s)),
  ):
    cloned.clear()
    copy()
    assert cloned, MOVED.format(what='how Params copy themselves')


def test_param_takes_what_is_given_it():
  assert ['self', 'value', 'trainable', 'metadata'] == _names(
    bx.Param.__init__
  ), MOVED.format(what='Param')


# Without what this module looks at, importing says so at once.


def _without_get():
  class Params(bx.Params):
    _get = None

  return Params


def _with_another_set():
  class Params(bx.Params):
    def _set(self, path, value, metadata=None):
      return super()._set(path, value, None, metadata)

  return Params


def _with_another_attribute():
  class Params(bx.Params):
    def __init__(self):
      self._store = {}
      self._locked = False

  return Params


@pytest.mark.parametrize(
  ('params', 'missing'),
  [
    (
      _without_get,
      'no method Params._get(path, shape, init, dtype, trainable, metadata, '
      'rng)',
    ),
    (
      _with_another_set,
      'Params._set(path, value, metadata) instead of Params._set(path, value, '
      'trainable, metadata)',
    ),
    (_with_another_attribute, "no attribute '_data' of Params"),
    (lambda: None, 'no class Params'),
  ],
)
def test_what_blox_lacks_is_named(monkeypatch, params, missing):
  monkeypatch.setattr(bx, 'Params', params())
  with pytest.raises(ImportError) as caught:
    live._check_blox()
  assert missing in str(caught.value)


def test_another_param_is_named(monkeypatch):
  class Param:
    def __init__(self, value, metadata=None):
      pass

  monkeypatch.setattr(bx, 'Param', Param)
  with pytest.raises(ImportError) as caught:
    live._check_blox()
  assert (
    'Param(value, metadata) instead of Param(value, trainable, metadata); no '
    'method Param.replace()' in str(caught.value)
  )


def test_a_parameter_behind_ours_does_no_harm(monkeypatch):
  class Params(bx.Params):
    def _clone(self, deep=False):
      return super()._clone()

  monkeypatch.setattr(bx, 'Params', Params)
  live._check_blox()


def test_importing_with_another_blox_says_what_to_install():
  script = (
    'import blox as bx, surgery\n'
    'bx.Params._fetch = bx.Params._get\n'
    'del bx.Params._get\n'
    'try:\n'
    '  surgery.attach\n'
    'except surgery.DependencyError as error:\n'
    '  print(error)\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  version = importlib.metadata.version('jax-blox')
  assert (
    f'surgery works inside of blox and needs {live.REQUIRED_BLOX}; the '
    f'installed jax-blox {version} ({bx.__file__}) has no method Params._get('
    'path, shape, init, dtype, trainable, metadata, rng). Install one that '
    f"fits: pip install '{live.REQUIRED_BLOX}'\n"
  ) == done.stdout


def test_what_is_required_is_what_is_declared():
  project = pathlib.Path(__file__).parents[2] / 'pyproject.toml'
  declared = tomllib.loads(project.read_text())['project']['dependencies']
  assert live.REQUIRED_BLOX in declared
