"""Bytes of a patch, as they are or compressed.

What is compressed of a tensor is its difference (exclusive or) from the base's,
with the first bytes of all elements in front, then all second ones and so on:
of a fine-tuned float the sign, the exponent and the first digits seldom change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from surgery import errors
from surgery.files import arrays, source
from surgery.model.checkpoint import Leaf

_LEVEL = 3


def zstd() -> Any:
  """Returns the package zstandard, or None if it is not installed."""
  try:
    import zstandard
  except ImportError:
    return None
  return zstandard


def pieces(leaf: Leaf, size: int) -> Iterator[np.ndarray]:
  """Yields the bytes of a tensor, so many at a time, `(n,)` of uint8."""
  rest = np.zeros(0, np.uint8)
  for block in source.unchecked(leaf).parts():
    flat = arrays.little(block).reshape(-1).view(np.uint8)
    if len(rest):
      flat = np.concatenate([rest, flat])
    whole = len(flat) // size * size
    for start in range(0, whole, size):
      yield flat[start : start + size]
    rest = flat[whole:]
  if len(rest):
    yield rest


def compress(
  values: Iterable[tuple[np.ndarray, np.ndarray | None]],
  itemsize: int,
  to: BinaryIO,
) -> None:
  """Compresses pieces, each with that of the base or None."""
  coder = zstd().ZstdCompressor(level=_LEVEL).compressobj()
  for piece, base in values:
    apart = piece if base is None else piece ^ base
    to.write(coder.compress(_turned(apart, itemsize).tobytes()))
  to.write(coder.flush())


def _turned(piece: np.ndarray, itemsize: int) -> np.ndarray:
  if itemsize == 1 or len(piece) % itemsize:
    return piece
  return piece.reshape(-1, itemsize).T


class Decoder:
  """Gives back what `compress` was given, piece by piece.

  Args:
    data: what it wrote.
    where: what it is, for messages.

  Raises:
    DependencyError: if zstandard is not installed.
  """

  def __init__(self, data: Any, where: str) -> None:
    package = zstd()
    if package is None:
      raise errors.DependencyError(
        f'{where}: the patch is compressed with zstd, and the package '
        "zstandard is not installed. pip install 'blox-surgery[zstd]'."
      )
    self._error = package.ZstdError
    self._reader = package.ZstdDecompressor().stream_reader(data)
    self._where = where

  def read(
    self, count: int, itemsize: int, base: np.ndarray | None
  ) -> np.ndarray:
    """Returns the next piece.

    Raises:
      FormatError: if there are not so many bytes.
    """
    parts, missing = [], count
    while missing:
      try:
        part = self._reader.read(missing)
      except self._error as error:
        raise errors.FormatError(
          f'{self._where}: the patch is damaged: {error}. Fetch or make it '
          'again.'
        ) from None
      if not part:
        raise errors.FormatError(
          f'{self._where}: the patch is damaged: expected {missing} more '
          'bytes, found the end. Fetch or make it again.'
        )
      parts.append(part)
      missing -= len(part)
    piece = np.frombuffer(b''.join(parts), np.uint8)
    if itemsize != 1 and not count % itemsize:
      piece = piece.reshape(itemsize, -1).T.reshape(-1)
    return piece if base is None else piece ^ base
