"""Descriptions of a parameter: its dtype, whether it is a key, its owner."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery.adapting import finding
from surgery.naming.paths import Path


def remembered(base: Mapping[Path, Any]) -> dict[Path, Callable[[], Any]]:
  """Returns functions by path that return values, by weak references."""
  return {path: _reference(value) for path, value in base.items()}


def _reference(value: Any) -> Callable[[], Any]:
  try:
    return weakref.ref(value)
  except TypeError:  # Plain values, which are small.
    return lambda: value


def is_key(value: Any) -> bool:
  """Whether a value is an array of typed PRNG keys."""
  dtype = getattr(value, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def info_of(param: bx.Param) -> finding.Info | None:
  """Returns the description of a parameter that an adapter needs.

  It is None if it cannot be adapted: no array, a key, or an adapter's weight.
  """
  value = param.value
  shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
  if shape is None or dtype is None or is_key(value) or owner_of(param):
    return None
  return finding.Info(
    tuple(shape),
    dtype_name(dtype),
    tuple(param.metadata.get('sharding') or ()),
  )


@functools.lru_cache(maxsize=256)
def dtype_name(dtype: Any) -> str:
  """Returns a dtype's name; numpy builds it at each call."""
  return str(np.dtype(dtype))


def owner_of(param: bx.Param) -> str | None:
  """Returns the adapter that a parameter is a weight of, by its metadata."""
  owner = param.metadata.get('adapter')
  return owner if isinstance(owner, str) else None
