"""Resize-vocab against plain numpy; live, in files, in blocks."""

import numpy as np

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  close,
  same,
)


def test_resize_vocab():
  net = {'e': array(10, 4), 'k': array(4, 10)}
  after = applied(net, {'resize-vocab': {'select': 'e', 'size': 7}})
  same({'e': net['e'][:7], 'k': net['k']}, after)
  step = {'select': 'k', 'size': 12, 'axis': -1}
  after = applied(net, {'resize-vocab': step})
  mean = net['k'].astype('float64').mean(1, keepdims=True)
  new = np.concatenate([net['k'], mean.repeat(2, 1).astype('float32')], 1)
  close({'e': net['e'], 'k': new}, after, 1e-7)
  same({'k': net['k']}, {'k': after['k'][:, :10].copy()})
  step = {'select': 'e', 'size': 12, 'new': 'zero'}
  after = applied(net, {'resize-vocab': step})
  same({'e': np.pad(net['e'], ((0, 2), (0, 0))), 'k': net['k']}, after)
  step |= {'new': 'random', 'seed': 1, 'scale': 0.0}
  after = applied(net, {'resize-vocab': step})
  rows = net['e'].astype('float64').mean(0).astype('float32')
  close({'e': np.stack([rows, rows])}, {'e': after['e'][10:]}, 1e-6)
