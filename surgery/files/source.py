"""Files that are read through memory, and tensors that lie in them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import mmap
import os
import stat
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import arrays, system
from surgery.files.digest import Digester
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

# Sources of which some blocks were read and hashed, and not yet all. A writer
# settles those that its tensors began; see `settle`.
_UNFINISHED: weakref.WeakSet[Source] = weakref.WeakSet()
_COUNT = itertools.count(1)
_LOCK = threading.RLock()

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


class Source:
  """A tensor in a file. Called, it returns the tensor.

  It is a leaf's `load` and its `source` at once. So a writer sees whether a
  pass put something else in the place of `load`: only a leaf of which
  `leaf.load is leaf.source` is copied unread.

  What is read is held against the digest on record: blocks in order on their
  way, without a second reading; anything else makes the whole tensor be hashed
  once, before it is given. So nothing is ever computed from a tensor that
  contradicts its digest, and no result gets a fresh one.

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
    '__weakref__',
    '_hashed',
    '_hashing',
    '_number',
    '_sound',
    'digest',
    'dtype',
    'file',
    'path',
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
    self.digest = digest
    self._sound = False
    # What has been hashed so far, and how many bytes that were.
    self._hashing: Digester | None = None
    self._hashed = 0
    self._number = 0
    self.file = file
    self.path = path
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
        'share bytes, so the tensor can be copied, renamed and dropped, and '
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
    start = at * math.prod(rest) * dtype.itemsize
    stop = start + math.prod((*sizes, *rest)) * dtype.itemsize
    ranges = list(self.ranges(start, stop))
    views = [self._view(*r) for r in ranges]
    flat = views[0] if len(views) == 1 else np.concatenate(views)
    self._follow(start, flat)
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

  def _follow(self, start: int, flat: np.ndarray) -> None:
    """Hashes a part on its way, or the whole if it comes out of order.

    Args:
      start: at which byte of the tensor the part starts.
      flat: its bytes.
    """
    if self.digest is None or self._sound:
      return
    with _LOCK:
      if start != self._hashed:
        self._settle()
        return
      self._take(flat.data)
      if self._hashed == self.nbytes:
        self._finish()

  def settle(self) -> None:
    """Hashes what has not been hashed yet, and compares.

    Raises:
      FormatError: if the tensor is not what its digest says.
    """
    if self.digest is not None and not self._sound:
      with _LOCK:
        self._settle()

  def _settle(self) -> None:
    if self._sound:
      return
    while self._hashed < self.nbytes:
      stop = min(self._hashed + _LARGE, self.nbytes)
      for first, last in self.ranges(self._hashed, stop):
        self._take(self._view(first, last).data)
    self._finish()

  def _take(self, data: memoryview) -> None:
    if self._hashing is None:
      self._hashing = Digester()
      self._number = next(_COUNT)
      _UNFINISHED.add(self)
    for piece in arrays.blocks(data):
      self._hashing.update(piece)
    self._hashed += len(data)

  def _finish(self) -> None:
    """Compares the digest; of a tensor that differs nothing is remembered."""
    hashing = self._hashing or Digester()
    self._hashing, self._hashed = None, 0
    _UNFINISHED.discard(self)
    found = hashing.digest()
    kind = found.partition(':')[0]
    # A digest of another kind cannot be compared.
    if self.digest not in (None, found) and self.digest.startswith(kind):
      raise errors.FormatError(
        f'{self.file.name}: {paths.show(self.path)}: expected the digest on '
        f'record, {self.digest}, found {found}. The tensor is damaged, so '
        'nothing is computed from it: fetch or save the file again. If it was '
        'changed on purpose, write a copy without digests first '
        '(--no-manifest, manifest=False).',
        self.spans[0][0],
      )
    self._sound = True

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


def mark() -> int:
  """Returns a mark for `settle`, before something is computed."""
  return next(_COUNT)


def settle(since: int) -> None:
  """Holds against their digests the tensors of which only some was read.

  Args:
    since: what `mark` returned before they were.

  Raises:
    FormatError: if one is not what its digest says.
  """
  for source in list(_UNFINISHED):
    if source._number > since:
      source.settle()


def unchecked(leaf: Leaf) -> Leaf:
  """Returns a leaf whose values are read whatever its digest says."""
  found = leaf.source
  if not isinstance(found, Source) or leaf.load is not found:
    return leaf
  raw = found.unchecked()
  return leaf.replace(
    load=raw,
    part=raw.part,
    source=raw,
    shape=raw.shape,
    dtype=raw.dtype,
    digest=leaf.digest,
    codes=leaf.codes,
  )
