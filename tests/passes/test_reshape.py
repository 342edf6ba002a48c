"""Transpose, reshape and pad against plain numpy; live, in files, in blocks."""

import numpy as np

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  same,
)


def test_transpose():
  net = {'x': array(2, 3, 4), 'y': array(3, 4)}
  after = applied(net, {'transpose': '*'})
  same({'x': net['x'].swapaxes(1, 2), 'y': net['y'].T}, after)
  after = applied(net, {'transpose': {'select': 'x', 'axes': [2, 0, 1]}})
  same({'x': net['x'].transpose(2, 0, 1), 'y': net['y']}, after)


def test_reshape():
  net = {'x': array(4, 6)}
  for shape in ([24], [2, -1, 3], [4, 6, 1], [1, 24]):
    after = applied(net, {'reshape': {'select': 'x', 'shape': shape}})
    same({'x': net['x'].reshape(shape)}, after)


def test_pad():
  net = {'x': array(3, 4), 'n': np.arange(3, dtype='int8')}
  step = {'select': 'x', 'axis': 1, 'before': 1, 'after': 2, 'value': 0.5}
  after = applied(net, {'pad': step})
  expected = np.pad(net['x'], ((0, 0), (1, 2)), constant_values=0.5)
  same({'x': expected, 'n': net['n']}, after)
  after = applied(net, {'pad': {'select': '*', 'to': 5, 'value': -1}})
  same(
    {
      'x': np.pad(net['x'], ((0, 2), (0, 0)), constant_values=-1),
      'n': np.pad(net['n'], (0, 2), constant_values=-1),
    },
    after,
  )
