"""Parameters of a layer when each row of an input has its own adapter.

The adapter's weights have an additional axis over adapters, from which the
factors of each row are taken; the base is shared. No dense array can represent
that, so the value can only be used factored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from surgery import errors
from surgery.adapting import compute
from surgery.adapting.compute import Fetch
from surgery.aliases import Array
from surgery.contract import lowrank
from surgery.contract.lowrank import RANK, ROW, LowRank
from surgery.model.records import ROUTE, AdapterRecord, Chain, SiteRecord
from surgery.naming import paths
from surgery.naming.paths import Path


def answer(chain: Chain, path: Path, fetch: Fetch) -> Any:
  """Returns what a layer gets when it asks for a parameter.

  Args:
    chain: the enabled adapters, innermost first.
    path: the parameter.
    fetch: returns a stored array by its path.

  Raises:
    AdapterError: if one of the adapters gives no low-rank value.
    SiteError: if weights are not those of many adapters.
  """
  stored = fetch(path)
  # As for one adapter: inputs before outputs, in float32 or wider, and rounded
  # once at the end.
  spec = chain[0][1].site.param(path[-1])
  stack = stored.ndim - len(spec.shape)
  front = tuple(range(stack))
  order = (*front, *(stack + i for i in spec.order))
  value = stored.transpose(order).astype(compute.wide(stored.dtype))
  for adapter, record in chain:
    value = _with(value, adapter, record, path, stack, fetch)
  value = value.transpose(tuple(_inverse(order)))
  return value.astype(stored.dtype)


def _inverse(order: tuple[int, ...]) -> list[int]:
  return sorted(range(len(order)), key=order.__getitem__)


def _with(
  value: Any,
  adapter: AdapterRecord,
  record: SiteRecord,
  path: Path,
  stack: int,
  fetch: Fetch,
) -> Any:
  """Returns a value with the update of one adapter, or of many.

  Args:
    value: the value so far: stacked axes, inputs, outputs.
    adapter: the adapter.
    record: its site.
    path: the parameter.
    stack: the number of stacked axes.
    fetch: returns a stored array by its path.
  """
  weights = {n: fetch(spec.path) for n, spec in record.weights.items()}
  index, many = None, 0
  if adapter.route is not None:
    index = fetch(adapter.route.path)
    many = min(
      (w.shape[stack] for w in weights.values() if w.ndim > stack), default=0
    )
    weights = {
      n: _picked(w, index, record.weights[n].shape, stack, path)
      for n, w in weights.items()
    }
  weights = {n: compute.widened(w) for n, w in weights.items()}
  factors = _Factors(adapter, record, path, fetch)
  # `apply` knows one layer and one adapter: it is mapped over the others, rows
  # outermost, since `_picked` put them in front.
  mapped: Callable[..., tuple[Array, Array]] = factors
  for _ in range(stack):
    mapped = jax.vmap(mapped)
  if index is not None:
    mapped = jax.vmap(mapped, (0, None))
  with compute.as_written(v.dtype for v in (value, *weights.values())):
    a, b = mapped(weights, value)
  if index is not None:
    a, b = (_chosen(factor, index, many) for factor in (a, b))
  ins = len(record.site.param(path[-1]).in_shape)
  front = tuple(range(stack))
  whole = tuple(range(value.ndim))
  # Factors have an axis of rows, which the value itself has not.
  row = () if index is None else (ROW,)
  return lowrank.primitive().bind(
    value,
    a,
    b,
    axes=(
      whole,
      (*row, *front, *whole[stack : stack + ins], RANK),
      (*row, *front, RANK, *whole[stack + ins :]),
    ),
    scale=factors.scale,
    dropout=0.0,
  )


class _Factors:
  """Computes the factors of an adapter for one layer and one row.

  Attributes:
    scale: the scale of the update, as far as it is a number; known after a
      call, and the same for all layers and rows.
  """

  def __init__(
    self, adapter: AdapterRecord, record: SiteRecord, path: Path, fetch: Fetch
  ) -> None:
    self._adapter, self._record, self._path = adapter, record, path
    self._shared = {
      name: compute.widened(fetch(spec.path))
      for name, spec in adapter.shared.items()
      if name != ROUTE
    }
    self.scale = 1.0

  def __call__(
    self, weights: Mapping[str, Array], base: Array
  ) -> tuple[Array, Array]:
    """Returns both factors; a scale that is an array is part of the second.

    Raises:
      AdapterError: if `apply` gives no low-rank value of this base.
    """
    bound = self._record.site.bind(lambda name: base)
    made = self._record.interceptor.apply(
      bound, self._path[-1], base, {**weights, **self._shared}
    )
    if not isinstance(made, LowRank) or made.a is None:
      raise self._refusal('no low-rank value')
    if made.base is not base:
      raise self._refusal('a low-rank value of another base than it was given')
    if isinstance(made.scale, (int, float)):
      self.scale = float(made.scale)
      return made.a, made.b
    return made.a, made.scale * made.b

  def _refusal(self, found: str) -> errors.AdapterError:
    return errors.AdapterError(
      f'{paths.show(self._path)}: adapter {self._adapter.name!r} gives {found} '
      'here, so rows cannot have adapters of their own. Its type has to return '
      'surgery.LowRank(base, a, b, scale).'
    )


def _picked(
  weight: Any, index: Any, core: tuple[int, ...], stack: int, path: Path
) -> Any:
  """Returns the weights of each row, the axis of rows in front."""
  if weight.ndim - len(core) != stack + 1:
    raise errors.SiteError(
      f'{paths.show(path)}: routed params need weights of many adapters, of '
      f'shape {("many", *core)} at a site, found {tuple(weight.shape)}. Stack '
      'them with surgery.stack_adapters.'
    )
  # A number out of range takes the nearest; `_chosen` overwrites such rows.
  taken = jnp.take(weight, index, axis=stack, mode='clip')
  return jnp.moveaxis(taken, stack, 0)


def _chosen(factor: Any, index: Any, many: int) -> Any:
  """Returns the rows' factors, zero for the base and NaN out of range.

  Args:
    factor: the rows' factors, the axis of rows in front.
    index: the number of an adapter for each row; -1 is the base alone. Another
      number out of range gives NaN, since a traced index cannot be refused.
    many: the number of adapters.
  """
  rows = (-1, *[1] * (factor.ndim - 1))
  base = (index == -1).reshape(rows)
  known = ((index >= 0) & (index < many)).reshape(rows)
  number = lambda value: jnp.asarray(value, factor.dtype)
  return jnp.where(known, factor, jnp.where(base, number(0), number(jnp.nan)))
