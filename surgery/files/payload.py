"""The bytes of tensors on their way into a file, the same for all formats.

A tensor that a file holds already is copied unread. Any other is computed in
blocks, each of which is hashed, written and dropped while the next is computed.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from surgery import errors
from surgery.files import arrays, checking
from surgery.files.digest import Digester
from surgery.files.output import Output
from surgery.files.source import Source
from surgery.model import sizes
from surgery.model.checkpoint import (
  Leaf,
)
from surgery.model.grid import (
  Index,
  grid,
)
from surgery.naming import paths
from surgery.naming.paths import Path

_T = TypeVar('_T')


class Payload:
  """The bytes of one tensor, written from first to last.

  Attributes:
    shape: the tensor's shape.
    dtype: name of its dtype.
    scalar: whether it is a numpy scalar.
    nbytes: number of its bytes.
  """

  def __init__(
    self, shape: tuple[int, ...], dtype: str, scalar: bool = False
  ) -> None:
    self.shape = shape
    self.dtype = dtype
    self.scalar = scalar
    self.nbytes = sizes.nbytes(dtype, math.prod(shape))

  def write(self, output: Output, count: int) -> None:
    """Writes the next `count` bytes."""
    raise NotImplementedError

  def digest(self, known: str | None) -> str | None:
    """Returns the digest of the bytes, after all have been written.

    Args:
      known: the digest that is on record.
    """
    raise NotImplementedError


class Copied(Payload):
  """A tensor that lies in a file; its bytes are never read."""

  def __init__(self, source: Source, scalar: bool) -> None:
    super().__init__(source.shape, source.dtype, scalar)
    self._source = source
    self._at = 0

  def write(self, output: Output, count: int) -> None:
    """Copies the next `count` bytes."""
    stop = self._at + count
    for begin, end in self._source.ranges(self._at, stop):
      output.copy(self._source.file, begin, end)
    self._at = stop

  def digest(self, known: str | None) -> str | None:
    """Returns the digest on record: what was not read is not hashed."""
    return known


class Computed(Payload):
  """A tensor that is in memory, or computed block by block.

  Args:
    shape: the tensor's shape.
    dtype: name of its dtype.
    blocks: what `arrays.little` returned for its blocks, in C order.
    scalar: whether it is a numpy scalar.
    mark: what `checking.mark` returned before anything was read for it.
  """

  def __init__(
    self,
    shape: tuple[int, ...],
    dtype: str,
    blocks: Iterable[np.ndarray],
    scalar: bool = False,
    mark: int | None = None,
  ) -> None:
    super().__init__(shape, dtype, scalar)
    self._mark = mark
    self._blocks = iter(blocks)
    self._block = memoryview(b'')
    self._digester = Digester()

  def write(self, output: Output, count: int) -> None:
    """Computes, hashes and writes the next `count` bytes."""
    while count:
      if not self._block:
        self._block = arrays.payload(next(self._blocks))
      now, self._block = self._block[:count], self._block[count:]
      count -= len(now)
      for piece in arrays.blocks(now):
        self._digester.update(piece)
        output.write(piece)

  def digest(self, known: str | None) -> str | None:
    """Returns the digest of what was written.

    Raises:
      FormatError: if it was computed from a tensor that does not match its own
        digest.
    """
    del known
    if self._mark is not None:
      checking.settle(self._mark)
    return self._digester.digest()


def source(leaf: Leaf) -> Source | None:
  """Returns where the leaf's bytes can be copied from unread, if anywhere."""
  found = leaf.source
  if (
    isinstance(found, Source)
    and leaf.load is found  # Else a pass computes something from it.
    and (leaf.shape, leaf.dtype) == (found.shape, found.dtype)
  ):
    return found
  return None


def of(leaf: Leaf, path: Path) -> Payload | Any:
  """Returns the bytes of a leaf, or its value if it is not an array.

  Args:
    leaf: the leaf; what it computes is computed when bytes are written.
    path: its path, for messages.

  Raises:
    FormatError: if a file cannot hold it, or it is not as it declares.
  """
  # From here on this leaf may begin to read other tensors; when it has been
  # written, their digests are checked to the end.
  mark = checking.mark()
  found = source(leaf)
  if found is not None:
    return Copied(found, leaf.scalar)
  if leaf.part is not None and leaf.shape is not None and leaf.dtype:
    cells = list(grid(leaf.shape))
    if len(cells) > 1 and not leaf.scalar:
      blocks = _ahead(_checked(leaf, index, path) for index in cells)
      return Computed(leaf.shape, leaf.dtype, blocks, mark=mark)
  return _whole(leaf, path, mark)


def _whole(leaf: Leaf, path: Path, mark: int) -> Payload | Any:
  """Returns the bytes of a leaf that is loaded in one piece."""
  value = leaf.load()
  try:
    if not (hasattr(value, 'shape') and hasattr(value, 'dtype')):
      _check(leaf, value)
      return value
    scalar = leaf.scalar
    if leaf.shape is None:
      scalar = isinstance(value, np.generic)
    array = arrays.little(value)
    _check(leaf, value)
  except errors.FormatError as error:
    raise errors.FormatError(f'{paths.show(path)}: {error}') from None
  return Computed(array.shape, array.dtype.name, (array,), scalar, mark)


def _checked(leaf: Leaf, index: Index, path: Path) -> np.ndarray:
  """Returns a block of a leaf as a file holds it."""
  assert leaf.part is not None and leaf.shape is not None
  value = leaf.part(index)
  try:
    array = arrays.little(value)
    _check(leaf, value, index)
  except errors.FormatError as error:
    raise errors.FormatError(f'{paths.show(path)}: {error}') from None
  return array


def _check(leaf: Leaf, value: Any, index: Index = ()) -> None:
  """Raises unless a value is as its leaf declares; headers are made of that."""
  wrong = leaf.mismatch(value, index)
  if wrong is None and leaf.scalar and leaf.shape:
    wrong = f'expected a numpy scalar, found {leaf}.'
  if wrong is not None:
    raise errors.FormatError(wrong)


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
  """Yields items, while a thread computes the next one."""
  # One ahead, not more: blocks are large, and the caller holds one of them.
  end: Any = object()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
      coming = pool.submit(next, items, end)
      yield item
