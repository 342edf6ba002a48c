"""VeRA: vectors between two random matrices that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import surgery
from surgery_shared.peft import PeftVeRA
from surgery_shared.sharing import refuse_patterns

__all__ = ['VeRA']


class VeRA(surgery.Adapter):
  """Learns two vectors a site (Kopiczko et al. 2023, arXiv 2310.11454).

  `W' = W + (A·diag(d)·B)·diag(b)`. `vera_a` `(in, rank)` and `vera_b`
  `(rank, out)` are random, frozen, shared by all sites, as large as the largest
  and sliced to each; inputs and outputs of several axes are taken flat.
  `lambda_d` `(rank,)` starts at `d_initial`, `lambda_b` `(out,)` at zero, so
  `W' = W` at the start.
  The shared matrices are drawn as in the paper, Kaiming-uniform: uniform in
  `±√(3 / fan_in)`.
  """

  name = 'vera'
  peft = PeftVeRA()
  frozen = ('vera_a', 'vera_b')
  adds = True

  rank: int = surgery.field(default=256, ge=1, doc='Rank of the projections.')
  d_initial: float = surgery.field(
    default=0.1, doc='Value of lambda_d at the start.'
  )

  def check(self) -> None:
    """Checks options that depend on each other."""
    refuse_patterns(self, 'rank')

  def init_shared(
    self, sites: Sequence[surgery.Site], key: jax.Array
  ) -> dict[str, Any]:
    """Returns `vera_a` `(in, rank)` and `vera_b` `(rank, out)` for all."""
    inputs = max(site.in_size for site in sites)
    outputs = max(site.out_size for site in sites)
    uniform = lambda name, shape, fan: jax.random.uniform(
      surgery.named_key(key, name),
      shape,
      'float32',
      minval=-((3 / fan) ** 0.5),
      maxval=(3 / fan) ** 0.5,
    )
    return {
      'vera_a': uniform('vera_a', (inputs, self.rank), inputs),
      'vera_b': uniform('vera_b', (self.rank, outputs), self.rank),
    }

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `lambda_d` `(rank,)` and `lambda_b` `(out,)`, zeros."""
    del key
    return {
      'lambda_d': jnp.full((self.rank,), self.d_initial, 'float32'),
      'lambda_b': jnp.zeros((site.out_size,), 'float32'),
    }

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> surgery.LowRank:
    """Returns `base` and the update as factors."""
    del name
    a = weights['vera_a'][: site.in_size] * weights['lambda_d']
    b = weights['vera_b'][:, : site.out_size] * weights['lambda_b']
    return surgery.LowRank(
      base,
      a.reshape((*site.in_shape, self.rank)),
      b.reshape((self.rank, *site.out_shape)),
    )
