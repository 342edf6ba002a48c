"""The file formats that come with the library.

The host imports this whenever any hook is asked, so formats are imported when
a file is.
"""

from __future__ import annotations

import importlib
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.contract.hookspecs import hookimpl
from surgery.host import location

if TYPE_CHECKING:
  from surgery.files.progress import Told
  from surgery.model.checkpoint import Checkpoint


class _Files:
  """A format of which several files can be a model.

  Attributes:
    suffixes: of names of such files.
  """

  suffixes: tuple[str, ...]
  _package: str

  def _module(self, name: str) -> Any:
    return importlib.import_module(f'{self._package}{name}')

  def open(self, path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a file or an index without reading its tensors.

    Raises:
      FormatError: if it is not as the format has it, with path and offset.
      FileNotFoundError: if there is no such file.
    """
    from surgery.files import sharding

    if location.is_index(pathlib.Path(os.fsdecode(path))):
      return sharding.open_set(path, self._module('.parts'))
    opened: Checkpoint = self._module('').open_file(path)
    return opened

  def write(
    self,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    manifest: bool = True,
    shard_size: int | None = None,
    progress: Told | None = None,
  ) -> None:
    """Writes a file or a set of files, whole or not at all.

    Args:
      checkpoint: what to write.
      path: the file, or what the set is called.
      overwrite: whether an existing file may be replaced; an index never is.
      manifest: whether flags, metadata, adapters and so on are written too.
      shard_size: most bytes a file, if several are to be written.
      progress: called with the numbers of tensors and bytes that were written.

    Raises:
      FormatError: if a file cannot hold a name, a value or the metadata.
      FileExistsError: if there is a file that must not be replaced.
      OSError: if it cannot be written.
    """
    from surgery.files import sharding

    how: dict[str, Any] = {
      'overwrite': overwrite,
      'manifest': manifest,
      'progress': progress,
    }
    if shard_size is None:
      self._module('').write_file(checkpoint, path, **how)
    else:
      form = self._module('.parts')
      sharding.write_set(checkpoint, path, form, shard_size, **how)


class Msgpack(_Files):
  """flax msgpack files; see `surgery.files.msgpack`."""

  suffixes = ('.msgpack',)
  _package = 'surgery.files.msgpack'


class Safetensors(_Files):
  """safetensors files; see `surgery.files.safetensors`."""

  suffixes = ('.safetensors',)
  _package = 'surgery.files.safetensors'


@hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the formats by name."""
  return {'msgpack': Msgpack(), 'safetensors': Safetensors()}
