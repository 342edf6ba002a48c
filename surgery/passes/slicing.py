"""Slice, permute, split and repeat places along an axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

Places = int | str | Sequence[int | str]

_RANGE = re.compile(r'\s*(-?\d+)?\s*:\s*(-?\d+)?\s*')


def places(given: Places, count: int, what: str) -> list[int]:
  """Reads places on an axis: `5`, `'0:640'`, `[0, 3, '8:']`, `'0:2, 5'`.

  Ranges are Python's: the end is not in it, and what is negative is counted
  from the end.

  Args:
    given: the places.
    count: number of places on the axis.
    what: the option, for messages.

  Raises:
    SurgeryError: for a place that the axis does not have.
  """
  items: list[Any] = []
  for one in [given] if isinstance(given, (int, str)) else list(given):
    items += one.split(',') if isinstance(one, str) else [one]
  found: list[int] = []
  for item in items:
    match = _RANGE.fullmatch(item) if isinstance(item, str) else None
    if match is None:
      found.append(_place(item, count, what))
    else:
      found += _range(match, count, what)
  if not found:
    raise errors.SurgeryError(f'{what}: {given!r} selects no place.')
  return found


def _range(match: re.Match[str], count: int, what: str) -> range:
  """Returns the places of a range, as Python slices.

  Raises:
    SurgeryError: for a bound beyond the axis, which Python would cut off.
  """
  bounds = [None if b is None else int(b) for b in match.groups()]
  if any(b is not None and not -count <= b <= count for b in bounds):
    raise errors.SurgeryError(
      f'{what}: the range {match[0].strip()!r} leaves the axis, which has '
      f'{count} places.'
    )
  return range(*slice(*bounds).indices(count))


def _place(item: Any, count: int, what: str) -> int:
  """Returns a place, counted from the front.

  Raises:
    SurgeryError: if it is not a number, or beyond the axis.
  """
  try:
    place = int(item)
  except ValueError:
    raise errors.SurgeryError(
      f"{what}: expected a number or a range such as '0:640', found {item!r}."
    ) from None
  if not -count <= place < count:
    raise errors.SurgeryError(
      f'{what}: there is no place {place}; the axis has {count}, from 0 to '
      f'{count - 1}.'
    )
  return place % count


def taken(leaf: Leaf, axis: int, wanted: Sequence[int]) -> Leaf:
  """Returns some places of a tensor along an axis, in that order."""
  assert leaf.shape is not None
  reader = Reader(leaf)
  index = np.asarray(wanted, np.int64)
  shape = (*leaf.shape[:axis], len(wanted), *leaf.shape[axis + 1 :])

  def block(region: Region) -> Any:
    return reader.take(region, axis, index[region[axis]])

  mixed = bool(np.any(np.diff(index) < 0))
  return regions.computed(leaf, shape, block, [leaf], scattered=mixed)


def _groups(size: int, of: int | None, path: Path) -> int:
  """Returns how many places a group has.

  Raises:
    SurgeryError: if the axis does not come in equal groups.
  """
  if of is None:
    return 1
  if of < 1 or size % of:
    raise errors.SurgeryError(
      f'{paths.show(path)}: an axis of {size} cannot be cut into {of} '
      'equal groups.'
    )
  return size // of


def _spread(wanted: Sequence[int], width: int) -> list[int]:
  return [k * width + j for k in wanted for j in range(width)]


def slice_(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  axis: int = 0,
  *,
  keep: Places | None = None,
  drop: Places | None = None,
  of: int | None = None,
  host: Host,
) -> Checkpoint:
  """Keeps some places along an axis: rows, columns, channels, heads.

  What is kept is in the order of `keep`, as of `numpy.take`: `[3, 1, 1]` is
  place 3, and then place 1 twice.

  Args:
    checkpoint: the model.
    select: the tensors.
    axis: the axis; negative ones count from the end.
    keep: places to keep, in order: `5`, `'0:640'`, `[0, '8:16']`.
    drop: places to leave out, instead.
    of: number of equal groups in which the axis comes, e.g. of heads; then
      places are groups.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for a place that is not there, or if none would be left.
    AdapterError: for a tensor with an adapter.

  Example:
    slice: {select: '**/{q,k,v}_proj/kernel', axis: -1, drop: 5, of: 16}
  """
  if (keep is None) == (drop is None):
    raise errors.SurgeryError('give keep, or drop, and not both.')
  changed = {}
  for path, leaf in tensors.chosen(checkpoint, select, 'slice', host).items():
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    width = _groups(leaf.shape[at], of, path)
    count = leaf.shape[at] // width
    what = f'slice: {paths.show(path)}, axis {axis}'
    given = keep if keep is not None else drop
    assert given is not None
    wanted = places(given, count, what)
    if keep is None:
      dropped = set(wanted)
      wanted = [k for k in range(count) if k not in dropped]
    if not wanted:
      raise errors.SurgeryError(f'{what}: nothing would be left.')
    if wanted != list(range(count)):
      changed[path] = taken(leaf, at, _spread(wanted, width))
  if not changed:
    raise errors.SurgeryError(
      'every place would be kept, in its order. Change keep or drop.'
    )
  # Even where the shape stays, an adapter's factors have the old order.
  return tensors.edited(
    checkpoint, 'slice', changed=changed, rearranged=True, host=host
  )


def permute(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  axis: int = 0,
  *,
  order: Places,
  of: int | None = None,
  host: Host,
) -> Checkpoint:
  """Brings places along an axis into another order.

  Args:
    checkpoint: the model.
    select: the tensors.
    axis: the axis; negative ones count from the end.
    order: all places, in the order that they are to have.
    of: number of equal groups in which the axis comes, e.g. of heads; then
      places are groups.
    host: knows the adapters' types.

  Raises:
    SurgeryError: if a place is missing or named twice.
    AdapterError: for a tensor with an adapter.

  Example:
    permute: {select: '**/qkv/kernel', axis: -1, order: [2, 0, 1], of: 3}
  """
  changed = {}
  for path, leaf in tensors.chosen(checkpoint, select, 'permute', host).items():
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    width = _groups(leaf.shape[at], of, path)
    count = leaf.shape[at] // width
    what = f'permute: {paths.show(path)}, axis {axis}'
    wanted = places(order, count, what)
    if sorted(wanted) != list(range(count)):
      raise errors.SurgeryError(
        f'{what}: expected each of {count} places once, found {len(wanted)} '
        f'places, {len(set(wanted))} of them different.'
      )
    changed[path] = taken(leaf, at, _spread(wanted, width))
  # An adapter's factors have the order of the tensor.
  return tensors.edited(
    checkpoint, 'permute', changed=changed, rearranged=True, host=host
  )
