"""The kit's plugin for pytest: a test for each law and kind of layer.

pytest loads it wherever the library is installed, so it imports nothing before
a conformance test is met.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

_MARKER = 'frameworks'


def pytest_configure(config: Any) -> None:
  """Registers the marker of what is looked at only where it is asked for."""
  config.addinivalue_line(
    'markers',
    f'{_MARKER}: conformance on layers of linen, nnx and equinox; left out '
    f'unless -m names it.',
  )


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
  """Leaves out what takes long, unless `-m` names it."""
  if _MARKER in (config.getoption('-m') or ''):
    return
  left = [item for item in items if item.get_closest_marker(_MARKER)]
  ours = [item for item in left if item.function.__name__ == 'test_framework']
  if ours:
    config.hook.pytest_deselected(items=ours)
    items[:] = [item for item in items if item not in ours]


def pytest_generate_tests(metafunc: Any) -> None:
  """Gives the tests of `AdapterConformance` their cases."""
  if metafunc.cls is None or 'surgery.testing' not in sys.modules:
    return
  if metafunc.function.__name__ not in ('test_law', 'test_framework'):
    return
  from surgery.testing import AdapterConformance

  if not issubclass(metafunc.cls, AdapterConformance):
    return
  if not hasattr(metafunc.cls, 'adapter'):
    raise pytest.UsageError(
      f'{metafunc.cls.__qualname__}: set `adapter`, e.g. adapter = '
      'Mine(rank=2).'
    )
  if metafunc.function.__name__ == 'test_framework':
    from surgery.testing import frameworks

    mark = getattr(pytest.mark, _MARKER)
    # A configuration for other kinds of layers may not suit these.
    kinds = set(metafunc.cls.kinds or ('linear',)) - {*metafunc.cls.unsupported}
    names = frameworks.installed() if kinds & {'linear', 'norm'} else []
    found = [pytest.param(name, marks=mark) for name in names]
    metafunc.parametrize('framework', found)
    return
  cases = metafunc.cls.cases()
  ids = [f'{c.law}-{c.kind}-{c.dtype}' for c in cases]
  metafunc.parametrize('case', cases, ids=ids)
