"""DoRA: low-rank updates of a matrix's direction, and its magnitude."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import surgery
from surgery_lora_family.peft import PeftDoRA


def _norm(value: jax.Array, site: surgery.Site) -> jax.Array:
  """Returns the norm over the input axes, of shape `out_shape`."""
  return jnp.sqrt(jnp.sum(value**2, axis=tuple(range(len(site.in_shape)))))


class DoRA(surgery.LoRA):
  """Learns direction and magnitude apart (Liu et al. 2024, arXiv 2402.09353).

  `W' = m · V / ‖V‖` with `V = W + s·A·B`, where `A` has shape `in_shape +
  (rank,)`, `B` `(rank,) + out_shape`, `m` `out_shape`, the norm is taken over
  the input axes, and `s = alpha / rank`, or `alpha / √rank` with `rslora`. At
  the start `B` is zero and `m = ‖W‖`, so `W' = W` up to rounding. The norm is
  a constant for the backward pass (section 4.3).
  """

  name = 'dora'
  adds = False
  peft = PeftDoRA()

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `lora_a`, `lora_b` (zeros) and `magnitude`."""
    factors = super().init(site, key)
    return {**factors, 'magnitude': _norm(site.base(), site)}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns `m · V / ‖V‖`, of the shape of `base`."""
    # Written as it is meant; `surgery.factored` keeps `V` factored in both.
    direction = super().apply(site, name, base, weights).dense()
    norm = jax.lax.stop_gradient(_norm(direction, site))
    # A column of zeros has no direction: it stays zero instead of NaN.
    return direction * (weights['magnitude'] / jnp.where(norm == 0, 1, norm))

  def sharding(self, site: surgery.Site, weight: str) -> tuple[Any, ...]:
    """The outer axes of the factors are split as the base's are."""
    if weight == 'magnitude':
      return site.primary.roles_sharding('o')
    return super().sharding(site, weight)
