"""IA3: learned scaling of a layer's outputs or inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import surgery
from surgery_scaling.peft import PeftIA3

if TYPE_CHECKING:
  import jax


class IA3(surgery.Adapter):
  """Scales outputs, or inputs (Liu et al. 2022, arXiv 2205.05638).

  `W' = W · scale` and `b' = b · scale` with `scale` of shape `out_shape`; with
  `feedforward`, `scale` has shape `in_shape`, multiplies the rows of `W`, and
  the bias stays. It is one at the start, so `W' = W`. The inputs of a
  convolution are `(*kernel_size, in)`: each tap has a scale of its own there,
  where PEFT has one a channel.
  """

  name = 'ia3'
  rewrites = ('kernel', 'bias')
  peft = PeftIA3()

  feedforward: bool = surgery.field(
    default=False, doc='Scale inputs instead of outputs and bias.'
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `scale`, ones of shape `out_shape`, or `in_shape`."""
    import jax.numpy as jnp

    del key
    shape = site.in_shape if self.feedforward else site.out_shape
    return {'scale': jnp.ones(shape, 'float32')}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the scaled kernel or bias, of the shape of `base`."""
    scale = weights['scale']
    if name != site.name:
      return base if self.feedforward else base * scale
    if self.feedforward:
      scale = scale.reshape(scale.shape + (1,) * len(site.out_shape))
    return surgery.LowRank(base).dense() * scale
