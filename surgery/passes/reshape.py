"""Reshape, transpose and pad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region, Shape
from surgery.host.manager import Host
from surgery.model import layouts
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection


def reshape(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  shape: Sequence[int],
  *,
  host: Host,
) -> Checkpoint:
  """Gives tensors another shape; elements keep their order.

  Args:
    checkpoint: the model.
    select: the tensors.
    shape: the shape; one -1 stands for what is left.
    host: knows the adapters' types.

  Raises:
    SurgeryError: if a tensor has another number of elements.
    AdapterError: for a tensor with an adapter.

  Example:
    reshape: {select: '**/query/kernel', shape: [768, 12, 64]}
  """
  changed = {}
  for path, leaf in tensors.chosen(checkpoint, select, 'reshape', host).items():
    changed[path] = _reshaped(leaf, _resolved(leaf, shape, path))
  return tensors.edited(checkpoint, 'reshape', changed=changed, host=host)


def _resolved(leaf: Leaf, shape: Sequence[int], path: Path) -> Shape:
  sizes = list(shape)
  fixed = math.prod(n for n in sizes if n != -1)
  if sizes.count(-1) == 1 and fixed and leaf.size % fixed == 0:
    sizes[sizes.index(-1)] = leaf.size // fixed
  if any(n < 0 for n in sizes) or math.prod(sizes) != leaf.size:
    raise errors.SurgeryError(
      f'{paths.show(path)}: {leaf.shape}, {leaf.size} elements, '
      f'cannot be {tuple(shape)}.'
    )
  return tuple(sizes)


def _reshaped(leaf: Leaf, shape: Shape) -> Leaf:
  reader = Reader(leaf)

  def block(region: Region) -> Any:
    sizes = regions.sizes(region)
    if sizes == shape:
      return reader(regions.whole(reader.shape)).reshape(shape)
    # A block is one range of elements in C order, and reshaping keeps that
    # order.
    start = regions.start_of(region, shape)
    return reader.flat(start, start + math.prod(sizes)).reshape(sizes)

  return regions.computed(leaf, shape, block, [leaf], anywhere=False)


def transpose(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  axes: Sequence[int] | None = None,
  *,
  host: Host,
) -> Checkpoint:
  """Brings axes into another order; by default swaps the last two.

  Args:
    checkpoint: the model.
    select: the tensors.
    axes: all axes, in their new order.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for a tensor that has other axes.
    AdapterError: for a tensor with an adapter.

  Example:
    transpose: '**/{query,key,value}/weight'
    transpose: {select: '**/conv*/weight', axes: [2, 3, 1, 0]}
  """
  changed, orders = {}, {}
  found = tensors.chosen(checkpoint, select, 'transpose', host)
  for path, leaf in found.items():
    assert leaf.shape is not None
    rank = len(leaf.shape)
    order = [*range(rank)]
    if axes is None and rank >= 2:
      order[-2:] = [rank - 1, rank - 2]
    elif axes is not None:
      order = [regions.axis_of(a, leaf.shape, path) for a in axes]
    if sorted(order) != list(range(rank)) or rank < 2:
      raise errors.SurgeryError(
        f'{paths.show(path)}: a tensor with the axes '
        f'{list(range(rank))} cannot have the order '
        f'{"of swapped axes" if axes is None else list(axes)}.'
      )
    changed[path] = transposed(leaf, order)
    orders[path] = order
  after = tensors.edited(
    checkpoint, 'transpose', changed=changed, rearranged=True, host=host
  )
  said = layouts.rearranged(checkpoint, checkpoint.manifest, orders)
  return after.replace(manifest=said)


def transposed(leaf: Leaf, order: Sequence[int]) -> Leaf:
  """Returns a tensor with its axes in another order."""
  assert leaf.shape is not None
  reader = Reader(leaf)
  # Axis k of the source is axis back[k] of the result.
  back = [order.index(axis) for axis in range(len(order))]
  shape = tuple(leaf.shape[axis] for axis in order)

  def block(region: Region) -> Any:
    return reader(tuple(region[k] for k in back)).transpose(order)

  # Where axes move, a block takes few elements from each row of the file.
  turned = list(order) != sorted(order)
  return regions.computed(leaf, shape, block, [leaf], scattered=turned)


def pad(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  axis: int = 0,
  *,
  before: int = 0,
  after: int = 0,
  to: int | None = None,
  value: float = 0,
  host: Host,
) -> Checkpoint:
  """Adds places with one value at the ends of an axis.

  Args:
    checkpoint: the model.
    select: the tensors.
    axis: the axis; negative ones count from the end.
    before: number of places to add in front.
    after: number of places to add behind.
    to: number of places in the result, instead of `after`.
    value: the value of the new places.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for a negative number of places, or if nothing is added.
    AdapterError: for a tensor with an adapter.

  Example:
    pad: {select: '**/kernel', axis: -1, to: 128}
  """
  changed = {}
  for path, leaf in tensors.chosen(checkpoint, select, 'pad', host).items():
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    where = f'pad: {paths.show(path)}, axis {axis}'
    behind = after if to is None else to - before - leaf.shape[at]
    if min(before, behind) < 0 or (to is not None and after):
      raise errors.SurgeryError(
        f'{where}: expected places to add, found {before} before, {after} '
        f'behind, and {to} in all, for an axis of {leaf.shape[at]}.'
      )
    if before + behind:
      changed[path] = padded(leaf, at, before, behind, value, where)
  if not changed:
    raise errors.SurgeryError('nothing would be added. Give before or to.')
  return tensors.edited(checkpoint, 'pad', changed=changed, host=host)


def padded(
  leaf: Leaf, axis: int, before: int, after: int, value: float, where: str
) -> Leaf:
  """Returns a tensor with more places at the ends of an axis."""
  assert leaf.shape is not None and leaf.dtype is not None
  reader = Reader(leaf)
  size = leaf.shape[axis]
  shape = (
    *leaf.shape[:axis],
    before + size + after,
    *leaf.shape[axis + 1 :],
  )
  number = scalar(value, leaf.dtype, where)

  def block(region: Region) -> Any:
    cut = region[axis]
    # The part of the block that lies in the old tensor; what is left of it on
    # both sides is padding.
    low = min(max(cut.start - before, 0), size)
    high = min(max(cut.stop - before, 0), size)
    inner = reader((*region[:axis], slice(low, high), *region[axis + 1 :]))
    widths = [(0, 0)] * len(shape)
    widths[axis] = (
      max(min(before, cut.stop) - cut.start, 0),
      max(cut.stop - max(before + size, cut.start), 0),
    )
    return regions.namespace(inner).pad(inner, widths, constant_values=number)

  return regions.computed(leaf, shape, block, [leaf])


def scalar(value: float | bool, dtype: str, where: str) -> Any:
  """Returns a number in a dtype.

  Raises:
    SurgeryError: if the dtype cannot hold it.
  """
  with np.errstate(over='ignore', invalid='ignore'):
    try:
      number = np.asarray(value).astype(regions.dtype_of(dtype))[()]
      # A finite number must not become infinite; an integer dtype must hold it
      # exactly, a floating one may round it.
      finite = bool(np.isfinite(np.float64(number.real)))
      exact = dtype.startswith(('float', 'bfloat', 'complex'))
      fits = finite == math.isfinite(value) and (exact or number == value)
    except (TypeError, ValueError, OverflowError):
      fits = False
  if not fits:
    raise errors.SurgeryError(f'{where}: {dtype} cannot hold {value!r}.')
  return number
