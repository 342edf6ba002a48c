"""Opens an item of Orbax as a checkpoint."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

import surgery
from surgery import Checkpoint, Leaf, formats
from surgery.formats import Index, LeafNote, Manifest, Path, show_path
from surgery_orbax import folders, index

# Our manifest, which Orbax leaves alone.
MANIFEST = '_SURGERY'
# Names that lead to another folder.
_OUTSIDE = re.compile('/[.]{0,2}/').search
# What `Manifest.extra` says of containers that are lists.
LISTS = 'orbax_lists'
# Of what was decoded that much is kept, or the largest chunk: blocks of one
# chunk would otherwise decode it once a block.
_CACHE = 32 << 20
_NOTHING = LeafNote()


class Entry(NamedTuple):
  """What `_METADATA` says of a leaf.

  Attributes:
    path: its keys, numbers as text.
    name: what its array is called.
    kind: type of its value, e.g. `jax.Array`, `scalar`, `None`.
    empty: whether it has no value.
    lists: which of its keys are positions in a list.
  """

  path: Path
  name: str
  kind: str
  empty: bool
  lists: tuple[bool, ...]


class Tensor(formats.Tensor):
  """An array in a folder, read when it is called.

  Args:
    store: opens arrays of the folder.
    array: which one.
    path: its path in the checkpoint.
    digest: the digest on record, if there is one.
  """

  __slots__ = ('array', 'store')
  piece = 16 << 20

  def __init__(
    self, store: Store, array: index.Array, path: Path, digest: str | None
  ) -> None:
    super().__init__(path, digest)
    self.store = store
    self.array = array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array."""
    return self.array.shape

  @property
  def dtype(self) -> str:
    """Name of its dtype."""
    return self.array.dtype

  @property
  def nbytes(self) -> int:
    """Number of bytes."""
    return math.prod(self.shape) * self._dtype.itemsize

  @property
  def place(self) -> tuple[str, int | None]:
    """The folder; where in its files the tensor lies is not known."""
    return str(self.store.folder), None

  def __call__(self) -> np.ndarray:
    """Returns the whole array.

    Raises:
      FormatError: if it cannot be read, or is not what its digest says.
    """
    value = self._read(())
    self.follow(0, value.reshape(-1).view(np.uint8))
    return value

  def part(self, cut: Index) -> np.ndarray:
    """Returns one of the blocks of its `grid`; see `Leaf.part`."""
    if not cut:
      return self()
    value = self._read(cut)
    self.follow(self._start(cut), value.reshape(-1).view(np.uint8))
    return value

  def region(self, cut: Index) -> np.ndarray:
    """Returns any region; held against the digest with all of the tensor."""
    self.settle()
    return self._read(cut)

  def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
    """Returns bytes `start` to `stop`, by reading the blocks they lie in."""
    at = 0
    for cut in formats.grid(self.array.shape):
      size = self._sized(cut)
      if at < stop and start < at + size:
        flat = self._read(cut).reshape(-1).view(np.uint8)
        yield flat[max(start - at, 0) : stop - at].data
      at += size

  def unchecked(self) -> Tensor:
    """Returns it as it is, whatever its digest says."""
    return Tensor(self.store, self.array, self.path, None)

  @property
  def _dtype(self) -> np.dtype[Any]:
    return formats.DTYPES[self.array.dtype]

  def _sized(self, cut: Index) -> int:
    sizes = [c.stop - c.start for c in cut]
    return (
      math.prod((*sizes, *self.array.shape[len(cut) :])) * self._dtype.itemsize
    )

  def _start(self, cut: Index) -> int:
    """Returns at which byte a block starts."""
    at = 0
    for one, size in zip(cut, self.array.shape, strict=False):
      at = at * size + one.start
    return at * math.prod(self.array.shape[len(cut) :]) * self._dtype.itemsize

  def _read(self, cut: Index) -> np.ndarray:
    where = f'{self.store.folder}: {show_path(self.path)}'
    try:
      opened = self.store.opened(self.array)
      value = opened[cut].read().result() if cut else opened.read().result()
    except (ValueError, OSError) as error:
      raise surgery.FormatError(
        f'{where}: the tensor cannot be read: {error}. The checkpoint is '
        'damaged; fetch or save it again.'
      ) from None
    array = np.asarray(value, self._dtype, order='C')
    if self.array.dtype == 'bool' and array.size:
      most = int(array.view(np.uint8).max())
      if most > 1:
        raise surgery.FormatError(
          f'{where}: expected booleans, found the byte {most}. The checkpoint '
          'is damaged; fetch or save it again.'
        )
    return array


class Store:
  """Opens the arrays of a folder, each once.

  Attributes:
    folder: the item's folder.
    database: whether it is an OCDBT database.
    zarr3: whether its arrays are zarr 3.
    nbytes: bytes of all its arrays.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    database: bool,
    found: Mapping[str, index.Array],
  ) -> None:
    self.folder = folder
    self.database = database
    self.zarr3 = any(array.zarr3 for array in found.values())
    self.nbytes = sum(array.nbytes for array in found.values())
    # Names in front of others: `a` beside `a/b`.
    self._outer = {
      name[:at]
      for name in found
      for at, letter in enumerate(name)
      if letter == '/'
    }
    largest = max((a.chunk_bytes for a in found.values()), default=0)
    limit = max(_CACHE, largest + (4 << 20))
    self._context = ts.Context({'cache_pool': {'total_bytes_limit': limit}})
    self._last: tuple[str, Any] | None = None

  def links(self, name: str) -> bool:
    """Whether an array's keys can be copied by what they begin with.

    Those of `a/b` begin with `a/` as well.
    """
    return self.database and name not in self._outer

  def opened(self, array: index.Array) -> Any:
    """Returns an array as TensorStore has it; the last one is kept open."""
    last = self._last
    if last is not None and last[0] == array.name:
      return last[1]
    if self.database:
      where = {**index.database(self.folder), 'path': f'{array.name}/'}
    else:
      where = index.base(self.folder / array.name)
    spec = {
      'driver': 'zarr3' if array.zarr3 else 'zarr',
      'kvstore': where,
      # A checkpoint is written once.
      'recheck_cached_metadata': 'open',
      'recheck_cached_data': 'open',
    }
    found = ts.open(spec, open=True, context=self._context).result()
    self._last = array.name, found
    return found


def open_folder(folder: pathlib.Path) -> Checkpoint:
  """Opens an item without reading its tensors.

  Raises:
    FormatError: if it is not as Orbax or this library writes it.
  """
  said = _metadata(folder)
  entries = list(_entries(folder, said))
  database = (folder / folders.INDEX).exists()
  stored = [e for e in entries if not e.empty and e.kind != 'string']
  _check_names(folder, stored)
  if database:
    found = index.of_database(folder)
  else:
    found = index.of_files(folder, [e.name for e in stored])
  _check_complete(folder, said, stored, found)
  store = Store(folder, database, found)
  whole, told, scalars = _manifest(folder, entries)
  keys = _keys(folder)
  strings = _strings(folder)
  leaves = {}
  for entry in entries:
    note = told.get(entry.path, _NOTHING)
    if entry.empty:
      leaf = _empty(folder, entry)
    elif entry.kind == 'string':
      leaf = _string(folder, entry, strings)
    else:
      leaf = _leaf(store, entry, found[entry.name], note, scalars)
      if entry.name in keys and note.key is None:
        leaf = leaf.with_fields(key=keys[entry.name])
    # A digest is in the leaf already; few tensors have more.
    if (
      not note.trainable or note.metadata or note.key or note.codes or note.base
    ):
      leaf = leaf.with_fields(
        trainable=note.trainable,
        metadata=note.metadata,
        key=note.key or leaf.key,
        codes=note.codes,
        base=note.base,
      )
    leaves[entry.path] = leaf
  lists = sorted(
    {
      show_path(entry.path[:n])
      for entry in entries
      if True in entry.lists
      for n, at in enumerate(entry.lists)
      if at
    }
  )
  extra = {k: v for k, v in whole.extra.items() if k != LISTS}
  if lists:
    extra[LISTS] = lists
  return Checkpoint(leaves, whole.replace(extra=extra), origin=str(folder))


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
  file = folder / folders.METADATA
  said = _json(file)
  tree = said.get('tree_metadata') if isinstance(said, dict) else None
  if not isinstance(tree, dict):
    raise surgery.FormatError(
      f'{file}: expected an object with tree_metadata, the names of the '
      'tensors. The checkpoint is damaged, or older than Orbax 0.5: restore it '
      'with Orbax and save it again.'
    )
  return dict(said)


def _json(file: pathlib.Path) -> Any:
  try:
    return json.loads(file.read_bytes())
  except (ValueError, RecursionError) as error:
    raise surgery.FormatError(
      f'{file}: expected JSON: {error}. The checkpoint is damaged; fetch or '
      'save it again.'
    ) from None


def _entries(folder: pathlib.Path, said: dict[str, Any]) -> Iterator[Entry]:
  """Returns the leaves that `_METADATA` names, in its order."""
  for text, about in said['tree_metadata'].items():
    try:
      keys = about['key_metadata']
      value = about['value_metadata']
      path = tuple(str(one['key']) for one in keys)
      lists = tuple(one['key_type'] == 1 for one in keys)
      kind, empty = str(value['value_type']), bool(value['skip_deserialize'])
    except (TypeError, KeyError) as error:
      raise surgery.FormatError(
        f'{folder / folders.METADATA}: {text}: expected key_metadata and '
        f'value_metadata as Orbax writes them: {error!r}. The checkpoint is '
        'damaged, or newer than this release of surgery-orbax.'
      ) from None
    if not path:
      raise surgery.FormatError(
        f'{folder}: expected tensors with names, found one tensor that was '
        'saved by itself. Save a dict of it.'
      )
    yield Entry(path, '.'.join(path), kind, empty, lists)


def _check_names(folder: pathlib.Path, entries: list[Entry]) -> None:
  """Raises unless each leaf has an array of its own, inside of the folder.

  Orbax joins keys by dots, so `{'a': {'b': …}}` and `{'a.b': …}` lie in one
  array, and what was saved first is lost.
  """
  seen: dict[str, Path] = {}
  for entry in entries:
    if _OUTSIDE(f'/{entry.name}/'):
      raise surgery.FormatError(
        f'{folder}: {entry.name!r}: expected the name of a tensor, found one '
        'that leads out of the checkpoint.'
      )
    other = seen.setdefault(entry.name, entry.path)
    if other != entry.path:
      raise surgery.FormatError(
        f'{folder}: {show_path(other)} and {show_path(entry.path)} are both '
        f'stored as {entry.name}, so Orbax has overwritten one of them. Rename '
        'one where they are made, and save them again.'
      )


def _check_complete(
  folder: pathlib.Path,
  said: dict[str, Any],
  entries: list[Entry],
  found: Mapping[str, index.Array],
) -> None:
  """Raises unless all arrays are there with all their chunks."""
  missing = [e.name for e in entries if e.name not in found]
  if missing:
    raise surgery.FormatError(
      f'{folder}: {folders.METADATA} names {len(missing)} tensors that are not '
      f'there: {", ".join(missing[:5])}. The checkpoint is incomplete; fetch '
      'or save it again.'
    )
  # Before Orbax 0.5.21 a chunk of zeros was left out.
  if not said.get('store_array_data_equal_to_fill_value'):
    return
  for entry in entries:
    one = found[entry.name]
    if one.found != one.expected:
      raise surgery.FormatError(
        f'{folder}: {show_path(entry.path)}: expected {one.expected} chunks, '
        f'found {one.found}. What is missing would be read as zeros. The '
        'checkpoint is incomplete; fetch or save it again.'
      )


def _keys(folder: pathlib.Path) -> dict[str, str]:
  """Returns the PRNG implementations of arrays that are keys."""
  found = {}
  for file in sorted((folder / 'array_metadatas').glob('process_*')):
    for one in _json(file).get('array_metadatas', ()):
      about = one.get('array_metadata') or {}
      impl = (about.get('ext_metadata') or {}).get('random_key_impl')
      if impl:
        found[about['param_name']] = impl
  return found


def _strings(folder: pathlib.Path) -> dict[str, str]:
  file = folder / '_strings.json'
  return dict(_json(file)) if file.is_file() else {}


def _manifest(
  folder: pathlib.Path, entries: list[Entry]
) -> tuple[Manifest, Mapping[Path, LeafNote], frozenset[str]]:
  """Returns what our manifest says; of Orbax's own folder nothing."""
  file = folder / MANIFEST
  if not file.is_file():
    return Manifest(), {}, frozenset()
  whole, told, own = formats.read_manifest(
    file.read_bytes(), str(file), {e.path for e in entries}
  )
  return whole, told, frozenset(own.get('scalars', ()))


def _leaf(
  store: Store,
  entry: Entry,
  array: index.Array,
  note: LeafNote,
  scalars: frozenset[str],
) -> Leaf:
  tensor = Tensor(store, array, entry.path, note.digest)
  numpy_scalar = entry.name in scalars
  if entry.kind == 'scalar' and not array.shape and not numpy_scalar:
    # Python's numbers take 64 bits; what has fewer was numpy's or JAX's.
    if array.dtype in ('int64', 'float64', 'bool'):
      return Leaf(functools.partial(_number, tensor))
    numpy_scalar = True
  if numpy_scalar:
    load: Any = functools.partial(_scalar, tensor)
    return Leaf(load, array.shape, array.dtype, scalar=True, digest=note.digest)
  return Leaf(
    tensor,
    array.shape,
    array.dtype,
    digest=note.digest,
    source=tensor,
    part=tensor.part,
    region=tensor.region,
  )


def _number(tensor: Tensor) -> Any:
  return tensor().item()


def _scalar(tensor: Tensor) -> Any:
  return tensor()[()]


def _empty(folder: pathlib.Path, entry: Entry) -> Leaf:
  """Returns a leaf without a value: None, or an empty container."""
  if entry.kind == 'Dict':
    return Leaf(dict)
  # An empty list, tuple or namedtuple holds nothing, as None does.
  return Leaf(lambda: None)


def _string(
  folder: pathlib.Path, entry: Entry, strings: Mapping[str, str]
) -> Leaf:
  if entry.name not in strings:
    raise surgery.FormatError(
      f'{folder}: {show_path(entry.path)}: expected a text in _strings.json, '
      'found none. The checkpoint is incomplete; fetch or save it again.'
    )
  return Leaf(functools.partial(str, strings[entry.name]))
