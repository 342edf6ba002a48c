"""What the host is offered; TensorStore is imported when a folder is read."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import surgery
from surgery_orbax import folders


class Orbax:
  """Folders as Orbax writes them.

  Attributes:
    suffixes: of folders' names: `-o out.orbax` writes one.
    keeps_format: that what is made of a checkpoint of Orbax and written to a
      folder (`-o out/`) is one as well.
  """

  suffixes: tuple[str, ...] = ('.orbax',)
  keeps_format = True

  def recognises(self, path: pathlib.Path) -> bool:
    """Whether a path is a checkpoint of Orbax, or holds some."""
    return folders.is_orbax(path)

  def open(self, path: str | os.PathLike[str]) -> surgery.Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
      path: an item, a step with one item, or a folder with one step.

    Raises:
      FormatError: if there are several, or it is unfinished or damaged.
    """
    from surgery_orbax import reading

    return reading.open_folder(folders.item(pathlib.Path(os.fsdecode(path))))

  def write(
    self,
    checkpoint: surgery.Checkpoint,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    manifest: bool = True,
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Writes a checkpoint that Orbax restores, whole or not at all.

    Args:
      checkpoint: what to write.
      path: the folder: a new name, or an empty folder.
      overwrite: means nothing, since a folder is never replaced.
      manifest: whether flags, metadata, adapters, digests and so on are written
        too, into a file of their own that Orbax does not read.
      progress: is told of tensors and bytes that were written.

    Raises:
      FormatError: if Orbax cannot hold a name, a value or a dtype.
      FileExistsError: if there is something in the folder.
      OSError: if it cannot be written.
    """
    from surgery_orbax import writing

    del overwrite
    writing.write_folder(checkpoint, path, manifest, progress)


@surgery.hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the format."""
  return {'orbax': Orbax()}
