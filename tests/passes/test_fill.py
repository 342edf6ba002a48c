"""Fill and random against plain numpy; live, in files, in blocks."""

from typing import Any

import ml_dtypes
import numpy as np

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  same,
)


def test_fill():
  net = {'h/0/w': array(2, 3), 'h/1/w': array(2, 3), 'b': np.ones(2, 'int32')}
  same(
    {**net, 'b': np.full(2, 7, 'int32')},
    applied(net, {'fill': {'rules': 'b', 'value': 7}}),
  )
  step: Any = {'rules': 'h/<i>/w -> h/<i>/gate', 'shape': [3], 'dtype': 'bf16'}
  after = applied(net, {'fill': step})
  gate = np.zeros(3, ml_dtypes.bfloat16)
  assert ['h/0/w', 'h/0/gate', 'h/1/w', 'h/1/gate', 'b'] == list(after)
  same({'h/0/gate': gate}, {'h/0/gate': after['h/0/gate']})
  step = {'rules': '-> new/x', 'value': 2.5, 'shape': [2], 'dtype': 'float64'}
  after = applied(net, {'fill': step})
  same({**net, 'new/x': np.full(2, 2.5)}, after)


def test_random_is_by_seed_and_path_alone():
  one = applied({'x': array(4, 5)}, {'random': {'rules': 'x', 'seed': 3}})
  net = {'a': array(2), 'x': array(4, 5), 'z': array(7)}
  more = applied(net, {'random': {'rules': ['z', 'x'], 'seed': 3}})
  same(one, {'x': more['x']})
  assert not np.array_equal(more['x'].reshape(-1)[:7], more['z'])
  other = applied({'x': array(4, 5)}, {'random': {'rules': 'x', 'seed': 4}})
  assert not np.array_equal(one['x'], other['x'])


def test_random_numbers_have_their_distribution():
  net = {'x': np.zeros((40, 50), 'float32')}
  step = {'rules': 'x', 'scale': 0.5, 'mean': 2}
  found = applied(net, {'random': step})['x']
  assert abs(found.mean() - 2) < 0.05 and abs(found.std() - 0.5) < 0.03
  step |= {'distribution': 'uniform'}
  found = applied(net, {'random': step})['x']
  assert 1.5 <= found.min() < 1.55 and 2.45 < found.max() <= 2.5
