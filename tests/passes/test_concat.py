"""Concat, split, stack and unstack against plain numpy; live, in files, in blocks."""

from typing import Any

import numpy as np
import pytest

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  by_name,
  same,
)


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_concat_and_split(axis):
  net = {'h/0/q': array(4, 4), 'h/0/k': array(4, 4, seed=1), 'z': array(1)}
  rule = 'h/<i>/{q,k} -> h/<i>/qk'
  after = applied(net, {'concat': {'rules': rule, 'axis': axis}})
  joined = np.concatenate([net['h/0/q'], net['h/0/k']], axis)
  same({'h/0/qk': joined, 'z': net['z']}, after)
  rule = 'h/<i>/qk -> h/<i>/{q,k}'
  again = applied(after, {'split': {'rules': rule, 'axis': axis}})
  same(by_name(net), by_name(again))


def test_split_into_sizes():
  net = {'x': array(6, 2)}
  step: Any = {'rules': 'x -> {a,b,c}', 'sizes': [1, 3, 2]}
  a, b, c = np.split(net['x'], [1, 4])
  same({'a': a, 'b': b, 'c': c}, applied(net, {'split': step}))
  step = {'rules': 'x -> x<i>', 'sizes': [1, 3, 2], 'keep': True}
  same(
    {'x': net['x'], 'x0': a, 'x1': b, 'x2': c}, applied(net, {'split': step})
  )


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_stack_and_unstack(axis):
  net = {f'h/{i}/x': array(2, 3, seed=i) for i in range(12)}
  after = applied(net, {'stack': {'rules': 'h/<i>/* -> h/*', 'axis': axis}})
  stacked = np.stack(list(net.values()), axis)
  same({'h/x': stacked}, after)
  step = {'rules': 'h/* -> h/<i>/*', 'axis': axis}
  again = applied(after, {'unstack': step})
  same(net, {k: again[k] for k in net})


def test_stack_by_name():
  net = {'a/w': array(2), 'b/w': array(2, seed=1), 's': array()}
  after = applied(net, {'stack': '{b,a}/w -> w'})
  expected = {'s': net['s'], 'w': np.stack([net['b/w'], net['a/w']])}
  same(expected, after)


def test_scalars_are_stacked_too():
  net = {'a/w': array(), 'b/w': array(seed=1)}
  after = applied(net, {'stack': '{a,b}/w -> w'})
  same({'w': np.stack(list(net.values()))}, after)
  same(net, applied(after, {'unstack': 'w -> {a,b}/w'}))
