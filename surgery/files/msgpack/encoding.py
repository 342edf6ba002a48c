"""Headers and plain values as flax writes them, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgpack  # type: ignore[import-untyped]

from surgery import errors
from surgery.files.msgpack import chunks
from surgery.files.msgpack.values import COMPLEX
from surgery.naming.paths import Integer

# Lengths that an extension's header holds in its first byte.
_FIXED = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
_PLAIN = (bool, int, float, str, bytes, type(None))


def map_header(count: int) -> bytes:
  """Returns the header of a map of that many entries."""
  return msgpack.Packer().pack_map_header(count)


def plain(value: Any) -> bytes:
  """Returns a number, text, None or an empty dict.

  Raises:
    FormatError: for anything else, and for an integer of more than 64 bits.
  """
  if type(value) is complex:
    body = msgpack.packb((value.real, value.imag))
    return _extension_header(COMPLEX, len(body)) + body
  if type(value) not in _PLAIN and not (type(value) is dict and not value):
    raise errors.FormatError(
      f'a value of type {type(value).__name__} cannot be saved. Use arrays, '
      'numbers, text, None, or an empty dict.'
    )
  try:
    return msgpack.packb(value)
  except (OverflowError, ValueError) as error:
    raise errors.FormatError(f'{value!r} cannot be saved: {error}.') from None


def key(segment: str) -> bytes:
  """Returns a key of a map, which may be an integer."""
  return plain(int(segment) if type(segment) is Integer else segment)


def array_header(
  code: int, shape: tuple[int, ...], dtype: str, nbytes: int
) -> bytes:
  """Returns all of an array that stands before its bytes.

  Args:
    code: of the extension.
    shape: its shape.
    dtype: name of its dtype.
    nbytes: number of its bytes.

  Raises:
    FormatError: if a file cannot hold so many bytes.
  """
  head = b'\x93' + msgpack.packb(shape) + msgpack.packb(dtype)
  head += _length(0xC4, nbytes)
  return _extension_header(code, len(head) + nbytes) + head


def chunks_header(shape: tuple[int, ...], count: int) -> bytes:
  """Returns all of an array in chunks that stands before the first chunk."""
  return b''.join(
    (
      map_header(3),
      *map(plain, (chunks.MARK, True, 'shape')),
      _numbered(shape),
      plain('chunks'),
      map_header(count),
    )
  )


def _numbered(values: Iterable[int]) -> bytes:
  return msgpack.packb({str(i): v for i, v in enumerate(values)})


def _extension_header(code: int, length: int) -> bytes:
  if length in _FIXED:
    return bytes((_FIXED[length], code))
  return _length(0xC7, length) + bytes((code,))


def _length(first: int, length: int) -> bytes:
  """Returns a length, after the byte that tells how many bytes it takes."""
  for power, width in enumerate((1, 2, 4)):
    if length < 1 << 8 * width:
      return bytes((first + power,)) + length.to_bytes(width, 'big')
  raise errors.FormatError(
    f'expected at most {2**32 - 1:,} bytes, found {length:,}.'
  )
