"""Opens a flax msgpack file as a checkpoint."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping

from surgery import errors
from surgery.files import notes
from surgery.files.msgpack.values import Entry, Value
from surgery.files.msgpack.walk import walk
from surgery.files.source import MappedFile, Source
from surgery.model import manifest as manifests
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import LeafNote, Manifest
from surgery.naming.paths import Path

_NOTHING = LeafNote()


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
  """Opens a file without reading its tensors.

  Args:
    path: a file that flax or this library wrote.

  Returns:
    A checkpoint. Its arrays are read-only views on the file, which stays open
    as long as one of them is in use.

  Raises:
    FormatError: if it is not exactly what flax or this library would have
      written, with path and offset.
    FileNotFoundError: if there is no such file.
    IsADirectoryError: if it is a folder.
  """
  file = MappedFile(path)
  found = walk(file)
  manifest, said = _manifest(file, found)
  leaves = {
    path: _leaf(entry, said.get(path, _NOTHING))
    for path, entry in found.items()
  }
  return Checkpoint(leaves, manifest, origin=file.name)


def _leaf(entry: Entry, note: LeafNote) -> Leaf:
  if isinstance(entry, Source):
    entry.digest = note.digest
    return Leaf(
      entry,
      entry.shape,
      entry.dtype,
      note.trainable,
      note.metadata,
      note.key,
      note.digest,
      entry.scalar,
      entry,
      entry.part,
      codes=note.codes,
      base=note.base,
    )
  # Of these only an empty dict could be changed by who gets it.
  load = functools.partial(copy.copy, entry.value)
  return Leaf(
    load,
    trainable=note.trainable,
    metadata=note.metadata,
    key=note.key,
    digest=note.digest,
    codes=note.codes,
    base=note.base,
  )


def _manifest(
  file: MappedFile, found: dict[Path, Entry]
) -> tuple[Manifest, Mapping[Path, LeafNote]]:
  """Takes out the manifest; returns what it says, of a file from flax nothing.

  Args:
    file: the file.
    found: what lies in it, from which the manifest's entry is removed.
  """
  path = next((p for p in reversed(found) if p[0] == manifests.KEY), None)
  if path is None:
    return Manifest(), {}
  entry = found.pop(path)
  offset = entry.offset if isinstance(entry, Value) else entry.spans[0][0]
  where = f'{file.name}: at byte {offset}, {manifests.KEY}'
  if len(path) > 1 or not _is_text(entry):
    shown = 'a map' if len(path) > 1 else _shown(entry)
    raise errors.FormatError(
      f'{where}: expected the manifest (a uint8 array with one axis), found '
      f'{shown}. The name is reserved; rename the parameter.',
      offset,
    )
  assert isinstance(entry, Source)
  text = entry().tobytes()
  return notes.read(text, f'{file.name}: at byte {offset}', offset, found)


def _is_text(entry: Entry) -> bool:
  return (
    isinstance(entry, Source)
    and entry.dtype == 'uint8'
    and len(entry.shape) == 1
  )


def _shown(entry: Entry) -> str:
  if isinstance(entry, Value):
    return f'a value of type {type(entry.value).__name__}'
  return f'{entry.dtype}[{",".join(map(str, entry.shape))}]'
