"""Writes a checkpoint as a flax msgpack file, one leaf at a time."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import arrays, atomic, notes, payload
from surgery.files.msgpack import chunks, encoding, walk
from surgery.files.msgpack.values import ARRAY, SCALAR
from surgery.files.output import Output
from surgery.files.progress import Told
from surgery.model import manifest as manifests
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
  nested,
)
from surgery.model.manifest import LeafNote
from surgery.model.sizes import (
  PACKED,
)
from surgery.naming import paths
from surgery.naming.paths import Path

# An array in chunks lies two maps deeper than its name tells.
_MAX_DEPTH = walk.MAX_DEPTH - 2


def write_file(
  checkpoint: Checkpoint,
  path: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  manifest: bool = True,
  progress: Told | None = None,
) -> None:
  """Writes a file, whole or not at all.

  The bytes are those of `flax.serialization.to_bytes`, and of one more entry if
  there is something to say that arrays cannot. Of leaves that come unchanged
  from a file the bytes are copied unread.

  Args:
    checkpoint: what to write.
    path: the file.
    overwrite: whether an existing file may be replaced.
    manifest: whether flags, metadata, adapters and so on are written too.
    progress: called with the numbers of tensors and bytes that were written.

  Raises:
    FormatError: if a file cannot hold a name, a value or the metadata.
    FileExistsError: if the file exists and `overwrite` is False.
    OSError: if it cannot be written.
  """
  tree = checked(checkpoint)
  said = checkpoint.notes()
  manifest = manifest and notes.worth_saying(checkpoint)
  if manifest:
    # What cannot be said should be known before gigabytes are written.
    manifests.dumps(checkpoint.manifest, said)
  with atomic.writing(path, overwrite=overwrite) as fd:
    output = Output(fd, progress)
    output.write(encoding.map_header(len(tree) + manifest))
    writer = _Writer(output, said)
    writer.entries(tree, ())
    if manifest:
      text = manifests.dumps(checkpoint.manifest, writer.notes)
      output.write(encoding.plain(manifests.KEY))
      array = np.frombuffer(text, np.uint8)
      writer.tensor(payload.Computed(array.shape, 'uint8', (array,)), False)
    output.flush()


def write_part(
  checkpoint: Checkpoint, output: Output
) -> dict[Path, str | None]:
  """Writes a file of a set, without a manifest.

  Args:
    checkpoint: what to write.
    output: takes the bytes.

  Returns:
    Digests of the leaves.

  Raises:
    FormatError: if a file cannot hold a name or a value.
  """
  tree = checked(checkpoint)
  output.write(encoding.map_header(len(tree)))
  writer = _Writer(output, checkpoint.notes())
  writer.entries(tree, ())
  return {path: note.digest for path, note in writer.notes.items()}


def checked(checkpoint: Checkpoint) -> dict[str, Any]:
  """Returns the leaves as nested dicts.

  Raises:
    FormatError: if a file cannot hold their names.
  """
  for path in checkpoint:
    _check_path(path)
  tree = nested(checkpoint)
  _check_limits(tree)
  return tree


def _check_path(path: Path) -> None:
  """Raises unless a file can hold a tensor of that name."""
  shown = '/'.join(map(str, path))
  if not path or not all(isinstance(key, str) for key in path):
    raise errors.FormatError(
      f'expected a path of one or more strings, found {path!r}.'
    )
  if path[0] == manifests.KEY or chunks.MARK in path:
    raise errors.FormatError(
      f'{shown}: the names {manifests.KEY!r} and {chunks.MARK!r} are reserved '
      'in a file. Rename the parameter.'
    )
  if len(path) > _MAX_DEPTH:
    raise errors.FormatError(
      f'{shown[:200]}…: expected a path of at most {_MAX_DEPTH} segments, '
      f'found {len(path)}.'
    )
  try:
    longest = max(len(key.encode()) for key in path)
  except UnicodeEncodeError as error:
    raise errors.FormatError(
      f'{shown!a}: a name cannot be written as UTF-8: {error.reason}. Rename '
      'the parameter.'
    ) from None
  if longest > walk.MAX_KEY:
    raise errors.FormatError(
      f'{shown[:200]}…: expected names of at most {walk.MAX_KEY} bytes, found '
      f'{longest}.'
    )


def _check_limits(tree: dict[str, Any]) -> None:
  """Raises if there is more to write than can be read again."""
  count, cost = 0, 0
  maps = [(tree, 0)]
  while maps:
    one, above = maps.pop()
    for key, child in one.items():
      own = walk.cost(above, key)
      count, cost = count + 1, cost + own
      if isinstance(child, dict):
        maps.append((child, own))
  if count > walk.MAX_NODES or cost > walk.MAX_PATHS:
    raise errors.FormatError(
      f'expected at most {walk.MAX_NODES:,} names with paths of '
      f'{walk.MAX_PATHS:,} bytes in all, found {count:,} with {cost:,}.'
    )


class _Writer:
  """Writes leaves.

  Args:
    output: takes the bytes.
    notes: what is known of each leaf; digests are put right.

  Attributes:
    notes: what is known of each leaf.
  """

  def __init__(self, output: Output, notes: dict[Path, LeafNote]) -> None:
    self._output = output
    self.notes = notes

  def entries(self, tree: dict[str, Any], path: Path) -> None:
    """Writes keys and values of a map."""
    for key, child in tree.items():
      here = (*path, key)
      self._output.write(encoding.key(key))
      if isinstance(child, dict):
        self._output.write(encoding.map_header(len(child)))
        self.entries(child, here)
      else:
        self._leaf(child, here)

  def _leaf(self, leaf: Leaf, path: Path) -> None:
    """Writes a leaf, and puts its digest right."""
    if leaf.dtype in PACKED:
      raise errors.FormatError(
        f'{paths.show(path)}: flax msgpack has no {leaf.dtype}, whose elements '
        'share bytes. Write safetensors, or drop the tensor.'
      )
    value = payload.of(leaf, path)
    note, digest = self.notes[path], None
    if isinstance(value, payload.Payload):
      self.tensor(value)
      digest = value.digest(note.digest)
    else:
      self._output.expect(0)
      try:
        self._output.write(encoding.plain(value))
      except errors.FormatError as error:
        raise errors.FormatError(f'{paths.show(path)}: {error}') from None
    self.notes[path] = dataclasses.replace(note, digest=digest)

  def tensor(self, tensor: payload.Payload, counts: bool = True) -> None:
    """Writes what stands before the bytes of a tensor, and these.

    Args:
      tensor: the tensor.
      counts: whether it is one of the model's.
    """
    write, nbytes = self._output.write, tensor.nbytes
    # As flax has it, a numpy scalar is no array.
    if tensor.scalar or nbytes <= chunks.MAX_CHUNK_SIZE:
      code = SCALAR if tensor.scalar else ARRAY
      write(encoding.array_header(code, tensor.shape, tensor.dtype, nbytes))
      if counts:
        self._output.expect(nbytes)
      tensor.write(self._output, nbytes)
      return
    itemsize = arrays.DTYPES[tensor.dtype].itemsize
    step = max(1, chunks.MAX_CHUNK_SIZE // itemsize) * itemsize
    starts = range(0, nbytes, step)
    write(encoding.chunks_header(tensor.shape, len(starts)))
    for index, start in enumerate(starts):
      size = min(step, nbytes - start)
      write(encoding.plain(str(index)))
      flat = (size // itemsize,)
      write(encoding.array_header(ARRAY, flat, tensor.dtype, size))
      if counts:
        self._output.expect(size, int(start + size == nbytes))
      tensor.write(self._output, size)
