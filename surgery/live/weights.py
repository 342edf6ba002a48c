"""An adapter's weights by site, for training: to read, to set, to regularise.

All of it works on arrays and on tracers, so it can stand in a loss under `jit`
and `grad`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors, expect
from surgery.adapting import compute
from surgery.aliases import Array, Params
from surgery.live import adoption
from surgery.live import params as live
from surgery.model.records import AdapterRecord, SiteRecord, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path

# The site of weights that all sites share.
SHARED: Path = ()


def _groups(
  record: AdapterRecord,
) -> Iterator[tuple[Path, dict[str, WeightSpec]]]:
  """Yields the specifications of an adapter's weights by site."""
  for path, site in record.sites.items():
    yield path, dict(site.weights)
  # The index of `surgery.route` is a weight of the core, not of the type.
  shared = {n: s for n, s in record.shared.items() if s is not record.route}
  if shared:
    yield SHARED, shared


def weights(
  params: Params, name: str = 'default'
) -> dict[Path, dict[str, Array]]:
  """Returns an adapter's weights by site, then by the name `init` gave them.

  A site is the path of its primary parameter, a tuple of strings; weights that
  all sites share stand under the empty path, `()`. Arrays are as they are
  stored, with stacked axes in front. The result is a pytree of its own: to
  change the model, give it to `surgery.with_weights`.

  Args:
    params: the model's params, or a half of them; weights that are not in a
      half are left out, and so are sites that have none there.
    name: the adapter's name.

  Raises:
    AdapterError: for an unknown name.

  Example:
    for path, site in surgery.weights(params).items():
      print(path, site['lora_a'].shape)
  """
  held: Any = adoption.adopted(expect.params(params, weights))
  found = {}
  for path, specs in _groups(live.records_of(held).get(name)):
    here = {
      weight: held[spec.path].value
      for weight, spec in specs.items()
      if spec.path in held
    }
    if here:
      found[path] = here
  return found


def with_weights(
  params: Params,
  name: str,
  weights: Mapping[Any, Mapping[str, Any]],
) -> live.AdaptedParams:
  """Returns params in which an adapter has other weights.

  Args:
    params: the model's params, or a half of them; not changed.
    name: the adapter's name.
    weights: new values by site and name, as `surgery.weights` returns them; a
      site may also be written `'net/mlp/hidden0/kernel'`. Sites and names that
      are left out keep theirs.

  Raises:
    AdapterError: for an unknown adapter, site or weight, one that is not in
      these params, or a value of another shape or dtype.

  Example:
    found = surgery.weights(params, 'default')
    halved = jax.tree.map(lambda w: w / 2, found)
    params = surgery.with_weights(params, 'default', halved)
  """
  held: Any = adoption.adopted(expect.params(params, with_weights))
  record = live.records_of(held).get(name)
  groups = dict(_groups(record))
  if not isinstance(weights, Mapping):
    raise errors.AdapterError(
      'with_weights: expected weights by site, as surgery.weights returns '
      f'them, found {type(weights).__name__}.'
    )
  # All values are checked before the first is set.
  values: dict[Path, Any] = {}
  for key, given in weights.items():
    site = site_path(key, groups, name, 'with_weights')
    if not isinstance(given, Mapping):
      raise errors.AdapterError(
        f'with_weights: {_shown(site)}: expected weights by name, found '
        f'{type(given).__name__}.'
      )
    for weight, value in given.items():
      if weight not in groups[site]:
        raise errors.AdapterError(
          f'with_weights: {_shown(site)}: adapter {name!r} has no weight '
          f'{weight!r} there.{errors.suggest(str(weight), groups[site])}'
        )
      path = groups[site][weight].path
      if path in values:
        raise errors.AdapterError(
          f'with_weights: {_shown(site)} is given twice, as text and as a '
          'tuple.'
        )
      values[path] = _fitting(held, path, value)
  return live.with_values(held, values)


def _shown(site: Path) -> str:
  return paths.show(site) if site else 'weights that sites share'


def site_path(
  key: Any, known: Mapping[Path, Any], name: str, verb: str
) -> Path:
  """Returns the path of a site that is given as a tuple or as text.

  Raises:
    AdapterError: if the adapter has no such site.
  """
  path = paths.parse(key) if isinstance(key, str) and key else key
  path = tuple(path) if isinstance(path, (tuple, list)) else path
  if isinstance(path, tuple) and path in known:
    return path
  shown = key if isinstance(key, str) else repr(key)
  is_path = isinstance(path, tuple) and all(isinstance(p, str) for p in path)
  hint = errors.suggest(
    paths.show(path) if is_path else str(key),
    [paths.show(p) for p in known if p],
  )
  raise errors.AdapterError(
    f'{verb}: adapter {name!r} has no site {shown}. A site is the path of the '
    f'parameter that it rewrites, with its name.{hint}'
  )


def _fitting(params: Any, path: Path, value: Any) -> Any:
  """Returns a value as an array of the shape and dtype of the present one.

  Raises:
    AdapterError: if these params lack it, or shape or dtype differ.
  """
  if path not in params:
    raise errors.AdapterError(
      f'with_weights: {paths.show(path)} is not in these params. Give the half '
      'that has it, or merge the halves first.'
    )
  old = params[path].value
  # A pytree of gradients or scores may hold numpy's arrays.
  if isinstance(value, (np.ndarray, np.generic)):
    value = jnp.asarray(value) if isinstance(old, jax.Array) else value
  found = getattr(value, 'shape', None), getattr(value, 'dtype', None)
  if None in found:
    raise errors.AdapterError(
      f'with_weights: {paths.show(path)}: expected an array, found '
      f'{type(value).__name__}.'
    )
  if found != (old.shape, old.dtype):
    raise errors.AdapterError(
      f'with_weights: {paths.show(path)}: expected {old.dtype} of shape '
      f'{tuple(old.shape)}, found {value.dtype} of shape {tuple(value.shape)}. '
      'Cast it, or change ranks by surgery.prune_ranks.'
    )
  return value


def regulariser(
  params: Params, names: str | tuple[str, ...] | list[str] | None = None
) -> Array:
  """Returns the sum of the adapter types' terms of the loss.

  The method `regulariser` of a type returns the term of a site; a type without
  it has none. At sites whose layers are stacked, each layer has a term.
  Adapters that are disabled add nothing.

  Args:
    params: the model's params, both halves of them.
    names: an adapter, several, or None for all.

  Returns:
    A scalar, float32 or wider; differentiable in the weights.

  Raises:
    AdapterError: for an unknown name, or if a weight is not in these params.
    PluginError: if a type's method fails, or returns no real scalar.

  Example:
    def loss(half, rest, x):
      params = half.merge(rest)
      y, after = fast(params, x)
      return (y ** 2).mean() + 0.1 * surgery.regulariser(params), after
  """
  held: Any = adoption.adopted(expect.params(params, regulariser))
  records = live.records_of(held)
  total = jnp.zeros((), jnp.float32)
  for name in records.chosen(names):
    record = records.get(name)
    for site in record.sites.values() if record.enabled else ():
      total = total + _term(record, site, held)
  return total


def _term(record: AdapterRecord, site: SiteRecord, params: Any) -> Any:
  """Returns the term of one site: the sum over stacked layers."""
  # A plugin's wrapper of an interceptor need not have the method.
  owner: Any = site.interceptor
  if not hasattr(owner, 'regulariser'):
    owner = record.adapter.at(site.site)
  shared = {n: s for n, s in record.shared.items() if s is not record.route}
  specs = {**site.weights, **shared}
  values = {n: params._fetch(spec.path) for n, spec in specs.items()}
  with compute.as_written(v.dtype for v in values.values()):
    wide = {n: compute.widened(v) for n, v in values.items()}
    # A type sees one layer, one member of an ensemble, one adapter of many: the
    # axes over these are mapped over.
    extra = {
      n: compute.stack_of(spec.path, values[n].shape, spec.shape)
      for n, spec in specs.items()
    }
    own = max((extra[n] for n in site.weights), default=0)

    mapped: Any = functools.partial(_checked, owner, site)
    for depth in range(own):
      # Weights with fewer such axes lack the outermost ones.
      axes = {n: 0 if extra[n] > depth else None for n in specs}
      mapped = jax.vmap(mapped, (axes,))
    return jnp.sum(mapped(wide))


def _checked(owner: Any, site: SiteRecord, weights: Mapping[str, Any]) -> Any:
  """Returns a type's term for one site; zero if it has none.

  Raises:
    PluginError: if the type's code fails, or returns no real scalar.
  """
  with compute.calling('regulariser', owner, site.site):
    value = owner.regulariser(site.site, weights)
  if value is None:
    return jnp.zeros((), jnp.float32)
  shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return jnp.asarray(value, jnp.float32)
  if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    found = type(value).__name__
    if shape is not None:
      found = f'{dtype} of shape {tuple(shape)}'
    raise errors.PluginError(
      f'{paths.show(site.site.path)}: regulariser of '
      f'{compute.called(owner)} returned {found}, expected a real scalar, or '
      'None for nothing.'
    )
  return value
