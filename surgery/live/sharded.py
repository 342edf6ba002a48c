"""Saved tensors straight onto the devices of a sharding.

Each part that some device of this process holds is read once, put there, and
forgotten. So neither the host nor a device ever holds more of a tensor than its
parts, and a process of several reads no more than is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from surgery import errors
from surgery.files.checking import Checked
from surgery.model.checkpoint import Leaf
from surgery.naming import paths
from surgery.naming.paths import Path

# Says for a tensor how it is to lie on devices; None for JAX's usual place.
Choice = Callable[[Path, Leaf], 'jax.sharding.Sharding | None']
Shardings = jax.sharding.Sharding | Choice | None


def chosen(shardings: Shardings, path: Path, leaf: Leaf) -> Any:
  """Returns the sharding of a tensor, or None.

  Raises:
    ConfigError: if it is none.
  """
  if shardings is None or leaf.shape is None or leaf.scalar:
    return None
  if isinstance(shardings, jax.sharding.Sharding):
    return shardings
  found = shardings(path, leaf)
  if found is None or isinstance(found, jax.sharding.Sharding):
    return found
  raise errors.ConfigError(
    f'{paths.show(path)}: shardings returned {type(found).__name__}, expected '
    'a jax.sharding.Sharding or None.'
  )


def checked(shardings: Any) -> Shardings:
  """Returns what may say how tensors lie on devices.

  Raises:
    ConfigError: for anything else.
  """
  if (
    shardings is None
    or isinstance(shardings, jax.sharding.Sharding)
    or callable(shardings)
  ):
    return shardings  # type: ignore[no-any-return]
  hint = ''
  if isinstance(shardings, jax.sharding.PartitionSpec):
    hint = ' Give the mesh with it: jax.sharding.NamedSharding(mesh, spec).'
  raise errors.ConfigError(
    'shardings: expected a jax.sharding.Sharding, or a function of a path and '
    f'a leaf that returns one, found {type(shardings).__name__}.{hint}'
  )


def array(leaf: Leaf, path: Path, sharding: Any) -> jax.Array:
  """Returns a saved tensor on the devices of a sharding, bit for bit.

  Where this process holds all of it, it is held against its digest; a part of
  it cannot be.

  Args:
    leaf: the tensor; no PRNG key.
    path: its path, for messages.
    sharding: how it is to lie.

  Raises:
    ConfigError: if it cannot lie like that.
    FormatError: if it cannot be read, or is not what its digest says.
  """
  assert leaf.shape is not None and leaf.dtype is not None
  dtype = jax.numpy.dtype(leaf.dtype)
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    raise errors.ConfigError(
      f'{paths.show(path)}: JAX would narrow {leaf.dtype} to 32 bits, so it '
      'cannot be put on devices. Set jax_enable_x64, cast the file first, or '
      'let shardings return None for it.'
    )
  try:
    axes = getattr(sharding, 'spec', ())
    if len(axes) > len(leaf.shape):
      raise ValueError(f'it names {len(axes)} axes')
    places = sharding.addressable_devices_indices_map(leaf.shape)
    sharding.shard_shape(leaf.shape)
  except (ValueError, IndexError) as error:
    raise errors.ConfigError(
      f'{paths.show(path)}: {leaf} cannot lie as {sharding} says: {error}. '
      'Give a function that returns a sharding for each tensor.'
    ) from None
  return _spread(leaf, sharding, places)


def _spread(leaf: Leaf, sharding: Any, places: Any) -> jax.Array:
  """Reads each part once, and puts it on all devices that hold it."""
  assert leaf.shape is not None
  holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
  for device, index in places.items():
    cuts = _bounds(index, leaf.shape)
    holders.setdefault(cuts, []).append(device)
  source = leaf.source
  read = leaf
  if isinstance(source, Checked) and leaf.load is source:
    if _is_whole(holders, leaf):
      source.settle()
    raw: Any = source.unchecked()
    region = getattr(raw, 'region', None)
    read = leaf.with_fields(load=raw, source=raw, region=region)
  parts = {}
  for cuts, devices in holders.items():
    # A copy of its own: memory of a file may change or go.
    part = np.array(_region(read, tuple(slice(a, b) for a, b in cuts)))
    for device in devices:
      parts[device] = jax.device_put(part, device)
  return jax.make_array_from_single_device_arrays(
    leaf.shape, sharding, [parts[device] for device in places]
  )


def _bounds(
  index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
  return tuple(
    cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True)
  )


def _is_whole(holders: Any, leaf: Leaf) -> bool:
  """Whether the parts, which do not overlap, are all of the tensor."""
  sizes = (
    int(np.prod([stop - start for start, stop in cuts], dtype=np.int64))
    for cuts in holders
  )
  return sum(sizes) == leaf.size


def _region(leaf: Leaf, index: tuple[slice, ...]) -> Any:
  """Returns a region; of a mapped file only its pages are read."""
  if leaf.region is not None:
    return leaf.region(index)
  return leaf.load()[index]
