"""flax msgpack files as parts of a set; see `surgery.files.sharding.Parts`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from surgery.files.msgpack import chunks, reading, writing
from surgery.files.output import Output
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

# What stands around a tensor: dtype, lengths, marks; and so on for each axis.
_AROUND, _AXIS, _CHUNK = 160, 24, 64
_MAP = 6


def names(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[Path, str]]:
  """Returns the leaves in the order of a file, and what an index calls them.

  Raises:
    FormatError: if a file cannot hold a name.
  """
  tree = writing.checked(checkpoint)
  leaves = {path: checkpoint[path] for path in _in_order(tree, ())}
  return checkpoint.replace(leaves=leaves), _named(leaves)


def _in_order(tree: Mapping[str, Any], above: Path) -> Iterator[Path]:
  for key, child in tree.items():
    if isinstance(child, dict):
      yield from _in_order(child, (*above, key))
    else:
      yield (*above, key)


def _named(found: Iterable[Path]) -> dict[Path, str]:
  """Returns names joined by `/`, as indexes have them."""
  return {path: paths.show(path) for path in found}


def metadata(checkpoint: Checkpoint) -> Mapping[str, str]:
  """Returns what each file of a set says of the whole: nothing."""
  return checkpoint.manifest.metadata


def empty(about: Manifest) -> int:
  """Returns how many bytes a file without leaves takes, at most."""
  del about
  return _MAP


def overhead(path: Path, leaf: Leaf) -> int:
  """Returns how many bytes a leaf takes beside its own, at most."""
  maps = sum(len(key.encode()) + _MAP for key in path)
  if leaf.shape is None:
    return maps + len(str(leaf.load()).encode()) + _AROUND
  count = leaf.nbytes // chunks.MAX_CHUNK_SIZE
  return maps + _AROUND + _AXIS * len(leaf.shape) + _CHUNK * count


def write_part(
  checkpoint: Checkpoint,
  output: Output,
  names: Mapping[Path, str],
  manifest: bool,
) -> dict[Path, str | None]:
  """Writes a shard; returns the leaves' digests."""
  del names, manifest
  return writing.write_part(checkpoint, output)


def open_part(
  path: str | os.PathLike[str],
) -> tuple[Checkpoint, Mapping[Path, str]]:
  """Opens a shard; returns it, and what an index calls its leaves."""
  checkpoint = reading.open_file(path)
  return checkpoint, _named(checkpoint)
