"""What the library reads and writes of other programs.

The host imports this whenever any hook is asked, so what does the work is
imported when it is called.
"""

from __future__ import annotations

import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.contract.hookspecs import hookimpl

if TYPE_CHECKING:
  from surgery.host.manager import Host
  from surgery.model.checkpoint import Checkpoint

CONFIG = 'adapter_config.json'


class Peft:
  """Folders of PEFT; see `surgery.interop.peft`.

  Attributes:
    suffixes: none: a model is a folder.
  """

  suffixes: tuple[str, ...] = ()

  def recognises(self, path: pathlib.Path) -> bool:
    """Whether a path is that of such a folder, or of the tensors in one."""
    if path.name == 'adapter_model.safetensors':
      path = path.parent
    # A link that leads nowhere is somebody's, too.
    there = lambda name: os.path.lexists(path / name)
    if not there(CONFIG):
      return False
    # A model's own folder may have the configuration of an adapter left over.
    tensors = there('adapter_model.safetensors') or there('adapter_model.bin')
    return tensors or not there('config.json')

  def open(self, path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a folder without reading its tensors.

    Raises:
      FormatError: if it is not as PEFT writes it.
    """
    opened: Checkpoint = _module('peft.folder').open_folder(path)
    return opened

  def write(
    self,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    host: Host | None = None,
  ) -> None:
    """Writes an adapter as a folder.

    Args:
      checkpoint: an adapter without its base.
      path: the folder: a new name, or an empty folder.
      overwrite: means nothing, since a folder is never replaced.
      host: knows the adapter's type.

    Raises:
      FormatError: if it is no adapter, or none that PEFT has.
      FileExistsError: if the folder has something in it.
      OSError: if it cannot be written.
    """
    del overwrite
    _module('peft.folder').write_folder(checkpoint, path, host)

  def notes(self, checkpoint: Checkpoint, host: Host) -> tuple[str, ...]:
    """Returns what a plan notes of a folder that is to be written."""
    found: tuple[str, ...] = _module('peft.folder').notes(checkpoint, host)
    return found


class _Bound:
  """A way to store an adapter, by the module that reads it."""

  def __init__(self, module: str) -> None:
    self._name = module

  def knows(self, alone: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter of this kind."""
    return bool(_module(self._name).knows(alone))

  def bound(
    self, alone: Checkpoint, base: Checkpoint, *, names: Any, host: Host
  ) -> Checkpoint:
    """Returns the adapter as one of ours.

    Raises:
      SurgeryError: if it does not fit the base.
    """
    found: Checkpoint = _module(self._name).bound(alone, base, names, host)
    return found


def _module(name: str) -> Any:
  return importlib.import_module(f'surgery.interop.{name}')


@hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers PEFT's folders as a format."""
  return {'peft': Peft()}


@hookimpl
def surgery_adapter_files() -> Mapping[str, Any]:
  """Offers the ways in which other programs store adapters."""
  return {
    'peft': _Bound('peft.reading'),
    'single-file': _Bound('peft.spellings'),
  }
