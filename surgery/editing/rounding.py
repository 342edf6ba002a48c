"""Rounding arrays to another floating-point dtype, once and to nearest even."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import ml_dtypes
import numpy as np

from surgery import errors
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
_HALVES = ('bfloat16', 'float16')
# Elements that are rounded at a time, for a processor's cache.
_PIECE = 1 << 15
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
    raise errors.ConfigError(
      f'expected a floating-point dtype, found {name!r}.{_suggested(name)}'
    )
  return name


# Other names of dtypes, of which only the letters differ.
_ELSEWHERE = {'half': 'f16', 'single': 'f32', 'float': 'f32', 'double': 'f64'}


def _suggested(name: str) -> str:
  """Returns which dtype may have been meant."""
  plain = name.lower().rpartition('.')[2]
  short = re.sub('^(bf|f)(p|loat)', r'\1', plain).replace('brain', 'bf')
  short = _ELSEWHERE.get(plain, short)
  if short in SHORT and short != 'f8_e4m3':  # Which others call e4m3fn.
    return f' Did you mean {short!r}?'
  if re.match(r'f?8|e[45]m', short):
    # What hardware and most files have, first.
    usual = ('f8_e4m3fn', 'f8_e5m2')
    near = [one for one in usual if short.lstrip('f8_')[:4] in one] or usual
    return f' Did you mean {" or ".join(map(repr, near))}?'
  return errors.suggest(name, (*SHORT, *SHORT.values()))


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
  name = block.dtype.name
  with np.errstate(over='ignore', invalid='ignore', under='ignore'):
    if to.itemsize == 1 or (name in _HALVES and dtype in _HALVES):
      return _by_table(block, dtype)
    if name == 'float64' and dtype not in _OF_NUMPY:
      return _from_double(block).astype(to)
    if name not in _OF_NUMPY and dtype not in _WIDE:
      block = block.astype(np.float32)  # Exact.
    return block.astype(to)


@functools.lru_cache(maxsize=64)
def _table(source: str, dtype: str) -> np.ndarray:
  """Returns the codes of all numbers of a 16-bit dtype in a narrow one."""
  every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[source])
  to = DTYPES[dtype]
  with np.errstate(over='ignore', invalid='ignore', under='ignore'):
    return every.astype(np.float32).astype(to).view(f'u{to.itemsize}')


def _by_table(block: np.ndarray, dtype: str) -> np.ndarray:
  """Returns an array in another dtype, looked up instead of computed.

  That is for 8-bit dtypes, and from one 16-bit dtype to the other.

  A table has all of bfloat16 and float16. Of float32 the upper half, with its
  last bit set if anything is cut off, serves as a bfloat16: that is rounding to
  odd to 8 bits of significand, and rounding that to nearest with at most 6 is
  rounding once (Boldo & Melquiond 2008). 8-bit dtypes have at most 5.
  """
  flat = np.ascontiguousarray(block).reshape(-1)
  name = flat.dtype.name
  table = _table(name if name == 'float16' else 'bfloat16', dtype)
  codes = np.empty(flat.size, table.dtype)
  for start in range(0, flat.size, _PIECE):
    index = _halves(flat[start : start + _PIECE])
    # All indices are in the table; clipping spares the copy that raising takes.
    table.take(index, out=codes[start : start + _PIECE], mode='clip')
  return codes.view(DTYPES[dtype]).reshape(block.shape)


def _halves(piece: np.ndarray) -> np.ndarray:
  """Returns numbers as 16 bits: of float16, or of bfloat16 rounded to odd."""
  name = piece.dtype.name
  if name in ('bfloat16', 'float16'):
    return piece.astype(DTYPES[name], copy=False).view(np.uint16)
  wide = _to_odd(piece) if name == 'float64' else piece.astype(np.float32)
  halves = wide.view(np.uint16)
  high = sys.byteorder == 'little'
  index: np.ndarray = halves[high::2] | (halves[1 - high :: 2] != 0)
  return index


def _from_double(block: np.ndarray) -> np.ndarray:
  """Returns float64 as float32 such that rounding again to bfloat16 is right.

  Rounding twice is wrong only where the float32 lies half-way between two
  numbers of bfloat16 and the float64 does not: that is rare.
  """
  near = block.astype(np.float32)
  flat = near.reshape(-1)
  # A number and a half: the lower 16 bits are a one and zeros.
  ties = np.left_shift(flat.view(np.uint32), 16) == np.uint32(1 << 31)
  if ties.any():
    places = np.flatnonzero(ties)
    flat[places] = _to_odd(block.reshape(-1)[places])
  return near


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


@functools.lru_cache(maxsize=64)
def largest(dtype: str) -> float:
  """Returns the largest finite number of a dtype."""
  return float(ml_dtypes.finfo(DTYPES[dtype]).max)


def lost(block: np.ndarray, after: np.ndarray) -> np.ndarray | None:
  """Finds values that a dtype cannot hold: too large, or infinite.

  Args:
    block: floating-point array.
    after: the same in another dtype.

  Returns:
    Boolean array that is True where a finite value became infinite or NaN, or
    an infinite one NaN, since some dtypes have no infinity; None if there is
    none.
  """
  if after.dtype.itemsize == 1:
    finite = _finite(after.dtype.name).take(after.view(np.uint8))
    if finite.all():
      return None
    became_nan = np.isnan(after.astype(np.float32))
    bad = ~finite & (np.isfinite(block) | (np.isinf(block) & became_nan))
    return bad if bad.any() else None
  most = largest(after.dtype.name)
  if largest(block.dtype.name) <= most or not block.size:
    return None
  # Cheap, and true of most; NaN and infinity make it False.
  if magnitude(block) <= most:
    return None
  with np.errstate(invalid='ignore'):
    bad = np.isfinite(block) & ~np.isfinite(after)
  return bad if bad.any() else None


def magnitude(block: np.ndarray) -> float:
  """Returns the largest magnitude of a floating-point array.

  Returns:
    NaN, where one of its numbers is; 0 of an empty array.
  """
  if not block.size:
    return 0.0
  if block.dtype.name in _HALVES:
    # Without the sign the codes have the order of the numbers, NaN is above
    # infinity, and integers are compared many at a time.
    code = _codes(block).max()
    return float(np.array(code, np.uint16).view(block.dtype))
  if block.dtype.kind != 'f':
    block = block.astype(np.float32)  # 8 bits, of ml_dtypes.
  with np.errstate(invalid='ignore'):
    return float(np.maximum(-block.min(), block.max()))


def _codes(block: np.ndarray) -> np.ndarray:
  """Returns the codes of 16-bit numbers, without the sign."""
  flat = np.ascontiguousarray(block).reshape(-1)
  return flat.view(np.uint16) & np.uint16(0x7FFF)


@functools.lru_cache(maxsize=16)
def _finite(dtype: str) -> np.ndarray:
  """Returns which codes of an 8-bit dtype are finite numbers."""
  every = np.arange(1 << 8, dtype=np.uint8).view(DTYPES[dtype])
  return np.isfinite(every.astype(np.float32))


@functools.lru_cache(maxsize=16)
def _nonzero(dtype: str) -> np.ndarray:
  """Returns which codes of an 8-bit dtype are not zero."""
  every = np.arange(1 << 8, dtype=np.uint8).view(DTYPES[dtype])
  return every.astype(np.float32) != 0


def nonzero(block: np.ndarray) -> int:
  """Returns how many numbers of a floating-point array are not zero."""
  name = block.dtype.name
  if block.dtype.itemsize == 1:
    return int(np.count_nonzero(_nonzero(name).take(block.view(np.uint8))))
  if name in _HALVES:
    # All bits but the sign; as numbers they are compared one by one.
    return int(np.count_nonzero(_codes(block)))
  if name == 'float32':
    bits = np.ascontiguousarray(block).reshape(-1).view(np.uint32)
    pieces = (bits[k : k + _PIECE] for k in range(0, bits.size, _PIECE))
    return sum(int(np.count_nonzero(one << np.uint32(1))) for one in pieces)
  return int(np.count_nonzero(block))


@functools.lru_cache(maxsize=64)
def smallest(dtype: str) -> float:
  """Returns the smallest positive number of a dtype."""
  return float(ml_dtypes.finfo(DTYPES[dtype]).smallest_subnormal)


def may_vanish(source: str, dtype: str) -> bool:
  """Whether a number of one dtype that is not zero may be zero in another."""
  return smallest(dtype) > smallest(source)
