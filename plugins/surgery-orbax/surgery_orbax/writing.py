"""Writes a checkpoint as an item that Orbax restores.

All arrays lie in one OCDBT database, as Orbax leaves it when it has joined
those of its processes. Tensors that lie in another checkpoint of Orbax already
are not copied: its data files are linked into the new folder, and the new index
points into them, under whatever names.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorstore as ts

import surgery
from surgery import Checkpoint, Leaf, formats
from surgery.formats import Index, Path, show_path
from surgery_orbax import folders, index, reading

Told = Callable[[int, int], None]

# A chunk is what is read at once, and by how much hosts can divide a tensor.
_CHUNK = 8 << 20
# A transaction is in memory until it is committed, and more than once while it
# is. Each writes anew those nodes of the index that it changes, so they are
# small.
_TRANSACTION = 24 << 20
_CONFIG = {'max_inline_value_bytes': 1024, 'max_decoded_node_bytes': 1 << 20}
_HANDLER = (
  'orbax.checkpoint._src.handlers.standard_checkpoint_handler.'
  'StandardCheckpointHandler'
)
# TensorStore has no zarr data type for these.
_UNKNOWN = {'float6_e2m3fn', 'float6_e3m2fn', 'float8_e4m3', 'uint2', 'uint4'}
_UNKNOWN |= {'float8_e3m4'}


def write_folder(
  checkpoint: Checkpoint,
  path: str | os.PathLike[str],
  manifest: bool,
  progress: Told | None,
) -> None:
  """Writes a folder, whole or not at all; see `Orbax.write`."""
  _check(checkpoint)
  if manifest:
    # What cannot be said should be known before gigabytes are written.
    formats.manifest_of(checkpoint)
  with formats.folder(path) as folder:
    writer = _Writer(folder, progress)
    writer.write(checkpoint)
    writer.finish(checkpoint)
    if manifest:
      _write_manifest(folder, checkpoint, writer)
    _write_metadata(folder, checkpoint, writer)


def _check(checkpoint: Checkpoint) -> None:
  """Raises for what Orbax cannot hold, before anything is written.

  Raises:
    FormatError: naming the tensor.
  """
  formats.nested(checkpoint)
  seen: dict[str, Path] = {}
  for path, leaf in checkpoint.items():
    shown = show_path(path)
    if not all(isinstance(k, str) for k in path):
      raise surgery.FormatError(
        f'expected a path of one or more strings, found {path!r}.'
      )
    name = '.'.join(path)
    if any(part in ('', '.', '..') for part in name.split('/')) or '\0' in name:
      raise surgery.FormatError(
        f'{shown}: Orbax would store it as {name!r}, which is no name of an '
        'array. Rename the parameter.'
      )
    try:
      name.encode()
    except UnicodeEncodeError as error:
      raise surgery.FormatError(
        f'{shown!a}: a name cannot be written as UTF-8: {error.reason}. Rename '
        'the parameter.'
      ) from None
    other = seen.setdefault(name, path)
    if other != path:
      raise surgery.FormatError(
        f'{show_path(other)} and {shown} would both be stored as {name}, and '
        'Orbax would read the same tensor twice. Rename one of them.'
      )
    _check_leaf(shown, leaf)


def _check_leaf(shown: str, leaf: Leaf) -> None:
  if leaf.shape is None:
    return
  if leaf.dtype in _UNKNOWN or leaf.dtype not in formats.DTYPES:
    raise surgery.FormatError(
      f'{shown}: Orbax cannot hold the dtype {leaf.dtype}. Cast it, or write '
      'msgpack or safetensors.'
    )
  if 0 in leaf.shape:
    raise surgery.FormatError(
      f'{shown}: Orbax cannot hold an array without elements, found {leaf}. '
      'Drop it, or write msgpack or safetensors.'
    )


class _Writer:
  """Puts tensors into the database of a folder.

  Attributes:
    kinds: type of each value, as `_METADATA` names it.
    digests: digests of what was written.
    strings: values that are texts, by the name of their array.
    scalars: arrays that are numpy's scalars.
    zarr3: whether arrays are zarr 3, as those of the first source are.
  """

  def __init__(self, folder: pathlib.Path, progress: Told | None) -> None:
    self.kinds: dict[Path, str] = {}
    self.digests: dict[Path, str | None] = {}
    self.strings: dict[str, str] = {}
    self.scalars: list[str] = []
    self.zarr3 = False
    self._folder = folder
    self._told = progress or (lambda tensors, nbytes: None)
    self._waiting = 0
    self._transaction = ts.Transaction()
    self._context = ts.Context({'cache_pool': {'total_bytes_limit': 0}})
    self._where = {**index.database(folder), 'config': _CONFIG}
    opened = ts.KvStore.open(self._where, context=self._context)
    self._database = opened.result()
    self._shared: set[reading.Store] = set()
    self._linked: dict[pathlib.Path, Any] = {}
    self._expected: dict[str, int] = {}

  def write(self, checkpoint: Checkpoint) -> None:
    """Writes all tensors, one at a time."""
    kept: dict[reading.Store, int] = {}
    for leaf in checkpoint.values():
      if isinstance(leaf.source, reading.Tensor):
        store = leaf.source.store
        same = leaf.load is leaf.source
        kept[store] = kept.get(store, 0) + leaf.nbytes * same
    self.zarr3 = bool(kept) and all(store.zarr3 for store in kept)
    # A data file holds many tensors, and lasts as long as one is linked. So
    # what was dropped would stay on the disk.
    self._shared = {s for s, size in kept.items() if 2 * size >= s.nbytes}
    for path, leaf in checkpoint.items():
      if not self._link(path, leaf):
        self._compute(path, leaf)
    self._commit()

  def finish(self, checkpoint: Checkpoint) -> None:
    """Sees to it that the index has all chunks of all arrays.

    Raises:
      FormatError: if something was lost.
    """
    found = index.of_database(self._folder) if self._expected else {}
    for name, expected in self._expected.items():
      there = found[name].found if name in found else 0
      if there != expected:
        raise surgery.FormatError(
          f'{self._folder}: {name}: expected {expected} chunks to have been '
          f'written, found {there}. Write it again.'
        )

  def _link(self, path: Path, leaf: Leaf) -> bool:
    """Lets the index point at a tensor that lies in another checkpoint."""
    source = leaf.source
    if (
      not isinstance(source, reading.Tensor)
      or leaf.load is not source
      or source.store not in self._shared
      or not source.store.links(source.array.name)
      or source.array.zarr3 != self.zarr3
    ):
      return False
    origin = self._linked_to(source.store.folder)
    if origin is None:
      return False
    name = '.'.join(path)
    target = self._database / f'{name}/'
    (origin / f'{source.array.name}/').experimental_copy_range_to(
      target
    ).result()
    self._expected[name] = source.array.found
    self.kinds[path] = 'np.ndarray'
    self.digests[path] = leaf.digest
    self._told(1, leaf.nbytes)
    return True

  def _linked_to(self, folder: pathlib.Path) -> Any:
    """Returns another checkpoint's database, its files linked into ours.

    Returns:
      None if files cannot be linked: they lie on another disk, say.
    """
    if not hasattr(ts.KvStore, 'experimental_copy_range_to'):
      return None
    if folder not in self._linked:
      inside = self._folder / f'ocdbt.process_{len(self._linked)}'
      try:
        _link_database(folder, inside)
      except OSError:
        shutil.rmtree(inside, ignore_errors=True)
        self._linked[folder] = None
      else:
        opened = ts.KvStore.open(index.database(inside), context=self._context)
        self._linked[folder] = opened.result()
    return self._linked[folder]

  def _compute(self, path: Path, leaf: Leaf) -> None:
    """Computes a tensor in blocks and writes it in chunks."""
    name = '.'.join(path)
    value = formats.payload(leaf, path)
    if not isinstance(value, formats.Payload):
      value = self._plain(path, name, value)
      if value is None:
        return
    else:
      said = Leaf(leaf.load, value.shape, value.dtype)
      _check_leaf(show_path(path), said)
      self.kinds[path] = 'scalar' if value.scalar else 'np.ndarray'
      if value.scalar:
        self.scalars.append(name)
    self._chunks(name, value)
    if leaf.shape is not None or value.shape:
      self.digests[path] = value.digest(leaf.digest)
    self._told(1, 0)

  def _plain(self, path: Path, name: str, value: Any) -> formats.Payload | None:
    """Takes note of a value that is no array; numbers are stored as arrays."""
    if value is None or value == {}:
      self.kinds[path] = 'None' if value is None else 'Dict'
    elif isinstance(value, str):
      self.kinds[path] = 'string'
      self.strings[name] = value
    elif isinstance(value, (bool, int, float)):
      self.kinds[path] = 'scalar'
      number = _number(path, value)
      return formats.payload(Leaf(lambda: number), path)
    else:
      raise surgery.FormatError(
        f'{show_path(path)}: Orbax cannot hold a value of type '
        f'{type(value).__name__}. Drop it, or write msgpack.'
      )
    return None

  def _chunks(self, name: str, value: formats.Payload) -> None:
    dtype = formats.DTYPES[value.dtype]
    chunk = _chunk(value.shape, dtype.itemsize)
    metadata = _array_metadata(value.shape, chunk, dtype, self.zarr3)
    store = self._opened(name, metadata)
    count = 0
    for cut in _cuts(value.shape, chunk):
      sizes = [c.stop - c.start for c in cut]
      sink = _Sink(math.prod(sizes) * dtype.itemsize)
      value.write(sink, len(sink.data))  # type: ignore[arg-type]
      block = np.frombuffer(sink.data, dtype).reshape(sizes)
      store[cut].write(block).result()
      count += 1
      self._waiting += block.nbytes
      self._told(0, block.nbytes)
      if self._waiting >= _TRANSACTION:
        self._commit()
        store = self._opened(name, metadata)
    self._expected[name] = count

  def _opened(self, name: str, metadata: dict[str, Any]) -> Any:
    """Returns an array, to which is written within the transaction."""
    return ts.open(
      {
        'driver': 'zarr3' if self.zarr3 else 'zarr',
        'kvstore': {**self._where, 'path': f'{name}/'},
        'metadata': metadata,
        # A chunk that was left out could not be told from one that was lost.
        'store_data_equal_to_fill_value': True,
      },
      create=True,
      open=True,
      context=self._context,
      transaction=self._transaction,
    ).result()

  def _commit(self) -> None:
    self._transaction.commit_async().result()
    self._transaction = ts.Transaction()
    self._waiting = 0


def _number(path: Path, value: float) -> np.ndarray:
  """Returns a number of Python's as the array that Orbax makes of it.

  Raises:
    FormatError: if it has more than 64 bits.
  """
  kinds = ((bool, 'bool'), (int, 'int64'), (float, 'float64'))
  dtype = next(d for kind, d in kinds if isinstance(value, kind))
  try:
    return np.asarray(value, dtype)
  except OverflowError:
    raise surgery.FormatError(
      f'{show_path(path)}: Orbax holds whole numbers of 64 bits, found '
      f'{value}. Drop it, or write msgpack.'
    ) from None


class _Sink:
  """Takes the bytes of a chunk in the place of an `Output`."""

  def __init__(self, size: int) -> None:
    self.data = bytearray(size)
    self._at = 0

  def write(self, piece: memoryview) -> None:
    """Takes further bytes."""
    self.data[self._at : self._at + len(piece)] = piece
    self._at += len(piece)

  def copy(self, file: Any, begin: int, end: int) -> None:
    """Takes a range of a file."""
    self.write(memoryview(file.data)[begin:end])
    file.forget(begin, end)


def _chunk(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
  """Returns the shape of a chunk: whole rows, that divide the tensor evenly.

  What does not divide it is padded in its last chunk, and hosts that read a
  part of a tensor each read whole chunks.
  """
  most = max(1, _CHUNK // itemsize)
  if math.prod(shape) <= most:
    return shape
  axis = next(k for k in range(len(shape)) if math.prod(shape[k + 1 :]) <= most)
  rows = max(1, most // math.prod(shape[axis + 1 :]))
  even = next(r for r in range(rows, 0, -1) if shape[axis] % r == 0)
  if even * 8 >= rows:
    rows = even
  return (*(1,) * axis, rows, *shape[axis + 1 :])


def _cuts(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
  """Returns the regions of chunks, in C order."""
  counts = [-(-size // one) for size, one in zip(shape, chunk, strict=True)]
  for at in np.ndindex(*counts):
    yield tuple(
      slice(i * one, min((i + 1) * one, size))
      for i, one, size in zip(at, chunk, shape, strict=True)
    )


def _array_metadata(
  shape: tuple[int, ...],
  chunk: tuple[int, ...],
  dtype: np.dtype[Any],
  zarr3: bool,
) -> dict[str, Any]:
  if zarr3:
    return {
      'shape': list(shape),
      'data_type': dtype.name,
      'chunk_grid': {
        'name': 'regular',
        'configuration': {'chunk_shape': list(chunk)},
      },
      'codecs': [
        {'name': 'bytes', 'configuration': {'endian': 'little'}},
        {'name': 'zstd', 'configuration': {'level': 1}},
      ],
    }
  known = dtype.type.__module__ == 'numpy'
  return {
    'shape': list(shape),
    'chunks': list(chunk),
    'dtype': dtype.newbyteorder('<').str if known else dtype.name,
    'compressor': {'id': 'zstd', 'level': 1},
    'dimension_separator': '.',
    'fill_value': None,
    'filters': None,
    'order': 'C',
  }


def _link_database(folder: pathlib.Path, inside: pathlib.Path) -> None:
  """Links the files of a database, and of those that it points into."""
  for file in folder.rglob('*'):
    target = inside / file.relative_to(folder)
    if file.is_file() and (
      file.parent.name == 'd' or file.name == folders.INDEX
    ):
      target.parent.mkdir(parents=True, exist_ok=True)
      os.link(file, target)


def _write_manifest(
  folder: pathlib.Path, checkpoint: Checkpoint, writer: _Writer
) -> None:
  extra = dict(checkpoint.manifest.extra)
  extra.pop(reading.LISTS, None)  # `_METADATA` says it.
  said = checkpoint.manifest.replace(extra=extra)
  own = {'scalars': writer.scalars} if writer.scalars else None
  text = formats.manifest_of(
    checkpoint.replace(manifest=said), writer.digests, own=own
  )
  if text is not None:
    (folder / reading.MANIFEST).write_bytes(text)


def _write_metadata(
  folder: pathlib.Path, checkpoint: Checkpoint, writer: _Writer
) -> None:
  """Writes what Orbax reads first; without it nothing is a checkpoint."""
  lists = _lists(checkpoint)
  tree = {}
  for path in checkpoint:
    keys = [
      {'key': key, 'key_type': 1 if path[:n] in lists else 2}
      for n, key in enumerate(path)
    ]
    kind = writer.kinds[path]
    tree[repr(path)] = {
      'key_metadata': keys,
      'value_metadata': {
        'value_type': kind,
        'skip_deserialize': kind in ('None', 'Dict'),
      },
    }
  _dump(
    folder / folders.METADATA,
    {
      'tree_metadata': tree,
      'use_ocdbt': True,
      'use_zarr3': writer.zarr3,
      'store_array_data_equal_to_fill_value': True,
      'custom_metadata': None,
    },
  )
  if writer.strings:
    _dump(folder / '_strings.json', writer.strings)
  now = time.time_ns()
  _dump(
    folder / folders.CHECKPOINT,
    {
      'item_handlers': _HANDLER,
      'metrics': {},
      'performance_metrics': {},
      'init_timestamp_nsecs': now,
      'commit_timestamp_nsecs': now,
      'custom_metadata': {},
    },
  )


def _lists(checkpoint: Checkpoint) -> set[Path]:
  """Returns which containers are lists: those that were, and still can be."""
  children: dict[Path, set[str]] = {}
  for path in checkpoint:
    for n in range(len(path)):
      children.setdefault(path[:n], set()).add(path[n])
  return {
    path
    for text in checkpoint.manifest.extra.get(reading.LISTS, ())
    if (path := _parsed(text)) in children
    and children[path] == {str(i) for i in range(len(children[path]))}
  }


def _parsed(text: str) -> Path:
  return formats.parse_path(text) if text else ()


def _dump(file: pathlib.Path, data: Any) -> None:
  file.write_text(json.dumps(data), 'utf-8')
