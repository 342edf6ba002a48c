"""Sets of files that are one model: shards, and an index that names them.

`out-00001-of-00003.msgpack` and so on are files as the format has them, each
with some of the tensors. `out.msgpack.index.json` says in which file each one
lies (`weight_map`), as sets on model hubs do, and has the manifest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from surgery import errors
from surgery.files import atomic, atomic_sets, notes, strict_json
from surgery.files.output import Output
from surgery.files.progress import Told
from surgery.files.source import MappedFile, Source
from surgery.host import location
from surgery.model import manifest as manifests
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import LeafNote, Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

_NOTHING = LeafNote()
_AGAIN = 'Fetch it again, or write the set again.'


class Parts(Protocol):
  """What a format offers so that its files can be shards."""

  def names(self, checkpoint: Checkpoint) -> tuple[Checkpoint, dict[Path, str]]:
    """Returns the leaves in the order of a file, and what files call them.

    A leaf without a name lies in a file too, but no index lists it.

    Raises:
      FormatError: if a file cannot hold one.
    """

  def metadata(self, checkpoint: Checkpoint) -> Mapping[str, str]:
    """Returns text by text what each file of a set says of the whole."""

  def empty(self, about: Manifest) -> int:
    """Returns how many bytes a file without leaves takes, at most.

    Args:
      about: what all files of the set say.
    """

  def overhead(self, path: Path, leaf: Leaf) -> int:
    """Returns how many bytes a leaf takes beside its own, at most."""

  def write_part(
    self,
    checkpoint: Checkpoint,
    output: Output,
    names: Mapping[Path, str],
    manifest: bool,
  ) -> dict[Path, str | None]:
    """Writes a shard and returns the leaves' digests.

    Args:
      checkpoint: what is in it.
      output: takes the bytes.
      names: what leaves are called.
      manifest: whether the shard may say what arrays cannot.
    """

  def open_part(
    self, path: pathlib.Path
  ) -> tuple[Checkpoint, Mapping[Path, str]]:
    """Opens a shard; returns it, and what it calls its leaves."""


def write_set(
  checkpoint: Checkpoint,
  path: str | os.PathLike[str],
  form: Parts,
  shard_size: int,
  *,
  overwrite: bool = False,
  manifest: bool = True,
  progress: Told | None = None,
) -> None:
  """Writes a set, whole or not at all.

  Args:
    checkpoint: what to write.
    path: what the set is called, e.g. `out.msgpack`.
    form: the format of its files.
    shard_size: most bytes a file; a tensor that is larger has its own.
    overwrite: whether a file or a set of that name, and files of a set without
      an index, may be replaced.
    manifest: whether flags, metadata, adapters and so on are written too.
    progress: called with the numbers of tensors and bytes that were written.

  Raises:
    FormatError: if a file cannot hold a name, a value or the metadata.
    FileExistsError: if there is a file that must not be replaced.
    OSError: if it cannot be written.
  """
  if type(shard_size) is not int or shard_size < 1:
    raise errors.FormatError(
      f'shard_size: expected a number of bytes (1 or more), found '
      f'{shard_size!r}.'
    )
  checkpoint, names = form.names(checkpoint)
  if not names:
    raise errors.FormatError(
      f'{os.fsdecode(path)}: a set of files needs at least one tensor, found '
      'none. Write one file, without a shard_size.'
    )
  known = checkpoint.notes()
  manifest = manifest and notes.worth_saying(checkpoint)
  if manifest:
    # Errors in the manifest should show before gigabytes are written.
    manifests.dumps(checkpoint.manifest, known)
  # The names of files contain their number, so all are known before the first
  # is written.
  shards = list(_cut(checkpoint, names, form, shard_size))
  with atomic_sets.writing(path, len(shards), overwrite=overwrite) as files:
    for shard in shards:
      with files.next() as fd:
        output = Output(fd, progress)
        digests = form.write_part(shard, output, names, manifest)
        output.flush()
      for where, digest in digests.items():
        known[where] = dataclasses.replace(known[where], digest=digest)
    # The index comes last, since it has the digests of what was computed.
    weight_map = {
      names[where]: file.name
      for shard, file in zip(shards, files.names, strict=True)
      for where in shard
      if where in names
    }
    total = sum(leaf.nbytes for leaf in checkpoint.values())
    about = manifests.to_json(checkpoint.manifest, known) if manifest else None
    _put(files.fd, _index(weight_map, total, about))


def _put(fd: int, text: bytes) -> None:
  """Writes a text to a descriptor."""
  output = Output(fd)
  output.write(text)
  output.flush()


def _cut(
  checkpoint: Checkpoint, names: Mapping[Path, str], form: Parts, most: int
) -> Iterator[Checkpoint]:
  """Yields runs of leaves that fit into a file, each with the same metadata."""
  about = Manifest(metadata=form.metadata(checkpoint))
  leaves: dict[Path, Leaf] = {}
  empty = form.empty(about)
  size, full = empty, False
  for path, leaf in checkpoint.items():
    own = leaf.nbytes + form.overhead(path, leaf)
    # A leaf that the index cannot list (an empty dict, say) stays with a
    # tensor that it lists, or its file would never be opened.
    if path in names and full and size + own > most:
      yield Checkpoint(leaves, about)
      leaves, size, full = {}, empty, False
    leaves[path] = leaf.replace(
      trainable=True, metadata={}, key=None, digest=leaf.digest
    )
    size += own
    full = full or path in names
  yield Checkpoint(leaves, about)


def _index(
  weight_map: Mapping[str, str], size: int, said: Mapping[str, Any] | None
) -> bytes:
  """Returns the text of an index.

  Raises:
    FormatError: if it is too long to be read again.
  """
  metadata: dict[str, Any] = {'total_size': size}
  if said is not None:
    metadata[manifests.KEY] = said
  return _encoded({'metadata': metadata, 'weight_map': weight_map})


def _encoded(data: Mapping[str, Any]) -> bytes:
  text = json.dumps(data, ensure_ascii=False, indent=2) + '\n'
  raw = text.encode()
  if strict_json.too_large(raw):
    raise errors.FormatError(
      f'the index has {len(raw):,} bytes, more than any known model has. Write '
      'one file, without a shard_size.'
    )
  return raw


def annotate(index: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
  """Rewrites the manifest in an index; the files with the tensors stay.

  Args:
    index: the index; it is replaced as a whole.
    checkpoint: what was opened from it, with other flags, digests and so on.

  Raises:
    FormatError: if the manifest cannot be written.
    OSError: if it cannot be written.
  """
  file = MappedFile(index)
  data = strict_json.loads(_text(file), file.name)
  said = manifests.to_json(checkpoint.manifest, checkpoint.notes())
  # Other programs may have left it out, or written another size.
  size = sum(leaf.nbytes for leaf in checkpoint.values())
  data['metadata'] = {
    **data.get('metadata', {}),
    'total_size': size,
    manifests.KEY: said,
  }
  raw = _encoded(data)
  with atomic.writing(index, overwrite=True) as fd:
    _put(fd, raw)


def open_set(index: str | os.PathLike[str], form: Parts) -> Checkpoint:
  """Opens a set without reading its tensors.

  Args:
    index: its index.
    form: the format of its files.

  Raises:
    FormatError: if the index is not what it should be, or a file is missing or
      has other tensors than the index says.
    FileNotFoundError: if there is no such index.
  """
  file = MappedFile(index)
  data = strict_json.loads(_text(file), file.name)
  weight_map = _texts(file.name, data, 'weight_map')
  metadata = data.get('metadata', {})
  if not isinstance(metadata, dict):
    raise _wrong(
      file.name,
      f"expected 'metadata' to be an object, found {_short(metadata)}",
    )
  leaves: dict[Path, Leaf] = {}
  foreign: dict[str, str] = {
    key: value for key, value in metadata.items() if isinstance(value, str)
  }
  for name, part, names in _parts(file.name, weight_map, form):
    _check(file.name, name, part, names, weight_map)
    for path, leaf in part.items():
      if path in leaves:
        raise _wrong(file.name, f'{paths.show(path)} occurs twice')
      leaves[path] = leaf
    for key, value in part.manifest.metadata.items():
      foreign.setdefault(key, value)
  manifest = Manifest(metadata=foreign)
  if manifests.KEY in metadata:
    manifest, said = notes.read(metadata[manifests.KEY], file.name, 0, leaves)
    _check_size(file.name, metadata, leaves)
    leaves = {
      path: _noted(leaf, said.get(path)) for path, leaf in leaves.items()
    }
  return Checkpoint(leaves, manifest, origin=file.name)


def _text(file: MappedFile) -> bytes:
  if file.size > strict_json.MAX_SIZE:
    raise _wrong(
      file.name,
      f'expected an index of at most {strict_json.MAX_SIZE:,} bytes, found '
      f'{file.size:,}',
    )
  return file.data[:]


def _wrong(where: str, what: str) -> errors.FormatError:
  return errors.FormatError(f'{where}: {what}. {_AGAIN}', 0)


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:80]}…'


def _texts(where: str, data: Mapping[str, Any], key: str) -> dict[str, str]:
  """Returns an object of texts in an index."""
  found = data.get(key)
  if not isinstance(found, dict) or not found:
    raise _wrong(
      where,
      f'expected an index with {key!r}, an object of tensors and their files, '
      f'found {_short(found)}',
    )
  for name, value in found.items():
    if not isinstance(value, str):
      raise _wrong(
        where,
        f'{name!r:.200}: expected the name of a file, found {_short(value)}',
      )
  return found


def _parts(
  where: str, weight_map: Mapping[str, str], form: Parts
) -> Iterator[tuple[str, Checkpoint, Mapping[Path, str]]]:
  """Opens all files of a set."""
  folder = pathlib.Path(where).parent
  files: dict[str, list[str]] = {}
  for name, file in weight_map.items():
    files.setdefault(file, []).append(name)
  for file in files:
    _check_file(where, file)
  missing = [file for file in files if not (folder / file).is_file()]
  if missing:
    lost = [name for file in missing for name in files[file]]
    there = len(files) - len(missing)
    raise _wrong(
      where,
      f'expected {len(files)} files beside it, found {there}. '
      f'Missing: {_some(missing)}; in it {_some(lost)}',
    )
  _check_numbers(where, folder, files)
  for file in files:
    part, names = form.open_part(folder / file)
    yield file, part, names


def _numbers_of(folder: pathlib.Path, name: str, count: int) -> dict[int, str]:
  """Returns the files of a numbered set that lie in a folder, by number."""
  numbered = {path.name: location.numbered(path) for path in folder.iterdir()}
  return {
    found[1]: file
    for file, found in numbered.items()
    if found is not None and (found[0], found[2]) == (name, count)
  }


def _check_numbers(
  where: str, folder: pathlib.Path, files: Iterable[str]
) -> None:
  """Raises if an index names only some files of a numbered set.

  The name `model-00001-of-00003` implies two more files. Whether these exist or
  not, the files that the index names are not the whole model.
  """
  numbers: dict[tuple[pathlib.Path, str, int], set[int]] = {}
  for file in files:
    path = pathlib.Path(file)
    found = location.numbered(path)
    if found is not None:
      name, number, count = found
      numbers.setdefault((path.parent, name, count), set()).add(number)
  for (above, name, count), there in numbers.items():
    # Some programs count from 0.
    first = 0 if 0 in there else 1
    lost = [k for k in range(first, first + count) if k not in there]
    if not lost:
      continue
    beside = _numbers_of(folder / above, name, count)
    shown = _some([beside.get(k, f'number {k}') for k in lost])
    place = 'lies' if all(k in beside for k in lost) else 'does not lie'
    raise _wrong(
      where,
      f'expected the names of {count} files, as their names say, found '
      f'{len(there)}. It does not name {shown}, which {place} beside it',
    )


def _check_file(where: str, file: str) -> None:
  """Raises unless a name is that of a file beside the index or beneath."""
  path = pathlib.PurePosixPath(file)
  if path.is_absolute() or not path.name or '..' in path.parts or '\0' in file:
    raise _wrong(
      where,
      f'expected names of files in its folder, found {file[:200]!r}. Nothing '
      'outside of the folder is opened',
    )


def _some(names: list[str]) -> str:
  """Returns some of many names."""
  more = f' and {len(names) - 5} more' if len(names) > 5 else ''
  return ', '.join(name[:200] for name in names[:5]) + more


def _check(
  where: str,
  file: str,
  part: Checkpoint,
  names: Mapping[Path, str],
  weight_map: Mapping[str, str],
) -> None:
  """Raises unless a file has exactly the tensors that the index says."""
  said = {name for name, lies in weight_map.items() if lies == file}
  found = set(names.values())
  if said - found:
    raise _wrong(
      where,
      f'expected in {file}: {_some(sorted(said - found))}; not found there',
    )
  for name in sorted(found - said):
    other = weight_map.get(name)
    what = 'does not name' if other is None else f'says lies in {other}'
    raise _wrong(where, f'found in {file}: {name[:200]}, which it {what}')
  nothing = Manifest(metadata=part.manifest.metadata)
  if part.manifest != nothing or any(
    note != _NOTHING for note in part.notes().values()
  ):
    raise errors.FormatError(
      f'{where}: {file} has a manifest ({manifests.KEY}) of its own; a set has '
      'one, in its index. Open that file alone.',
      0,
    )


def _check_size(
  where: str, metadata: Mapping[str, Any], leaves: Mapping[Path, Leaf]
) -> None:
  """Raises unless a set of ours is as large as it says."""
  size = sum(leaf.nbytes for leaf in leaves.values())
  said = metadata.get('total_size')
  if said != size:
    raise _wrong(
      where,
      f'expected tensors of {_short(said)} bytes (total_size), found {size}',
    )


def _noted(leaf: Leaf, note: LeafNote | None) -> Leaf:
  if note is None:
    return leaf
  if isinstance(leaf.source, Source):
    leaf.source.digest = note.digest
  return leaf.replace(
    trainable=note.trainable,
    metadata=note.metadata,
    key=note.key,
    digest=note.digest,
    codes=note.codes,
    base=note.base,
  )
