"""The header of a safetensors file: where each tensor lies.

Eight bytes, little-endian, tell the length of a JSON object that tells dtype,
shape and bytes of each tensor by its name, and text by text what else there is
to say under `__metadata__`. The tensors' bytes follow without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from surgery import errors
from surgery.files import arrays, strict_json
from surgery.files.safetensors import dtypes, names
from surgery.files.source import MappedFile
from surgery.model import sizes

START = 8
_KEYS = {'dtype', 'shape', 'data_offsets'}
_DAMAGED = 'The file is damaged; save or fetch it again'
# So that a product of sizes stays a number that a file can have.
_MOST = 1 << 62


class Entry(NamedTuple):
  """A tensor as the header has it.

  Attributes:
    tag: its dtype, e.g. `BF16`.
    shape: its shape.
    start: where its bytes start, counted from the end of the header.
    stop: where they end.
  """

  tag: str
  shape: tuple[int, ...]
  start: int
  stop: int


def encoded(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
  """Returns a header, with what tells its length.

  Raises:
    FormatError: if it is longer than readers take.
  """
  data: dict[str, Any] = {names.METADATA: dict(metadata)} if metadata else {}
  for name, (tag, shape, start, stop) in entries.items():
    data[name] = {'dtype': tag, 'shape': shape, 'data_offsets': (start, stop)}
  raw = json.dumps(data, ensure_ascii=False, separators=(',', ':')).encode()
  # The bytes of tensors are aligned.
  raw += b' ' * (-len(raw) % START)
  if strict_json.too_large(raw):
    raise errors.FormatError(
      f'the header has {len(raw):,} bytes, more than readers take '
      f'({strict_json.MAX_SIZE:,}). Write several files (shard_size), or '
      'another format.'
    )
  return len(raw).to_bytes(START, 'little') + raw


def read(file: MappedFile) -> tuple[dict[str, Entry], dict[str, str], int]:
  """Reads a header.

  Returns:
    Tensors by name, in order; the metadata; and where the header ends.

  Raises:
    FormatError: if it is not what it should be, or the file has more or fewer
      bytes than it says.
  """
  length = int.from_bytes(file.data[:START], 'little')
  if file.size < START or length > file.size - START:
    raise errors.FormatError(
      f'{file.name}: at byte 0: expected a safetensors file (the length of a '
      f'header, and the header), found {file.size:,} bytes that are none. '
      f'{_DAMAGED}.',
      0,
    )
  if length > strict_json.MAX_SIZE:
    raise errors.FormatError(
      f'{file.name}: at byte 0: expected a header of at most '
      f'{strict_json.MAX_SIZE:,} bytes, found {length:,}. {_DAMAGED}.',
      0,
    )
  raw = file.data[START : START + length]
  data = strict_json.loads(raw, file.name, START)
  metadata = data.pop(names.METADATA, {})
  if not isinstance(metadata, dict) or not all(
    isinstance(text, str) for text in metadata.values()
  ):
    raise _wrong(
      file, raw, names.METADATA, 'expected text by text', repr(metadata)
    )
  entries = {name: _entry(file, raw, name, data[name]) for name in data}
  _check_cover(file, raw, entries, file.size - START - length)
  return entries, metadata, START + length


def _wrong(
  file: MappedFile, raw: bytes, name: str, expected: str, found: str
) -> errors.FormatError:
  """Returns an error that names a tensor and, as far as known, its place."""
  key = json.dumps(name, ensure_ascii=False).encode('utf-8', 'replace')
  at = START + max(raw.find(key), 0)
  shown = found if len(found) <= 200 else f'{found[:200]}…'
  return errors.FormatError(
    f'{file.name}: at byte {at}, {name[:400]}: {expected}, found {shown}. '
    f'{_DAMAGED}.',
    at,
  )


def _entry(file: MappedFile, raw: bytes, name: str, data: Any) -> Entry:
  if not isinstance(data, dict) or data.keys() != _KEYS:
    expected = 'expected dtype, shape and data_offsets'
    raise _wrong(file, raw, name, expected, repr(data))
  tag, shape, at = data['dtype'], data['shape'], data['data_offsets']
  if not isinstance(tag, str) or tag not in dtypes.NAMES:
    known = ', '.join(dtypes.NAMES)
    expected = f'expected one of the dtypes {known}'
    raise _wrong(file, raw, name, expected, repr(tag))
  if not _sizes(shape) or len(shape) > arrays.MAX_RANK:
    expected = f'expected the sizes of at most {arrays.MAX_RANK} axes'
    raise _wrong(file, raw, name, expected, repr(shape))
  if not _sizes(at) or len(at) != 2:
    expected = 'expected where its bytes start and end'
    raise _wrong(file, raw, name, expected, repr(at))
  nbytes = sizes.nbytes(dtypes.NAMES[tag], math.prod(shape))
  if at[1] - at[0] != nbytes:
    expected = f'expected {nbytes} bytes for {tag}{shape}'
    raise _wrong(file, raw, name, expected, f'{at[1] - at[0]}')
  return Entry(tag, tuple(shape), at[0], at[1])


def _sizes(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(value) is int and 0 <= value < _MOST for value in values
  )


def _check_cover(
  file: MappedFile, raw: bytes, entries: Mapping[str, Entry], size: int
) -> None:
  """Raises unless tensors take all bytes after the header, each byte once."""
  end = 0
  ordered = sorted(entries.items(), key=lambda item: item[1][2:])
  for name, entry in ordered:
    if entry.start != end:
      expected = f'expected its bytes to start at {end}, where others end'
      raise _wrong(file, raw, name, expected, str(entry.start))
    end = entry.stop
    if end > size:
      expected = f'expected its bytes within the {size} after the header'
      raise _wrong(file, raw, name, expected, f'{entry.start} to {end}')
  if end != size:
    at = START + len(raw) + end
    raise errors.FormatError(
      f'{file.name}: at byte {at}: expected the end of the file after the last '
      f'tensor, found {size - end} more bytes. {_DAMAGED}.',
      at,
    )
