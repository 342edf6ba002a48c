"""Puts what passes made on the host where the params lie that it belongs to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from typing import Any

import jax
import numpy as np

from surgery import jaxcompat
from surgery.contract.adapter import Adapter
from surgery.contract.site import Site
from surgery.editing import devices
from surgery.model.records import Records
from surgery.naming.paths import Path

# Axes of meshes by axis of an array, as in a PartitionSpec.
Axes = tuple[Any, ...]


def weights(
  values: Mapping[Path, Any], records: Records, fresh: Set[Path]
) -> dict[Path, Any]:
  """Returns weights that were made on the host, beside their bases.

  Where a base is on one device, its adapter's weights are there as well. Where
  it is spread over a mesh they are on that mesh, split as the type's `sharding`
  says for a base that is split like this one, otherwise whole on each device.

  Args:
    values: all parameters.
    records: the adapters.
    fresh: paths of what was made on the host.
  """
  placed: dict[Path, Any] = {}
  left = {path for path in fresh if path in records.owned}
  known: dict[Any, Any] = {}
  for record in records.adapters:
    for one in record.sites.values():
      base: Any = values.get(one.site.path)
      if not _is_placed(base):
        continue
      # Most often both are where JAX puts what lies nowhere.
      usual = None if base.committed else base.sharding
      for name, spec in one.weights.items():
        if spec.path not in left:
          continue
        left.discard(spec.path)
        value = values[spec.path]
        if usual is None or not _is_placed(value) or value.sharding != usual:
          key = (
            *(record.name, one.site.anonymous, name),
            *(base.sharding, base.ndim, value.ndim),
          )
          if key not in known:
            known[key] = _beside(base, record.adapter, one.site, name, value)
          placed[spec.path] = _put(value, known[key], base)
    for spec in record.shared.values():
      if spec.path in left:
        bases = (values.get(path) for path in record.sites)
        base = next(filter(_is_placed, bases), None)
        if base is not None:
          left.discard(spec.path)
          value = values[spec.path]
          where = _on_mesh(base.sharding, (None,) * value.ndim)
          placed[spec.path] = _put(value, where, base)
  placed.update((path, _usually(values[path])) for path in left)
  return placed


def weight(
  value: Any, base: Any, adapter: Adapter, site: Site, name: str
) -> Any:
  """Returns one weight beside its base, see `weights`."""
  if not _is_placed(base):
    return _usually(value)
  return _put(value, _beside(base, adapter, site, name, value), base)


def kept(value: Any, old: Any) -> Any:
  """Returns what numpy computed of a parameter, where the parameter lies.

  Args:
    value: an array of numpy that JAX would not narrow.
    old: the parameter before, or None.
  """
  if _is_placed(old) and old.shape == value.shape:
    return _put(value, old.sharding, old)
  return jax.numpy.asarray(value)


def _is_placed(value: Any) -> bool:
  return isinstance(value, jax.Array) and not jaxcompat.is_traced(value)


def _beside(
  base: Any, adapter: Adapter, site: Site, name: str, value: Any
) -> Any:
  """Returns the sharding of a weight; None where JAX decides, as for the base.

  Args:
    base: the site's parameter.
    adapter: the adapter.
    site: the site.
    name: the weight.
    value: its value.
  """
  sharding = base.sharding
  if not isinstance(sharding, jax.sharding.NamedSharding):
    if len(sharding.device_set) == 1:
      return sharding
    # Of another kind, without names: alike where the shape is.
    return sharding if value.shape == base.shape else None
  spec = (*sharding.spec, *[None] * (base.ndim - len(sharding.spec)))
  front = base.ndim - len(site.primary.shape)
  axes = _axes(adapter, site, name, spec[front:])
  whole = (*spec[:front], *axes) if axes is not None else ()
  if len(whole) != value.ndim:
    whole = (None,) * value.ndim
  return _on_mesh(sharding, _dividing(sharding.mesh, whole, value.shape))


def _axes(
  adapter: Adapter, site: Site, name: str, spec: Axes
) -> tuple[Any, ...] | None:
  """Returns how a type splits a weight, of a base that is split by `spec`."""
  primary = dataclasses.replace(site.primary, sharding=spec)
  params = tuple(
    primary if one.name == primary.name else one for one in site.params
  )
  return adapter.sharding(dataclasses.replace(site, params=params), name)


def _dividing(mesh: Any, axes: Axes, shape: tuple[int, ...]) -> Axes:
  """Returns axes without those that do not divide the array, or come twice."""
  found: list[Any] = []
  used: set[str] = set()
  for axis, size in zip(axes, shape, strict=True):
    names = axis if isinstance(axis, tuple) else (axis,)
    known = all(n in mesh.shape and n not in used for n in names)
    if not known or size % math.prod(mesh.shape[n] for n in names):
      found.append(None)
      continue
    used.update(names)
    found.append(axis)
  return tuple(found)


def _on_mesh(sharding: Any, axes: Axes) -> Any:
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding if len(sharding.device_set) == 1 else None
  return jax.sharding.NamedSharding(
    sharding.mesh,
    jax.sharding.PartitionSpec(*axes),
    memory_kind=sharding.memory_kind,
  )


def _put(value: Any, sharding: Any, base: Any) -> Any:
  """Returns a value with a sharding, committed to it if the base is."""
  if jaxcompat.is_traced(value):
    return value
  if sharding is None or _is_narrowed(value):
    return _usually(value)
  if len(sharding.device_set) == 1 and not base.committed:
    (device,) = sharding.device_set
    if isinstance(value, jax.Array) and value.devices() == {device}:
      return value
    with jax.default_device(device):
      return jax.device_put(np.asarray(value))
  if sharding.is_fully_addressable:
    return jax.device_put(value, sharding)
  # Every process drew the same and has its part of it at hand.
  whole = np.asarray(value)
  return jax.make_array_from_callback(
    whole.shape, sharding, lambda index: whole[index]
  )


def _usually(value: Any) -> Any:
  """Returns a value where JAX puts what lies nowhere yet."""
  if jaxcompat.is_traced(value) or _is_narrowed(value):
    return value
  if isinstance(value, np.ndarray) or devices.is_elsewhere(value):
    return jax.device_put(np.asarray(value))
  return value


def _is_narrowed(value: Any) -> bool:
  """Whether JAX would narrow a value (64 bits); numpy keeps its bits."""
  dtype = getattr(value, 'dtype', None)
  return isinstance(value, np.ndarray) and (
    jax.dtypes.canonicalize_dtype(dtype) != dtype
  )
