"""Writes a checkpoint as a safetensors file, one leaf at a time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.files import atomic, digest, notes, payload
from surgery.files.output import Output
from surgery.files.progress import Told
from surgery.files.safetensors import (
  dtypes,
  extras,
  frameworks,
  header,
  names,
)
from surgery.files.safetensors.header import Entry
from surgery.model import manifest as manifests
from surgery.model import sizes
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import LeafNote, Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

# Digests that are not known yet take as many bytes as those that are.
_UNKNOWN = digest.Digester().digest()


def write_file(
  checkpoint: Checkpoint,
  path: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  manifest: bool = True,
  progress: Told | None = None,
) -> None:
  """Writes a file, whole or not at all.

  The bytes of leaves that come unchanged from a file are copied unread.

  Args:
    checkpoint: what to write.
    path: the file.
    overwrite: whether an existing file may be replaced.
    manifest: whether flags, metadata, adapters and so on are written too.
      Metadata of other programs always is, and so is `format`, without which
      some readers refuse a file.
    progress: called with the numbers of tensors and bytes that were written.

  Raises:
    FormatError: if a file cannot hold a name, a value or the metadata.
    FileExistsError: if the file exists and `overwrite` is False.
    OSError: if it cannot be written.
  """
  layout = Layout(checkpoint, called(checkpoint))
  known = _noted(checkpoint, layout)
  if not manifest:
    layout.needs_no_manifest(path)
  # The metadata of other programs has a place of its own in the header.
  worth = manifest and notes.worth_saying(checkpoint, metadata=False)
  full = checkpoint.manifest if worth else None
  before = layout.header(full, known)
  with atomic.writing(path, overwrite=overwrite) as fd:
    output = Output(fd, progress)
    output.write(before)
    for where, found in layout.write(output).items():
      known[where] = dataclasses.replace(known[where], digest=found)
    output.flush()
    # The header stands in front of the tensors and has their digests, so it is
    # written again, over the first one, which has the same length.
    after = layout.header(full, known)
    if after != before:
      assert len(after) == len(before)
      output.replace(0, after)


def _noted(checkpoint: Checkpoint, layout: Layout) -> dict[Path, LeafNote]:
  """Returns the notes of leaves, with room for digests that are not known."""
  known = checkpoint.notes()
  for path in checkpoint:
    if payload.source(checkpoint[path]) is None:
      known[path] = dataclasses.replace(known[path], digest=_UNKNOWN)
  for path, value in layout.values.items():
    if not isinstance(value, payload.Payload):
      known[path] = dataclasses.replace(known[path], digest=None)
  return known


def called(checkpoint: Checkpoint) -> dict[Path, str]:
  """Returns the names of tensors in a file, without those of other leaves.

  Raises:
    FormatError: if it cannot have a name.
  """
  return {
    path: names.name_of(path)
    for path, leaf in checkpoint.items()
    if not _is_value(leaf)
  }


def _is_value(leaf: Leaf) -> bool:
  if leaf.shape is not None:
    return False
  value = leaf.load()
  return not (hasattr(value, 'shape') and hasattr(value, 'dtype'))


class Layout:
  """Where everything lies in a file.

  Tensors lie in the order of their element's size, largest first, so that all
  are aligned; the header has them in the order of the checkpoint.

  Args:
    checkpoint: what is in it.
    called: what tensors are called.

  Attributes:
    values: by path, leaves that are no arrays, or were no arrays until loaded.

  Raises:
    FormatError: for what a file cannot hold.
  """

  def __init__(
    self, checkpoint: Checkpoint, called: Mapping[Path, str]
  ) -> None:
    self.values: dict[Path, Any] = {}
    self._checkpoint = checkpoint
    self._changed = any(
      payload.source(leaf) is None for leaf in checkpoint.values()
    )
    self._extras = extras.Extras()
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    self._paths: dict[str, Path] = {}
    for at, (path, leaf) in enumerate(checkpoint.items()):
      if leaf.shape is None:
        value = self.values[path] = payload.of(leaf, path)
        if not isinstance(value, payload.Payload):
          self._extras.values.append(extras.Value(at, path, value))
          continue
      self._paths[called[path]] = path
      kinds[called[path]] = self._kind(path, leaf)
    self._extras.paths.update(names.odd(self._paths.items()))
    self._order = sorted(
      kinds, key=lambda name: -sizes.itemsize(kinds[name][1])
    )
    self._entries = self._placed(kinds)

  def _kind(self, path: Path, leaf: Leaf) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of a tensor."""
    tensor = self.values.get(path, leaf)
    try:
      dtype = dtypes.canonical(tensor.dtype)
    except errors.FormatError as error:
      raise errors.FormatError(f'{paths.show(path)}: {error}') from None
    return tensor.shape, dtype

  def _placed(
    self, kinds: Mapping[str, tuple[tuple[int, ...], str]]
  ) -> dict[str, Entry]:
    """Returns entries in the order of the checkpoint."""
    placed: dict[str, Entry] = {}
    start = 0
    for name in self._order:
      shape, dtype = kinds[name]
      stop = start + sizes.nbytes(dtype, math.prod(shape))
      tag, stored = dtypes.stored(shape, dtype)
      placed[name] = Entry(tag, stored, start, stop)
      start = stop
      if dtype not in dtypes.NAMES.values():
        self._extras.dtypes[name] = dtype
      tensor = self._checkpoint[self._paths[name]]
      if getattr(self.values.get(self._paths[name], tensor), 'scalar', False):
        self._extras.scalars.append(name)
    return {name: placed[name] for name in kinds}

  def needs_no_manifest(self, where: str | os.PathLike[str]) -> None:
    """Raises if the file would not say what it holds without one.

    Raises:
      FormatError: naming what it cannot say.
    """
    found = self._extras
    for what, some in (
      ('values that are no arrays', [paths.show(v.path) for v in found.values]),
      ('names with dots inside', list(found.paths.values())),
      ('dtypes that safetensors does not have', list(found.dtypes)),
    ):
      if some:
        raise errors.FormatError(
          f'{os.fsdecode(where)}: without a manifest the file cannot tell of '
          f'{what}: {", ".join(some[:5])}. Write it with one (manifest=True), '
          'or drop or rename these.'
        )

  def header(
    self, manifest: Manifest | None, said: Mapping[Path, LeafNote]
  ) -> bytes:
    """Returns the header.

    Args:
      manifest: the manifest; None to write only what the file needs.
      said: the notes of leaves, if `manifest` is not None.

    Raises:
      FormatError: if it is too long, or something cannot be said.
    """
    metadata = dict(self._checkpoint.manifest.metadata)
    if manifests.KEY in metadata:
      raise errors.FormatError(
        f'metadata: the key {manifests.KEY!r} is reserved in a file.'
      )
    more = self._extras.to_json()
    ours = manifest is not None or bool(more)
    if frameworks.KEY not in metadata and (ours or self._changed):
      metadata = frameworks.named(metadata, self._checkpoint)
      # So that a reader knows that no other program wrote it.
      more[frameworks.KEY] = metadata[frameworks.KEY]
    if ours:
      bare = (manifest or Manifest()).replace(metadata={})
      data = manifests.to_json(bare, {} if manifest is None else said)
      if more:
        data[manifests.FILE] = more
      metadata[manifests.KEY] = manifests.encoded(data).decode()
    return header.encoded(self._entries, metadata)

  def write(self, output: Output) -> dict[Path, str | None]:
    """Writes all tensors; returns their digests."""
    digests: dict[Path, str | None] = {}
    for name in self._order:
      path = self._paths[name]
      leaf = self._checkpoint[path]
      tensor = self.values.pop(path, None) or payload.of(leaf, path)
      output.expect(tensor.nbytes)
      tensor.write(output, tensor.nbytes)
      digests[path] = tensor.digest(leaf.digest)
    return digests
