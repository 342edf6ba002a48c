"""Tensors that are held against the digest on record while they are read.

A format's tensors derive from `Checked`: blocks that are read in order are
hashed on their way, without a second reading; anything else makes the whole
tensor be hashed once, before it is given. So nothing is ever computed from a
tensor that contradicts its digest, and no result gets a fresh one.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import arrays
from surgery.files.digest import Digester
from surgery.naming import paths
from surgery.naming.paths import Path

# Tensors of which only some blocks were read and hashed yet. A writer finishes
# the ones that its own tensors began; see `settle`.
_UNFINISHED: weakref.WeakSet[Checked] = weakref.WeakSet()
_COUNT = itertools.count(1)
_LOCK = threading.RLock()


class Checked:
  """A saved tensor whose bytes are checked against a digest as they are read.

  It is a leaf's `load` and its `source` at once.

  Attributes:
    path: the tensor's name, for messages.
    digest: the digest on record, if there is one.
    piece: bytes that are read at once of a tensor that is hashed for its own
      sake.
  """

  piece = 1 << 20

  __slots__ = (
    '__weakref__',
    '_hashed',
    '_hashing',
    '_number',
    '_sound',
    'digest',
    'path',
  )

  def __init__(self, path: Path, digest: str | None = None) -> None:
    self.path = path
    self.digest = digest
    self._sound = False
    # The hash of the bytes so far, and their number.
    self._hashing: Digester | None = None
    self._hashed = 0
    self._number = 0

  @property
  def nbytes(self) -> int:
    """Number of bytes."""
    raise NotImplementedError

  @property
  def place(self) -> tuple[str, int | None]:
    """The file, and the offset of the tensor in it, for messages."""
    raise NotImplementedError

  def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
    """Returns bytes `start` to `stop` of the tensor, in C order."""
    raise NotImplementedError

  def __call__(self) -> Any:
    """Returns the tensor."""
    raise NotImplementedError

  def unchecked(self) -> Checked:
    """Returns the tensor as it is, whatever its digest says."""
    raise NotImplementedError

  def follow(self, start: int, flat: np.ndarray) -> None:
    """Hashes a part on its way, or the whole if it comes out of order.

    A format calls it with each part that it read, before it gives it away.

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
      stop = min(self._hashed + self.piece, self.nbytes)
      for piece in self.pieces(self._hashed, stop):
        self._take(piece)
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
      name, offset = self.place
      raise errors.FormatError(
        f'{name}: {paths.show(self.path)}: expected the digest on '
        f'record, {self.digest}, found {found}. The tensor is damaged, so '
        'nothing is computed from it: fetch or save the file again. If it was '
        'changed on purpose, write a copy without digests first '
        '(--no-manifest, manifest=False).',
        offset,
      )
    self._sound = True


def mark() -> int:
  """Returns a mark for `settle`, before something is computed."""
  return next(_COUNT)


def settle(since: int) -> None:
  """Checks the tensors that were read in part against their digests.

  Args:
    since: what `mark` returned before they were read.

  Raises:
    FormatError: if one does not match its digest.
  """
  for source in list(_UNFINISHED):
    if source._number > since:
      source.settle()
