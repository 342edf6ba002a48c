"""JSON of other programs, read strictly and with bounded memory."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from surgery import errors

MAX_SIZE = 100_000_000
# A comma separates what takes a hundred bytes in memory at most.
_MAX_ITEMS = 8_000_000


def too_large(data: bytes) -> bool:
  """Whether `loads` would refuse it for its size."""
  return len(data) > MAX_SIZE or data.count(b',') > _MAX_ITEMS


def loads(data: bytes, where: str, offset: int = 0) -> dict[str, Any]:
  """Reads an object.

  Args:
    data: UTF-8.
    where: file and place, for messages.
    offset: of `data` in the file.

  Raises:
    FormatError: if it is no object, has a key twice, says NaN or Infinity, has
      text that is no Unicode, or is too large.
  """
  if too_large(data):
    raise errors.FormatError(
      f'{where}: more than any known model has ({len(data):,} bytes). If yours '
      'does, tell blox-surgery.',
      offset,
    )
  try:
    text = data.decode()
    found = json.loads(
      text, object_pairs_hook=_object, parse_constant=_constant
    )
    if '\\ud' in text or '\\uD' in text:
      json.dumps(found, ensure_ascii=False).encode()
  except (ValueError, RecursionError) as error:
    at = offset
    if isinstance(error, json.JSONDecodeError):
      at += len(error.doc[: error.pos].encode())
    elif isinstance(error, UnicodeDecodeError):
      at += error.start
    raise errors.FormatError(
      f'{where}: at byte {at}: not valid JSON: {error}. The file is damaged; '
      'save or fetch it again.',
      at,
    ) from None
  if not isinstance(found, dict):
    raise errors.FormatError(
      f'{where}: at byte {offset}: expected a JSON object, found '
      f'{type(found).__name__}. The file is damaged or something else; save or '
      'fetch it again.',
      offset,
    )
  return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    seen: set[str] = set()
    for key, _ in pairs:
      if key in seen:
        raise ValueError(f'the key {key[:200]!r} occurs twice')
      seen.add(key)
  return found


def _constant(name: str) -> NoReturn:
  raise ValueError(f'{name} is no number')
