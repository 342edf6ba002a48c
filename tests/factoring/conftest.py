"""Compiling in a hurry: these tests compile a thousand tiny programs."""

import pytest


@pytest.fixture(scope='module')
def in_a_hurry():
  """All programs, but in modules about bits: these say `OPTIMIZED = True`."""
  return r'.*'
