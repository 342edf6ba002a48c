"""safetensors files as parts of a set; see `surgery.files.sharding.Parts`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from surgery.files.output import Output
from surgery.files.safetensors import dtypes, frameworks, writing
from surgery.files.safetensors.reading import open_part
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

__all__ = ['empty', 'metadata', 'names', 'open_part', 'overhead', 'write_part']

# Of an entry of the header; of its axes; of what the manifest says of a name.
_AROUND, _AXIS, _SAID = 100, 20, 60
# Of a file: lengths, padding, and the manifest but for what it says of names.
_FILE = 300


def names(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[Path, str]]:
  """Returns the leaves in the order of a file, and what an index calls them.

  Raises:
    FormatError: if a file cannot hold a name.
  """
  return checkpoint, writing.called(checkpoint)


def metadata(checkpoint: Checkpoint) -> Mapping[str, str]:
  """Returns text by text what each file of a set says of the whole."""
  return frameworks.named(checkpoint.manifest.metadata, checkpoint)


def empty(about: Manifest) -> int:
  """Returns how many bytes a file without leaves takes, at most."""
  return _FILE + len(json.dumps(dict(about.metadata)).encode())


def overhead(path: Path, leaf: Leaf) -> int:
  """Returns how many bytes a leaf takes beside its own, at most."""
  # Quotes and backslashes are escaped, and in the manifest twice.
  text = len(json.dumps(paths.show(path), ensure_ascii=False).encode())
  if leaf.shape is None:
    value = json.dumps(str(leaf.load()), ensure_ascii=False)
    return 4 * (text + len(value.encode())) + _AROUND + _SAID
  size = text + len(path) + _AROUND + _AXIS * len(leaf.shape)
  if leaf.scalar or leaf.dtype not in dtypes.TAGS or _is_odd(path):
    size += 8 * text + _SAID
  return size


def _is_odd(path: Path) -> bool:
  return any('.' in key or '\\' in key for key in path)


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
