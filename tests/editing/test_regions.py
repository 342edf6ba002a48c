"""What is read of a tensor's sources, and how often."""

import math
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import surgery
from surgery.editing import regions
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.passes import arithmetic
from surgery.recipes import planning
from tests.recipes.models import SmallBlocks, blocks, saved, values

HELD = 400  # Bytes, for 16-byte rows and blocks of 5 elements.


class Counted:
  """A tensor in blocks that counts the elements that are asked for."""

  def __init__(self, value):
    self.value = value
    self.asked = 0

  def leaf(self):
    value = self.value
    return Leaf(self.load, value.shape, value.dtype.name, part=self.part)

  def load(self):
    self.asked += self.value.size
    return self.value

  def part(self, index):
    self.asked += self.value[index].size
    return self.value[index]


def done(counted, *steps):
  leaves: dict[Any, Leaf] = {
    (f'w{k}',): one.leaf() for k, one in enumerate(counted)
  }
  return surgery.Recipe(steps).apply(Checkpoint(leaves, origin='counted'))


def array(*shape):
  return np.arange(math.prod(shape), dtype='float32').reshape(shape)


@pytest.mark.parametrize('order', [[2, 0, 1], [1, 2, 0], [2, 1, 0], [1, 0, 2]])
@pytest.mark.parametrize('shape', [(4, 5, 6), (30, 5, 7), (3, 50, 4)])
def test_a_transposed_tensor_is_read_once_for_what_can_be_held(shape, order):
  one = Counted(array(*shape))
  with SmallBlocks(5), mock.patch.object(regions, '_HELD', HELD):
    after = done([one], {'transpose': {'select': 'w0', 'axes': order}})
    found = blocks(after)['w0']
  np.testing.assert_array_equal(one.value.transpose(order), found)
  plane = max(math.prod(found.shape[k:]) for k in (1, 2))
  boxes = -(-one.value.size // (HELD // 4))
  # A box ends where an axis does.
  assert one.asked <= one.value.size * (boxes + found.shape[0] + plane // 100)


def test_what_is_turned_after_it_was_computed_is_computed_once():
  one = Counted(array(40, 50))
  seen = []
  compute = arithmetic.elementwise

  def watched(values_, *rest):
    seen.append(values_[0].size)
    return compute(values_, *rest)

  with (
    SmallBlocks(7),
    mock.patch.object(regions, '_HELD', HELD),
    mock.patch.object(arithmetic, 'elementwise', watched),
  ):
    steps = [{'scale': {'select': 'w0', 'by': 2}}, {'transpose': 'w0'}]
    found = blocks(done([one], *steps))['w0']
  np.testing.assert_array_equal(2 * one.value.T, found)
  assert one.value.size == sum(seen)


STEPS = [
  {'transpose': 'w0'},
  {'transpose': 'w1'},
  {'slice': {'select': 'w0', 'keep': [5, 0, 3, 3]}},
  {'slice': {'select': 'w0', 'axis': -1, 'keep': [4, 1, 1, 0]}},
  {'permute': {'select': 'w1', 'order': [3, 1, 2, 0]}},
  {'stack': {'rules': 'w<i> -> w', 'axis': 1}},
  {'stack': 'w<i> -> w'},
  {'concat': {'rules': 'w<i> -> w', 'axis': -1}},
  {'add': 'w0 -> w1'},
  {'scale': {'select': 'w*', 'by': 3}},
  {'reshape': {'select': 'w*', 'shape': [-1]}},
  {'pad': {'select': 'w*', 'axis': -1, 'after': 2}},
  {'transpose': 'w'},
  {'slice': {'select': 'w', 'keep': [1, 0]}},
]


@hypothesis.settings(deadline=None, max_examples=80)
@hypothesis.given(
  st.lists(st.sampled_from(STEPS), min_size=1, max_size=5),
  st.integers(1, 9),
  st.integers(4, 200),
)
def test_boxes_do_not_change_what_is_computed(steps, elements, held):
  arrays = [array(6, 6), array(6, 6) + 100]
  try:
    with SmallBlocks(1 << 20):
      expected = values(done([Counted(a) for a in arrays], *steps))
  except surgery.SurgeryError:
    hypothesis.assume(False)
  with SmallBlocks(elements), mock.patch.object(regions, '_HELD', held):
    after = done([Counted(a) for a in arrays], *steps)
    found, whole = blocks(after), values(after)
  for path, value in expected.items():
    np.testing.assert_array_equal(value, found[path], path)
    np.testing.assert_array_equal(value, whole[path], path)


def test_a_file_is_read_in_blocks_where_a_region_has_no_whole_rows(tmp_path):
  file = saved({'w': array(30, 50)}, tmp_path)
  leaf = surgery.open(file)['w',]
  with SmallBlocks(64):
    reader = regions.Reader(leaf)
    found = reader((slice(3, 20), slice(7, 9)))
    np.testing.assert_array_equal(array(30, 50)[3:20, 7:9], found)
    # No view of the file, all of which would stay in memory with it.
    assert found.base is None
    places = np.asarray([40, 2, 2, 49])
    found = reader.take((slice(0, 30), slice(0, 4)), 1, places)
    np.testing.assert_array_equal(array(30, 50)[:, places], found)


def test_the_plan_knows_what_turning_takes(tmp_path):
  size = (3000, 4000)
  leaf = Leaf(lambda: None, size, 'float32', part=lambda index: None)
  ckpt = Checkpoint({('w0',): leaf, ('w1',): leaf}, origin='x')
  turned = surgery.apply(ckpt, {'transpose': 'w*'})
  nbytes = 4 * math.prod(size)
  assert nbytes <= planning.memory(turned['w0',]) <= 3 * nbytes
  both = surgery.apply(turned, {'stack': 'w<i> -> w'})
  assert regions._HELD <= planning.needed(both) <= 10 * regions._HELD
