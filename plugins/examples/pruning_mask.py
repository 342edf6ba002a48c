"""Magnitude pruning: the smallest values of a kernel are masked out.

A mask stands between the stored parameter and the layer and trains nothing, so
it is an adapter type whose only weight is frozen. It is drawn from the base
when it is attached; merging writes the zeros down.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import surgery


class Prune(surgery.Adapter):
  """Answers `W ∘ M` with a mask of zeros and ones.

  `M` is zero at the `round(fraction·size)` smallest `|W|` of each kernel (Han
  et al. 2015, arXiv 1506.02626); of equal values those that come first go. `M`
  stays while the base trains, and what is masked gets no gradient.
  """

  name = 'prune'
  frozen = ('mask',)

  fraction: float = surgery.field(
    default=0.5, ge=0, lt=1, doc='Part of the values that is masked out.'
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `mask`, booleans of the shape of the kernel."""
    del key
    base = site.base()
    order = jnp.argsort(jnp.abs(base), axis=None, stable=True)
    kept = jnp.ones(base.size, bool)
    kept = kept.at[order[: round(self.fraction * base.size)]].set(False)
    return {'mask': kept.reshape(base.shape)}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns `base` where the mask is one, and zero elsewhere."""
    del site, name
    return jnp.where(weights['mask'] > 0, base, 0)
