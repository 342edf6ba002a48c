"""Opens a safetensors file as a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.files import arrays, notes
from surgery.files.safetensors import (
  dtypes,
  extras,
  frameworks,
  header,
  names,
)
from surgery.files.safetensors.extras import Extras
from surgery.files.source import MappedFile, Source
from surgery.model import manifest as manifests
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import LeafNote, Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

_NOTHING = LeafNote()


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
  """Opens a file without reading its tensors.

  Args:
    path: a file of any program; names are split at dots into paths.

  Returns:
    A checkpoint. Its arrays are read-only views on the file, which stays open
    as long as one of them is in use. What others say of the file is in its
    manifest's `metadata`.

  Raises:
    FormatError: if it is not as the format has it, with path and offset.
    FileNotFoundError: if there is no such file.
    IsADirectoryError: if it is a folder.
  """
  return open_part(path)[0]


def open_part(
  path: str | os.PathLike[str],
) -> tuple[Checkpoint, Mapping[Path, str]]:
  """Opens a file; returns it, and what it calls its tensors."""
  file = MappedFile(path)
  entries, metadata, end = header.read(file)
  where = f'{file.name}: at byte {header.START}'
  data, more = _manifest(metadata, where)
  sources = _sources(file, entries, end, more)
  called = {source.path: name for name, source in sources.items()}
  if len(called) < len(sources):
    raise _wrong(where, 'expected other paths, found one twice')
  found = _in_order(sources, more, where)
  manifest = Manifest()
  about: Mapping[Path, LeafNote] = {}
  if data is not None:
    manifest, about = notes.read(data, where, header.START, found)
  leaves = {
    path: _leaf(value, about.get(path, _NOTHING))
    for path, value in found.items()
  }
  manifest = manifest.replace(metadata=metadata)
  return Checkpoint(leaves, manifest, origin=file.name), called


def _manifest(metadata: dict[str, str], where: str) -> tuple[Any, Extras]:
  """Takes the manifest out of a header's metadata.

  Args:
    metadata: the metadata, from which our own entries are removed.
    where: the place in the file, for messages.

  Returns:
    The manifest's JSON data, or None, and what only this format needs of it.
  """
  text = metadata.pop(manifests.KEY, None)
  if text is None:
    return None, Extras()
  try:
    data = manifests.decoded(text)
  except errors.FormatError as error:
    raise errors.FormatError(f'{where}: {error}', header.START) from None
  if not isinstance(data, dict):
    return data, Extras()
  inner = data.pop(manifests.FILE, {})
  own = inner.get(frameworks.KEY) if isinstance(inner, dict) else None
  if own is not None and metadata.get(frameworks.KEY) == own:
    # We wrote this `format`, so it is inferred anew after names changed.
    del metadata[frameworks.KEY]
  return data, extras.from_json(inner, where, header.START)


def _wrong(where: str, what: str) -> errors.FormatError:
  return errors.FormatError(
    f'{where}: {manifests.KEY}, {manifests.FILE}: {what}. The file was changed '
    'by a program that does not know the manifest; save it again with surgery.',
    header.START,
  )


def _sources(
  file: MappedFile, entries: Mapping[str, header.Entry], end: int, more: Extras
) -> dict[str, Source]:
  """Returns tensors by name.

  Raises:
    FormatError: if the manifest speaks of others.
  """
  where = f'{file.name}: at byte {header.START}'
  for name in (*more.paths, *more.dtypes, *more.scalars):
    if name not in entries:
      raise _wrong(where, f'found {name[:200]!r}, which is not in the file')
  scalars = set(more.scalars)
  found: dict[str, Source] = {}
  for name, (tag, shape, start, stop) in entries.items():
    path = names.path_of(name)
    if name in more.paths:
      path = paths.parse(more.paths[name])
    dtype = dtypes.NAMES[tag]
    if name in more.dtypes:
      dtype = more.dtypes[name]
      shape = _shape(tag, shape, dtype, name, where)
    if name in scalars and shape:
      raise _wrong(where, f'expected a scalar, found {name[:200]}: {shape}')
    spans = ((end + start, end + stop),)
    found[name] = Source(file, path, shape, dtype, spans, name in scalars)
  return found


def _shape(
  tag: str, shape: tuple[int, ...], dtype: str, name: str, where: str
) -> tuple[int, ...]:
  """Returns the shape of a tensor that is stored as bytes."""
  itemsize = arrays.DTYPES[dtype].itemsize
  if tag != dtypes.BYTES or (itemsize > 1 and shape[-1:] != (itemsize,)):
    raise _wrong(
      where,
      f'expected {name[:200]} to be {dtype}, found {tag}{list(shape)}',
    )
  return shape if itemsize == 1 else shape[:-1]


def _in_order(
  sources: Mapping[str, Source], more: Extras, where: str
) -> dict[Path, Source | extras.Value]:
  """Returns tensors and other values by path, in order."""
  ordered: list[Source | extras.Value] = list(sources.values())
  for value in sorted(more.values, key=lambda value: value.at):
    ordered.insert(value.at, value)
  found = {one.path: one for one in ordered}
  if len(found) < len(ordered) or () in found:
    raise _wrong(where, 'expected other paths, found one twice, or empty')
  return found


def _leaf(value: Source | extras.Value, note: LeafNote) -> Leaf:
  if isinstance(value, Source):
    value.digest = note.digest
    leaf = Leaf(
      value,
      value.shape,
      value.dtype,
      scalar=value.scalar,
      source=value,
      part=value.part,
    )
  else:
    # Of these only an empty dict could be changed by who gets it.
    leaf = Leaf(functools.partial(copy.copy, value.value))
  return dataclasses.replace(
    leaf,
    trainable=note.trainable,
    metadata=note.metadata,
    key=note.key,
    digest=note.digest,
    codes=note.codes,
    base=note.base,
  )
