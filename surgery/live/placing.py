"""Placing: new weights go to the devices of the parameters they belong to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Set
from typing import Any, TypeAlias, TypeGuard

import jax
import numpy as np
from jax.sharding import Sharding

from surgery import jaxcompat
from surgery.aliases import Array
from surgery.contract.adapter import Adapter
from surgery.contract.site import Site
from surgery.editing import devices
from surgery.model.records import AdapterRecord, Records, SiteRecord
from surgery.naming.paths import Path

# A weight is an array of JAX, or of numpy while it is on the host.
AnyArray: TypeAlias = Array | np.ndarray[Any, Any] | np.generic
# Axes of meshes by axis of an array, as in a PartitionSpec.
Axes = tuple[Any, ...]


def weights(
  values: Mapping[Path, Any], records: Records, fresh: Set[Path]
) -> dict[Path, Any]:
  """Returns weights that were made on the host, beside their bases.

  If a base is on one device, its adapter's weights go to the same device. If it
  is spread over a mesh they go to that mesh, split as the type's `sharding`
  says for a base that is split like this one, by default whole on each device.

  Args:
    values: all parameters.
    records: the adapters.
    fresh: paths of parameters that were made on the host.
  """
  placing = _Placing(values, {path for path in fresh if path in records.owned})
  for record in records.adapters:
    for one in record.sites.values():
      placing.site(record, one)
    placing.shared(record)
  return placing.finished()


class _Placing:
  """Places the weights of params, one site after another.

  Args:
    values: all parameters.
    left: paths of weights that have no place yet.
  """

  def __init__(self, values: Mapping[Path, Any], left: set[Path]) -> None:
    self._values = values
    self._left = left
    self._placed: dict[Path, Any] = {}
    # Shardings of weights, which are the same for sites that look alike.
    self._known: dict[Any, Any] = {}

  def site(self, record: AdapterRecord, one: SiteRecord) -> None:
    """Places the weights of a site beside its parameter."""
    base: Any = self._values.get(one.site.path)
    if not _is_placed(base):
      return
    # A base that is not committed is where JAX puts arrays by default. A weight
    # that is there too need not be moved, as is usual.
    usual = None if base.committed else base.sharding
    for name, spec in one.weights.items():
      if spec.path not in self._left:
        continue
      self._left.discard(spec.path)
      value = self._values[spec.path]
      if usual is None or not _is_placed(value) or value.sharding != usual:
        sharding = self._sharding(base, record, one.site, name, value)
        self._placed[spec.path] = _put(value, sharding, base)

  def _sharding(
    self,
    base: Array,
    record: AdapterRecord,
    site: Site,
    name: str,
    value: AnyArray,
  ) -> Sharding | None:
    key = (
      *(record.name, site.anonymous, name),
      *(base.sharding, base.ndim, value.ndim),
    )
    if key not in self._known:
      self._known[key] = _beside(base, record.adapter, site, name, value)
    return self._known[key]

  def shared(self, record: AdapterRecord) -> None:
    """Places weights that sites share, whole on each device of a base."""
    for spec in record.shared.values():
      bases = (self._values.get(path) for path in record.sites)
      base = next(filter(_is_placed, bases), None)
      if spec.path not in self._left or base is None:
        continue
      self._left.discard(spec.path)
      value = self._values[spec.path]
      where = _on_mesh(base.sharding, (None,) * value.ndim)
      self._placed[spec.path] = _put(value, where, base)

  def finished(self) -> dict[Path, Any]:
    """Returns all weights; those without a base where JAX puts arrays."""
    rest = {path: _usually(self._values[path]) for path in self._left}
    return {**self._placed, **rest}


def weight(
  value: AnyArray, base: Array, adapter: Adapter, site: Site, name: str
) -> AnyArray:
  """Returns one weight beside its base, see `weights`."""
  if not _is_placed(base):
    return _usually(value)
  return _put(value, _beside(base, adapter, site, name, value), base)


def kept(value: AnyArray, old: Array | None) -> AnyArray:
  """Returns what numpy computed of a parameter, where the parameter lies.

  Args:
    value: an array of numpy that JAX would not narrow.
    old: the parameter before, or None.
  """
  if _is_placed(old) and old.shape == value.shape:
    return _put(value, old.sharding, old)
  return jax.numpy.asarray(value)


def _is_placed(value: object) -> TypeGuard[Array]:
  """Whether a value is an array that is on devices."""
  return isinstance(value, jax.Array) and not jaxcompat.is_traced(value)


def _beside(
  base: Array, adapter: Adapter, site: Site, name: str, value: AnyArray
) -> Sharding | None:
  """Returns the sharding of a weight; None to let JAX decide.

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
    # Another kind of sharding has no axes with names. It fits an array of the
    # same shape.
    return sharding if value.shape == base.shape else None
  spec = (*sharding.spec, *[None] * (base.ndim - len(sharding.spec)))
  # The type sees the parameter of one layer; stacked axes are split as the
  # base's are.
  front = base.ndim - len(site.primary.shape)
  axes = _axes(adapter, site, name, spec[front:])
  whole = (*spec[:front], *axes) if axes is not None else ()
  if len(whole) != value.ndim:
    whole = (None,) * value.ndim
  return _on_mesh(sharding, _dividing(sharding.mesh, whole, value.shape))


def _axes(
  adapter: Adapter, site: Site, name: str, spec: Axes
) -> tuple[Any, ...] | None:
  """Returns how a type splits a weight if its base is split by `spec`."""
  primary = dataclasses.replace(site.primary, sharding=spec)
  params = tuple(
    primary if one.name == primary.name else one for one in site.params
  )
  return adapter.sharding(dataclasses.replace(site, params=params), name)


def _dividing(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  axes: Axes,
  shape: tuple[int, ...],
) -> Axes:
  """Returns axes without those that divide no array axis, or are repeated."""
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


def _on_mesh(sharding: Sharding, axes: Axes) -> Sharding | None:
  """Returns a sharding of other axes on the mesh of one."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding if len(sharding.device_set) == 1 else None
  return jax.sharding.NamedSharding(
    sharding.mesh,
    jax.sharding.PartitionSpec(*axes),
    memory_kind=sharding.memory_kind,
  )


def _put(value: AnyArray, sharding: Sharding | None, base: Array) -> AnyArray:
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
  # Every process has drawn the same array, and keeps its own part of it.
  whole = np.asarray(value)
  return jax.make_array_from_callback(
    whole.shape, sharding, lambda index: whole[index]
  )


def _usually(value: AnyArray) -> AnyArray:
  """Returns a value on the device where JAX puts arrays by default."""
  if jaxcompat.is_traced(value) or _is_narrowed(value):
    return value
  if isinstance(value, np.ndarray) or devices.is_elsewhere(value):
    return jax.device_put(np.asarray(value))
  return value


def _is_narrowed(value: AnyArray) -> bool:
  """Whether JAX would narrow a value (64 bits); numpy keeps its bits."""
  dtype = getattr(value, 'dtype', None)
  return isinstance(value, np.ndarray) and (
    jax.dtypes.canonicalize_dtype(dtype) != dtype
  )
