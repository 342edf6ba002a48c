"""safetensors files as parts of a set; see `surgery.files.sharding.Parts`."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.core.checkpoint import Checkpoint, Leaf
from surgery.core.paths import Path
from surgery.files.output import Output
from surgery.files.safetensors import writing
from surgery.files.safetensors.reading import open_part

__all__ = ['names', 'open_part', 'overhead', 'write_part']

# An entry of the header and what the manifest may say of a name; each axis.
_AROUND, _AXIS = 400, 20


def names(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[Path, str]]:
  """Returns the leaves in the order of a file, and what an index calls them.

  Raises:
    FormatError: if a file cannot hold a name.
  """
  return checkpoint, writing.called(checkpoint)


def overhead(path: Path, leaf: Leaf) -> int:
  """Returns how many bytes a leaf takes beside its own, at most."""
  text = sum(len(key.encode()) + 3 for key in path)
  if leaf.shape is None:
    return 4 * text + 2 * len(repr(leaf.load()).encode()) + _AROUND
  return 4 * text + _AROUND + _AXIS * len(leaf.shape)


def write_part(
  checkpoint: Checkpoint,
  output: Output,
  names: Mapping[Path, str],
  manifest: bool,
) -> dict[Path, str | None]:
  """Writes a shard; returns the leaves' digests."""
  layout = writing.Layout(checkpoint, names)
  if not manifest:
    layout.needs_no_manifest('a file of a set')
  output.write(layout.header(None, {}))
  digests = layout.write(output)
  return {path: digests.get(path) for path in checkpoint}
