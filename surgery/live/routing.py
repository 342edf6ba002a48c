"""Routing: many adapters on one model, an adapter for each row of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from surgery import errors, jaxcompat
from surgery.aliases import Params
from surgery.editing import devices
from surgery.live import adoption, described
from surgery.live import params as live
from surgery.model.records import ROUTE, AdapterRecord, Records, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path


def _params(value: Any, verb: str) -> live.AdaptedParams:
  found = adoption.adopted(value) if isinstance(value, bx.Params) else value
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


@devices.transfers()
def stack_adapters(
  many: Sequence[Params],
  *,
  names: str | Sequence[str] | None = None,
  check_base: bool = True,
) -> live.AdaptedParams:
  """Stacks the adapters of many params into one, for `route`.

  The adapter's weights get an axis over the params. The model cannot be called
  until `route` assigns an adapter to each row.

  Args:
    many: params with the same adapters at the same sites, e.g. one of each
      tenant. The base is taken from the first; the others may lack it.
    names: the adapters that are stacked; all by default.
    check_base: whether the base of the others must have the first one's values.
      Identical arrays are not compared, traced ones cannot be, and the state of
      a `bx.Rng` may differ.

  Returns:
    Params whose weights have the shape `(len(many), …)` at each site, after
    axes in which the layer itself is stacked.

  Raises:
    AdapterError: if adapters differ in type, configuration or sites, or share
      weights between sites; if params have further adapters.
    BaseMismatchError: if the params of one have another base.

  Example:
    params = surgery.stack_adapters([alice, bob, carol])
    routed = surgery.route(params, jnp.array([2, 0, 0, 1]))
    y, _ = surgery.factored(model)(routed, x)  # x: four rows
  """
  whole = _listed(many)
  first = whole[0]
  chosen = _chosen(first.records, names)
  for number, other in enumerate(whole[1:], 1):
    _check_alike(first, other, number, chosen)
  owned = {
    path for name in chosen for path in first.records.get(name).weight_paths()
  }
  if check_base:
    for number, other in enumerate(whole[1:], 1):
      _check_base(first, other, number, owned)
  result = first
  for name in chosen:
    for path, spec in _weights(first.records.get(name)).items():
      found = [_weight(one, path, number) for number, one in enumerate(whole)]
      # After the axes in which the layer itself is stacked.
      axis = found[0].value.ndim - len(spec.shape)
      value = jnp.stack([one.value for one in found], axis=axis)
      metadata = _with_axis(found[0], axis)
      param = found[0].replace(value=value, metadata=metadata)
      result = live.with_param(result, path, param)
  return result


def _listed(many: Any) -> list[live.AdaptedParams]:
  """Returns a list of params with adapters, at least one."""
  if isinstance(many, (bx.Params, Mapping, str)) or not isinstance(
    many, Iterable
  ):
    raise errors.AdapterError(
      'stack_adapters: expected a list of params, each with the adapter, found '
      f'{type(many).__name__}. Write surgery.stack_adapters([first, second]).'
    )
  whole = [_params(one, 'stack_adapters') for one in many]
  if not whole:
    raise errors.AdapterError('stack_adapters: expected at least one params.')
  return whole


def _check_alike(
  first: live.AdaptedParams,
  other: live.AdaptedParams,
  number: int,
  chosen: Sequence[str],
) -> None:
  """Raises unless the adapters of two params can be stacked.

  Raises:
    AdapterError: naming the adapter that differs, or that only one has.
  """
  for name in chosen:
    record = first.records.get(name)
    if record.saved:
      shown = errors.listed(map(paths.show, record.saved))
      raise errors.AdapterError(
        f'stack_adapters: adapter {name!r} was saved with values of its own '
        f'for {shown}, which cannot differ from row to row. Save it without '
        'them (modules_to_save).'
      )
    if record.shared:
      raise errors.AdapterError(
        f'stack_adapters: the sites of adapter {name!r} share weights, which '
        'cannot differ from row to row.'
      )
  ours, theirs = first.records.names, other.records.names
  for name in (*ours, *theirs):
    if name not in theirs or name not in ours:
      has, lacks = (number, 0) if name in theirs else (0, number)
      raise errors.AdapterError(
        f'stack_adapters: params {has} have an adapter {name!r}, which params '
        f'{lacks} lack, so rows would get other results than their own params '
        'give. Attach it to all of them, or merge or detach it first.'
      )
  if ours != theirs:
    raise errors.AdapterError(
      f'stack_adapters: the adapters of params {number} were attached in '
      f"another order than the first one's: {', '.join(theirs)}; "
      f'{", ".join(ours)}. Attach them in one order.'
    )
  for name in ours:
    mine, yours = first.records.get(name), other.records.get(name)
    if mine.digest != yours.digest:
      differ = next(_differences(mine, yours))
      raise errors.AdapterError(
        f'stack_adapters: adapter {name!r} of params {number} differs from '
        f"the first one's: {differ}. Only adapters that are alike can be "
        'stacked.'
      )


def _differences(first: AdapterRecord, other: AdapterRecord) -> Iterator[str]:
  """Yields how two adapters differ, in words, the plainest difference first."""
  mine, yours = first.adapter, other.adapter
  if type(mine) is not type(yours):
    yield f'its type is {yours.name!r} instead of {mine.name!r}'
  changes = _changes(mine.config(), yours.config())
  if changes:
    yield ', '.join(f'{key} is {text}' for key, text in changes.items())
  if first.enabled != other.enabled:
    yield f'it is {"enabled" if other.enabled else "disabled"}'
  for path in (*first.sites, *other.sites):
    if path not in first.sites or path not in other.sites:
      has = '' if path in other.sites else 'not '
      yield f'it is {has}attached to {paths.show(path)}'
  for path, one in first.sites.items():
    shapes = (
      {name: spec.shape for name, spec in site.weights.items()}
      for site in (one, other.sites[path])
    )
    for name, text in _changes(*shapes).items():
      yield f'{name} of {paths.show(path)} has the shape {text}'
    if one.digest != other.sites[path].digest:
      yield f'the parameter {paths.show(path)} differs'
  yield 'it is in another state'


def _changes(
  first: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, str]:
  """Returns in words, by key, which values of two mappings differ."""
  return {
    key: f'{other.get(key)!r} instead of {first.get(key)!r}'
    for key in {**first, **other}
    if first.get(key) != other.get(key)
  }


def _check_base(
  first: live.AdaptedParams,
  other: live.AdaptedParams,
  number: int,
  owned: Collection[Path],
) -> None:
  """Raises unless some params have the first one's values.

  Args:
    first: the params whose base is taken.
    other: other params; parameters that they lack are not compared.
    number: their number, for messages.
    owned: the weights that are stacked.

  Raises:
    BaseMismatchError: naming a parameter that differs.
  """
  for path, param in other.items():
    # The count of a random generator has no influence on the base.
    if path in owned or str(param.metadata.get('tag')).startswith('rng_'):
      continue
    if path in first and _same(first[path].value, param.value):
      continue
    found = 'has another value than' if path in first else 'is not in'
    raise errors.BaseMismatchError(
      f'stack_adapters: {paths.show(path)} of params {number} {found} the '
      "first one's, whose base is used for all rows. Stack adapters of one "
      'base, or give check_base=False.'
    )


def _is_unknown(value: Any) -> bool:
  """Whether only shape and dtype of an array are known."""
  return jaxcompat.is_traced(value) or isinstance(value, jax.ShapeDtypeStruct)


def _same(a: Any, b: Any) -> bool:
  """Whether two values are equal, as far as that is known."""
  trees: list[Any] = [jax.tree.structure(value) for value in (a, b)]
  if trees[0] != trees[1]:
    return False
  return all(map(_same_array, jax.tree.leaves(a), jax.tree.leaves(b)))


def _same_array(a: Any, b: Any) -> bool:
  if a is b:
    return True
  if described.is_key(a) and described.is_key(b):
    if jax.random.key_impl(a) != jax.random.key_impl(b):
      return False
    a, b = jax.random.key_data(a), jax.random.key_data(b)
  shapes = [(np.shape(v), getattr(v, 'dtype', None)) for v in (a, b)]
  if shapes[0] != shapes[1]:
    return False
  if any(map(_is_unknown, (a, b))):
    return True
  numbers = jnp.issubdtype(jnp.result_type(a), jnp.inexact)
  return bool(jnp.array_equal(a, b, equal_nan=numbers))


def _weight(params: live.AdaptedParams, path: Path, number: int) -> bx.Param:
  """Returns a weight that is stacked.

  Raises:
    AdapterError: if the params lack it.
  """
  if path not in params:
    raise errors.AdapterError(
      f'stack_adapters: {paths.show(path)} is not in params {number}. Merge '
      'the halves that split() made first: a.merge(b).'
    )
  return params[path]


def _with_axis(param: bx.Param, axis: int) -> dict[str, Any]:
  """Returns a weight's metadata after a new axis was inserted.

  The new axis is not split over the mesh, so its sharding gets a None there;
  otherwise the names of later axes would be shifted.
  """
  sharding = param.metadata.get('sharding')
  if not sharding or axis > len(sharding):
    return dict(param.metadata)
  axes = (*sharding[:axis], None, *sharding[axis:])
  return {**param.metadata, 'sharding': axes}


@devices.transfers()
def route(
  params: Params,
  index: ArrayLike | Sequence[int],
  *,
  names: str | Sequence[str] | None = None,
) -> live.AdaptedParams:
  """Assigns an adapter of many to each row of a batch.

  Call `surgery.factored(model)` with the result: `x·W` is computed for all
  rows at once, and `s·(x·Aᵢ)·Bᵢ` for each with its own factors. A row is an
  element of the leading free axis of what a layer multiplies with its kernel,
  `(rows, …, features)`; of the leading axis of the input of a convolution or a
  look-up. If that axis has another size the call raises, as does an operation
  that needs a dense parameter. If a model moves another axis of the same size
  to the front, this cannot be detected: keep rows in front.

  Args:
    params: params with stacked adapters, see `stack_adapters`.
    index: integers of shape `(rows,)`; -1 is the base alone. A number out of
      range is an error, and gives NaN if the index is traced.
    names: the adapters that are routed; all by default.

  Returns:
    Params that only `surgery.factored(model)` can use. A new index of the same
    shape is another value of the same program.

  Raises:
    AdapterError: if the index is no vector of integers, or out of range, or
      weights are not stacked.
  """
  params = _params(params, 'route')
  # numpy first: JAX would narrow 64-bit integers before they are checked.
  of_jax = any(isinstance(i, jax.Array) for i in jax.tree.leaves(index))
  index = jnp.asarray(index) if of_jax else np.asarray(index)
  if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
    raise errors.AdapterError(
      'route: expected an index of integers of shape (rows,), found '
      f'{index.dtype}{tuple(index.shape)}.'
    )
  records, result = params.records, params
  for name in _chosen(records, names):
    record = records.get(name)
    _check(params, record, index)
    # The index is a shared weight, so `detach`, `save` and `jit` treat it so.
    path = (f'surgery.{name}', ROUTE)
    spec = WeightSpec(path, tuple(index.shape), 'int32', False)
    shared = {**record.shared, ROUTE: spec}
    records = records.replace(dataclasses.replace(record, shared=shared))
    param = bx.Param(_narrowed(index), False, {'adapter': name})
    result = live.with_param(result, path, param)
  routed = live.with_records(result, records)
  assert isinstance(routed, live.AdaptedParams)
  return routed


def _narrowed(index: Any) -> Any:
  """Returns an index as int32, in which numbers out of range stay so."""
  own, wide = jnp.iinfo(index.dtype), jnp.iinfo('int32')
  # A cast alone would wrap large numbers around, to valid ones.
  least, most = max(own.min, wide.min), min(own.max, wide.max)
  return jnp.asarray(index).clip(least, most).astype('int32')


def _check(
  params: live.AdaptedParams, record: AdapterRecord, index: Any
) -> None:
  """Raises unless an adapter is stacked, and the index is in range.

  Raises:
    AdapterError: naming the weight, or the number.
  """
  count = None
  # A weight of many adapters has one axis more than the layer's stack.
  for site in record.sites.values():
    base = params[site.site.path].value
    stack = base.ndim - len(site.site.primary.shape)
    for spec in site.weights.values():
      value = params[spec.path].value
      if value.ndim - len(spec.shape) != stack + 1:
        raise errors.AdapterError(
          f'route: {paths.show(spec.path)} of shape {tuple(value.shape)} is '
          'the weight of one adapter. Stack several with '
          'surgery.stack_adapters.'
        )
      count = value.shape[stack]
  if count is None or jaxcompat.is_traced(index):
    return
  found = np.asarray(index)
  wrong = found[(found < -1) | (found >= count)]
  if wrong.size:
    raise errors.AdapterError(
      f'route: there is no adapter {wrong[0]}: {count} are stacked, 0 to '
      f'{count - 1}, and -1 is the base alone.'
    )
