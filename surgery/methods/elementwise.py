"""How several changes become one, element by element: merge methods.

Each is a function from arrays of one shape, a weight each, and options, to an
array. All is done in the dtype of the arrays, which callers make wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import errors

Arrays = Sequence[np.ndarray]


def linear(arrays: Arrays, weights: Sequence[float], **options: Any) -> Any:
  """Returns `Σ w·δ`."""
  del options
  total = np.zeros_like(arrays[0])
  for array, weight in zip(arrays, weights, strict=True):
    total += weight * array
  return total


def trimmed(array: np.ndarray, density: float) -> np.ndarray:
  """Returns an array of which the largest magnitudes are left.

  Args:
    array: the array.
    density: share of the elements that are kept, at least one.
  """
  keep = max(1, int(density * array.size))
  if keep >= array.size:
    return array
  sizes = np.abs(array).reshape(-1)
  # Which of equal ones are kept depends on their places alone.
  order = np.argpartition(-sizes, keep - 1)
  least = sizes[order[keep - 1]]
  mask = sizes > least
  ties = np.flatnonzero(sizes == least)
  mask[ties[: keep - int(mask.sum())]] = True
  return np.where(mask.reshape(array.shape), array, 0)


def magnitude_prune(
  arrays: Arrays, weights: Sequence[float], *, density: float, **options: Any
) -> Any:
  """Returns `Σ w·δ` of what is left of the largest magnitudes of each."""
  del options
  return linear([trimmed(a, density) for a in arrays], weights)


def _elected(arrays: Arrays, weights: Sequence[float]) -> Any:
  """Returns the mean over those whose sign is that of the sum (TIES)."""
  stack = np.stack(arrays)
  sign = np.where(stack.sum(axis=0) >= 0, 1, -1)
  agree = np.sign(stack) == sign
  factors = np.asarray(weights, stack.dtype).reshape(-1, *[1] * sign.ndim)
  count = np.maximum(agree.sum(axis=0), 1)
  return ((stack * factors) * agree).sum(axis=0) / count


def ties(
  arrays: Arrays, weights: Sequence[float], *, density: float, **options: Any
) -> Any:
  """Trims, elects a sign, and takes the mean of those that agree.

  Yadav et al. 2023, arXiv 2306.01708; the sign is that of the sum of what was
  trimmed, and weights count in the mean.
  """
  del options
  return _elected([trimmed(a, density) for a in arrays], weights)


def _dropped(arrays: Arrays, density: float, masks: Arrays) -> list[Any]:
  """Returns arrays of which some are dropped, and the rest is larger (DARE)."""
  return [a * m / density for a, m in zip(arrays, masks, strict=True)]


def dare_linear(
  arrays: Arrays,
  weights: Sequence[float],
  *,
  density: float,
  masks: Arrays,
  **options: Any,
) -> Any:
  """Returns `Σ w·δ·m/p` with random masks `m` of density `p`.

  Yu et al. 2023, arXiv 2311.03099.
  """
  del options
  return linear(_dropped(arrays, density, masks), weights)


def dare_ties(
  arrays: Arrays,
  weights: Sequence[float],
  *,
  density: float,
  masks: Arrays,
  **options: Any,
) -> Any:
  """Drops at random as DARE does, and elects signs as TIES does."""
  del options
  return _elected(_dropped(arrays, density, masks), weights)


METHODS = {
  'dare_linear': dare_linear,
  'dare_ties': dare_ties,
  'linear': linear,
  'magnitude_prune': magnitude_prune,
  'ties': ties,
}


def check_density(density: float) -> None:
  """Raises unless a density is a share.

  Raises:
    ConfigError: otherwise.
  """
  if not 0 < density <= 1:
    raise errors.ConfigError(
      f'density: expected a share above 0 and at most 1, found {density}.'
    )
