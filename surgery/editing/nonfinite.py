"""NaN and infinity that a step would make of numbers that were none.

Every pass that computes values hands its results to `checked`, a block at a
time, on their way out: so nothing is read twice, and no pass has its own rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.editing import rounding
from surgery.naming import paths
from surgery.naming.paths import Path

# Whether a step may write NaN and infinity that its inputs do not have.
NonFinite = Literal['refuse', 'allow']


def within(block: np.ndarray, dtype: str) -> bool:
  """Whether all numbers are finite, and stay so in a dtype.

  That is one pass over the block, and no array; NaN makes it False.
  """
  if not block.size:
    return True
  if dtype in ('complex64', 'complex128'):
    # The real and the imaginary numbers, one behind the other.
    flat = np.ascontiguousarray(block).reshape(-1)
    block = flat.view(flat.real.dtype) if flat.dtype.kind == 'c' else flat
    dtype = {'complex64': 'float32', 'complex128': 'float64'}[dtype]
  if not rounding.is_float(dtype):
    return bool(np.isfinite(block).all())
  return rounding.magnitude(block) <= rounding.largest(dtype)


def _has(kind: Any, value: np.ndarray, shape: tuple[int, ...]) -> Any:
  """Returns where an input is NaN, or infinite.

  Args:
    kind: `np.isnan` or `np.isinf`.
    value: the input.
    shape: of the result; an input of another shape is asked as a whole, since
      any of its numbers may be in any of the result's.
  """
  found = kind(value)
  return found if found.shape == shape else found.any()


def checked(
  block: np.ndarray,
  after: np.ndarray,
  path: Path,
  verb: str,
  *,
  inputs: Sequence[np.ndarray] = (),
  start: Sequence[int] = (),
  nonfinite: NonFinite = 'refuse',
  option: bool = True,
) -> np.ndarray:
  """Returns a result, unless it is NaN or infinite where no input is.

  A NaN may stand where an input is NaN, an infinity where one is infinite.

  Args:
    block: the result as it was computed.
    after: the same in the dtype in which it is written.
    path: the tensor, for messages.
    verb: the step, for messages.
    inputs: what it was computed from.
    start: index of the block's first element.
    nonfinite: `'allow'` returns every result.
    option: whether the step has an option `nonfinite`, to be named.

  Raises:
    CastError: naming the first such number.
  """
  if nonfinite == 'allow' or within(block, after.dtype.name):
    return after
  bad = np.zeros(after.shape, bool)
  for kind in (np.isnan, np.isinf):
    new = kind(after)
    if new.any():
      # A mask of -inf may stay -inf, and NaN may stay NaN; `inf - inf` is a NaN
      # that no input has.
      for one in inputs:
        new &= ~_has(kind, one, after.shape)
    bad |= new
  if not bad.any():
    return after
  first = np.unravel_index(int(np.argmax(bad)), bad.shape)
  offset = (*start, *[0] * (bad.ndim - len(start)))
  index = [int(a) + b for a, b in zip(first, offset, strict=True)]
  advice = ' To write it all the same, give nonfinite: allow.' if option else ''
  raise errors.CastError(
    f'{verb}: {paths.show(path)}: the result at index {index} is '
    f'{_reason(block[first], after, first, inputs)}{advice}'
  )


def _reason(
  value: Any,
  after: np.ndarray,
  first: tuple[Any, ...],
  inputs: Sequence[np.ndarray],
) -> str:
  """Returns what a number became, and what to do."""
  dtype = after.dtype.name
  with np.errstate(all='ignore'):
    # An input of another shape has no element at that index: any may be it.
    infinite = any(
      bool(np.any(np.isinf(one[first] if one.shape == after.shape else one)))
      for one in inputs
    )
    finite = bool(np.isfinite(value))
  if np.isnan(after[first]) and not finite:
    if not infinite:
      return 'NaN, and no input is.'
    return (
      'NaN: an input is infinite there, and inf - inf and 0 · inf are NaN. '
      'Select other tensors.'
    )
  most = rounding.largest(dtype) if rounding.is_float(dtype) else math.inf
  shown = f'{value.real:g}' if finite else 'infinite'
  limit = '' if math.isinf(most) else f', whose largest number is {most:g}'
  return (
    f'{shown}, too large for {dtype}{limit}; no input is infinite there. Cast '
    'the tensor to a wider dtype first.'
  )
