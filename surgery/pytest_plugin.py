"""The kit's plugin for pytest: a test for each law and kind of layer.

pytest loads it wherever the library is installed, so it imports nothing before
a conformance test is met.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest


def pytest_generate_tests(metafunc: Any) -> None:
  """Gives `AdapterConformance.test_law` its cases."""
  if metafunc.cls is None or 'surgery.testing' not in sys.modules:
    return
  if metafunc.function.__name__ != 'test_law':
    return
  from surgery.testing import AdapterConformance

  if not issubclass(metafunc.cls, AdapterConformance):
    return
  if not hasattr(metafunc.cls, 'adapter'):
    raise pytest.UsageError(
      f'{metafunc.cls.__qualname__}: set `adapter`, e.g. adapter = '
      'Mine(rank=2).'
    )
  cases = metafunc.cls.cases()
  ids = [f'{c.law}-{c.kind}-{c.dtype}' for c in cases]
  metafunc.parametrize('case', cases, ids=ids)
