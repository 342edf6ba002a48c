"""What authors of file formats build on, beside `surgery.Checkpoint`.

A format reads headers when it opens a file, gives each tensor as a leaf whose
blocks are read on demand, and writes block by block. What is here does the rest
the way all formats do it: tensors are held against their digests as they are
read (`Tensor`), folders appear whole or not at all (`folder`), the bytes of a
leaf come as they are computed (`payload`), and what arrays cannot say goes into
a manifest (`manifest_of`, `read_manifest`).

See `plugins/surgery-orbax` for a format that is built with it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from surgery import errors
from surgery.files import notes as _notes
from surgery.files.arrays import DTYPES
from surgery.files.atomic_folders import writing as folder
from surgery.files.checking import Checked as Tensor
from surgery.files.payload import Payload
from surgery.files.payload import of as payload
from surgery.model import manifest as _manifest
from surgery.model.checkpoint import Checkpoint, nested
from surgery.model.grid import Index, grid
from surgery.model.manifest import LeafNote, Manifest
from surgery.naming.paths import Path
from surgery.naming.paths import parse as parse_path
from surgery.naming.paths import show as show_path

__all__ = [
  'DTYPES',
  'Index',
  'LeafNote',
  'Manifest',
  'Path',
  'Payload',
  'Tensor',
  'folder',
  'grid',
  'manifest_of',
  'nested',
  'parse_path',
  'payload',
  'read_manifest',
  'show_path',
]


def manifest_of(
  checkpoint: Checkpoint,
  digests: Mapping[Path, str | None] | None = None,
  *,
  own: Mapping[str, Any] | None = None,
) -> bytes | None:
  """Returns what a file says beside its tensors, as UTF-8 JSON.

  Args:
    checkpoint: what is written.
    digests: digests of tensors that were computed while they were written.
    own: what only the format understands; `read_manifest` returns it.

  Returns:
    The text, or None if there is nothing to say.

  Raises:
    FormatError: for metadata that JSON cannot hold.
  """
  if not (own or _notes.worth_saying(checkpoint)):
    return None
  said = checkpoint.notes()
  for path, digest in (digests or {}).items():
    said[path] = LeafNote(**{**vars(said[path]), 'digest': digest})
  data = _manifest.to_json(checkpoint.manifest, said)
  if own:
    data[_manifest.FILE] = dict(own)
  return _manifest.encoded(data)


def read_manifest(
  text: bytes, where: str, found: Container[Path]
) -> tuple[Manifest, dict[Path, LeafNote], dict[str, Any]]:
  """Reads what `manifest_of` returned.

  Args:
    text: the text.
    where: file and place, for messages.
    found: the tensors and values that there are.

  Returns:
    The manifest; what it says of each tensor; and what `own` was.

  Raises:
    FormatError: if it is no manifest, or speaks of other tensors.
  """
  try:
    data = _manifest.decoded(text)
  except errors.FormatError as error:
    raise errors.FormatError(f'{where}: {error}') from None
  own = data.pop(_manifest.FILE, {}) if isinstance(data, dict) else {}
  whole, said = _notes.read(data, where, 0, found)
  return whole, said, own if isinstance(own, dict) else {}
