"""Task vectors: differences of models from their base, thinned and added up.

`base + lambda · Σ w·δ'`, where `δ'` is what a method leaves of `δ = x - base`.
In methods that elect (TIES and its relatives) only the deltas count at each
place that have the sign of the majority.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from surgery import errors
from surgery.contract.config import field
from surgery.contract.method import Block, Cut, Method, Whole
from surgery.methods.linear import weighted

Normalize = bool | Literal['count']
Rescale = Literal['density', 'l1', 'none']

_NORMALIZE = (
  'Whether the sum is divided by the weights of those that count: true, false, '
  'or `count` to divide by their number.'
)
_DENSITY = 'Share of the elements of a delta that is kept, of each model.'


class Task(Method):
  """The base class of all methods on task vectors.

  Attributes:
    elects: whether a sign is elected at each place.
  """

  base = 'required'
  elects: ClassVar[bool] = False

  weight: tuple[float, ...] = field(
    default=(1.0,), doc='Weight of the delta of each model.'
  )
  lambda_: float = field(default=1.0, doc='A factor for the sum of all deltas.')
  normalize: Normalize = field(default=False, doc=_NORMALIZE)
  majority: Literal['weighted', 'plain'] = field(
    default='weighted',
    doc='Whether weights count where a sign is elected.',
  )

  def thinned(self, block: Block, prepared: Any) -> Sequence[np.ndarray]:
    """Returns the deltas after thinning."""
    del prepared
    return block.deltas

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the base plus the sum of the thinned deltas."""
    deltas = self.thinned(block, prepared)
    mixed = self._elected(deltas) if self.elects else self._summed(deltas)
    if self.lambda_ != 1:
      mixed *= self.lambda_
    return mixed if block.base is None else block.base + mixed

  def _summed(self, deltas: Sequence[np.ndarray]) -> Any:
    mixed = weighted(deltas, self.weight)
    if self.normalize:
      mixed /= self._divisor(sum(self.weight), len(deltas))
    return mixed

  def _divisor(self, total: float, count: int) -> float:
    if self.normalize == 'count':
      return count
    # Weights may cancel out; mergekit does not divide then either.
    return 1.0 if abs(total) < 1e-8 else total

  def _elected(self, deltas: Sequence[np.ndarray]) -> Any:
    """Returns the sum of the deltas that have the sign of the majority.

    Yadav et al. 2023, arXiv 2306.01708.
    """
    # Elect: the sign of the sum of all deltas. PEFT counts them unweighted,
    # mergekit with their weights.
    weighs = self.majority == 'weighted'
    votes = [
      d * w if weighs else d for d, w in zip(deltas, self.weight, strict=True)
    ]
    total = votes[0].copy()
    for vote in votes[1:]:
      total += vote
    # Zero counts as positive. The sign is one bit of a float64, and exclusive
    # or with it is quicker than a product with 1 or -1.
    sign = np.left_shift(~(total >= 0), 63, dtype=np.uint64)
    mixed = np.zeros_like(total)
    divisor = np.zeros_like(total)
    for vote, weight in zip(votes, self.weight, strict=True):
      # With the elected sign taken off, deltas that agree are positive, and
      # those that do not become zero. A delta of zero does not count.
      agreeing = (vote.view(np.uint64) ^ sign).view(np.float64)
      np.maximum(agreeing, 0, out=agreeing)
      # Disjoint mean: where it is normalised, a sum is divided by the weights
      # of the deltas that agreed at that place, not by all.
      if self.normalize:
        counts = 1.0 if self.normalize == 'count' else weight
        divisor += (agreeing > 0) * counts
      mixed += agreeing if weighs else agreeing * weight
    mixed.view(np.uint64)[...] ^= sign
    if self.normalize:
      np.copyto(divisor, 1, where=divisor == 0)
      mixed /= divisor
    return mixed


class TaskArithmetic(Task):
  """`base + lambda · Σ w·δ` (Ilharco et al. 2023, arXiv 2212.04089)."""

  name = 'task_arithmetic'
  pointwise = True

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the sum, computed as a weighted sum of the models and the base.

    So a model of weight 1 comes out unchanged, to the bit.
    """
    # base + λ·Σ w·(x - base) = λ·Σ w·x + (1 - λ·Σ w)·base, without rounding
    # differences of numbers that are nearly equal.
    total = sum(self.weight)
    factor = self.lambda_
    if self.normalize:
      factor /= self._divisor(total, len(self.weight))
    mixed = weighted(block.tensors, [factor * w for w in self.weight])
    left = 1 - factor * total
    if block.base is not None and left:
      mixed += left * block.base
    return mixed


def kept(density: float, size: int) -> int:
  """Returns the number of elements of a share, at least one."""
  return size if density >= 1 else max(1, int(density * size))


class _Trimmed(Task):
  """Keeps the largest magnitudes of each delta."""

  density: tuple[float, ...] = field(default=(1.0,), gt=0, le=1, doc=_DENSITY)

  def prepare(self, whole: Whole) -> list[Cut]:
    """Finds the smallest magnitude that is kept."""
    counts = [[kept(d, whole.size)] for d in self.density]
    return [cut for [cut] in whole.largest(_magnitudes, counts)]

  def thinned(self, block: Block, prepared: Any) -> Sequence[np.ndarray]:
    """Returns the largest magnitudes, and zero elsewhere."""
    return [
      d if p >= 1 else d * cut.mask(np.abs(d), block.start)
      for d, cut, p in zip(block.deltas, prepared, self.density, strict=True)
    ]


def _magnitudes(block: Block) -> Sequence[np.ndarray]:
  return [np.abs(d) for d in block.deltas]


class MagnitudePrune(_Trimmed):
  """`base + lambda · Σ w·δ` of the largest magnitudes of each delta."""

  name = 'magnitude_prune'


class Ties(_Trimmed):
  """Trims, elects signs, and takes the mean of those that agree.

  Yadav et al. 2023, arXiv 2306.01708.
  """

  name = 'ties'
  elects = True

  normalize: Normalize = field(default=True, doc=_NORMALIZE)


class _Dropped(Task):
  """Drops elements at random, and makes the rest larger (DARE)."""

  density: tuple[float, ...] = field(gt=0, le=1, doc=_DENSITY)
  rescale: Rescale = field(
    default='density',
    doc='What makes up for the dropped: `density` divides by the share that is '
    'kept, `l1` keeps the sum of magnitudes, `none` does nothing.',
  )

  def _probability(self, delta: np.ndarray, model: int) -> Any:
    """Returns the probability with which each element is kept."""
    del delta
    return self.density[model]

  def _masked(self, block: Block) -> list[np.ndarray]:
    """Returns deltas with some elements dropped, rescaled by the share kept."""
    found = []
    for model, delta in enumerate(block.deltas):
      if self.density[model] >= 1:
        found.append(delta)
        continue
      # DARE, equation 2: δ' = δ·m / p with m ~ Bernoulli(p), whose mean is δ.
      # Random numbers belong to places, so that blocks do not matter.
      share = self._probability(delta, model)
      left = delta * (block.uniform(model) < share)
      found.append(left / share if self.rescale == 'density' else left)
    return found

  def prepare(self, whole: Whole) -> Any:
    """Finds the sums of magnitudes before and after, if they are kept."""
    if self.rescale != 'l1' or all(d >= 1 for d in self.density):
      return None

    # The masks are drawn again when the result is computed, and are the same.
    def measure(block: Block) -> np.ndarray:
      pairs = zip(block.deltas, self._masked(block), strict=True)
      return np.array([[np.abs(d).sum(), np.abs(m).sum()] for d, m in pairs])

    return [
      before / after if before and after else 1.0
      for before, after in whole.total(measure)
    ]

  def thinned(self, block: Block, prepared: Any) -> Sequence[np.ndarray]:
    """Returns the deltas that were kept at random, rescaled."""
    found = self._masked(block)
    if prepared is None:
      return found
    return [d * factor for d, factor in zip(found, prepared, strict=True)]


class DareLinear(_Dropped):
  """Drops at random and adds up (Yu et al. 2023, arXiv 2311.03099)."""

  name = 'dare_linear'


class DareTies(_Dropped):
  """Drops at random as DARE does, and elects signs as TIES does."""

  name = 'dare_ties'
  elects = True


class _Ranked(_Dropped):
  """Drops small magnitudes of a row more often than large ones.

  Deep et al. 2024, arXiv 2406.11617.
  """

  epsilon: tuple[float, ...] = field(
    default=(0.15,),
    ge=0,
    lt=1,
    doc='Half of the range in which the probability to be kept lies.',
  )

  @property
  def rows(self) -> bool:
    """Elements are ranked in their row."""
    return True

  def check(self) -> None:
    """Raises unless all probabilities lie between 0 and 1."""
    count = max(len(self.density), len(self.epsilon))
    for k in range(count):
      density = self.density[min(k, len(self.density) - 1)]
      epsilon = self.epsilon[min(k, len(self.epsilon) - 1)]
      if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
        raise errors.ConfigError(
          f"method '{self.name}': density {density:g} with epsilon {epsilon:g} "
          f'gives probabilities from {density - epsilon:g} to '
          f'{density + epsilon:g}; expected numbers between 0 and 1. Give a '
          'smaller epsilon.'
        )

  def _probability(self, delta: np.ndarray, model: int) -> Any:
    # DELLA's MAGPRUNE: the probability rises linearly with the rank of the
    # magnitude in its row, from density - epsilon to density + epsilon.
    last = delta.shape[-1] - 1
    order = np.argsort(np.abs(delta), axis=-1, kind='stable')
    rank = np.empty(delta.shape)
    places = np.broadcast_to(np.arange(last + 1.0), delta.shape)
    np.put_along_axis(rank, order, places, axis=-1)
    # A row of one element has no ranks: it gets the mean probability.
    share = rank / last if last > 0 else np.full(delta.shape, 0.5)
    epsilon = self.epsilon[model]
    return self.density[model] - epsilon + 2 * epsilon * share


class Della(_Ranked):
  """Drops by rank, and elects signs as TIES does."""

  name = 'della'
  elects = True

  normalize: Normalize = field(default=True, doc=_NORMALIZE)


class DellaLinear(_Ranked):
  """Drops by rank, and adds up."""

  name = 'della_linear'


class Breadcrumbs(Task):
  """Leaves out the largest magnitudes, and the smallest.

  Davari & Belilovsky 2023, arXiv 2312.06795.
  """

  name = 'breadcrumbs'

  density: tuple[float, ...] = field(gt=0, le=1, doc=_DENSITY)
  gamma: tuple[float, ...] = field(
    default=(0.01,),
    ge=0,
    lt=1,
    doc='Share of the elements that is left out as the largest; less, where '
    'density could not be kept otherwise.',
  )

  def prepare(self, whole: Whole) -> Any:
    """Finds the magnitudes between which elements are kept."""
    counts = []
    for density, gamma in zip(self.density, self.gamma, strict=True):
      # The largest are outliers and the smallest noise: what is kept lies
      # between two thresholds, and is a share of `density`.
      count = kept(density, whole.size)
      top = min(int(gamma * whole.size), whole.size - count)
      counts.append([top + count, top])
    return whole.largest(_magnitudes, counts)

  def thinned(self, block: Block, prepared: Any) -> Sequence[np.ndarray]:
    """Returns the deltas that are neither the largest nor the smallest."""
    found = []
    for delta, (outer, inner) in zip(block.deltas, prepared, strict=True):
      sizes = np.abs(delta)
      mask = outer.mask(sizes, block.start) & ~inner.mask(sizes, block.start)
      found.append(delta * mask)
    return found


class BreadcrumbsTies(Breadcrumbs):
  """Breadcrumbs, with signs elected as TIES does."""

  name = 'breadcrumbs_ties'
  elects = True
