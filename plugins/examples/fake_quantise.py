"""Fake quantisation: layers get parameters of few bits, gradients pass.

Two ways to stand between a stored parameter and the layer. `Quantise` is a type
that adds no weights, so it is attached, saved, merged and taken off as any
other. `QuantiseAnswers` wraps the interceptor of whatever type is attached, so
that training an adapter sees what quantising the merged model will do to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp

import surgery


def on_grid(site: surgery.Site, value: jax.Array, bits: int) -> jax.Array:
  """Returns a parameter rounded to multiples of a step for each output.

  `k·step` with whole `k` from `-m` to `m`, `m = 2^(bits-1) - 1`, and `step =
  max|value|/m` over the inputs (Krishnamoorthi 2018, arXiv 1806.08342). The
  gradient is that of `value` (straight-through: Bengio et al. 2013, arXiv
  1308.3432).

  Args:
    site: the site, which knows how many axes are inputs.
    value: array of shape `in_shape + out_shape`.
    bits: number of bits of a value.
  """
  inputs = tuple(range(len(site.in_shape)))
  most = 2 ** (bits - 1) - 1
  step = jnp.max(jnp.abs(value), axis=inputs, keepdims=True) * (1 / most)
  rounded = jnp.round(value / jnp.where(step == 0, 1, step)) * step
  # The difference is zero, exactly: what is answered lies on the grid.
  return jax.lax.stop_gradient(rounded) + (value - jax.lax.stop_gradient(value))


class Quantise(surgery.Adapter):
  """Rounds kernels to a grid (see `on_grid`); adds no weights.

  What trains is the base, or an adapter that was attached before this one.
  """

  name = 'quantise'

  bits: int = surgery.field(default=8, ge=2, le=16, doc='Bits of a value.')

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns no weights."""
    del site, key
    return {}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the parameter rounded, of the shape of `base`."""
    del name, weights
    return on_grid(site, base, self.bits)


@dataclasses.dataclass(frozen=True)
class _Quantised:
  """Rounds what another interceptor answers.

  It is data, and equal only to what computes the same, as interceptors are.
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
    return on_grid(site, value, self.bits)


class QuantiseAnswers:
  """A plugin that rounds what every adapter of its host answers.

  Args:
    bits: number of bits of a value, at least 2.

  Example:
    host = surgery.Host(plugins=[QuantiseAnswers(bits=4)])
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
    return None if inner is None else _Quantised(inner, self._bits)
