"""SCE, Model Stock, NearSwap and Arcee Fusion: methods that measure first."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery.contract.config import field
from surgery.contract.method import Block, Method, Whole
from surgery.methods.linear import mean
from surgery.methods.spherical import products


class Sce(Method):
  """Selects where models differ most, weighs by energy, erases minorities.

  Wan et al. 2024, arXiv 2408.07990.
  """

  name = 'sce'
  base = 'required'

  select_topk: float = field(
    default=1.0,
    gt=0,
    le=1,
    doc='Share of the places with a variance whose deltas are kept, those of '
    'the largest variance.',
  )

  def prepare(self, whole: Whole) -> Any:
    """Finds the smallest variance that is kept, and the models' weights."""
    # Select: of the places where models differ at all, the share with the
    # largest variance.
    cut = None
    if self.select_topk < 1:
      places = whole.total(lambda block: np.count_nonzero(_variance(block)))
      wanted = max(1, int(int(places) * self.select_topk)) if places else 0
      [[cut]] = whole.largest(lambda block: [_variance(block)], [[wanted]])

    # Calculate: a model's weight is its share of the squared norms of what was
    # selected, one number for the whole tensor.
    def squares(block: Block) -> np.ndarray:
      deltas = self._selected(block, cut)
      return np.array([np.add.reduce(d * d) for d in deltas])

    energy = whole.total(squares)
    total = energy.sum()
    equal = np.full(whole.count, 1 / whole.count)
    return cut, energy / total if total else equal

  def _selected(self, block: Block, cut: Any) -> Any:
    if cut is None:
      return block.deltas
    mask = cut.mask(_variance(block), block.start)
    return [d * mask for d in block.deltas]

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the base and the mean of the deltas that agree."""
    cut, weights = prepared
    deltas = self._selected(block, cut)
    # Erase: deltas whose sign is not that of the sum are left out, and the rest
    # is divided by the weights of those that stay.
    positive = sum(deltas[1:], deltas[0]) >= 0
    mixed = np.zeros_like(deltas[0])
    divisor = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
      agrees = np.where(positive, delta > 0, delta < 0)
      mixed += delta * agrees * weight
      divisor += agrees * weight
    return block.base + mixed / np.where(divisor > 0, divisor, 1)


def _variance(block: Block) -> np.ndarray:
  """Returns the variance of the deltas at each place."""
  middle = mean(block.deltas)
  result: np.ndarray = mean([(d - middle) ** 2 for d in block.deltas])
  return result


class ModelStock(Method):
  """The mean of the models, moved towards the base by their angles.

  `t·mean + (1 - t)·base` with `t = N·cos / (1 + (N - 1)·cos)` and the mean
  cosine of the pairs of deltas (Jang et al. 2024, arXiv 2403.19522).
  """

  name = 'model_stock'
  base = 'required'
  least = 2

  filter_wise: bool = field(
    default=False, doc='Whether each row has an angle of its own.'
  )

  @property
  def rows(self) -> bool:
    """Whether each row is combined separately."""
    return self.filter_wise

  def prepare(self, whole: Whole) -> Any:
    """Finds the share of the mean in the result."""
    if self.filter_wise:
      return None
    return self._share(whole.total(products))

  def _share(self, gram: np.ndarray) -> Any:
    """Returns `t` from products of pairs, which are the first two axes."""
    count = len(gram)
    cosines = []
    for i in range(count):
      for j in range(i):
        scale = np.sqrt(gram[i, i]) * np.sqrt(gram[j, j])
        cosine = gram[i, j] / np.where(scale > 0, scale, 1)
        cosines.append(np.clip(np.where(scale > 0, cosine, 0), -1, 1))
    cosine = sum(cosines) / len(cosines)
    below = 1 + (count - 1) * cosine
    # Where deltas cancel each other there is no estimate: the base stays.
    apart = np.abs(below) < 1e-6
    return np.where(apart, 0, count * cosine / np.where(apart, 1, below))

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the mean, drawn to the base."""
    share = prepared
    if self.filter_wise:
      deltas = block.deltas
      gram = np.array(
        [[np.sum(a * b, -1, keepdims=True) for b in deltas] for a in deltas]
      )
      share = self._share(gram)
    return share * mean(block.tensors) + (1 - share) * block.base


class NearSwap(Method):
  """Moves the base to the model where they are near.

  `w·x + (1 - w)·base` with `w = min(1, t / |x - base|)`.
  """

  name = 'nearswap'
  pointwise = True
  base = 'required'
  most = 1

  t: float = field(ge=0, doc='Up to this distance the model is taken.')

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the base, moved."""
    far = np.abs(block.deltas[0])
    weight = np.minimum(1.0, self.t / np.where(far > 0, far, 1))
    weight = np.where(far > 0, weight, 1.0)
    return weight * block.tensors[0] + (1 - weight) * block.base


class ArceeFusion(Method):
  """Takes from the model what is important: changed much, in changed rows.

  Importance is `|x - base|` times the divergence of the softmax of the row;
  elements from `median + 1.5·(q3 - q1)` on are taken.
  """

  name = 'arcee_fusion'
  base = 'required'
  most = 1

  @property
  def rows(self) -> bool:
    """The softmax is over a row."""
    return True

  def _importance(self, block: Block) -> np.ndarray:
    p = _softmax(block.tensors[0]) + 1e-8
    q = _softmax(block.base) + 1e-8
    apart = np.sum(p * np.log(p / q), -1, keepdims=True)
    # It is never negative, but for rounding.
    return np.abs(block.deltas[0]) * np.maximum(apart, 0)

  def prepare(self, whole: Whole) -> Any:
    """Finds from which importance on elements are taken."""
    places = [int(q * (whole.size - 1)) for q in (0.25, 0.5, 0.75)]
    counts = [whole.size - place for place in places]
    [cuts] = whole.largest(lambda block: [self._importance(block)], [counts])
    low, middle, high = (cut.value for cut in cuts)
    return middle + 1.5 * (high - low)

  def combine(self, block: Block, prepared: Any) -> Any:
    """Returns the base, with what is important of the model."""
    assert block.base is not None
    taken = self._importance(block) >= prepared
    return np.where(taken, block.tensors[0], block.base)


def _softmax(x: Any) -> Any:
  raised = np.exp(x - x.max(-1, keepdims=True))
  return raised / raised.sum(-1, keepdims=True)
