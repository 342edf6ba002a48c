"""The file formats that come with the library.

The host imports this whenever any hook is asked, so formats are imported when
a file is.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.core import location
from surgery.core.hookspecs import hookimpl

if TYPE_CHECKING:
  from surgery.core.checkpoint import Checkpoint
  from surgery.files.progress import Told


class Msgpack:
  """flax msgpack files, and sets of them.

  Attributes:
    suffixes: of names of such files.
  """

  suffixes = ('.msgpack',)

  def open(self, path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a file, or an index; see `surgery.files.msgpack.open_file`."""
    from surgery.files import msgpack, sharding
    from surgery.files.msgpack import parts

    if location.is_index(pathlib.Path(os.fsdecode(path))):
      return sharding.open_set(path, parts)
    return msgpack.open_file(path)

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
    """Writes a file or a set; see `surgery.files.msgpack.write_file`."""
    from surgery.files import msgpack, sharding
    from surgery.files.msgpack import parts

    if shard_size is None:
      msgpack.write_file(
        checkpoint,
        path,
        overwrite=overwrite,
        manifest=manifest,
        progress=progress,
      )
      return
    sharding.write_set(
      checkpoint,
      path,
      parts,
      shard_size,
      overwrite=overwrite,
      manifest=manifest,
      progress=progress,
    )


@hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the formats by name."""
  return {'msgpack': Msgpack()}
