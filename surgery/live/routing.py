"""Many adapters on one model, each row of a batch with its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery.core import errors, paths
from surgery.core.paths import Path
from surgery.core.records import ROUTE, AdapterRecord, Records, WeightSpec
from surgery.live import designed
from surgery.live import params as live


def _params(value: Any, verb: str) -> live.AdaptedParams:
  found = designed.adopted(value) if isinstance(value, bx.Params) else value
  if not isinstance(found, live.AdaptedParams):
    raise errors.AdapterError(
      f'{verb}: expected params with an adapter, found {type(value).__name__}.'
    )
  return found


def _chosen(records: Records, names: str | Sequence[str] | None) -> list[str]:
  if names is None:
    return list(records.names)
  listed = [names] if isinstance(names, str) else list(names)
  for name in listed:
    records.get(name)
  return listed


def _weights(record: AdapterRecord) -> dict[Path, WeightSpec]:
  return {
    spec.path: spec
    for site in record.sites.values()
    for spec in site.weights.values()
  }


def stack_adapters(
  many: Sequence[bx.Params], *, names: str | Sequence[str] | None = None
) -> live.AdaptedParams:
  """Puts the adapters of many params into one, for `route`.

  The adapter's weights get an axis: which of many. Until `route` says which row
  has which, layers cannot be asked.

  Args:
    many: params with the same adapters at the same sites, e.g. one of each
      tenant. The base is that of the first one; the others may lack theirs.
    names: the adapters that are stacked; all by default.

  Returns:
    Params whose weights have the shape `(len(many), …)` at each site, behind
    axes in which the layer itself is stacked.

  Raises:
    AdapterError: if adapters differ in type, configuration or sites, or share
      weights between sites.

  Example:
    params = surgery.stack_adapters([alice, bob, carol])
    routed = surgery.route(params, jnp.array([2, 0, 0, 1]))
    y, _ = surgery.factored(model)(routed, x)  # x: four rows
  """
  if not many:
    raise errors.AdapterError('stack_adapters: expected at least one params.')
  whole = [_params(one, 'stack_adapters') for one in many]
  first = whole[0]
  chosen = _chosen(first.records, names)
  values: dict[Path, Any] = {}
  for name in chosen:
    record = first.records.get(name)
    if record.shared:
      raise errors.AdapterError(
        f'stack_adapters: the sites of adapter {name!r} share weights, which '
        'rows cannot have of their own.'
      )
    for number, other in enumerate(whole):
      if other.records.get(name).digest != record.digest:
        raise errors.AdapterError(
          f'stack_adapters: adapter {name!r} of params {number} differs from '
          "the first one's in type, configuration, state or sites. Only "
          'adapters that are alike can be stacked.'
        )
    for path, spec in _weights(record).items():
      found = [one[path].value for one in whole]
      stack = found[0].ndim - len(spec.shape)
      values[path] = jnp.stack(found, axis=stack)
  return live.with_values(first, values)


def route(
  params: bx.Params,
  index: Any,
  *,
  names: str | Sequence[str] | None = None,
) -> live.AdaptedParams:
  """Says which row of a batch has which of many adapters.

  Call `surgery.factored(model)` with the result: `x·W` is computed for all
  rows at once, and `s·(x·Aᵢ)·Bᵢ` for each with its own factors. A row is an
  element of the leading free axis of what a layer multiplies with its kernel,
  `(rows, …, features)`; of the leading axis of what a convolution or a look-up
  gets. Where that axis has another size the call raises; so does whatever
  needs a dense parameter. A model that brings another axis of the same size to
  the front cannot be told from one that does not: keep rows in front.

  Args:
    params: params with stacked adapters, see `stack_adapters`.
    index: integers of shape `(rows,)`; -1 is the base alone. One beyond the
      last adapter gives NaN where it is traced.
    names: the adapters that are meant; all by default.

  Returns:
    Params that only `surgery.factored(model)` can use. A new index of the same
    shape is another value, and nothing is compiled anew.

  Raises:
    AdapterError: if the index is no vector of integers, or out of range, or
      weights are not stacked.
  """
  params = _params(params, 'route')
  index = jnp.asarray(index)
  if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
    raise errors.AdapterError(
      'route: expected an index of integers of shape (rows,), found '
      f'{index.dtype}{tuple(index.shape)}.'
    )
  records, result = params.records, params
  for name in _chosen(records, names):
    record = records.get(name)
    _check(params, record, index)
    path = (f'surgery.{name}', ROUTE)
    spec = WeightSpec(path, tuple(index.shape), 'int32', False)
    shared = {**record.shared, ROUTE: spec}
    records = records.replace(dataclasses.replace(record, shared=shared))
    param = bx.Param(index.astype('int32'), False, {'adapter': name})
    result = live.with_param(result, path, param)
  routed = live.with_records(result, records)
  assert isinstance(routed, live.AdaptedParams)
  return routed


def _check(
  params: live.AdaptedParams, record: AdapterRecord, index: Any
) -> None:
  """Raises unless an adapter is many, and all that is asked for is there.

  Raises:
    AdapterError: naming the weight, or the number.
  """
  count = None
  for site in record.sites.values():
    base = params[site.site.path].value
    stack = base.ndim - len(site.site.primary.shape)
    for spec in site.weights.values():
      value = params[spec.path].value
      if value.ndim - len(spec.shape) != stack + 1:
        raise errors.AdapterError(
          f'route: {paths.show(spec.path)} of shape {tuple(value.shape)} is of '
          'one adapter. Put several together by surgery.stack_adapters.'
        )
      count = value.shape[stack]
  if count is None or isinstance(index, jax.core.Tracer):
    return
  found = np.asarray(index)
  wrong = found[(found < -1) | (found >= count)]
  if wrong.size:
    raise errors.AdapterError(
      f'route: there is no adapter {wrong[0]}: {count} are stacked, 0 to '
      f'{count - 1}, and -1 is the base alone.'
    )
