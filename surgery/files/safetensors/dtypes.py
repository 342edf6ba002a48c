"""What safetensors calls dtypes.

Those that it does not know are stored as bytes, with one more axis if an
element has several, and our manifest tells which they are.
"""

from __future__ import annotations

import numpy as np

from surgery import errors
from surgery.files import arrays

TAGS = {
  'bool': 'BOOL',
  'int8': 'I8',
  'int16': 'I16',
  'int32': 'I32',
  'int64': 'I64',
  'uint8': 'U8',
  'uint16': 'U16',
  'uint32': 'U32',
  'uint64': 'U64',
  'float16': 'F16',
  'float32': 'F32',
  'float64': 'F64',
  'bfloat16': 'BF16',
  'complex64': 'C64',
  'float8_e4m3fn': 'F8_E4M3',
  'float8_e5m2': 'F8_E5M2',
  'float8_e8m0fnu': 'F8_E8M0',
  'float8_e4m3fnuz': 'F8_E4M3FNUZ',
  'float8_e5m2fnuz': 'F8_E5M2FNUZ',
}
# Elements that share bytes: numpy has no such arrays, so they are copied only.
PACKED = {
  'packed_float4_e2m1fn': 'F4',
  'packed_float6_e2m3fn': 'F6_E2M3',
  'packed_float6_e3m2fn': 'F6_E3M2',
}
NAMES = {tag: name for name, tag in {**TAGS, **PACKED}.items()}
BYTES = 'U8'


def canonical(dtype: str) -> str:
  """Returns the name of a dtype as files have it.

  Args:
    dtype: what `str` makes of it, which may name a byte order.

  Raises:
    FormatError: for one that no file can hold.
  """
  if dtype in PACKED:
    return dtype
  try:
    name = dtype if dtype in arrays.DTYPES else np.dtype(dtype).name
  except TypeError:
    name = dtype
  if name not in arrays.DTYPES:
    raise errors.FormatError(
      f'expected an array of numbers, found dtype {dtype}. A file can hold: '
      f'{", ".join(arrays.DTYPES)}.'
    )
  return name


def stored(shape: tuple[int, ...], dtype: str) -> tuple[str, tuple[int, ...]]:
  """Returns as what a file has an array: a tag, and a shape."""
  if dtype in TAGS or dtype in PACKED:
    return TAGS.get(dtype) or PACKED[dtype], shape
  itemsize = arrays.DTYPES[dtype].itemsize
  return BYTES, shape if itemsize == 1 else (*shape, itemsize)
