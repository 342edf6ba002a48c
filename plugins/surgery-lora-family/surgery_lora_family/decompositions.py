"""PiSSA and OLoRA: LoRA whose factors begin in the matrix itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import surgery
from surgery_lora_family.peft import PeftOLoRA, PeftPiSSA


class _Decomposed(surgery.Adapter):
  """LoRA that begins with a part of the matrix.

  `W' = W + A·B - A₀·B₀`, where `A₀` and `B₀` are what `A` and `B` begin with.
  Others take that part out of the stored base; here the base stays as it is, so
  that switching off, and taking off, gives it back bit for bit.
  """

  frozen = ('lora_a0', 'lora_b0')
  adds = True
  rank_axes: ClassVar[Mapping[str, int]] = {
    'lora_a': -1,
    'lora_b': 0,
    'lora_a0': -1,
    'lora_b0': 0,
  }

  rank: int = surgery.field(default=8, ge=1, doc='Rank of the update.')

  def _factors(
    self, matrix: jax.Array, rank: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns `A₀` `(in, rank)` and `B₀` `(rank, out)`."""
    raise NotImplementedError

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `lora_a`, `lora_b`, and what they begin with.

    Raises:
      SiteError: if the rank exceeds the smaller side of the matrix.
    """
    del key
    rows, columns = math.prod(site.in_shape), math.prod(site.out_shape)
    if self.rank > min(rows, columns):
      raise surgery.SiteError(
        f'{"/".join(site.path)}: rank {self.rank} exceeds the smaller side of '
        f'a matrix of {rows} inputs and {columns} outputs. Take a smaller '
        'rank, for this layer by patterns.'
      )
    matrix = site.base().astype('float32').reshape(rows, columns)
    a, b = self._factors(matrix, self.rank)
    return {'lora_a': a, 'lora_b': b, 'lora_a0': a, 'lora_b0': b}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> surgery.LowRank:
    """Returns the base with the update, as factors.

    `A·B - A₀·B₀ = (A - A₀)·B + A₀·(B - B₀)`, which is zero to the bit as long
    as nothing is trained.
    """
    del name
    a, b = weights['lora_a'], weights['lora_b']
    a0, b0 = weights['lora_a0'], weights['lora_b0']
    left = jnp.concatenate([a - a0, a0], 1)
    right = jnp.concatenate([b, b - b0], 0)
    return surgery.LowRank(
      base,
      left.reshape(*site.in_shape, left.shape[1]),
      right.reshape(left.shape[1], *site.out_shape),
    )


class PiSSA(_Decomposed):
  """Begins with the largest singular values.

  `W' = W + A·B - A₀·B₀` with `A₀ = U·√S` of shape `(in, rank)` and `B₀ = √S·Vᵀ`
  `(rank, out)` of the singular value decomposition of `W`, of which the `rank`
  largest are taken (Meng et al. 2024, arXiv 2404.02948). At the start `W' = W`.
  """

  name = 'pissa'
  peft = PeftPiSSA()

  def _factors(
    self, matrix: jax.Array, rank: int
  ) -> tuple[jax.Array, jax.Array]:
    u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


class OLoRA(_Decomposed):
  """Begins with orthonormal columns (Büyükakyüz 2024, arXiv 2406.01775).

  `W' = W + A·B - A₀·B₀` with `A₀ = Q` of shape `(in, rank)`, the first columns,
  and `B₀ = R` `(rank, out)`, the first rows, of `W = Q·R`. At the start
  `W' = W`.
  """

  name = 'olora'
  peft = PeftOLoRA()

  def _factors(
    self, matrix: jax.Array, rank: int
  ) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(matrix)
    return q[:, :rank], r[:rank]
