"""Blocks of arrays, and what a leaf forgets when it changes."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from surgery.model.checkpoint import (
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
  grid,
)

shapes = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@given(shapes, st.integers(1, 60))
def test_blocks_in_order_are_the_array(shape, most):
  array = np.arange(math.prod(shape)).reshape(shape)
  cells = [array[index] for index in grid(shape, most)]
  joined = np.concatenate([cell.reshape(-1) for cell in cells])
  assert array.reshape(-1).tolist() == joined.tolist()


@given(shapes, st.integers(1, 60))
def test_no_block_is_larger_than_asked_for(shape, most):
  array = np.empty(shape)
  assert all(array[index].size <= most for index in grid(shape, most))


@given(shapes, st.integers(1, 60))
def test_blocks_of_one_array_have_few_sizes(shape, most):
  # Each size is compiled anew.
  array = np.empty(shape)
  assert len({array[index].shape for index in grid(shape, most)}) <= 2


def test_what_is_small_is_one_block():
  assert [()] == list(grid((BLOCK,)))
  assert [()] == list(grid(()))
  assert [()] == list(grid((0, 5)))


def test_a_large_array_has_rows_in_blocks():
  half = BLOCK // 2
  expected = [(slice(0, 2),), (slice(2, 3),)]
  assert expected == list(grid((3, half)))


def test_rows_that_are_large_themselves_are_cut():
  expected = [
    (slice(0, 1), slice(0, BLOCK)),
    (slice(0, 1), slice(BLOCK, BLOCK + 1)),
    (slice(1, 2), slice(0, BLOCK)),
    (slice(1, 2), slice(BLOCK, BLOCK + 1)),
  ]
  assert expected == list(grid((2, BLOCK + 1)))


def test_another_value_forgets_what_held_for_the_old_one():
  old = Leaf(
    lambda: 1, (), 'int32', digest='d', source='s', part=lambda index: 1
  )
  new = old.replace(load=lambda: 2)
  assert (None, None, None) == (new.digest, new.source, new.part)


def test_another_flag_forgets_nothing():
  part = lambda index: 1
  old = Leaf(lambda: 1, (), 'int32', digest='d', source='s', part=part)
  new = old.replace(trainable=False)
  assert ('d', 's', part) == (new.digest, new.source, new.part)


def test_a_leaf_without_parts_comes_in_one():
  value = np.ones((2, BLOCK))
  (found,) = Leaf(lambda: value, value.shape, 'float64').parts()
  assert value is found


def test_a_leaf_comes_in_the_blocks_of_the_grid():
  value = np.arange(2 * BLOCK + 2).reshape(2, -1)
  leaf = Leaf(
    lambda: value, value.shape, 'int64', part=lambda index: value[index]
  )
  assert [(1, BLOCK), (1, 1)] * 2 == [part.shape for part in leaf.parts()]
