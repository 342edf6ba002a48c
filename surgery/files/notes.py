"""What a manifest says of a file's tensors, held against the file."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from surgery import errors
from surgery.files import payload
from surgery.model import manifest
from surgery.model.checkpoint import Checkpoint
from surgery.model.manifest import LeafNote, Manifest
from surgery.naming import paths
from surgery.naming.paths import Path

_KINDS = (('metadata', dict), ('key', str), ('digest', str))


def worth_saying(checkpoint: Checkpoint, metadata: bool = True) -> bool:
  """Whether there is anything that a manifest would say.

  Args:
    checkpoint: what is written.
    metadata: whether the manifest has to hold what other programs said, too.
  """
  nothing = LeafNote()
  about = checkpoint.manifest
  return (
    (about if metadata else about.replace(metadata={})) != Manifest()
    or any(note != nothing for note in checkpoint.notes().values())
    # Arrays that are not copied unread get a digest.
    or any(
      leaf.shape is not None and payload.source(leaf) is None
      for leaf in checkpoint.values()
    )
  )


def read(
  said: bytes | dict[str, Any],
  where: str,
  offset: int,
  found: Container[Path],
) -> tuple[Manifest, dict[Path, LeafNote]]:
  """Reads a manifest.

  Args:
    said: its text, or the decoded text.
    where: file and place, for messages.
    offset: of the manifest in the file.
    found: what lies in the file.

  Raises:
    FormatError: if it is not a manifest, or has notes of other tensors.
  """
  try:
    if isinstance(said, bytes):
      said = manifest.decoded(said)
    whole, notes = manifest.from_json(said)
  except errors.FormatError as error:
    raise errors.FormatError(f'{where}: {error}', offset) from None
  # `show` writes the empty path and one empty name alike; no leaf is at ().
  if () in notes:
    notes[('',)] = notes.pop(())
  for path, note in notes.items():
    what = _wrong(path, note, found)
    if what is not None:
      raise errors.FormatError(f'{where}, {manifest.KEY}: {what}', offset)
  return whole, notes


def _wrong(path: Path, note: LeafNote, found: Container[Path]) -> str | None:
  """Returns what is wrong with a note, if anything."""
  shown = paths.show(path)
  if path not in found:
    return (
      f'expected only tensors of this file, found {shown!r}, which is not in '
      'it. The file was changed by a program that does not know the manifest; '
      'save it again with surgery.'
    )
  for name, kind in _KINDS:
    value = getattr(note, name)
    if value is not None and not isinstance(value, kind):
      return (
        f'{shown}: expected {name} to be a {kind.__name__}, found {value!r}. '
        'The file is damaged; save it again.'
      )
  return None
