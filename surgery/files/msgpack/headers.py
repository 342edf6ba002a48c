"""What msgpack says before a value: its kind and length.

https://github.com/msgpack/msgpack/blob/master/spec.md has the first bytes. No
length is believed: each is held against the file before it is used.
"""

from __future__ import annotations

import struct
from typing import Any, NoReturn

DAMAGED = 'The file is damaged or no flax msgpack file; save or fetch it again'


class Bad(Exception):  # noqa: N818
  """Reading cannot go on; says where, why and what to do."""

  def __init__(self, offset: int, why: str, hint: str = DAMAGED) -> None:
    super().__init__(offset, why, hint)
    self.offset, self.why, self.hint = offset, why, hint


class Headers:
  """Reads headers and plain values at any offset.

  Each method takes the offset at which something starts. Those that return a
  value and an offset return where it ends.

  Args:
    data: the file's bytes; only headers and plain values are touched.
    size: their number.
  """

  def __init__(self, data: Any, size: int) -> None:
    self.data = data
    self.size = size

  def byte(self, pos: int) -> int:
    """Returns one byte."""
    try:
      return self.data[pos]
    except IndexError:
      self.truncated(pos, 1)

  def take(self, pos: int, length: int) -> bytes:
    """Returns some bytes."""
    if length > self.size - pos:
      self.truncated(pos, length)
    return self.data[pos : pos + length]

  def has(self, pos: int, raw: bytes) -> bool:
    """Whether these bytes stand here."""
    return self.data[pos : pos + len(raw)] == raw

  def uint(self, pos: int, length: int) -> int:
    """Returns the unsigned number in some bytes."""
    return int.from_bytes(self.take(pos, length), 'big')

  def truncated(self, pos: int, length: int) -> NoReturn:
    """Raises because the file ends too early."""
    raise Bad(
      pos,
      f'expected {length} more byte{"s" if length > 1 else ""}, found '
      f'{max(self.size - pos, 0)} before the end of the file',
    )

  def refuse(self, pos: int, expected: str) -> NoReturn:
    """Raises because something of another kind starts here."""
    raise Bad(pos, f'expected {expected}, found {_kind(self.byte(pos))}')

  def map(self, pos: int) -> tuple[int | None, int]:
    """Returns the number of entries of a map; None if there is none."""
    byte = self.byte(pos)
    if byte & 0xF0 == 0x80:
      count, end = byte & 0x0F, pos + 1
    elif byte == 0xDE:
      count, end = self.uint(pos + 1, 2), pos + 3
    elif byte == 0xDF:
      count, end = self.uint(pos + 1, 4), pos + 5
    else:
      return None, pos
    # A key and a value take a byte each.
    if 2 * count > self.size - end:
      raise Bad(
        pos,
        f'expected a map of {count} entries, found {self.size - end} bytes '
        'before the end of the file',
      )
    return count, end

  def list(self, pos: int, expected: str) -> tuple[int, int]:
    """Returns the number of items of a list."""
    byte = self.byte(pos)
    if byte & 0xF0 == 0x90:
      return byte & 0x0F, pos + 1
    if byte == 0xDC:
      return self.uint(pos + 1, 2), pos + 3
    if byte == 0xDD:
      return self.uint(pos + 1, 4), pos + 5
    self.refuse(pos, expected)

  def text(self, pos: int) -> tuple[int | None, int]:
    """Returns the number of bytes of text; None if there is none."""
    byte = self.byte(pos)
    if byte & 0xE0 == 0xA0:
      return byte & 0x1F, pos + 1
    if 0xD9 <= byte <= 0xDB:
      width = 1 << (byte - 0xD9)
      return self.uint(pos + 1, width), pos + 1 + width
    return None, pos

  def binary(self, pos: int, expected: str) -> tuple[int, int]:
    """Returns the number of bytes that are just bytes."""
    byte = self.byte(pos)
    if not 0xC4 <= byte <= 0xC6:
      self.refuse(pos, expected)
    width = 1 << (byte - 0xC4)
    return self.uint(pos + 1, width), pos + 1 + width

  def extension(self, pos: int) -> tuple[int | None, int, int]:
    """Returns code (None if there is no extension), length and start."""
    byte = self.byte(pos)
    if 0xD4 <= byte <= 0xD8:
      length, at = 1 << (byte - 0xD4), pos + 1
    elif 0xC7 <= byte <= 0xC9:
      width = 1 << (byte - 0xC7)
      length, at = self.uint(pos + 1, width), pos + 1 + width
    else:
      return None, 0, pos
    code = self.byte(at)
    if length > self.size - at - 1:
      self.truncated(at + 1, length)
    return code - 256 if code > 127 else code, length, at + 1

  def plain(self, pos: int, expected: str) -> tuple[Any, int]:
    """Returns None, a boolean or a number."""
    byte = self.byte(pos)
    if byte < 0x80:
      return byte, pos + 1
    if byte >= 0xE0:
      return byte - 0x100, pos + 1
    if byte in _CONSTANTS:
      return _CONSTANTS[byte], pos + 1
    form = _NUMBERS.get(byte)
    if form is None:
      self.refuse(pos, expected)
    raw = self.take(pos + 1, form.size)
    return form.unpack(raw)[0], pos + 1 + form.size


def utf8(raw: bytes, offset: int, what: str) -> str:
  """Returns bytes as text."""
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise Bad(
      offset + error.start, f'{what} is not valid UTF-8: {error.reason}'
    ) from None


def _kind(byte: int) -> str:
  """Returns what a byte begins."""
  kind = next(kind for last, kind in _KINDS if byte <= last)
  return f'{kind} (0x{byte:02x})'


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
  0xCA: struct.Struct('>f'),
  0xCB: struct.Struct('>d'),
  0xCC: struct.Struct('>B'),
  0xCD: struct.Struct('>H'),
  0xCE: struct.Struct('>I'),
  0xCF: struct.Struct('>Q'),
  0xD0: struct.Struct('>b'),
  0xD1: struct.Struct('>h'),
  0xD2: struct.Struct('>i'),
  0xD3: struct.Struct('>q'),
}
# What bytes up to and with this one begin.
_KINDS = (
  (0x7F, 'an integer'),
  (0x8F, 'a map'),
  (0x9F, 'a list'),
  (0xBF, 'text'),
  (0xC0, 'nil'),
  (0xC1, 'a byte that msgpack never uses'),
  (0xC3, 'a boolean'),
  (0xC6, 'bytes'),
  (0xC9, 'an extension'),
  (0xCB, 'a float'),
  (0xD3, 'an integer'),
  (0xD8, 'an extension'),
  (0xDB, 'text'),
  (0xDD, 'a list'),
  (0xDF, 'a map'),
  (0xFF, 'an integer'),
)
