"""LoRA whose branch has a bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import surgery
from surgery_lora_family.peft import PeftBiasLoRA


class BiasLoRA(surgery.LoRA):
  """Adds a low-rank branch that has a bias (`lora_bias=True` in PEFT).

  `y = x·W + bias + s·(x·A·B + b)`, so `W' = W + s·A·B` and `bias' = bias +
  s·b`, with `A` of shape `in_shape + (rank,)`, `B` `(rank,) + out_shape`, `b`
  as the bias, and `s` that of LoRA (Hu et al. 2021, arXiv 2106.09685). `B` and
  `b` are zero at the start, so the layer is what it was. A layer without bias
  cannot be merged into, and is not served.
  """

  name = 'lora-bias'
  rewrites = ('kernel', 'bias')
  peft = PeftBiasLoRA()

  def serves(self, site: surgery.Site) -> str | None:
    """Returns why a site cannot be served: above all, that it has no bias."""
    if not site.has('bias'):
      return (
        f"{'/'.join(site.layer)} has no parameter 'bias' for the branch's bias "
        "to be merged into; adapter type 'lora' needs none"
      )
    return super().serves(site)

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `lora_a`, `lora_b` (zeros), and `lora_bias`, zeros."""
    bias = site.param('bias')
    shape = bias.in_shape + bias.out_shape
    return {**super().init(site, key), 'lora_bias': jnp.zeros(shape, 'float32')}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array | surgery.LowRank:
    """Returns the kernel as factors, or the bias, of the shape of `base`."""
    if name == 'bias':
      return base + self.scale * weights['lora_bias']
    return super().apply(site, name, base, weights)

  def sharding(self, site: surgery.Site, weight: str) -> tuple[Any, ...]:
    """The bias is split as the base's is, and the factors' outer axes too."""
    if weight == 'lora_bias':
      bias = site.param('bias')
      return bias.roles_sharding('i') + bias.roles_sharding('o')
    return super().sharding(site, weight)
