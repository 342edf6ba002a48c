"""Linear, mean and passthrough: weighted sums of the tensors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract.config import field
from surgery.contract.method import Block, Method


def weighted(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> Any:
  """Returns `Σ w·x`."""
  result = arrays[0] * weights[0]
  for array, weight in zip(arrays[1:], weights[1:], strict=True):
    result += array * weight
  return result


def mean(arrays: Sequence[np.ndarray]) -> Any:
  """Returns the mean of arrays."""
  result = arrays[0].copy()
  for array in arrays[1:]:
    result += array
  result /= len(arrays)
  return result


class Linear(Method):
  """`Σ w·x / Σ w` (Wortsman et al. 2022, arXiv 2203.05482)."""

  name = 'linear'
  pointwise = True

  weight: tuple[float, ...] = field(
    default=(1.0,), doc='Weight of each model in the mean.'
  )
  normalize: bool = field(
    default=True, doc='Whether the sum is divided by the sum of the weights.'
  )

  def check(self) -> None:
    """Raises for weights without a mean."""
    total = sum(self.weight)
    if self.normalize and abs(total) < 1e-8:
      raise errors.ConfigError(
        f"method '{self.name}': the weights {list(self.weight)} add up to "
        f'{total:g}, so that there is no mean. Give other weights, or '
        'normalize: false.'
      )

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the weighted mean, or sum."""
    if not self.normalize:
      return weighted(block.tensors, self.weight)
    if len(set(self.weight)) == 1:
      return mean(block.tensors)  # Without the rounding of 1/3 and the like.
    total = sum(self.weight)
    return weighted(block.tensors, [w / total for w in self.weight])


class Mean(Method):
  """The mean of all models, as of the last checkpoints of a training run."""

  name = 'mean'
  pointwise = True

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the mean."""
    return mean(block.tensors)


class Passthrough(Method):
  """`scale · x` of one model."""

  name = 'passthrough'
  pointwise = True
  most = 1

  scale: float = field(default=1.0, doc='A factor.')

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the scaled tensor."""
    return block.tensors[0] * self.scale
