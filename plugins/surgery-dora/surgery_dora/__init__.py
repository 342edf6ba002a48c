"""DoRA: low-rank updates of a matrix's direction, and its magnitude."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

import surgery

__all__ = ['DoRA']


def _norm(value: jax.Array, site: surgery.Site) -> jax.Array:
  """Returns the norm over the input axes, of shape `out_shape`."""
  return jnp.sqrt(jnp.sum(value**2, axis=tuple(range(len(site.in_shape)))))


class DoRA(surgery.Adapter):
  """Learns direction and magnitude apart (Liu et al. 2024, arXiv 2402.09353).

  `W' = m · V / ‖V‖` with `V = W + s·A·B`, where `A` has shape `in_shape +
  (rank,)`, `B` `(rank,) + out_shape`, `m` `out_shape`, the norm is taken over
  the input axes, and `s = alpha / rank`, or `alpha / √rank` with `rslora`. At
  the start `B` is zero and `m = ‖W‖`, so `W' = W` up to rounding. The norm is
  a constant for the backward pass (section 4.3).
  """

  name = 'dora'

  rank: int = surgery.field(default=8, ge=1, doc='Rank of the update.')
  alpha: float | None = surgery.field(
    default=None, gt=0, doc='Scale times rank; twice the rank by default.'
  )
  rslora: bool = surgery.field(
    default=False, doc='Scale by 1/√rank instead of 1/rank.'
  )

  @property
  def scale(self) -> float:
    """Factor of the product of `A` and `B`."""
    alpha = 2 * self.rank if self.alpha is None else self.alpha
    return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `lora_a`, `lora_b` (zeros) and `magnitude`.

    Raises:
      SiteError: if the rank exceeds the smaller side of the matrix.
    """
    largest = min(site.in_size, site.out_size)
    if self.rank > largest:
      raise surgery.SiteError(
        f'rank {self.rank} exceeds the smaller side of '
        f'{site.in_size}×{site.out_size}. Choose a rank of at most {largest}.'
      )
    draw = jax.random.normal(
      surgery.named_key(key, 'lora_a'), (*site.in_shape, self.rank), 'float32'
    )
    return {
      'lora_a': draw / math.sqrt(self.rank),
      'lora_b': jnp.zeros((self.rank, *site.out_shape), 'float32'),
      'magnitude': _norm(site.base(), site),
    }

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns `m · V / ‖V‖`, of the shape of `base`."""
    del name
    update = jnp.tensordot(weights['lora_a'], weights['lora_b'], axes=1)
    direction = base + self.scale * update
    norm = jax.lax.stop_gradient(_norm(direction, site))
    # A column of zeros has no direction: it stays zero instead of NaN.
    return direction * (weights['magnitude'] / jnp.where(norm == 0, 1, norm))

  def sharding(self, site: surgery.Site, weight: str) -> tuple[Any, ...]:
    """The outer axes of the factors are split as the base's are."""
    outputs = site.primary.roles_sharding('o')
    if weight == 'lora_a':
      return (*site.primary.roles_sharding('i'), None)
    return outputs if weight == 'magnitude' else (None, *outputs)
