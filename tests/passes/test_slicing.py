"""Slice and permute against plain numpy; live, in files, in blocks."""

import numpy as np
import pytest

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  same,
)


@pytest.mark.parametrize(
  ('options', 'places'),
  [
    ({'keep': '1:4'}, [1, 2, 3]),
    ({'keep': [0, '4:']}, [0, 4, 5]),
    ({'keep': '-1, 0:2'}, [5, 0, 1]),
    ({'keep': [3, 1, 0]}, [3, 1, 0]),
    ({'keep': [2, 2, '0:2', 2]}, [2, 2, 0, 1, 2]),
    ({'keep': [5, 4, 3, 2, 1, 0]}, [5, 4, 3, 2, 1, 0]),
    ({'keep': [0, 1, 2, 3, 4, 5, 0]}, [0, 1, 2, 3, 4, 5, 0]),
    ({'keep': [1, 0], 'of': 3}, [2, 3, 0, 1]),
    ({'drop': [4, 1, 4]}, [0, 2, 3, 5]),
    ({'drop': 2}, [0, 1, 3, 4, 5]),
    ({'keep': 2, 'of': 3}, [4, 5]),
    ({'drop': '0:1', 'of': 2}, [3, 4, 5]),
  ],
)
@pytest.mark.parametrize('axis', [0, 1, -1])
def test_slice(options, places, axis):
  net = {'x': array(6, 6, 6), 'y': array(1)}
  after = applied(net, {'slice': {'select': 'x', 'axis': axis, **options}})
  same({'x': np.take(net['x'], places, axis), 'y': net['y']}, after)


def test_permute():
  net = {'x': array(3, 8)}
  step = {'select': 'x', 'axis': -1, 'order': [2, 0, 3, 1], 'of': 4}
  after = applied(net, {'permute': step})
  expected = net['x'].reshape(3, 4, 2)[:, [2, 0, 3, 1]].reshape(3, 8)
  same({'x': expected}, after)
