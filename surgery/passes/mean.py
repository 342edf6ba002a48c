"""Mean: an axis, or groups of it, become their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.nonfinite import NonFinite
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import arithmetic, rows


def mean(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  axis: int,
  *,
  groups: int | None = None,
  size: int = 1,
  nonfinite: NonFinite = 'refuse',
  host: Host,
) -> Checkpoint:
  """Replaces an axis, or groups of neighbours along it, by their mean.

  It is computed in float64 and rounded once. With `groups` the axis stays, and
  has as many places, or as many times `size`: the way from multi-head attention
  to grouped-query attention, for keys and values (Ainslie et al. 2023, arXiv
  2305.13245). Without, it goes.

  Args:
    checkpoint: the model.
    select: the tensors.
    axis: the axis.
    groups: in how many groups of neighbours the axis is divided.
    size: with `groups`, how many places belong together and are kept apart from
      each other, as the elements of a head where heads lie in one axis.
    nonfinite: `allow` lets NaN and infinity be written that the tensor has not.
    host: knows the adapters' types.

  Raises:
    SurgeryError: if there is no such axis, or it cannot be so divided.
    AdapterError: for a tensor with an adapter.

  Example:
    mean: {select: '**/{key,value}/kernel', axis: -1, groups: 8, size: 64}
  """
  if groups is not None and groups < 1:
    raise errors.SurgeryError(f'groups: expected 1 or more, found {groups}.')
  if size < 1 or (size > 1 and groups is None):
    raise errors.SurgeryError(
      f'size: expected 1 or more, and groups beside it, found {size}.'
    )
  changed = {
    path: _mean(leaf, path, axis, groups, size, nonfinite)
    for path, leaf in tensors.chosen(checkpoint, select, 'mean', host).items()
  }
  return tensors.edited(
    checkpoint, 'mean', changed=changed, rearranged=True, host=host
  )


def _mean(
  leaf: Leaf,
  path: Path,
  axis: int,
  groups: int | None,
  size: int,
  nonfinite: NonFinite,
) -> Leaf:
  dtype = arithmetic.check_number(leaf, path, 'mean')
  shape = leaf.shape or ()
  axis = regions.axis_of(axis, shape, path)
  unit = size * (groups or 1)
  if not shape[axis] or shape[axis] % unit:
    raise errors.SurgeryError(
      f'{paths.show(path)}: axis {axis} of {shape} has {shape[axis]} places; '
      f'expected a multiple of {unit}, which is groups ({groups or 1}) times '
      f'size ({size}), but not 0.'
    )
  many = shape[axis] // unit  # Of so many each is the mean.
  reader = Reader(leaf)
  wide = arithmetic.wide(dtype)

  def block(region: Region) -> Any:
    if groups is None:
      cut, inner = slice(0, many), None
      front, behind = region[:axis], region[axis:]
    else:
      # The groups in which the places lie, and where in these they do.
      one = region[axis]
      first, last = one.start // size, -(-one.stop // size)
      cut = slice(first * many * size, last * many * size)
      inner = slice(one.start - first * size, one.stop - first * size)
      front, behind = region[:axis], region[axis + 1 :]
    whole = (*front, cut, *behind)
    value = arithmetic.plain(reader(whole), path, 'mean')
    if nonfinite == 'refuse':
      rows.check_spread(value, path, whole)
    before, after = value.shape[:axis], value.shape[axis + 1 :]
    parts = value.reshape(*before, -1, many, size, *after).astype(wide)
    with np.errstate(all='ignore'):  # What is wrong is found behind it.
      found = parts.mean(axis=axis + 1)
    found = found.reshape(*before, -1, *after)
    if inner is None:
      found = found.reshape(*before, *after)
    else:
      found = found[(*(slice(None) for _ in before), inner)]
    return arithmetic.narrowed(
      found, dtype, path, 'mean', inputs=[value], region=region,
      nonfinite=nonfinite,
    )  # fmt: skip

  left = () if groups is None else (unit,)
  compute: Callable[[Region], Any] = block
  return regions.computed(
    leaf, (*shape[:axis], *left, *shape[axis + 1 :]), compute, [leaf]
  )
