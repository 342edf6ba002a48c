"""Finds the tensors in a flax msgpack file by its headers alone.

Payloads are never touched. Maps are followed without recursion, and there are
limits to what a small file can make of itself in memory.
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

from surgery import errors
from surgery.files.msgpack import chunks
from surgery.files.msgpack.headers import Bad, Headers, utf8
from surgery.files.msgpack.values import Entry, Value, Values
from surgery.files.source import MappedFile
from surgery.naming import paths
from surgery.naming.paths import Path

MAX_DEPTH = 100
MAX_NODES = 1_000_000
MAX_KEY = 4096
# Of all paths together; a segment counts as its text and a reference to it.
MAX_PATHS = 1 << 28

_TOO_MUCH = 'No known model has that; if yours does, tell blox-surgery'


@dataclasses.dataclass(slots=True)
class _Map:
  """A map that is being read.

  Attributes:
    path: its name.
    offset: where it starts.
    left: number of entries that are still to come.
    before: number of values that were found before it.
    cost: what its path counts for `MAX_PATHS`.
    keys: its keys so far.
  """

  path: Path
  offset: int
  left: int
  before: int
  cost: int
  keys: set[str]


def walk(file: MappedFile) -> dict[Path, Entry]:
  """Returns what lies in a file, by path and in order.

  Raises:
    FormatError: if it is not exactly what flax would have written; with path
      and offset.
  """
  walker = _Walker(file)
  try:
    with file.scattered():
      return walker.run()
  except Bad as bad:
    where = f', {_short(paths.show(walker.path))}' if walker.path else ''
    raise errors.FormatError(
      f'{file.name}: at byte {bad.offset}{where}: {bad.why}. {bad.hint}.',
      bad.offset,
    ) from None


def _short(text: str) -> str:
  return text if len(text) <= 400 else f'{text[:200]}…{text[-200:]}'


def cost(above: int, key: str) -> int:
  """Returns what a path counts for `MAX_PATHS`.

  Args:
    above: what the path above it counts.
    key: its last segment.
  """
  return above + len(key) + 8


def _take(key: str, taken: set[str], pos: int) -> None:
  if key in taken:
    raise Bad(
      pos,
      f'the key {_short(key)!r} occurs twice in one map',
      'It is ambiguous which one is meant; save the file again',
    )
  taken.add(key)


class _Walker:
  def __init__(self, file: MappedFile) -> None:
    self._size = file.size
    self._headers = Headers(file.data, file.size)
    self._values = Values(file)
    self._found: dict[Path, Entry] = {}
    self._nodes = 0
    self._cost = 0
    self._names: dict[bytes, str] = {}
    # Where it is, for messages.
    self.path: Path = ()

  def run(self) -> dict[Path, Entry]:
    count, pos = self._headers.map(0)
    if count is None:
      self._headers.refuse(0, 'a map (a dict of parameters)')
    stack = [_Map((), 0, count, 0, 0, set())]
    while stack:
      top = stack[-1]
      self.path = top.path
      if top.left:
        top.left -= 1
        pos = self._entry(top, stack, pos)
      else:
        stack.pop()
        if chunks.MARK in top.keys:
          self._join(top)
    if pos != self._size:
      raise Bad(
        pos,
        f'expected the end of the file, found {self._size - pos} further bytes',
      )
    return self._found

  def _entry(self, top: _Map, stack: list[_Map], pos: int) -> int:
    """Reads a key and its value or the header of its map."""
    key, start = self._key(pos, top.keys)
    self.path = path = (*top.path, key)
    own = cost(top.cost, key)
    self._nodes += 1
    self._cost += own
    if self._nodes > MAX_NODES or self._cost > MAX_PATHS:
      self._too_much(pos)
    count, end = self._headers.map(start)
    if count is None:
      self._found[path], end = self._values.at(start, path)
    elif count == 0:
      self._found[path] = Value({}, start)
    elif len(stack) < MAX_DEPTH:
      before = len(self._found)
      stack.append(_Map(path, start, count, before, own, set()))
    else:
      raise Bad(start, f'maps nested more than {MAX_DEPTH} deep', _TOO_MUCH)
    return end

  def _key(self, pos: int, taken: set[str]) -> tuple[str, int]:
    length, start = self._headers.text(pos)
    if length is None:
      return self._integer(pos, taken)
    if length > MAX_KEY:
      raise Bad(pos, f'a key of {length} bytes, more than {MAX_KEY}', _TOO_MUCH)
    raw = self._headers.take(start, length)
    # Few names occur in a model, each of them often.
    key = self._names.get(raw)
    if key is None:
      key = self._names[raw] = utf8(raw, start, 'a key')
    _take(key, taken, pos)
    return key, start + length

  def _integer(self, pos: int, taken: set[str]) -> tuple[str, int]:
    """Returns an integer that is a key, as flax reads it."""
    value, end = self._headers.plain(pos, 'text or an integer as a key')
    if type(value) is not int:
      self._headers.refuse(pos, 'text or an integer as a key')
    key = paths.Integer(value)
    _take(key, taken, pos)
    return key, end

  def _too_much(self, pos: int) -> NoReturn:
    """Raises because there is more in the file than any model has."""
    if self._nodes > MAX_NODES:
      raise Bad(pos, f'more than {MAX_NODES:,} entries', _TOO_MUCH)
    raise Bad(pos, f'paths of more than {MAX_PATHS:,} bytes', _TOO_MUCH)

  def _join(self, top: _Map) -> None:
    """Puts the values of a map that is a chunked array together."""
    if not top.path:
      raise Bad(0, 'expected a map (a dict of parameters), found an array')
    parts: dict[Path, Entry] = {}
    while len(self._found) > top.before:
      path, entry = self._found.popitem()
      parts[path[len(top.path) :]] = entry
    self._found[top.path] = chunks.join(top.path, top.offset, parts)
