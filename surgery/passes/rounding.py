"""Rounding arrays to another floating-point dtype, once and to nearest even."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from surgery.core import errors
from surgery.files.arrays import DTYPES

# What tensors can be cast to, by the short name. Missing are dtypes that have
# no sign, or no NaN and so nothing to mark what does not fit.
SHORT = {
  'bf16': 'bfloat16',
  'f16': 'float16',
  'f32': 'float32',
  'f64': 'float64',
  'f8_e3m4': 'float8_e3m4',
  'f8_e4m3': 'float8_e4m3',
  'f8_e4m3b11fnuz': 'float8_e4m3b11fnuz',
  'f8_e4m3fn': 'float8_e4m3fn',
  'f8_e4m3fnuz': 'float8_e4m3fnuz',
  'f8_e5m2': 'float8_e5m2',
  'f8_e5m2fnuz': 'float8_e5m2fnuz',
}
_WIDE = ('float32', 'float64')
_OF_NUMPY = ('float16', *_WIDE)


def is_float(dtype: str | None) -> bool:
  """Whether a dtype is one of real floating-point numbers."""
  return dtype in DTYPES and dtype.startswith(('float', 'bfloat'))


def name_of(dtype: Any) -> str:
  """Returns the full name of a dtype that tensors can be cast to.

  Args:
    dtype: its name, short or full, or anything that numpy takes for a dtype.

  Raises:
    ConfigError: for any other.
  """
  name = dtype
  if not isinstance(dtype, str):
    try:
      name = np.dtype(dtype).name
    except TypeError:
      name = repr(dtype)
  name = SHORT.get(name, name)
  if name not in SHORT.values():
    known = (*SHORT, *SHORT.values())
    raise errors.ConfigError(
      f'cast: expected a floating-point dtype, found {name!r}.'
      f'{errors.suggest(name, known)}'
    )
  return name


def rounded(block: np.ndarray, dtype: str) -> np.ndarray:
  """Returns an array in another floating-point dtype, rounded once.

  Args:
    block: floating-point array of any shape.
    dtype: full name of the dtype.

  Returns:
    Array of the same shape; what is too large became infinite, or NaN where
    the dtype has no infinity.
  """
  to = DTYPES[dtype]
  block = np.asarray(block)
  if block.dtype.name not in _OF_NUMPY and dtype not in _WIDE:
    block = block.astype(np.float32)  # Exact.
  with np.errstate(over='ignore', invalid='ignore', under='ignore'):
    if block.dtype.name == 'float64' and dtype not in _OF_NUMPY:
      block = _to_odd(block)
    return block.astype(to)


def _to_odd(block: np.ndarray) -> np.ndarray:
  """Returns float64 as float32 such that rounding again rounds rightly.

  What is not exact is cut, and its last bit set: so it is never half-way
  between two numbers of a dtype that is narrower by two bits, and lies on the
  right side of that. ml_dtypes goes by float32 and would round twice.
  """
  near = block.astype(np.float32)
  back = near.astype(np.float64)
  bits = near.reshape(-1).view(np.uint32)
  away = np.abs(back) > np.abs(block)
  bits -= away.reshape(-1)
  bits |= (back != block).reshape(-1)
  return near


def largest(dtype: str) -> float:
  """Returns the largest finite number of a dtype."""
  return float(ml_dtypes.finfo(DTYPES[dtype]).max)


def lost(block: np.ndarray, after: np.ndarray) -> np.ndarray | None:
  """Finds finite values that a dtype cannot hold.

  Args:
    block: floating-point array.
    after: the same in another dtype.

  Returns:
    Boolean array that is True where a finite value became infinite or NaN;
    None if there is none.
  """
  most = largest(after.dtype.name)
  if largest(block.dtype.name) <= most or not block.size:
    return None
  # Cheap, and true of most; NaN and infinity make it False.
  with np.errstate(invalid='ignore'):
    if -most <= float(block.min()) and float(block.max()) <= most:
      return None
    bad = np.isfinite(block) & ~np.isfinite(after)
  return bad if bad.any() else None
