"""The blocks in which tensors are computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

Index = tuple[slice, ...]


# A tensor is computed in blocks of at most that many elements. Live params and
# files have the same blocks, so that they have the same bits.
BLOCK = 1 << 20


def grid(shape: tuple[int, ...], most: int = BLOCK) -> Iterator[Index]:
  """Returns the blocks of an array, in C order; they are contiguous.

  Args:
    shape: shape of the array.
    most: largest number of elements of a block.

  Returns:
    For each block slices of its leading axes, whose bounds are numbers; the
    empty tuple, which is the whole, if the array is one block.
  """
  if math.prod(shape) <= most:
    yield ()
    return
  # Axes in front of the one that is cut are taken one by one.
  axis = next(k for k in range(len(shape)) if math.prod(shape[k + 1 :]) <= most)
  rows = max(1, most // max(1, math.prod(shape[axis + 1 :])))
  for front in itertools.product(*map(range, shape[:axis])):
    before = tuple(slice(i, i + 1) for i in front)
    for start in range(0, shape[axis], rows):
      yield (*before, slice(start, min(start + rows, shape[axis])))
