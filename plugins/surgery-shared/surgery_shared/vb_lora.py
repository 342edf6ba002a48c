"""VB-LoRA: low-rank updates put together of vectors that all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import surgery
from surgery_shared.peft import PeftVBLoRA
from surgery_shared.sharing import refuse_patterns

__all__ = ['VBLoRA']


class VBLoRA(surgery.Adapter):
  """Mixes LoRA's factors from a bank of vectors (Li et al. 2024).

  `W' = W + A·B` with `A` `(in, rank)` and `B` `(rank, out)` (arXiv 2405.15179).
  A column of `A`, and a row of `B`, is cut into pieces of `vector_length`
  numbers. Each piece is a mixture of vectors from `vector_bank` `(num_vectors,
  vector_length)`, which all sites share: of the piece's `num_vectors` logits
  the `topk` largest are taken, and their softmax weighs the vectors. Inputs and
  outputs of several axes are taken flat.
  The bank begins uniform in `±bank_bound`, logits normal with standard
  deviation `logits_std`. So `W'` is near `W` at the start and not equal to it:
  `A` and `B` come from one bank, and zeros in it would have no gradient.
  """

  name = 'vb-lora'
  peft = PeftVBLoRA()
  adds = True

  rank: int = surgery.field(default=4, ge=1, doc='Rank of the update.')
  num_vectors: int = surgery.field(
    default=256, ge=2, doc='Number of vectors in the bank.'
  )
  vector_length: int = surgery.field(
    default=256, ge=1, doc='Their length; divides inputs and outputs.'
  )
  topk: int = surgery.field(
    default=2, ge=2, doc='Vectors in a mixture; of one, logits would not learn.'
  )
  bank_bound: float = surgery.field(
    default=0.02, gt=0, doc='The bank begins uniform between -this and this.'
  )
  logits_std: float = surgery.field(
    default=0.1, gt=0, doc='Standard deviation of the logits at the start.'
  )

  def check(self) -> None:
    """Checks options that depend on each other."""
    refuse_patterns(self, 'num_vectors', 'vector_length', 'bank_bound')
    if self.topk > self.num_vectors:
      raise surgery.ConfigError(
        f"adapter type 'vb-lora', option 'topk': expected at most the "
        f'{self.num_vectors} vectors of the bank, found {self.topk}.'
      )

  def init_shared(
    self, sites: Sequence[surgery.Site], key: jax.Array
  ) -> dict[str, Any]:
    """Returns `vector_bank`, `(num_vectors, vector_length)`."""
    del sites
    shape = (self.num_vectors, self.vector_length)
    most = self.bank_bound
    return {
      'vector_bank': jax.random.uniform(
        key, shape, 'float32', minval=-most, maxval=most
      )
    }

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `logits_a` and `logits_b`.

    They are `(rank, in / vector_length, num_vectors)` and `(out /
    vector_length, rank, num_vectors)`.

    Raises:
      SiteError: if the vectors do not divide inputs and outputs, or the rank
        exceeds the smaller of them.
    """
    where, length = '/'.join(site.path), self.vector_length
    both = math.gcd(site.in_size, site.out_size)
    if both % length:
      fitting = [n for n in range(1, both + 1) if both % n == 0]
      raise surgery.SiteError(
        f'{where}: vector_length {length} does not divide {site.in_size} '
        f'inputs and {site.out_size} outputs. Common divisors are {fitting}; '
        'all sites of an adapter take the same.'
      )
    largest = min(site.in_size, site.out_size)
    if self.rank > largest:
      raise surgery.SiteError(
        f'{where}: rank {self.rank} exceeds the smaller side of '
        f'{site.in_size}×{site.out_size}. Choose a rank of at most {largest}, '
        'for this site alone by patterns.'
      )

    def draw(name: str, *shape: int) -> jax.Array:
      # Drawn flat: XLA takes many times longer to compile three axes.
      count = math.prod(shape) * self.num_vectors
      flat = jax.random.normal(
        surgery.named_key(key, name), (count,), 'float32'
      )
      return self.logits_std * flat.reshape((*shape, self.num_vectors))

    return {
      'logits_a': draw('logits_a', self.rank, site.in_size // length),
      'logits_b': draw('logits_b', site.out_size // length, self.rank),
    }

  def _mixed(self, logits: jax.Array, bank: jax.Array) -> jax.Array:
    """Returns pieces `(…, vector_length)` for logits `(…, num_vectors)`."""
    largest, which = jax.lax.top_k(logits, self.topk)
    shares = jax.nn.softmax(largest, axis=-1)
    return jnp.einsum('...k,...kl->...l', shares, bank[which])

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> surgery.LowRank:
    """Returns `base` and the update as factors."""
    del name
    bank = weights['vector_bank']
    a = self._mixed(weights['logits_a'], bank)  # (rank, pieces, length)
    b = self._mixed(weights['logits_b'], bank)  # (pieces, rank, length)
    return surgery.LowRank(
      base,
      a.reshape(self.rank, -1).T.reshape((*site.in_shape, self.rank)),
      b.swapaxes(0, 1).reshape((self.rank, *site.out_shape)),
    )
