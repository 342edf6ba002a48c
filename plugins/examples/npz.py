"""A file format: numpy's `.npz`, an array a path.

It keeps arrays and no more: what else a model has (flags, adapters, history) a
format either writes down, or refuses to lose.
"""

import functools
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

import surgery


class Npz:
  """Reads and writes `.npz`."""

  suffixes = ('.npz',)

  def open(self, path: Any) -> surgery.Checkpoint:
    """Returns the arrays of a file, of which none has been read."""
    leaves = {}
    with np.load(path, allow_pickle=False) as file:
      for name in file.files:
        array = file[name]  # For its shape; numpy offers no other way.
        load = functools.partial(_read, path, name)
        key = tuple(name.split('/'))
        leaves[key] = surgery.Leaf(load, array.shape, array.dtype.name)
    return surgery.Checkpoint(leaves, origin=str(path))

  def write(
    self, checkpoint: surgery.Checkpoint, path: Any, *, overwrite: bool = False
  ) -> None:
    """Writes a checkpoint, whole or not at all."""
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
      raise FileExistsError(17, 'the file exists', str(path))
    if checkpoint.manifest.adapters:
      raise surgery.FormatError(
        f'{path}: .npz has no place for adapters. Merge or detach first.'
      )
    arrays = {
      '/'.join(name): np.asarray(leaf.load())
      for name, leaf in checkpoint.items()
    }
    other = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.npz')
    try:
      np.savez(other, **arrays)
      os.replace(other, path)  # noqa: PTH105
    finally:
      other.unlink(missing_ok=True)


def _read(path: Any, name: str) -> np.ndarray:
  with np.load(path, allow_pickle=False) as file:
    return file[name]


@surgery.hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the format by its name."""
  return {'npz': Npz()}
