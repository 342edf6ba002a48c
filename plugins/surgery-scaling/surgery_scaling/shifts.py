"""What types share that add something of its own to each number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import surgery

if TYPE_CHECKING:
  import jax


class Shift(surgery.Adapter):
  """Adds to each parameter a difference of its shape, zero at the start.

  The stored parameters stay as they are, so that switching off and taking off
  give them back bit for bit; what trains is the difference.
  """

  adds = True

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `<parameter>_shift` for each, zeros of the parameter's shape."""
    import jax.numpy as jnp

    del key
    return {
      f'{p.name}_shift': jnp.zeros(p.in_shape + p.out_shape, 'float32')
      for p in site.params
    }

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the parameter and its difference, of the shape of `base`."""
    del site
    return base + weights[f'{name}_shift']

  def unfit(self, site: surgery.Site) -> str | None:
    """Returns why a type does not mean a parameter, or None if it does."""
    raise NotImplementedError

  def serves(self, site: surgery.Site) -> str | None:
    """Returns why a site cannot be served; it needs no axis of inputs."""
    if not site.dtype.startswith(('float', 'bfloat')):
      return f'its dtype is {site.dtype}, a floating-point one is needed'
    return self.unfit(site)

  def sharding(self, site: surgery.Site, weight: str) -> tuple[Any, ...]:
    """A difference is split as its parameter is."""
    spec = site.param(weight.removesuffix('_shift'))
    return spec.roles_sharding('i') + spec.roles_sharding('o')
