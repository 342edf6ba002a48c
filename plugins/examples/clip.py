"""A pass: values beyond a bound are brought to it. So it is a step of recipes.

A pass is a function from a checkpoint to a checkpoint. It reads nothing: a leaf
is computed when it is written, in blocks if the leaf that it is made of is.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import surgery


def clip(
  checkpoint: surgery.Checkpoint,
  select: str | Sequence[str],
  at: float,
  *,
  host: surgery.Host,
) -> surgery.Checkpoint:
  """Brings values beyond a bound to it.

  Args:
    checkpoint: the model.
    select: the tensors.
    at: the bound, for both signs.
    host: whose hooks are asked.

  Raises:
    SurgeryError: for a bound that is not positive, or a tensor that has no
      floating-point numbers.

  Example:
    clip: {select: '**/kernel', at: 0.5}
  """
  if not at > 0:
    raise surgery.SurgeryError(f'clip: expected a bound above 0, found {at}.')
  leaves = dict(checkpoint)
  for path in surgery.select(checkpoint, select, host=host):
    leaf = leaves[path]

    if leaf.dtype is None or 'float' not in leaf.dtype:
      raise surgery.SurgeryError(
        f'clip: {"/".join(path)}: expected a floating-point tensor, found '
        f'{leaf}. Select others.'
      )

    def clipped(value: Any) -> np.ndarray:
      # With a bfloat16 array and a number numpy computes in float32, and a
      # leaf gives what it says: the bound is rounded to the tensor's dtype.
      array = np.asarray(value)
      return np.clip(array, -at, at).astype(array.dtype)

    def load(leaf: surgery.Leaf) -> Any:
      return clipped(leaf.load())

    def part(leaf: surgery.Leaf, index: Any) -> Any:
      assert leaf.part is not None
      return clipped(leaf.part(index))

    leaves[path] = leaf.replace(
      load=functools.partial(load, leaf),
      part=None if leaf.part is None else functools.partial(part, leaf),
    )
  return checkpoint.replace(leaves=leaves)


@surgery.hookimpl
def surgery_passes() -> Mapping[str, Callable[..., Any]]:
  """Offers the pass by its name."""
  return {'clip': clip}
