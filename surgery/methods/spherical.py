"""Slerp and its relatives: interpolation of directions on a sphere.

Each of them is a weighted sum whose weights follow from the products of all
pairs of tensors, so one pass over the inputs finds the weights, and a second
one adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract.config import field
from surgery.contract.method import Block, Method, Whole
from surgery.methods.linear import weighted


def products(block: Block) -> np.ndarray:
  """Returns the products of all pairs of deltas, or tensors without a base.

  Not by BLAS, whose threads decide how it rounds.
  """
  arrays = block.deltas
  result = np.empty((len(arrays), len(arrays)))
  for i, one in enumerate(arrays):
    for j, other in enumerate(arrays[: i + 1]):
      result[i, j] = result[j, i] = np.add.reduce((one * other).reshape(-1))
  return result


def _arc(
  aa: Any, bb: Any, ab: Any, t: float, near: Callable[[Any], Any]
) -> Any:
  """Returns the weights of two vectors in their slerp.

  Args:
    aa: square of the norm of the first.
    bb: that of the second.
    ab: their product.
    t: how far from the first to the second.
    near: says of cosines whether they are so near to 1 or -1 that the vectors
      are interpolated linearly.
  """
  scale = np.sqrt(aa) * np.sqrt(bb)
  cosine = np.clip(ab / np.where(scale > 0, scale, 1), -1, 1)
  # A vector of zeros has no direction.
  straight = near(cosine) | (scale == 0)
  angle = np.arccos(np.where(straight, 0, cosine))
  sine = np.sin(angle)
  first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
  second = np.where(straight, t, np.sin(t * angle) / sine)
  return first, second


class Slerp(Method):
  """Spherical interpolation of two tensors, as vectors (Shoemake 1985).

  Vectors with a cosine beyond ±0.9995 are interpolated linearly.
  """

  name = 'slerp'
  least = most = 2

  t: float = field(ge=0, le=1, doc='0 is the first model, 1 the second.')

  def prepare(self, whole: Whole) -> Any:
    """Finds the weights."""
    (aa, ab), (_, bb) = whole.total(products)
    return _arc(aa, bb, ab, self.t, lambda cosine: np.abs(cosine) > 0.9995)

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the weighted sum."""
    return weighted(block.tensors, prepared)


class NuSlerp(Method):
  """Slerp by weights: of tensors, rows or columns; of deltas with a base."""

  name = 'nuslerp'
  base = 'optional'
  least = most = 2

  weight: tuple[float, ...] = field(
    default=(1.0,), doc='Weights of both models; t is the second over the sum.'
  )
  flatten: bool = field(
    default=True, doc='Whether a tensor is one vector; else it has several.'
  )
  row_wise: bool = field(
    default=False,
    doc='Of a tensor that is not flattened: whether vectors lie along the '
    'first axis rather than along the last.',
  )

  @property
  def rows(self) -> bool:
    """Vectors along the last axis have to be whole."""
    return not self.flatten and not self.row_wise

  def _arc(self, aa: Any, bb: Any, ab: Any) -> Any:
    total = sum(self.weight)
    t = 0.5 if abs(total) < 1e-6 else self.weight[1] / total
    return _arc(aa, bb, ab, t, lambda cosine: 1 - cosine**2 <= 1e-12)

  def prepare(self, whole: Whole) -> Any:
    """Finds the weights, of all vectors that are not in one row."""
    if self.rows:
      return None
    if self.flatten:
      (aa, ab), (_, bb) = whole.total(products)
      return self._arc(aa, bb, ab)
    inner = math.prod(whole.shape[1:])

    def columns(block: Block) -> np.ndarray:
      a, b = block.deltas
      place = _columns(block, inner)
      return np.stack(
        [np.bincount(place, x, inner) for x in (a * a, b * b, a * b)]
      )

    return inner, self._arc(*whole.total(columns))

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the weighted sum."""
    a, b = block.deltas
    if self.rows:
      sums = [np.sum(x, -1, keepdims=True) for x in (a * a, b * b, a * b)]
      weights = self._arc(*sums)
    elif self.flatten:
      weights = prepared
    else:
      inner, columns = prepared
      weights = [one[_columns(block, inner)] for one in columns]
    mixed = weighted((a, b), weights)
    return mixed if block.base is None else block.base + mixed


def _columns(block: Block, inner: int) -> np.ndarray:
  """Returns the column of each element."""
  size = block.tensors[0].size
  return (block.start + np.arange(size)) % inner


def _sum(block: Block, weights: Sequence[float]) -> Any:
  mixed = weighted(block.deltas, weights)
  return mixed if block.base is None else block.base + mixed


class MultiSlerp(Method):
  """The normalised mean of the directions, times the mean of the norms.

  The tangents at that mean add up to zero, so the exponential map of
  barycentric interpolation leaves it where it is.
  """

  name = 'multislerp'
  base = 'optional'

  weight: tuple[float, ...] = field(default=(1.0,), doc='Weight of each model.')
  normalize_weights: bool = field(
    default=True, doc='Whether weights are divided by their sum.'
  )
  eps: float = field(
    default=1e-8, ge=0, doc='What a norm has to exceed to have a direction.'
  )

  def prepare(self, whole: Whole) -> Any:
    """Finds the weights."""
    given = np.array(self.weight)
    if whole.count == 1:
      return [1.0]
    if self.normalize_weights:
      if abs(given.sum()) < 1e-8:
        raise errors.ConfigError(
          f"method '{self.name}': the weights {list(self.weight)} add up to "
          '0. Give other weights, or normalize_weights: false.'
        )
      given = given / given.sum()
    # All that follows depends on the models only by the products of all pairs:
    # one pass over the tensors, and small matrices from here on.
    gram = whole.total(products)
    norms = np.sqrt(np.diag(gram))
    inverse = 1 / (norms + self.eps) if self.eps else _inverse(norms)
    # The mean direction as a sum of the models, and its length, which is less
    # than one where directions differ.
    toward = given * inverse
    length = math.sqrt(max(0.0, float(toward @ gram @ toward)))
    if length <= self.eps:
      # Two opposite models have no direction between them; mergekit takes the
      # plain mean there.
      if whole.count == 2 or not norms.any():
        return list(given)
      raise errors.SurgeryError(
        f"method '{self.name}': the weighted directions of {whole.count} "
        'models add up to zero, so there is no mean direction. Give other '
        'weights.'
      )
    # Normalised, and as long as the models are on average.
    return list(toward / length * float(norms @ given))

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the weighted sum."""
    return _sum(block, prepared)


def _inverse(norms: np.ndarray) -> np.ndarray:
  return np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)


class Karcher(Method):
  """The Riemannian mean of the directions, times the mean of the norms.

  Karcher 1977; the mean is a weighted sum of the tensors in each iteration, so
  it is found from the products of all pairs.
  """

  name = 'karcher'

  weight: tuple[float, ...] = field(default=(1.0,), doc='Weight of each model.')
  max_iter: int = field(default=10, ge=0, doc='Most iterations.')
  tol: float = field(
    default=1e-5, gt=0, doc='Smaller angles and norms count as zero.'
  )

  def check(self) -> None:
    """Raises for weights without a mean."""
    if min(self.weight) < 0 or not sum(self.weight):
      raise errors.ConfigError(
        f"method '{self.name}': expected weights of 0 or more that are not all "
        f'0, found {list(self.weight)}.'
      )

  def prepare(self, whole: Whole) -> Any:
    """Finds the weights."""
    share = np.array(self.weight) / sum(self.weight)
    if whole.count == 1:
      return [1.0]
    gram = whole.total(products)
    norms = np.sqrt(np.diag(gram))
    valid = norms > self.tol
    if not valid.any():
      return [0.0] * whole.count
    # Directions are unit vectors; a tensor of zeros has none and does not
    # count.
    inverse = np.where(valid, _inverse(norms), 0)
    cosines = gram * inverse * inverse[:, None]
    alphas = np.where(valid, share, 0)
    if not alphas.sum():
      return [0.0] * whole.count
    alphas = alphas / alphas.sum()
    center = self._center(cosines, alphas, valid)
    return list(center * inverse * float(share @ norms))

  def _center(
    self, cosines: np.ndarray, alphas: np.ndarray, valid: np.ndarray
  ) -> np.ndarray:
    """Returns the mean direction as a sum of unit vectors."""

    def length(weights: np.ndarray) -> float:
      return math.sqrt(max(0.0, float(weights @ cosines @ weights)))

    center = alphas.copy()
    # The mean of opposite directions is no start, so that the first one is.
    if length(center) < self.tol:
      center = np.zeros_like(alphas)
      center[int(np.argmax(valid))] = 1.0
    center = center / length(center)
    for _ in range(self.max_iter):
      # Rounding may bring a cosine just above one, which has no angle.
      dots = np.clip(cosines @ center, -1, 1)
      angles = np.where(alphas > 0, np.arccos(dots), 0)
      if (np.pi - angles).min() < self.tol:
        raise errors.SurgeryError(
          f"method '{self.name}': models point in opposite directions, so "
          'there is no mean direction. Give other weights, or another method.'
        )
      far = angles >= self.tol
      # The logarithm map scales each direction's tangent by angle /
      # sin(angle), which is one for an angle of zero.
      sines = np.where(far, np.sin(np.where(far, angles, 1)), 1)
      factors = np.where(far, alphas * angles / sines, 0)
      # The step is the weighted mean of all tangents at the center.
      tangent = factors - (factors @ dots) * center
      size = length(tangent)
      if size < self.tol:
        break
      # The exponential map: along the great circle in that direction.
      center = math.cos(size) * center + math.sin(size) / size * tangent
      center = center / length(center)
    return center

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the weighted sum."""
    return _sum(block, prepared)
