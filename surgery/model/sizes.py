"""Dtypes by name, and how many bytes they take."""

from __future__ import annotations

import functools
import re
from typing import Any

# Bytes an element as stored, for all dtypes that a file can hold. What is
# narrower than a byte takes one.
_SIZES = {
  1: (
    'bool int1 int2 int4 int8 uint1 uint2 uint4 uint8 float4_e2m1fn '
    'float6_e2m3fn float6_e3m2fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz '
    'float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu'
  ),
  2: 'int16 uint16 float16 bfloat16',
  4: 'int32 uint32 float32 complex32 bcomplex32',
  8: 'int64 uint64 float64 complex64',
  16: 'complex128',
}


_ITEMSIZE = {
  name: size for size, names in _SIZES.items() for name in names.split()
}


# Bits an element where elements share bytes. Such tensors are copied, not read.
PACKED = {
  'packed_float4_e2m1fn': 4,
  'packed_float6_e2m3fn': 6,
  'packed_float6_e3m2fn': 6,
}


# Kinds and bits of others, which only memory holds: `complex256`.
_BITS = re.compile(r'(?:int|uint|float|complex|datetime|timedelta)(\d+)\b.*')


@functools.cache
def itemsize(dtype: str) -> int:
  """Returns bytes an element as stored; int4 and the like take one byte."""
  if dtype in _ITEMSIZE:
    return _ITEMSIZE[dtype]
  bits = _BITS.fullmatch(dtype)
  return max(int(bits[1]) // 8, 1) if bits else 1


def nbytes(dtype: str, size: int) -> int:
  """Returns how many bytes elements of a dtype take as stored."""
  if dtype in PACKED:
    return -(-size * PACKED[dtype] // 8)
  return size * itemsize(dtype)


@functools.lru_cache(maxsize=256)
def dtype_name(dtype: Any) -> str:
  """Returns a dtype's text; numpy makes it anew each time."""
  return str(dtype)


@functools.lru_cache(maxsize=256)
def names_of(dtype: Any) -> tuple[str, str]:
  """Returns a dtype's name, and its text; numpy makes them anew each time."""
  # The name leaves the order of bytes out, the text may be JAX's own.
  return str(getattr(dtype, 'name', dtype)), str(dtype)
