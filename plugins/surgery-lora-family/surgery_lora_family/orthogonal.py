"""LoRA that begins with two factors whose product is zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import surgery

# Of the source and of PEFT.
_SIZE = 0.1


class OrthogonalLoRA(surgery.LoRA):
  """Begins with factors that are orthogonal, and neither is zero.

  `W' = W + s·A·B` as in LoRA, with `A = Z₁·Q₁ / 10` of shape `in_shape +
  (rank,)` and `B = Q₂ᵀ·Z₂ / 10` of shape `(rank,) + out_shape`. `Q₁` and `Q₂`,
  `(rank / 2, rank)`, are the even and the odd rows of a random orthogonal
  matrix, so `Q₁·Q₂ᵀ = 0`; `Z₁` and `Z₂` are Gaussian with standard deviation
  one. So `A·B = 0` and `W' = W` at the start, up to rounding, and both factors
  have gradients from the first step on. The rank is even. There is no paper:
  the idea is of Datta, "Rethinking LoRA initialisation",
  https://datta0.github.io/posts/rethink-lora-init/, which PEFT's
  `init_lora_weights="orthogonal"` follows.
  """

  name = 'lora-orthogonal'

  def check(self) -> None:
    """Checks options that depend on each other."""
    if self.rank % 2:
      raise surgery.ConfigError(
        f"adapter type '{self.name}', option 'rank': expected an even number, "
        f'half of it for each factor, found {self.rank}.'
      )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `lora_a` and `lora_b`, whose product is zero."""
    half = self.rank // 2

    def draw(name: str, *shape: int) -> jax.Array:
      return jax.random.normal(surgery.named_key(key, name), shape, 'float32')

    q, _ = jnp.linalg.qr(draw('orthogonal', self.rank, self.rank))
    a = draw('lora_a', *site.in_shape, half)
    b = draw('lora_b', half, *site.out_shape)
    with jax.default_matmul_precision('highest'):
      return {
        'lora_a': _SIZE * jnp.tensordot(a, q[0::2], axes=1),
        'lora_b': _SIZE * jnp.tensordot(q[1::2].T, b, axes=1),
      }
