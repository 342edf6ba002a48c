"""Rows of embeddings and heads: taken, and averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions
from surgery.editing.regions import Reader, Region
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import arithmetic

# So many numbers are added up at a time.
_STEP = 1 << 20


def taken(
  reader: Reader, path: Path, region: Region, axis: int, places: np.ndarray
) -> np.ndarray:
  """Returns rows, which become the first axis, in C order.

  Args:
    reader: reads the tensor.
    path: its path, for messages.
    region: which region of the other axes.
    axis: the axis of rows.
    places: which rows.
  """
  found = arithmetic.plain(reader.take(region, axis, places), path, 'rows')
  return np.ascontiguousarray(np.moveaxis(found, axis, 0))


def check_finite(
  found: np.ndarray, path: Path, places: np.ndarray, model: str = ''
) -> None:
  """Raises for NaN and infinity, which would be spread over other rows.

  Args:
    found: rows on the first axis.
    path: the tensor.
    places: which rows they are.
    model: whose they are.

  Raises:
    CastError: naming the first such row.
  """
  with np.errstate(all='ignore'):
    good = np.isfinite(found.reshape(len(found), -1)).all(axis=1)
  if good.all():
    return
  at = int(np.argmin(good))
  values = found[at].reshape(-1)
  bad = values[int(np.argmin(np.isfinite(values)))]
  of = f'{model}: ' if model else ''
  raise errors.CastError(
    f'{of}{paths.show(path)}: row {int(places[at])} has {bad}, and other rows '
    'would be made of it. Mend it first: surgery stats --finite.'
  )


def check_spread(
  value: np.ndarray, path: Path, region: Sequence[slice]
) -> None:
  """Raises for NaN and infinity in what several numbers are made of.

  Args:
    value: a region of a tensor.
    path: the tensor.
    region: which region.

  Raises:
    CastError: naming the first such number.
  """
  with np.errstate(all='ignore'):
    good = np.isfinite(value)
  if good.all():
    return
  place = np.unravel_index(int(np.argmin(good)), value.shape)
  index = [int(at) + cut.start for at, cut in zip(place, region, strict=True)]
  raise errors.CastError(
    f'{paths.show(path)}: has {value[place]} at index {index}, and other '
    'numbers would be made of it. Mend it first: surgery stats --finite.'
  )


def mean(
  reader: Reader,
  path: Path,
  axis: int,
  places: np.ndarray | None = None,
  model: str = '',
) -> np.ndarray:
  """Returns the mean of rows, in float64.

  It has the same bits for a matrix and for its transpose, so that a head that
  is a copy of the embedding stays one.

  Args:
    reader: reads the tensor.
    path: its path, for messages.
    axis: the axis of rows.
    places: which rows, at least one; all by default.
    model: whose they are, for messages.

  Returns:
    The shape of a row.

  Raises:
    CastError: for a row that has NaN or infinity.
  """
  shape = reader.shape
  rest = (*shape[:axis], *shape[axis + 1 :])
  if places is None:
    places = np.arange(shape[axis])
  kind = arithmetic.wide(str(reader.leaf.dtype))
  total: Any = np.zeros(rest, kind)
  step = max(1, _STEP // max(1, math.prod(rest)))
  for start in range(0, len(places), step):
    part = places[start : start + step]
    found = taken(reader, path, regions.whole(shape), axis, part)
    check_finite(found, path, part, model)
    total += found.astype(kind).sum(axis=0)
  result: np.ndarray = total / len(places)
  return result
