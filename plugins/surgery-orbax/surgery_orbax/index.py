"""What arrays a folder has, with shapes and dtypes, from its index alone.

Shapes and dtypes stand in each array's zarr metadata, and these in the index of
the OCDBT database, so that 50,000 arrays are listed by reading one file.
Without OCDBT they lie in a folder for each array.

Formats: zarr 2 and 3 (zarr-specs.readthedocs.io), OCDBT
(google.github.io/tensorstore/kvstore/ocdbt).
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

import surgery
from surgery import formats
from surgery_orbax import folders

_ZARR2, _ZARR3 = '.zarray', 'zarr.json'


class Array(NamedTuple):
  """What is known of an array before it is read.

  Attributes:
    name: of the array in the folder.
    shape: its shape.
    dtype: name of its dtype.
    chunks: shape of a chunk, which is what is read at once.
    zarr3: whether it is zarr 3.
    found: number of chunks that are there.
  """

  name: str
  shape: tuple[int, ...]
  dtype: str
  chunks: tuple[int, ...]
  zarr3: bool
  found: int

  @property
  def expected(self) -> int:
    """Number of chunks that make up the array."""
    return math.prod(
      -(-size // max(chunk, 1))
      for size, chunk in zip(self.shape, self.chunks, strict=True)
    )

  @property
  def nbytes(self) -> int:
    """Bytes of the array in memory."""
    return math.prod(self.shape) * formats.DTYPES[self.dtype].itemsize

  @property
  def chunk_bytes(self) -> int:
    """Bytes of a chunk in memory."""
    return math.prod(self.chunks) * formats.DTYPES[self.dtype].itemsize


def base(folder: pathlib.Path) -> dict[str, Any]:
  """Returns TensorStore's name for a folder."""
  return {'driver': 'file', 'path': f'{folder.absolute()}/'}


def database(folder: pathlib.Path) -> dict[str, Any]:
  """Returns TensorStore's name for the OCDBT database in a folder."""
  return {'driver': 'ocdbt', 'base': base(folder)}


def of_database(folder: pathlib.Path) -> dict[str, Array]:
  """Lists the arrays of an OCDBT database.

  Raises:
    FormatError: if the index cannot be read.
  """
  metadata: dict[tuple[str, bool], bytes] = {}
  others: list[str] = []
  try:
    for key, value in _entries(folder):
      name, _, last = key.rpartition('/')
      if value is not None and last in (_ZARR2, _ZARR3):
        metadata[name, last == _ZARR3] = value
      else:
        others.append(key)
  except (ValueError, OSError, KeyError, UnicodeDecodeError) as error:
    raise surgery.FormatError(
      f'{folder}: the index of the checkpoint ({folders.INDEX}) cannot be '
      f'read: {_short(error)}. It is damaged; fetch or save it again.'
    ) from None
  counts = _counted(others, metadata)
  return {
    name: _array(folder, name, text, zarr3, counts.get(name, 0))
    for (name, zarr3), text in metadata.items()
  }


def of_files(folder: pathlib.Path, names: Iterable[str]) -> dict[str, Array]:
  """Lists the arrays of a folder that has a folder for each of them.

  Raises:
    FormatError: if metadata cannot be read.
  """
  found = {}
  for name in names:
    for last in (_ZARR2, _ZARR3):
      file = folder / name / last
      if file.is_file():
        zarr3 = last == _ZARR3
        inside = folder / name / 'c' if zarr3 else folder / name
        files = [inside] if inside.is_file() else inside.rglob('*')
        count = sum(f.is_file() and f.name != last for f in files)
        found[name] = _array(folder, name, file.read_bytes(), zarr3, count)
  return found


def _entries(folder: pathlib.Path) -> Iterator[tuple[str, bytes | None]]:
  """Returns the keys of a database; of arrays' metadata what it says, too."""
  store = ts.KvStore.open(base(folder)).result()
  dump = getattr(ts.ocdbt, 'dump', None)
  if dump is None:  # Slower: a request for each array.
    yield from _requested(folder)
    return
  manifest = dump(store).result()
  if 'versions' not in manifest or not manifest['versions']:
    return
  # The newest version is the last; nodes hold the end of each key only.
  root = manifest['versions'][-1]['root']
  waiting = [(root['location'], b'')] if 'location' in root else []
  while waiting:
    location, prefix = waiting.pop()
    node = dump(store, location).result()
    for entry in node['entries']:
      if node['height']:
        inner = prefix + entry['subtree_common_prefix']
        waiting.append((entry['location'], inner))
        continue
      key = (prefix + entry['key']).decode()
      value = entry.get('inline_value')
      if value is None and key.endswith((f'/{_ZARR2}', f'/{_ZARR3}')):
        value = dump(store, entry['indirect_value']).result()
      yield key, value


def _requested(folder: pathlib.Path) -> Iterator[tuple[str, bytes | None]]:
  store = ts.KvStore.open(database(folder)).result()
  keys = [key.decode() for key in store.list().result()]
  wanted = [k for k in keys if k.endswith((f'/{_ZARR2}', f'/{_ZARR3}'))]
  asked = {key: store.read(key) for key in wanted}
  for key in keys:
    yield key, asked[key].result().value if key in asked else None


def _counted(
  keys: Iterable[str], metadata: dict[tuple[str, bool], bytes]
) -> dict[str, int]:
  """Returns how many chunks each array has."""
  counts: dict[str, int] = {}
  for key in keys:
    # zarr 2 has name/0.0, zarr 3 name/c/0/0; names may have a slash, too.
    name = key.rpartition('/')[0]
    if (name, False) not in metadata:
      name = key
      while name and (name, True) not in metadata:
        name = name.rpartition('/c')[0]
    counts[name] = counts.get(name, 0) + 1
  return counts


def _array(
  folder: pathlib.Path, name: str, text: bytes, zarr3: bool, found: int
) -> Array:
  try:
    shape, dtype, chunks = _parsed(text, zarr3)
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise surgery.FormatError(
      f'{folder}: {name}: the metadata of the array cannot be read: '
      f'{_short(error)}. The checkpoint is damaged, or newer than this release '
      'of surgery-orbax.'
    ) from None
  return Array(name, shape, dtype, chunks, zarr3, found)


# Models have few shapes, and parsing takes longer than all else.
@functools.lru_cache(maxsize=4096)
def _parsed(
  text: bytes, zarr3: bool
) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
  """Returns shape, dtype and shape of a chunk of an array's metadata.

  Raises:
    ValueError: if they make no sense; KeyError and TypeError, too.
  """
  said = json.loads(text)
  shape = tuple(int(size) for size in said['shape'])
  if zarr3:
    dtype = said['data_type']
    chunks = said['chunk_grid']['configuration']['chunk_shape']
  else:
    dtype, chunks = said['dtype'], said['chunks']
  chunks = tuple(int(size) for size in chunks)
  if len(chunks) != len(shape) or min((*shape, *chunks), default=0) < 0:
    raise ValueError(f'shape {shape} and chunks {chunks} do not match')
  return shape, _dtype(dtype), chunks


def _dtype(name: Any) -> str:
  """Returns the name of a dtype that zarr names.

  Raises:
    ValueError: if no file can hold it.
  """
  if not isinstance(name, str):
    raise ValueError(f'expected the name of a dtype, found {name!r}')
  if name in formats.DTYPES:
    return name
  try:
    known = np.dtype(name).name
  except TypeError:
    known = ''
  if known not in formats.DTYPES:
    raise ValueError(f'unknown dtype {name!r}')
  return known


def _short(error: BaseException) -> str:
  """Returns an error's text without TensorStore's notes on where it arose."""
  return str(error).split(' [')[0].rstrip('.')
