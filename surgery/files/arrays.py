"""Which arrays a file may hold, and their bytes as a file holds them.

A file holds the elements in C order and little-endian; the 2- and 4-bit types
take one byte an element.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from surgery import errors

# A payload is hashed and written in blocks that a processor's cache holds.
BLOCK = 1 << 20
MAX_RANK = 64

_NUMPY = (
  'bool',
  'int8',
  'int16',
  'int32',
  'int64',
  'uint8',
  'uint16',
  'uint32',
  'uint64',
  'float16',
  'float32',
  'float64',
  'complex64',
  'complex128',
)
_ML_DTYPES = (
  'bfloat16',
  'float8_e3m4',
  'float8_e4m3',
  'float8_e4m3b11fnuz',
  'float8_e4m3fn',
  'float8_e4m3fnuz',
  'float8_e5m2',
  'float8_e5m2fnuz',
  'float8_e8m0fnu',
  'float6_e2m3fn',
  'float6_e3m2fn',
  'float4_e2m1fn',
  'int2',
  'int4',
  'uint2',
  'uint4',
)

# Nothing else is ever made from a name that stands in a file.
DTYPES: dict[str, np.dtype[Any]] = {
  **{name: np.dtype(name).newbyteorder('<') for name in _NUMPY},
  **{name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_DTYPES},
}


def little(value: Any) -> np.ndarray:
  """Returns a value as an array that a file can hold.

  Args:
    value: array of any library that numpy understands, or a numpy scalar.

  Returns:
    Array of the same shape, in C order and little-endian; the very memory of
    `value` where it is so already.

  Raises:
    FormatError: for a dtype that a file cannot hold.
  """
  try:
    array = np.asarray(value)
  except (TypeError, ValueError) as error:
    raise errors.FormatError(
      f'a {type(value).__name__} is not an array: {error}.'
    ) from None
  known = DTYPES.get(array.dtype.name)
  if known is None:
    raise errors.FormatError(
      f'expected an array of numbers, found dtype {array.dtype} of '
      f'{type(value).__name__}. A file can hold: {", ".join(DTYPES)}.'
    )
  # The byte order does not show in the name, so flax gets this wrong.
  big = array.dtype.byteorder == '>' or (
    array.dtype.byteorder == '=' and sys.byteorder == 'big'
  )
  return np.asarray(array, known if big else None, order='C')


def payload(array: np.ndarray) -> memoryview:
  """Returns the bytes of what `little` returned, without a copy."""
  return array.reshape(-1).view(np.uint8).data


def blocks(data: memoryview) -> Iterator[memoryview]:
  """Returns the bytes in blocks."""
  for start in range(0, len(data), BLOCK):
    yield data[start : start + BLOCK]


def count(shape: tuple[int, ...], itemsize: int) -> int | None:
  """Returns the number of elements; None if no array can have that shape."""
  # Numpy multiplies the sizes that are not zero, and must not overflow.
  most = math.prod(size or 1 for size in shape) * itemsize
  if len(shape) > MAX_RANK or most >= 1 << 63:
    return None
  return math.prod(shape)
