"""Clamp: numbers outside of a range become its ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import arithmetic


def clamp(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  *,
  min: float | None = None,
  max: float | None = None,
  host: Host,
) -> Checkpoint:
  """Brings numbers into a range: what lies outside becomes its nearest end.

  NaN stays. An end that a dtype cannot hold is rounded to it.

  Args:
    checkpoint: the model.
    select: the tensors.
    min: the smallest number; none by default.
    max: the largest number; none by default.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for a range that is empty, or without ends, and for a tensor
      that is not of real floating-point numbers.

  Example:
    clamp: {select: '**/kernel', min: -1, max: 1}
  """
  if min is None and max is None:
    raise errors.SurgeryError('give min, max, or both.')
  low = -math.inf if min is None else float(min)
  high = math.inf if max is None else float(max)
  if not low <= high:
    raise errors.SurgeryError(f'expected min <= max, found {low} and {high}.')
  changed = {
    path: _clamped(leaf, path, low, high)
    for path, leaf in tensors.chosen(checkpoint, select, 'clamp', host).items()
  }
  return tensors.edited(checkpoint, 'clamp', changed=changed, host=host)


def _clamped(leaf: Leaf, path: Path, low: float, high: float) -> Leaf:
  dtype = arithmetic.check_number(leaf, path, 'clamp')
  arithmetic.check_real(dtype, path)
  reader = Reader(leaf)

  def clipped(x: np.ndarray) -> np.ndarray:
    return np.clip(x.astype('float64'), low, high)

  def block(region: Region) -> Any:
    value = arithmetic.plain(reader(region), path, 'clamp')
    return arithmetic.elementwise(
      [value], clipped, dtype, path, 'clamp', region, 'refuse'
    )

  return regions.computed(leaf, leaf.shape or (), block, [leaf])
