"""Large arrays, which flax writes as a map of flat chunks.

`{'__msgpack_chunked_array__': True, 'shape': {'0': …}, 'chunks': {'0': …}}`
"""

from __future__ import annotations

from surgery.files.msgpack.headers import Bad
from surgery.files.msgpack.values import Entry, Value, check_axis, check_size
from surgery.files.source import Source, Span
from surgery.naming.paths import Path

MARK = '__msgpack_chunked_array__'
# Arrays of more bytes are written in chunks of that many.
MAX_CHUNK_SIZE = 2**30


def _is(entry: Entry | None, value: object) -> bool:
  """Whether an entry is a certain value, which is no array."""
  found = entry.value if isinstance(entry, Value) else None
  return type(found) is type(value) and bool(found == value)


def join(path: Path, offset: int, parts: dict[Path, Entry]) -> Source:
  """Returns a chunked array as one tensor.

  Args:
    path: its name.
    offset: where its map starts.
    parts: what is in the map, by path from there; used up.

  Raises:
    Bad: if it is not what flax writes.
  """
  mark = parts.pop((MARK,), None)
  sizes = _numbered(parts, 'shape')
  chunks = _numbered(parts, 'chunks')
  if not sizes:
    # Without axes an empty dict stands in the place of the sizes.
    has_shape = _is(parts.pop(('shape',), None), {})
  else:
    has_shape = ('shape',) not in parts
  if not (_is(mark, True) and has_shape and chunks) or parts:
    raise Bad(
      offset,
      f'malformed array in chunks: expected the keys {MARK!r} (true), '
      "'shape' and 'chunks', each of these with entries '0', '1', …",
    )
  dtype, spans = _spans(offset, chunks)
  shape = _shape(offset, sizes)
  total = sum(stop - start for start, stop in spans)
  check_size((spans[0][0], spans[0][0] + total), shape, dtype)
  return Source(chunks[0].file, path, shape, dtype, spans)  # type: ignore[union-attr]


def _numbered(parts: dict[Path, Entry], name: str) -> list[Entry]:
  """Takes the entries `name/0`, `name/1` and so on out of `parts`."""
  found: list[Entry] = []
  while (path := (name, str(len(found)))) in parts:
    found.append(parts.pop(path))
  return found


def _shape(offset: int, sizes: list[Entry]) -> tuple[int, ...]:
  shape = []
  for entry in sizes:
    if not isinstance(entry, Value):
      raise Bad(offset, 'malformed array in chunks: an array in its shape')
    check_axis(entry.offset, entry.value)
    shape.append(entry.value)
  return tuple(shape)


def _spans(offset: int, chunks: list[Entry]) -> tuple[str, tuple[Span, ...]]:
  """Returns the dtype of chunks and where their bytes lie."""
  spans: list[Span] = []
  dtypes = set()
  for chunk in chunks:
    flat = (
      isinstance(chunk, Source)
      and not chunk.scalar
      and len(chunk.shape) == 1
      and len(chunk.spans) == 1
    )
    if not flat:
      raise Bad(
        offset, 'malformed array in chunks: expected chunks with one axis'
      )
    dtypes.add(chunk.dtype)  # type: ignore[union-attr]
    spans += chunk.spans  # type: ignore[union-attr]
  if len(dtypes) > 1:
    raise Bad(
      offset,
      'malformed array in chunks: expected one dtype, found '
      f'{" and ".join(sorted(dtypes))}',
    )
  return dtypes.pop(), tuple(spans)
