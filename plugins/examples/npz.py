"""A file format: numpy's `.npz`, an array a path.

It keeps arrays and no more: what else a model has (flags, metadata, adapters)
a format either writes down, or refuses to lose.
"""

import contextlib
import functools
import os
import pathlib
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import surgery

# Of other dtypes, as bfloat16, numpy's files keep the bytes and not the name.
_DTYPES = frozenset(
  (
    'bool',
    *(f'{kind}int{bits}' for kind in ('', 'u') for bits in (8, 16, 32, 64)),
    *(f'float{bits}' for bits in (16, 32, 64)),
    *(f'complex{bits}' for bits in (64, 128)),
  )
)


class Npz:
  """Reads and writes `.npz`."""

  suffixes = ('.npz',)

  def open(self, path: Any) -> surgery.Checkpoint:
    """Returns the arrays of a file, of which none has been read."""
    leaves = {}
    with _reading(path) as file:
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
    _check(checkpoint, path)
    other = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.npz')
    try:
      # What `numpy.savez` does, but for one array after the other, and for any
      # name: savez takes names as arguments, of which `file` is one already.
      with zipfile.ZipFile(other, 'w') as file:
        for name, leaf in checkpoint.items():
          array = np.asanyarray(leaf.load())
          with file.open(f'{"/".join(name)}.npy', 'w', force_zip64=True) as one:
            np.lib.format.write_array(one, array, allow_pickle=False)
      os.replace(other, path)  # noqa: PTH105
    finally:
      other.unlink(missing_ok=True)


def _check(checkpoint: surgery.Checkpoint, path: pathlib.Path) -> None:
  """Raises if a checkpoint has something that would be lost."""
  if checkpoint.manifest.adapters:
    raise surgery.FormatError(
      f'{path}: .npz has no place for adapters. Merge or detach first.'
    )
  if checkpoint.manifest.metadata:
    raise surgery.FormatError(f'{path}: .npz has no place for texts of files.')
  for name, leaf in checkpoint.items():
    what = None
    if leaf.shape is None or leaf.dtype is None:
      what = 'values that are no arrays'
    elif leaf.key is not None:
      what = 'keys of random numbers'
    elif not leaf.trainable or leaf.metadata:
      what = 'flags and metadata'
    elif leaf.dtype not in _DTYPES:
      what = f'{leaf.dtype}'
    elif any('/' in part or '\\' in part for part in name):
      what = 'names with slashes'
    if what is not None:
      raise surgery.FormatError(
        f'{path}: {"/".join(name)}: .npz has no place for {what}.'
      )


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[Any]:
  """Opens a file; whatever it raises because of its bytes is a FormatError."""
  # Outside of `try`: what the system says of a file it says best.
  with pathlib.Path(path).open('rb') as stream:
    try:
      with np.load(stream, allow_pickle=False) as file:
        yield file
    except Exception as error:
      raise surgery.FormatError(
        f'{path}: it is no .npz, or damaged: {type(error).__name__}: {error}. '
        'Fetch it again.'
      ) from error


def _read(path: Any, name: str) -> np.ndarray:
  with _reading(path) as file:
    array: np.ndarray = file[name]
    return array


@surgery.hookimpl
def surgery_formats() -> Mapping[str, Any]:
  """Offers the format by its name."""
  return {'npz': Npz()}
