"""A folder of PEFT as a checkpoint: its tensors, and what it says of them."""

from __future__ import annotations

import os
import pathlib
import stat
from typing import Any

from surgery import errors
from surgery.files import strict_json
from surgery.files.safetensors import reading
from surgery.host.manager import Host, default_host
from surgery.interop.peft import config as configs
from surgery.model import manifest
from surgery.model.checkpoint import Checkpoint

CONFIG = 'adapter_config.json'
TENSORS = 'adapter_model.safetensors'
PICKLE = 'adapter_model.bin'
# Many times what any configuration takes that lists its modules one by one.
_LARGEST = 16_000_000


def open_folder(path: str | os.PathLike[str]) -> Checkpoint:
  """Opens a folder without reading its tensors.

  Args:
    path: the folder, or the file of tensors in it.

  Returns:
    The tensors as PEFT calls them, and a manifest of the kind `adapter` that
    has the configuration. It becomes an adapter of ours beside its base.

  Raises:
    FormatError: if a file is missing, is no regular file of the folder's own,
      or is not what it should be.
  """
  folder = pathlib.Path(os.fsdecode(path))
  if folder.name == TENSORS:
    folder = folder.parent
  said = _config(folder)
  tensors = folder / TENSORS
  if not os.path.lexists(tensors):
    raise errors.FormatError(_missing(folder))
  _check_own(tensors)
  opened = reading.open_file(tensors)
  if opened.manifest.kind == manifest.ADAPTER or opened.manifest.adapters:
    raise errors.FormatError(
      f'{tensors}: expected the tensors of PEFT, found an adapter of '
      'blox-surgery. Give the file instead of its folder.'
    )
  return Checkpoint(
    dict(opened),
    opened.manifest.replace(
      kind=manifest.ADAPTER, extra={**opened.manifest.extra, configs.KEY: said}
    ),
    origin=str(folder),
  )


def _missing(folder: pathlib.Path) -> str:
  if os.path.lexists(folder / PICKLE):
    return (
      f'{folder / PICKLE}: a pickle, which can run any code and is never '
      'opened. Load it with PEFT where you trust it, and save it again with '
      f'save_pretrained(…, safe_serialization=True), which writes {TENSORS}.'
    )
  return (
    f'{folder}: expected {TENSORS} beside {CONFIG}, found none. Fetch it, or '
    'save the adapter again.'
  )


def _config(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the configuration.

  Raises:
    FormatError: if it is missing, too large or no JSON object.
  """
  path = folder / CONFIG
  if not os.path.lexists(path):
    raise errors.FormatError(f'{folder}: there is no {CONFIG} in it.')
  _check_own(path)
  size = path.stat().st_size
  if size > _LARGEST:
    raise errors.FormatError(
      f'{path}: expected the configuration of an adapter, of at most '
      f'{_LARGEST:,} bytes, found {size:,} bytes.'
    )
  with path.open('rb') as file:
    # One that grows meanwhile is not read on.
    return strict_json.loads(file.read(_LARGEST + 1), str(path))


def _check_own(path: pathlib.Path) -> None:
  """Raises unless a file is a regular one, and the folder's own.

  A link out of the folder could name any file of whoever opens it; only caches
  of a hub have such links, from `snapshots/…` into `blobs`.

  Raises:
    FormatError: saying what it is instead.
  """
  real = pathlib.Path(os.path.realpath(path))
  folder = pathlib.Path(os.path.realpath(path.parent))
  if not real.exists():
    raise errors.FormatError(
      f'{path}: a link to {real}, where there is nothing.'
    )
  if not stat.S_ISREG(real.stat().st_mode):
    raise errors.FormatError(f'{path}: expected a regular file.')
  cached = folder.parent.name == 'snapshots' and (
    real.parent == folder.parent.parent / 'blobs'
  )
  if folder not in real.parents and not cached:
    raise errors.FormatError(
      f'{path}: a link to {real}, outside of the folder. Copy the file into it '
      'if that is meant.'
    )


def notes(checkpoint: Checkpoint, host: Host | None = None) -> tuple[str, ...]:
  """Returns what plans note; see `surgery.interop.plugin.Peft.notes`."""
  from surgery.interop.peft import writing

  return writing.notes(checkpoint, host or default_host())


def write_folder(
  checkpoint: Checkpoint,
  path: str | os.PathLike[str],
  host: Host | None = None,
) -> None:
  """Writes an adapter as a folder; see `surgery.interop.plugin.Peft.write`."""
  from surgery.interop.peft import writing

  writing.write_folder(checkpoint, path, host or default_host())
