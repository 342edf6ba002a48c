"""Each step of structure against plain numpy; live, in files, in blocks."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import surgery
from tests.passes.structure import NET, array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  HOST,
  applied,
  blocks,
  held,
  same,
  saved,
)


@pytest.mark.parametrize(
  'step',
  [
    {'slice': {'select': 'w', 'keep': [0, 2], 'axis': 1}},
    {'transpose': 'w'},
    {'reshape': {'select': 'w', 'shape': [-1]}},
    {'concat': {'rules': '{w,v} -> x', 'axis': 1}},
    {'stack': '{w,v} -> x'},
    {'pad': {'select': 'w', 'after': 1}},
    {'permute': {'select': 'w', 'order': [3, 2, 1, 0]}},
  ],
  ids=lambda step: next(iter(step)),
)
@pytest.mark.parametrize(
  'dtype', ['bool', 'int4', 'uint8', 'bfloat16', 'float8_e4m3fn', 'complex64']
)
def test_any_dtype_is_moved_about(step, dtype):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  net = {k: np.arange(12).reshape(4, 3).astype(dtype) for k in 'wv'}
  assert {dtype} == {v.dtype for v in applied(net, step).values()}


def test_steps_compose_lazily():
  net = {'q': array(6, 4), 'k': array(6, 4, seed=1)}
  steps = [
    {'concat': {'rules': '{q,k} -> qk', 'axis': 1}},
    {'transpose': 'qk'},
    {'scale': {'select': 'qk', 'by': 2}},
    {'slice': {'select': 'qk', 'keep': '2:6'}},
    {'reshape': {'select': 'qk', 'shape': [2, 2, 6]}},
    {'cast': 'bf16'},
  ]
  joined = np.concatenate([net['q'], net['k']], 1).T * np.float32(2)
  expected = joined[2:6].reshape(2, 2, 6).astype(ml_dtypes.bfloat16)
  same({'qk': expected}, applied(net, *steps))


def test_nothing_is_read_while_it_is_planned():
  def fail():
    raise AssertionError('read')

  net = held(NET)
  lazy = net.replace(
    leaves={p: leaf.replace(load=fail) for p, leaf in net.items()}
  )
  steps: list[Any] = [
    {'slice': {'select': '**/a', 'keep': '0:2'}},
    {'factorise': {'rules': '**/a -> **/{u,v}', 'rank': 1}},
    {'stack': 'h/<i>/* -> h/*'},
    {'assert': {'finite': '**'}},
  ]
  after = surgery.Recipe(steps).apply(lazy)
  assert ['h/b', 'h/u', 'h/v', 'out'] == ['/'.join(p) for p in after]
  with pytest.raises(AssertionError, match='read'):
    after.check()


def test_blocks_are_as_planned():
  after = surgery.Recipe([{'transpose': 'out'}]).apply(held(NET))
  same({**NET, 'out': NET['out'].T}, blocks(after))


def test_flags_and_metadata_stay():
  net = held(NET)
  leaf = net['out',].replace(trainable=False, metadata={'tag': 'x'})
  net = net.replace(leaves={**net, ('out',): leaf})
  steps = [{'transpose': 'out'}, {'copy': 'out -> more'}]
  after = surgery.Recipe(steps).apply(net, host=HOST)
  for path in (('out',), ('more',)):
    assert (False, {'tag': 'x'}) == (
      after[path].trainable,
      dict(after[path].metadata),
    )


@pytest.mark.parametrize(
  'step',
  [
    {'transpose': 'x'},
    {'slice': {'select': 'x', 'axis': 1, 'keep': '5:15'}},
    {'permute': {'select': 'x', 'order': [1, 0], 'of': 2}},
    {'reshape': {'select': 'x', 'shape': [-1]}},
    {'pad': {'select': 'x', 'axis': 1, 'before': 3}},
  ],
  ids=lambda step: next(iter(step)),
)
def test_what_is_computed_is_computed_once(tmp_path, step):
  """Or twice, where blocks of the result begin within others."""
  file = saved({'x': array(40, 30)}, tmp_path)
  scaled = surgery.Recipe([{'scale': {'select': 'x', 'by': 2}}]).apply(
    surgery.open(file)
  )
  [leaf] = scaled.values()
  computed = 0

  def part(index):
    nonlocal computed
    block = leaf.part(index)
    computed += block.size
    return block

  def load():
    nonlocal computed
    computed += leaf.size
    return leaf.load()

  counted = leaf.replace(load=load, part=part)
  after = surgery.Recipe([step]).apply(scaled.replace(leaves={('x',): counted}))
  expected = applied({'x': 2 * array(40, 30)}, step)
  same(expected, blocks(after))
  assert computed <= 2 * leaf.size
