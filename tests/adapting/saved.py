"""Small models as checkpoints, for the tests of this room."""

import numpy as np

import surgery
from surgery.naming import paths


def leaf(value, **fields):
  array = np.asarray(value)
  return surgery.Leaf(lambda: array, array.shape, str(array.dtype), **fields)


def numbers(*shape, seed=0, dtype='float32'):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def model(**tensors):
  """Returns a checkpoint of arrays; `a__b` stands for the path `a/b`."""
  return surgery.Checkpoint(
    {tuple(name.split('__')): leaf(v) for name, v in tensors.items()}
  )


def values(checkpoint):
  """Returns all arrays of a checkpoint by path, as written down."""
  return {
    paths.show(path): np.asarray(one.load()) for path, one in checkpoint.items()
  }


def with_values(checkpoint, **tensors):
  """Returns a checkpoint with other values of some tensors."""
  leaves = dict(checkpoint)
  for name, value in tensors.items():
    path = paths.parse(name.replace('__', '/'))
    array = np.asarray(value, np.float32)
    assert leaves[path].shape == array.shape
    leaves[path] = leaves[path].replace(load=lambda array=array: array)
  return checkpoint.replace(leaves=leaves)
