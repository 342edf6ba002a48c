"""Files that are read through memory, and tensors that lie in them."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import stat
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import arrays, system
from surgery.files.checking import Checked
from surgery.model.checkpoint import (
  Leaf,
)
from surgery.model.grid import (
  Index,
)
from surgery.model.sizes import (
  PACKED,
)
from surgery.naming import paths
from surgery.naming.paths import Path

Span = tuple[int, int]

# Pages of a tensor of at least that many bytes are dropped after use.
_LARGE = 1 << 20

# What a repository has in the place of a large file that was not fetched.
_POINTER = b'version https://git-lfs.github.com/spec/'

# As Linux has it; Python has no name for it.
_POPULATE_READ = 22

# Of smaller files all is read when their headers are: that takes no time.
_SCATTERED = 1 << 26


class MappedFile:
  """A file that is open for reading, mapped into memory.

  It stays readable when another file takes its name. It is closed when the
  last array that lies in it is gone.

  Attributes:
    name: its path, for messages.
    fd: its descriptor.
    size: number of its bytes.
    data: its bytes.

  Raises:
    FormatError: if it is empty or no regular file.
    FileNotFoundError: if there is no such file.
    IsADirectoryError: if it is a folder.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    self.name = os.fsdecode(path)
    self.fd = os.open(path, system.READ | system.NO_WAIT)
    weakref.finalize(self, os.close, self.fd)
    status = os.fstat(self.fd)
    if stat.S_ISDIR(status.st_mode):
      raise IsADirectoryError(
        errno.EISDIR, os.strerror(errno.EISDIR), self.name
      )
    if not stat.S_ISREG(status.st_mode):
      raise errors.FormatError(
        f'{self.name}: expected a file, found a pipe or a device. Write it to '
        'a file first.'
      )
    self.size = status.st_size
    if not self.size:
      raise errors.FormatError(
        f'{self.name}: at byte 0: expected a saved model, found an empty file. '
        'Save or fetch it again.',
        0,
      )
    self.data = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
    if self.data[: len(_POINTER)] == _POINTER:
      raise errors.FormatError(
        f'{self.name}: expected a saved model, found a pointer of Git LFS, '
        'which says where the model is. Fetch it with `git lfs pull`.',
        0,
      )

  @contextlib.contextmanager
  def scattered(self) -> Iterator[None]:
    """Says that little is read here and there, far apart.

    Otherwise the system would read megabytes ahead at each place.
    """
    advise = self.size >= _SCATTERED and hasattr(mmap, 'MADV_RANDOM')
    if advise:
      self.data.madvise(mmap.MADV_RANDOM)
    try:
      yield
    finally:
      if advise:
        self.data.madvise(mmap.MADV_NORMAL)

  def fetch(self, start: int, stop: int) -> None:
    """Makes a range ready for reading at once, not page by page."""
    if sys.platform != 'linux':
      return
    start = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # Older systems do not know it.
      self.data.madvise(_POPULATE_READ, start, stop - start)

  def forget(self, start: int, stop: int) -> None:
    """Gives back the memory of a range; its bytes are read again if needed."""
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = stop // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0 and hasattr(mmap, 'MADV_DONTNEED'):
      self.data.madvise(mmap.MADV_DONTNEED, start, length)


class Source(Checked):
  """A tensor in a file. Called, it returns the tensor.

  It is a leaf's `load` and its `source` at once. So a writer sees whether a
  pass put something else in the place of `load`: only a leaf of which
  `leaf.load is leaf.source` is copied unread.

  What is read is checked against the digest on record: blocks in order are
  hashed as they are read; any other access hashes the whole tensor once, before
  it returns. So nothing is computed from a tensor that contradicts its digest,
  and no result gets a new one.

  Attributes:
    file: the file.
    path: the tensor's name, for messages.
    shape: its shape.
    dtype: name of its dtype.
    scalar: whether it is a numpy scalar, not a 0-d array.
    spans: where its bytes lie, as (start, stop) in C order; one span, or one a
      chunk.
    digest: the digest on record, if there is one.
  """

  __slots__ = (
    'dtype',
    'file',
    'scalar',
    'shape',
    'spans',
  )

  def __init__(
    self,
    file: MappedFile,
    path: Path,
    shape: tuple[int, ...],
    dtype: str,
    spans: tuple[Span, ...],
    scalar: bool = False,
    digest: str | None = None,
  ) -> None:
    super().__init__(path, digest)
    self.file = file
    self.shape = shape
    self.dtype = dtype
    self.spans = spans
    self.scalar = scalar

  @property
  def nbytes(self) -> int:
    """Number of bytes."""
    return sum(stop - start for start, stop in self.spans)

  def ranges(self, start: int, stop: int) -> Iterator[Span]:
    """Returns where in the file bytes `start` to `stop` of the tensor lie."""
    before = 0
    for first, last in self.spans:
      begin, end = max(start - before, 0), min(stop - before, last - first)
      if begin < end:
        yield first + begin, first + end
      before += last - first

  def __call__(self) -> Any:
    """Returns the tensor as a read-only array or a numpy scalar.

    The array is a view on the file, and often not aligned: `np.array` makes a
    copy that is. A tensor in chunks is a copy.

    Raises:
      FormatError: for a boolean that is neither 0 nor 1, and if the tensor is
        not what its digest says.
    """
    if self.dtype in PACKED:
      raise errors.FormatError(
        f'{self.file.name}: {paths.show(self.path)}: elements of {self.dtype} '
        'share bytes, so the tensor can be copied, renamed and dropped, but '
        'not read. Select other tensors, or dequantise the model first.',
        self.spans[0][0],
      )
    self.settle()
    dtype = arrays.DTYPES[self.dtype]
    if len(self.spans) == 1:
      flat = self._view(*self.spans[0])
    else:
      flat = np.empty(self.nbytes, np.uint8)
      at = 0
      for start, stop in self.spans:
        flat[at : at + stop - start] = self._view(start, stop)
        at += stop - start
    self._check(flat, self.spans[0][0])
    array = flat.view(dtype).reshape(self.shape)
    array.setflags(write=False)
    return array[()] if self.scalar else array

  def part(self, index: Index) -> np.ndarray:
    """Returns a part of the tensor, one of the blocks of its `grid`.

    Raises:
      FormatError: for a boolean that is neither 0 nor 1; and, with the last
        part at the latest, if the tensor is not what its digest says.
    """
    if not index or self.dtype in PACKED:
      return np.asarray(self())
    dtype = arrays.DTYPES[self.dtype]
    sizes = [s.stop - s.start for s in index]
    rest = self.shape[len(index) :]
    at = 0
    for cut, size in zip(index, self.shape, strict=False):
      at = at * size + cut.start
    # Blocks of a grid cut the first axes only, so that each is one range of
    # bytes.
    start = at * math.prod(rest) * dtype.itemsize
    stop = start + math.prod((*sizes, *rest)) * dtype.itemsize
    ranges = list(self.ranges(start, stop))
    views = [self._view(*r) for r in ranges]
    flat = views[0] if len(views) == 1 else np.concatenate(views)
    self.follow(start, flat)
    self._check(flat, ranges[0][0])
    array = flat.view(dtype).reshape((*sizes, *rest))
    array.setflags(write=False)
    return array

  def unchecked(self) -> Source:
    """Returns it as it is, whatever its digest says; packed ones as bytes."""
    shape, dtype = self.shape, self.dtype
    if dtype in PACKED:
      shape, dtype = (self.nbytes,), 'uint8'
    return Source(self.file, self.path, shape, dtype, self.spans, self.scalar)

  @property
  def place(self) -> tuple[str, int | None]:
    """The file, and where the tensor's first byte lies in it."""
    return self.file.name, self.spans[0][0]

  def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
    """Returns bytes `start` to `stop` of the tensor, in C order."""
    for first, last in self.ranges(start, stop):
      yield self._view(first, last).data

  def _check(self, flat: np.ndarray, offset: int) -> None:
    """Raises if bytes of the tensor cannot be what its dtype says."""
    if self.dtype == 'bool' and flat.size and flat.max() > 1:
      raise errors.FormatError(
        f'{self.file.name}: {paths.show(self.path)}: expected booleans, found '
        f'the byte {flat.max()}. The file is damaged; save or fetch it again.',
        offset,
      )

  def _view(self, start: int, stop: int) -> np.ndarray:
    """Returns bytes of the file as a uint8 array `(stop - start,)`."""
    view = np.frombuffer(self.file.data, np.uint8, stop - start, start)
    if stop - start >= _LARGE:
      # Pages of a mapped file count as the process's own until dropped.
      done = weakref.finalize(view, self.file.forget, start, stop)
      done.atexit = False
    return view


def unchecked(leaf: Leaf) -> Leaf:
  """Returns a leaf whose values are read whatever its digest says."""
  found = leaf.source
  if not isinstance(found, Checked) or leaf.load is not found:
    return leaf
  raw: Any = found.unchecked()
  return leaf.replace(
    load=raw,
    part=raw.part,
    source=raw,
    shape=raw.shape,
    dtype=raw.dtype,
    digest=leaf.digest,
    codes=leaf.codes,
  )
