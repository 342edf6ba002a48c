"""Digests of tensors, which bind an adapter to its base and find damage."""

from __future__ import annotations

from typing import Any

import xxhash

from surgery.files import arrays

_PREFIX = 'xxh3:'


class Digester:
  """Computes a digest of bytes that come in parts."""

  def __init__(self) -> None:
    self._hash = xxhash.xxh3_128()

  def update(self, data: bytes | memoryview) -> None:
    """Takes in further bytes."""
    self._hash.update(data)

  def digest(self) -> str:
    """Returns the digest of all bytes so far, e.g. `xxh3:9e0f…`."""
    return _PREFIX + self._hash.hexdigest()


def digest(array: Any) -> str:
  """Returns the digest of an array's elements.

  It is XXH3 (128 bits) of the bytes in C order and little-endian, so it knows
  neither shape nor dtype. It finds damage and mistakes, not malice.

  Args:
    array: array of any shape and of a dtype that a file can hold.

  Raises:
    FormatError: for any other dtype.
  """
  digester = Digester()
  for block in arrays.blocks(arrays.payload(arrays.little(array))):
    digester.update(block)
  return digester.digest()
