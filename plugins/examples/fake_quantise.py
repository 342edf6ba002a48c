"""An interceptor that is no adapter: layers get rounded parameters.

It wraps whatever stands between a stored parameter and the layer, so training
an adapter sees what quantising the merged model will do to it. Gradients pass
as if nothing was rounded (straight-through: Bengio et al. 2013, arXiv
1308.3432).
"""

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

import surgery


@dataclasses.dataclass(frozen=True)
class Quantised:
  """Rounds what another interceptor answers.

  It is data, and equal only to what computes the same, as interceptors are.

  Attributes:
    inner: the other one.
    bits: number of bits of a value.
  """

  inner: Any
  bits: int

  def init(self, site: surgery.Site, key: jax.Array) -> Any:
    """Returns the weights of the other one."""
    return self.inner.init(site, key)

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the answer of the other one, rounded, of the shape of `base`."""
    value = self.inner.apply(site, name, base, weights)
    if isinstance(value, surgery.LowRank):
      value = value.dense()
    most = 2 ** (self.bits - 1) - 1
    step = jnp.max(jnp.abs(value)) / most
    rounded = jnp.round(value / jnp.where(step == 0, 1, step)) * step
    return value + jax.lax.stop_gradient(rounded - value)


class FakeQuantise:
  """The plugin.

  Args:
    bits: number of bits of a value, at least 2.

  Example:
    host = surgery.Host(plugins=[FakeQuantise(bits=4)])
    params = surgery.attach(params, surgery.LoRA(), to='**', host=host)
  """

  def __init__(self, bits: int = 8) -> None:
    self._bits = bits

  @surgery.hookimpl(wrapper=True)
  def surgery_intercept_param(
    self, site: surgery.Site
  ) -> Generator[None, Any, Any]:
    """Wraps what the adapter that is being attached answers with."""
    del site
    inner = yield
    return None if inner is None else Quantised(inner, self._bits)
