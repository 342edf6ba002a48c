"""LoHa and LoKr: updates that are products of small matrices."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

import surgery
from surgery_products.peft import PeftLoHa, PeftLoKr

__all__ = ['LoHa', 'LoKr']


def _flat(site: surgery.Site) -> tuple[int, int]:
  """Returns the numbers of inputs and of outputs."""
  return math.prod(site.in_shape), math.prod(site.out_shape)


def _normal(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
  """Returns normal numbers, whose width goes with the number of rows."""
  draw = jax.random.normal(surgery.named_key(key, name), shape, 'float32')
  return draw / math.sqrt(shape[0])


class LoHa(surgery.Adapter):
  """A product element by element of two low-rank matrices.

  `W' = W + s·(A₁·B₁ ∘ A₂·B₂)` with `Aᵢ` of shape `(in, rank)`, `Bᵢ` `(rank,
  out)` and `s = alpha / rank`; axes of inputs, and of outputs, are taken
  together. The update has a rank of up to `rank²` (FedPara: Hyeon-Woo et al.
  2022, arXiv 2108.06098; LyCORIS: Yeh et al. 2023, arXiv 2309.14859). `B₂` is
  zero at the start, so `W' = W`.
  """

  name = 'loha'
  peft = PeftLoHa()
  adds = True

  rank: int = surgery.field(default=8, ge=1, doc='Rank of each product.')
  alpha: float | None = surgery.field(
    default=None, gt=0, doc='Scale times the rank; the rank by default.'
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `w1_a`, `w1_b`, `w2_a` and `w2_b` (zeros)."""
    rows, columns = _flat(site)
    return {
      'w1_a': _normal(key, 'w1_a', (rows, self.rank)),
      'w1_b': _normal(key, 'w1_b', (self.rank, columns)),
      'w2_a': _normal(key, 'w2_a', (rows, self.rank)),
      'w2_b': jnp.zeros((self.rank, columns), 'float32'),
    }

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the base with the update, of the shape of `base`."""
    del site, name
    scale = 1.0 if self.alpha is None else self.alpha / self.rank
    first = weights['w1_a'] @ weights['w1_b']
    second = weights['w2_a'] @ weights['w2_b']
    return base + scale * (first * second).reshape(base.shape)


def _divided(size: int, factor: int) -> tuple[int, int]:
  """Returns two factors of a size, the smaller one first.

  Args:
    size: the size.
    factor: one of them, if it divides the size; otherwise, or if it is -1, they
      are as near to each other as can be, the smaller one at most `factor`.
  """
  if factor > 0 and size % factor == 0:
    small, large = sorted((factor, size // factor))
    return small, large
  most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
  small = next(n for n in range(max(most, 1), 0, -1) if size % n == 0)
  return small, size // small


class LoKr(surgery.Adapter):
  """A Kronecker product (LyCORIS: Yeh et al. 2023, arXiv 2309.14859).

  `W' = W + s·(C ⊗ D)` with `C` of shape `(in₁, out₁)`, `D` `(in₂, out₂)`, where
  `in = in₁·in₂` and `out = out₁·out₂`, and `s = alpha / rank`. `D` is a product
  of rank `rank` if that is less than half of its larger side, and with `both`
  `C`, too. With `taps`, `in` is the number of channels of a convolution, and
  `D` has a matrix for each tap. `C` is zero at the start, so `W' = W`.
  """

  name = 'lokr'
  peft = PeftLoKr()
  adds = True

  rank: int = surgery.field(default=8, ge=1, doc='Rank of the large factor.')
  alpha: float | None = surgery.field(
    default=None, gt=0, doc='Scale times the rank; the rank by default.'
  )
  factor: int = surgery.field(
    default=-1, ge=-1, doc='Size of the small factor; -1 for near the root.'
  )
  both: bool = surgery.field(
    default=False,
    doc='Make the small factor a product, too, where it is large.',
  )
  factor_first: bool = surgery.field(
    default=False,
    doc='Let a factor that divides a side be the size of the small factor also '
    'where it is the larger one, as PEFT does.',
  )
  taps: bool = surgery.field(
    default=False,
    doc='Cut the channels of a convolution and leave its taps whole, as PEFT '
    'does; by default all axes of inputs are taken together.',
  )

  def _channels(self, site: surgery.Site) -> int:
    """Returns which axis of the inputs is cut, if they are not one."""
    # As torch has it, (out, in, *taps), or as JAX has, (*taps, in, out).
    return 0 if site.primary.layout.startswith('o') else -1

  def _taps(self, site: surgery.Site) -> tuple[int, ...]:
    """Returns the sizes of the axes of inputs that stay whole."""
    if not self.taps:
      return ()
    shape = list(site.in_shape)
    del shape[self._channels(site)]
    return tuple(shape)

  def _sizes(self, site: surgery.Site) -> tuple[tuple[int, int], ...]:
    rows = site.in_size // math.prod(self._taps(site))
    return tuple(self._cut(n) for n in (rows, site.out_size))

  def _cut(self, size: int) -> tuple[int, int]:
    if self.factor_first and self.factor > 0 and size % self.factor == 0:
      return self.factor, size // self.factor
    return _divided(size, self.factor)

  def _is_low(self, site: surgery.Site) -> bool:
    (_, rows), (_, columns) = self._sizes(site)
    return self.rank < max(rows, columns) / 2

  def _is_low_small(self, site: surgery.Site) -> bool:
    (rows, _), (columns, _) = self._sizes(site)
    return self.both and self.rank < max(rows, columns) / 2

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `w1` (zeros), and `w2`, or the factors `…_a` and `…_b` of each.

    Axes of taps are rows of `w2`, behind the channels that these are of.
    """
    (in_1, in_2), (out_1, out_2) = self._sizes(site)
    rows, rank = in_2 * math.prod(self._taps(site)), self.rank
    weights = {'w1': jnp.zeros((in_1, out_1), 'float32')}
    if self._is_low_small(site):
      weights = {
        'w1_a': _normal(key, 'w1_a', (in_1, rank)),
        'w1_b': jnp.zeros((rank, out_1), 'float32'),
      }
    if not self._is_low(site):
      return {**weights, 'w2': _normal(key, 'w2', (rows, out_2))}
    return {
      **weights,
      'w2_a': _normal(key, 'w2_a', (rows, rank)),
      'w2_b': _normal(key, 'w2_b', (rank, out_2)),
    }

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the base with the update, of the shape of `base`."""
    del name
    scale = 1.0 if self.alpha is None else self.alpha / self.rank
    large = (
      weights['w2_a'] @ weights['w2_b'] if self._is_low(site) else weights['w2']
    )
    small = (
      weights['w1_a'] @ weights['w1_b']
      if self._is_low_small(site)
      else weights['w1']
    )
    # A product over an axis of size one: (in₂, out₂, in₁, out₁).
    kron = surgery.LowRank(None, large[..., None], small[None], scale).dense()
    update = kron.transpose(2, 0, 3, 1)
    if (taps := self._taps(site)) and self._channels(site):
      # (channels, *taps, out) as (*taps, channels, out).
      update = update.reshape(-1, *taps, site.out_size)
      update = jnp.moveaxis(update, 0, -2)
    return surgery.LowRank(base).dense() + update.reshape(base.shape)
