"""Arrays for tests of structural passes, which run whole and in blocks."""

import numpy as np
import pytest

from tests.recipes.models import SmallBlocks


def array(*shape, seed=0, dtype='float32'):
  values = np.random.default_rng(seed).standard_normal(shape)
  return values.astype(dtype)


@pytest.fixture(autouse=True, params=[1 << 20, 5], ids=['whole', 'blocks'])
def elements(request):
  """How many elements a block has."""
  with SmallBlocks(request.param):
    yield


NET = {
  'h/0/a': array(4, 6),
  'h/0/b': array(6, seed=1),
  'h/1/a': array(4, 6, seed=2),
  'h/1/b': array(6, seed=3),
  'out': array(6, 3, seed=4),
}
