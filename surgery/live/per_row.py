"""What a layer gets where each row of an input has an adapter of its own.

The adapter's weights have one axis more than a site's: which of many adapters.
The rows' factors are picked out of it, and the base is shared. No dense array
can say that, so the value can only be used factored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from surgery import errors
from surgery.adapting import compute
from surgery.adapting.compute import Fetch
from surgery.contract import lowrank
from surgery.contract.lowrank import RANK, ROW, LowRank
from surgery.model.records import ROUTE, AdapterRecord, Chain, SiteRecord
from surgery.naming import paths
from surgery.naming.paths import Path


def answer(chain: Chain, path: Path, fetch: Fetch) -> Any:
  """Returns what a layer gets when it asks for a parameter.

  Args:
    chain: the adapters that take part, innermost first.
    path: the parameter.
    fetch: returns a stored array by its path.

  Raises:
    AdapterError: if one of the adapters gives no low-rank value.
    SiteError: if weights are not those of many adapters.
  """
  stored = fetch(path)
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
  """Returns a value with the update of one adapter, or of many."""
  weights = {n: fetch(spec.path) for n, spec in record.weights.items()}
  shared = {
    n: compute.widened(fetch(spec.path))
    for n, spec in adapter.shared.items()
    if n != ROUTE
  }
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
  scale = 1.0

  def factors(weights: Mapping[str, Any], base: Any) -> tuple[Any, Any]:
    nonlocal scale
    bound = record.site.bind(lambda name: base)
    made = record.interceptor.apply(
      bound, path[-1], base, {**weights, **shared}
    )
    if not isinstance(made, LowRank) or made.base is not base or made.a is None:
      low_rank = isinstance(made, LowRank) and made.a is not None
      found = (
        'a low-rank value of another base than it was given'
        if low_rank
        else 'no low-rank value'
      )
      raise errors.AdapterError(
        f'{paths.show(path)}: adapter {adapter.name!r} gives {found} here, so '
        'rows cannot have adapters of their own. Its type has to return '
        'surgery.LowRank(base, a, b, scale).'
      )
    if isinstance(made.scale, (int, float)):
      scale = float(made.scale)
      return made.a, made.b
    return made.a, made.scale * made.b

  for _ in range(stack):
    factors = jax.vmap(factors)
  if index is not None:
    factors = jax.vmap(factors, (0, None))
  with compute.as_written(v.dtype for v in (value, *weights.values())):
    a, b = factors(weights, value)
  if index is not None:
    a, b = (_chosen(factor, index, many) for factor in (a, b))
  ins = len(record.site.param(path[-1]).in_shape)
  front = tuple(range(stack))
  whole = tuple(range(value.ndim))
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
    scale=scale,
    dropout=0.0,
  )


def _picked(
  weight: Any, index: Any, core: tuple[int, ...], stack: int, path: Path
) -> Any:
  """Returns the weights of rows, the axis of rows in front."""
  if weight.ndim - len(core) != stack + 1:
    raise errors.SiteError(
      f'{paths.show(path)}: routed params need weights of many adapters, of '
      f'shape {("many", *core)} at a site, found {tuple(weight.shape)}. Put '
      'them together by surgery.stack_adapters.'
    )
  # `_chosen` overwrites the rows for which this takes a neighbour's.
  taken = jnp.take(weight, index, axis=stack, mode='clip')
  return jnp.moveaxis(taken, stack, 0)


def _chosen(factor: Any, index: Any, many: int) -> Any:
  """Returns a factor of rows that have the adapter that the index names.

  Args:
    factor: the rows' factors, the axis of rows in front.
    index: the number of an adapter for each row; -1 is the base alone, and its
      row is zero. Of any other number that is none, the row is NaN, so that it
      is seen: a traced index cannot be refused.
    many: how many adapters there are.
  """
  rows = (-1, *[1] * (factor.ndim - 1))
  base = (index == -1).reshape(rows)
  known = ((index >= 0) & (index < many)).reshape(rows)
  number = lambda value: jnp.asarray(value, factor.dtype)
  return jnp.where(known, factor, jnp.where(base, number(0), number(jnp.nan)))
