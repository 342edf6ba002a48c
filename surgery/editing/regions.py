"""Tensors that are computed from regions of others, block by block.

A tensor that is cut, joined, permuted or added up is never held as a whole: a
writer reads a block of it, which reads the regions of other tensors that it is
made of.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import arrays
from surgery.model import quantised
from surgery.model.checkpoint import (
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
  Index,
  grid,
)
from surgery.model.sizes import (
  itemsize,
)
from surgery.naming import paths
from surgery.naming.paths import Path

Shape = tuple[int, ...]

# For each axis a slice whose bounds are numbers.
Region = tuple[slice, ...]

# A computed tensor that is not read in rows is held as a whole up to that many
# bytes, until its last element has been read. One whose blocks are made of
# elements that lie far apart is computed that many bytes at a time.
_HELD = 64_000_000


def whole(shape: Shape) -> Region:
  """Returns the region that is all of an array."""
  return tuple(slice(0, n) for n in shape)


def sizes(region: Region) -> Shape:
  """Returns the shape of a region."""
  return tuple(s.stop - s.start for s in region)


def full(index: Index, shape: Shape) -> Region:
  """Returns a block of `grid(shape)` as a region."""
  return (*index, *whole(shape)[len(index) :])


def dtype_of(name: str) -> np.dtype[Any]:
  """Returns a dtype by its full name."""
  return np.dtype(arrays.DTYPES[name])


def of_jax(*values: Any) -> bool:
  """Whether one of some arrays is JAX's, without importing it."""
  jax = sys.modules.get('jax')
  return jax is not None and any(isinstance(v, jax.Array) for v in values)


def namespace(*values: Any) -> Any:
  """Returns `jax.numpy` if one of some arrays is JAX's, otherwise numpy.

  Results from files are numpy's where JAX would move them to an accelerator.
  """
  if of_jax(*values):
    import jax.numpy

    from surgery.editing import devices

    host = all(map(devices.is_of_host, values))
    return np if host and not devices.is_usual() else jax.numpy
  return np


def array(leaf: Leaf, path: Path, verb: str) -> Shape:
  """Returns the shape of a tensor.

  Args:
    leaf: the tensor.
    path: its path, for messages.
    verb: the pass, for messages.

  Raises:
    SurgeryError: if it is not an array of numbers.
  """
  if leaf.shape is None or leaf.dtype is None or leaf.key is not None:
    kind = 'a PRNG key' if leaf.key is not None else 'a value without a shape'
    raise errors.SurgeryError(
      f'{verb}: {paths.show(path)}: expected an array, found {kind}. Select '
      'arrays only.'
    )
  return leaf.shape


class Reader:
  """Reads regions of a tensor, which may be computed itself.

  Args:
    leaf: the tensor.
  """

  def __init__(self, leaf: Leaf) -> None:
    assert leaf.shape is not None
    self.leaf = leaf
    self.shape: Shape = leaf.shape
    self._last: tuple[Index, Any] | None = None
    self._held: Any = None

  @property
  def direct(self) -> bool:
    """Whether the tensor's values exist already: in memory, or mapped."""
    leaf = self.leaf
    if leaf.part is None:
      return True
    spans = getattr(leaf.source, 'spans', ())
    return self._is_stored and len(spans) == 1

  @property
  def _is_stored(self) -> bool:
    """Whether the tensor is stored in a file, and not computed."""
    return self.leaf.part is not None and self.leaf.load is self.leaf.source

  def __call__(self, region: Region) -> Any:
    """Returns a region."""
    if self._is_stored and not self._is_rows(region):
      # A view of the whole would keep all pages of the file in memory.
      return self._gathered(region)
    if self.direct or math.prod(self.shape) == 0:
      return self.leaf.load()[region]
    if self.leaf.region is not None:
      # The region goes through to what the tensor is computed from.
      return self.leaf.region(region)
    return self._assembled(region)

  def take(self, region: Region, axis: int, places: np.ndarray) -> Any:
    """Returns some places along one axis, and a region along the others."""
    if not len(places):
      cut = (*region[:axis], slice(0, 0), *region[axis + 1 :])
      return self(cut)
    low, high = int(places.min()), int(places.max()) + 1
    cut = (*region[:axis], slice(low, high), *region[axis + 1 :])
    follow = high - low == len(places) and bool(np.all(np.diff(places) == 1))
    if self._is_stored and not follow:
      return self._gathered(cut, axis, places)
    # Few places far apart are read one run at a time; reading all between them
    # and dropping most is quicker where they are dense.
    if self.leaf.region is not None and high - low > 4 * len(places):
      return self._runs(region, axis, places)
    found = self(cut)
    if follow:
      return found
    return namespace(found).take(found, places - low, axis=axis)

  def _runs(self, region: Region, axis: int, places: np.ndarray) -> Any:
    """Returns places along an axis, reading each run of neighbours at once."""
    ends = np.flatnonzero(np.diff(places) != 1) + 1
    pieces = []
    for run in np.split(places, ends):
      cut = slice(int(run[0]), int(run[-1]) + 1)
      pieces.append(self((*region[:axis], cut, *region[axis + 1 :])))
    return namespace(*pieces).concatenate(pieces, axis=axis)

  def flat(self, start: int, stop: int) -> Any:
    """Returns elements of the tensor in C order, `(stop - start,)`."""
    if self.direct or math.prod(self.shape) == 0:
      return self.leaf.load().reshape(-1)[start:stop]
    pieces, at = [], 0
    for index in grid(self.shape):
      count = math.prod(sizes(full(index, self.shape)))
      low, high = max(start - at, 0), min(stop - at, count)
      if low < high:
        pieces.append(self._block(index).reshape(-1)[low:high])
      at += count
    if len(pieces) == 1:
      return pieces[0]
    if not pieces:
      return self.leaf.load().reshape(-1)[:0]
    return namespace(*pieces).concatenate(pieces)

  def _is_rows(self, region: Region) -> bool:
    """Whether elements of a region are one behind the other, in C order."""
    counts = sizes(region)
    # In front of the axis that is cut there is one element each, behind it all
    # of them: then the region is one range of memory.
    cut = next((k for k, n in enumerate(counts) if n != 1), len(counts))
    return counts[cut + 1 :] == self.shape[cut + 1 :]

  def _block(self, index: Index) -> Any:
    if self._last is None or self._last[0] != index:
      assert self.leaf.part is not None
      # The last block is kept, since regions that follow often lie in it.
      self._last = (index, self.leaf.part(index))
    return self._last[1]

  def _assembled(self, region: Region) -> Any:
    """Returns a region of a tensor that is computed in blocks."""
    if not self._is_rows(region) and self.leaf.nbytes <= _HELD:
      # Otherwise each of its blocks would be computed again for each region.
      held = self.leaf.load() if self._held is None else self._held
      last = all(s.stop == n for s, n in zip(region, self.shape, strict=True))
      self._held = None if last else held
      return held[region].copy()
    return self._gathered(region)

  def _gathered(
    self,
    region: Region,
    axis: int | None = None,
    places: np.ndarray | None = None,
  ) -> Any:
    """Returns a region, put together from blocks, one of which is held.

    Args:
      region: the region.
      axis: an axis of which only some places are wanted.
      places: these, in any order, all of them in the region.
    """
    assert self.leaf.dtype is not None
    counts = list(sizes(region))
    if axis is not None and places is not None:
      counts[axis] = len(places)
    result = np.empty(counts, dtype_of(self.leaf.dtype))
    for index in grid(self.shape):
      block = full(index, self.shape)
      met = _met(region, block)
      if not math.prod(sizes(met)):
        continue  # The block and the region have nothing in common.
      # Where the common part lies in the result, and where in the block.
      to, of = _shifted(met, region), _shifted(met, block)
      if axis is None or places is None:
        result[to] = self._block(index)[of]
        continue
      here = np.flatnonzero(
        (places >= met[axis].start) & (places < met[axis].stop)
      )
      if len(here):
        # Along that axis places are picked from the block by number, and go to
        # their own places in the result, whatever their order is.
        inner = places[here] - block[axis].start
        front, behind = slice(None, axis), slice(axis + 1, None)
        target: Any = (*to[front], here, *to[behind])
        result[target] = self._block(index)[(*of[front], inner, *of[behind])]
    return result


def _met(a: Region, b: Region) -> Region:
  """Returns the common part of two regions; axes may be of size zero."""
  starts = [max(x.start, y.start) for x, y in zip(a, b, strict=True)]
  stops = [min(x.stop, y.stop) for x, y in zip(a, b, strict=True)]
  return tuple(
    slice(low, max(low, high)) for low, high in zip(starts, stops, strict=True)
  )


def _shifted(region: Region, origin: Region) -> Region:
  """Returns a region as counted from the start of another one."""
  return tuple(
    slice(r.start - o.start, r.stop - o.start)
    for r, o in zip(region, origin, strict=True)
  )


def blocks(leaf: Leaf) -> Iterator[tuple[Region, np.ndarray]]:
  """Yields the blocks of a tensor, each with its region."""
  assert leaf.shape is not None
  reader = Reader(leaf)
  for index in grid(leaf.shape):
    cell = full(index, leaf.shape)
    yield cell, np.asarray(reader(cell))


def same_bytes(a: Leaf, b: Leaf) -> bool:
  """Whether two tensors of one shape and dtype have the same bytes."""
  pairs = zip(blocks(a), blocks(b), strict=True)
  return all(x.tobytes() == y.tobytes() for (_, x), (_, y) in pairs)


def computed(
  like: Leaf,
  shape: Shape,
  block: Callable[[Region], Any],
  sources: Sequence[Leaf],
  dtype: str | None = None,
  cut: bool = False,
  anywhere: bool = True,
  scattered: bool = False,
) -> Leaf:
  """Returns a tensor that is computed lazily.

  Args:
    like: the leaf whose flags and metadata it gets.
    shape: its shape.
    block: returns a region of it, one of the blocks of `grid(shape)`, or all.
    sources: what it is computed from; if these are in memory it is not cut into
      blocks.
    dtype: name of its dtype; that of `like` by default.
    cut: whether it is cut into blocks even then, because bits depend on that.
    anywhere: whether `block` returns any region, not only blocks.
    scattered: whether a block is made of elements that lie far apart in the
      sources.

  Raises:
    QuantisedError: if a source holds codes of a quantised weight.
  """
  for leaf in sources:
    quantised.refuse(leaf)
  held = not cut and _in_memory(sources)
  kind = dtype or like.dtype
  assert kind is not None
  # Scattered once, scattered for all that is computed from it: only the last
  # tensor of a chain collects its blocks in boxes.
  scattered = scattered or any(leaf.scattered for leaf in sources)
  region = block if anywhere and not cut and not held else None
  boxes = None
  if region is not None and scattered:
    boxes = _Boxes(block, shape, itemsize(kind))

  def part(index: Index) -> Any:
    return block(full(index, shape)) if boxes is None else boxes.part(index)

  def load() -> Any:
    blocks = list(grid(shape))
    if held or len(blocks) == 1:
      return block(whole(shape))
    result = np.empty(shape, dtype_of(kind))
    for index in blocks:
      result[index] = part(index)
    return result

  return like.replace(
    load=load,
    part=None if held else part,
    region=region,
    scattered=boxes is not None,
    memory=_memory(shape, kind, sources, boxes),
    shape=shape,
    dtype=kind,
    scalar=False,
  )


def _in_memory(sources: Sequence[Leaf]) -> bool:
  """Whether there are sources, and all of them are whole in memory."""
  return bool(sources) and all(
    leaf.part is None and leaf.source is None for leaf in sources
  )


def _memory(
  shape: Shape, dtype: str, sources: Sequence[Leaf], boxes: _Boxes | None
) -> int | None:
  """Returns the bytes that computing takes, if not those of its blocks."""
  inner = max((leaf.memory or 0 for leaf in sources), default=0)
  if not inner and boxes is None:
    return None
  own = 4 * min(math.prod(shape), BLOCK) * max(4, itemsize(dtype))
  if boxes is not None:
    # A box of the result, and the parts of the sources that it is made of: at
    # most as much of each source as of the result.
    size = max(1, math.prod(shape) * itemsize(dtype))
    share = -(-sum(leaf.nbytes for leaf in sources) // size)
    own += boxes.nbytes * (1 + min(len(sources), share))
  return inner + own


class _Boxes:
  """Blocks that are computed many at a time, and returned one by one.

  A block of a transposed matrix takes a few elements of each row. Computed
  alone it would read each row of the file, and so would the next. So as many
  blocks as `_HELD` allows are computed together, from longer pieces of rows.

  Args:
    block: returns any region.
    shape: shape of the tensor.
    size: bytes an element.
  """

  def __init__(
    self, block: Callable[[Region], Any], shape: Shape, size: int
  ) -> None:
    self._block = block
    self._shape = shape
    first = full(next(iter(grid(shape))), shape)
    self._most = max(math.prod(sizes(first)), _HELD // size)
    self.nbytes = min(math.prod(shape), self._most) * size
    self._held: tuple[Region, Any] | None = None

  def _box(self, region: Region) -> Region:
    """Returns the region that is computed for one of the grid's blocks."""
    shape, most = self._shape, self._most
    if math.prod(shape) <= most:
      return whole(shape)
    # The outermost axis along which several places fit into a box.
    axis = next(
      k for k in range(len(shape)) if math.prod(shape[k + 1 :]) <= most
    )
    inner = math.prod(shape[axis + 1 :])
    # Boxes end where blocks end, so that each block lies in one box.
    first = next(iter(grid(shape)))
    rows = 1
    if len(first) == axis + 1:
      rows = first[axis].stop - first[axis].start
    step = max(rows, most // max(1, inner) // rows * rows)
    start = region[axis].start // step * step
    cut = slice(start, min(start + step, shape[axis]))
    return (*region[:axis], cut, *whole(shape)[axis + 1 :])

  def part(self, index: Index) -> Any:
    """Returns a block; see `Leaf.part`."""
    region = full(index, self._shape)
    box = self._box(region)
    held = self._held
    if held is None or held[0] != box:
      # The old box is released before the new one is computed, or there would
      # be two in memory.
      self._held = held = None
      held = self._held = (box, self._block(box))
    inner = _shifted(region, box)
    # Blocks come in order, so that the one at the box's end is its last.
    last = all(r.stop == b.stop for r, b in zip(region, box, strict=True))
    if last:
      self._held = None
    return held[1][inner]


def start_of(region: Region, shape: Shape) -> int:
  """Returns the number of elements before a block of `grid(shape)`."""
  at = 0
  for cut, size in zip(region, shape, strict=True):
    at = at * size + cut.start
  return at


def axis_of(axis: int, shape: Shape, path: Path) -> int:
  """Returns an axis counted from the front.

  Raises:
    SurgeryError: if there is none.
  """
  if not -len(shape) <= axis < len(shape):
    raise errors.SurgeryError(
      f'{paths.show(path)}: has no axis {axis}, its shape is '
      f'{shape}. Give an axis from {-len(shape)} to {len(shape) - 1}.'
    )
  return axis % len(shape)
