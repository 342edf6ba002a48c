"""The file formats that come with the library.

The host imports this whenever any hook is asked, so formats are imported when
a file is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from surgery.core.hookspecs import hookimpl

if TYPE_CHECKING:
  from surgery.core.checkpoint import Checkpoint


class Msgpack:
  """flax msgpack files.

  Attributes:
    suffixes: of names of such files.
  """

  suffixes = ('.msgpack',)

  def open(self, path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a file; see `surgery.files.msgpack.open_file`."""
    from surgery.files import msgpack

    return msgpack.open_file(path)

  def write(
    self,
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    manifest: bool = True,
  ) -> None:
    """Writes a file; see `surgery.files.msgpack.write_file`."""
    from surgery.files import msgpack

    msgpack.write_file(checkpoint, path, overwrite=overwrite, manifest=manifest)


@hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the formats by name."""
  return {'msgpack': Msgpack()}
