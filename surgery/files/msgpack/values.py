"""What flax puts into a file: arrays, numbers, text, None.

An array is extension 1, a complex number extension 2, a numpy scalar extension
3. The body of 1 and 3 is a list of shape, name of dtype, and bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from surgery.files import arrays
from surgery.files.msgpack.headers import Bad, Headers, utf8
from surgery.files.source import MappedFile, Source, Span
from surgery.naming.paths import Path

ARRAY, COMPLEX, SCALAR = 1, 2, 3

_NAMES = {name.encode(): name for name in arrays.DTYPES}


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
  """What is no array: a number, text, bytes, None or an empty dict.

  Attributes:
    value: the value.
    offset: where it starts.
  """

  value: Any
  offset: int


Entry = Source | Value


class _Head(NamedTuple):
  """What stands before the bytes of an array."""

  raw: bytes
  shape: tuple[int, ...]
  dtype: str


class Values:
  """Reads values; of an array only what stands before its bytes.

  Args:
    file: the file.
  """

  def __init__(self, file: MappedFile) -> None:
    self._file = file
    self._headers = Headers(file.data, file.size)
    # By code and length of an extension what stood before the bytes of the
    # last such array. Models have few shapes, and equal bytes mean the same.
    self._heads: dict[tuple[int, int], _Head] = {}

  def at(self, pos: int, path: Path) -> tuple[Entry, int]:
    """Returns the value that starts at an offset, and where it ends.

    Args:
      pos: the offset.
      path: the name of the value.
    """
    code, size, start = self._headers.extension(pos)
    if code is not None:
      end = start + size
      if code in (ARRAY, SCALAR):
        return self._array(start, end, code, path), end
      if code == COMPLEX:
        return Value(self._complex(start, end), pos), end
      raise Bad(
        pos,
        'expected extension 1 (array), 2 (complex number) or 3 (numpy scalar), '
        f'found extension {code}',
      )
    length, start = self._headers.text(pos)
    if length is not None:
      raw = self._headers.take(start, length)
      return Value(utf8(raw, start, 'text'), pos), start + length
    if 0xC4 <= self._headers.byte(pos) <= 0xC6:
      length, start = self._headers.binary(pos, 'bytes')
      return Value(self._headers.take(start, length), pos), start + length
    value, end = self._headers.plain(
      pos,
      'a map (as which flax writes a list, too), an array, a number, text, '
      'bytes or nil',
    )
    return Value(value, pos), end

  def _array(self, start: int, end: int, code: int, path: Path) -> Source:
    head = self._heads.get((code, end - start))
    if head is None or not self._headers.has(start, head.raw):
      head = self._head(start, end, code == SCALAR)
      self._heads[code, end - start] = head
    spans = ((start + len(head.raw), end),)
    return Source(
      self._file, path, head.shape, head.dtype, spans, code == SCALAR
    )

  def _head(self, start: int, end: int, scalar: bool) -> _Head:
    expected = 'an array (a list of shape, dtype and bytes)'
    parts, pos = self._headers.list(start, expected)
    if parts != 3:
      raise Bad(start, f'expected {expected}, found a list of {parts}')
    shape, pos = self._shape(pos)
    dtype, pos = self._dtype(pos)
    length, first = self._headers.binary(pos, 'the bytes of an array')
    if first + length != end:
      raise Bad(
        pos,
        f'expected the bytes of an array to end at byte {end}, as it does, '
        f'found {first + length}',
      )
    check_size((first, end), shape, dtype)
    if scalar and shape:
      raise Bad(start, f'expected a numpy scalar, found the shape {shape}')
    return _Head(self._headers.take(start, first - start), shape, dtype)

  def _shape(self, pos: int) -> tuple[tuple[int, ...], int]:
    rank, at = self._headers.list(pos, 'a shape (a list)')
    if rank > arrays.MAX_RANK:
      raise Bad(pos, f'expected at most {arrays.MAX_RANK} axes, found {rank}')
    sizes = []
    for _ in range(rank):
      size, end = self._headers.plain(at, 'the size of an axis')
      check_axis(at, size)
      sizes.append(size)
      at = end
    return tuple(sizes), at

  def _dtype(self, pos: int) -> tuple[str, int]:
    length, start = self._headers.text(pos)
    if length is None:
      self._headers.refuse(pos, 'the name of a dtype')
    raw = self._headers.take(start, length)
    name = _NAMES.get(raw)
    if name is None:
      found = raw[:64].decode('ascii', 'replace')
      raise Bad(
        start,
        f'expected a dtype of numbers, found {found!r}',
        f'A file can hold: {", ".join(arrays.DTYPES)}',
      )
    return name, start + length

  def _complex(self, start: int, end: int) -> complex:
    expected = 'a complex number (a list of two floats)'
    parts, pos = self._headers.list(start, expected)
    real, pos = self._headers.plain(pos, expected)
    imag, pos = self._headers.plain(pos, expected)
    floats = isinstance(real, float) and isinstance(imag, float)
    if parts != 2 or pos != end or not floats:
      raise Bad(start, f'expected {expected}')
    return complex(real, imag)


def check_axis(offset: int, size: Any) -> None:
  """Raises unless an axis can have that size."""
  if type(size) is not int or size < 0:
    raise Bad(
      offset, f'expected the size of an axis (0 or more), found {size!r}'
    )


def check_size(span: Span, shape: tuple[int, ...], dtype: str) -> None:
  """Raises unless there are as many bytes as shape and dtype need."""
  itemsize = arrays.DTYPES[dtype].itemsize
  count = arrays.count(shape, itemsize)
  if count is None:
    raise Bad(span[0], f'the shape {shape} is too large for any array')
  found = span[1] - span[0]
  if count * itemsize != found:
    raise Bad(
      span[0],
      f'expected {count * itemsize} bytes of '
      f'{dtype}[{",".join(map(str, shape))}], found {found}',
    )
