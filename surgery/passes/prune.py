"""Prune: the smallest numbers of tensors become zero."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.contract.method import Cut
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.methods import streaming
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.once import once
from surgery.passes import arithmetic, twins
from surgery.passes.reshape import transposed


def prune(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  share: float,
  *,
  scope: Literal['tensor', 'all'] = 'tensor',
  host: Host,
) -> Checkpoint:
  """Makes the smallest numbers of tensors zero, by their magnitude.

  Of `n` numbers `floor(share · n)` become zero, those that are zero already
  among them; of equal ones the first. The threshold is found exactly, by going
  over the numbers two or three times, block by block. A head that is stored as
  a copy of the embedding, or as its transpose, stays one.

  Args:
    checkpoint: the model.
    select: the tensors.
    share: share of the numbers that become zero, 0 to 1.
    scope: `tensor` counts the numbers of each tensor; `all` those of all that
      are selected together, with one threshold; copies then count once.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for another share, or a tensor that is not floating-point;
      and, when it is written, for one that has NaN.

  Example:
    prune: {select: '**/kernel', share: 0.5}
    prune: {select: '**/kernel', share: 0.5, scope: all}
  """
  if not 0 <= share <= 1:
    raise errors.SurgeryError(f'share: expected 0 to 1, found {share}.')
  if scope not in ('tensor', 'all'):
    raise errors.SurgeryError(
      f'scope: expected tensor or all, found {scope!r}.'
    )
  members = {}
  for path, leaf in tensors.chosen(checkpoint, select, 'prune', host).items():
    arithmetic.check_number(leaf, path, 'prune')
    twin, turned = twins.twin(path, checkpoint)
    lying = transposed(leaf, [1, 0]) if turned else leaf
    members[path] = _Member(path, lying, twin, turned)
  groups = [members] if scope == 'all' else [{p: m} for p, m in members.items()]
  changed = {}
  for group in groups:
    found = _Threshold(group, share)
    changed.update({path: _pruned(one, found) for path, one in group.items()})
  return tensors.edited(checkpoint, 'prune', changed=changed, host=host)


@dataclasses.dataclass(frozen=True)
class _Member:
  """A tensor that is pruned.

  Attributes:
    path: its path.
    leaf: the tensor, as its embedding lies.
    twin: the embedding of which it may be a copy, or its own path.
    turned: whether it is stored transposed.
  """

  path: Path
  leaf: Leaf
  twin: Path
  turned: bool

  def sizes(self, start: int, stop: int, reader: Reader) -> np.ndarray:
    """Returns magnitudes of elements in C order.

    Raises:
      SurgeryError: for NaN.
    """
    return _sizes(reader.flat(start, stop), self)


def _sizes(value: Any, member: _Member) -> np.ndarray:
  dtype = str(member.leaf.dtype)
  value = arithmetic.plain(value, member.path, 'prune')
  # Magnitudes of narrow dtypes are exact in float32, and complex ones are not.
  wide = arithmetic.wide(dtype) if _is_wide(dtype) else 'float32'
  with np.errstate(all='ignore'):
    found: np.ndarray = np.abs(value.astype(wide))
  if np.isnan(found).any():
    raise errors.SurgeryError(
      f'prune: {paths.show(member.path)}: has NaN, which has no magnitude. See '
      'surgery stats --finite.'
    )
  return found


def _is_wide(dtype: str) -> bool:
  return dtype == 'float64' or dtype.startswith('complex')


class _Threshold:
  """The numbers of some tensors that become zero, found when first asked.

  Numbers are gone over from the last to the first, since a selection keeps of
  equal ones those that come first, and the last are to be kept.

  Args:
    members: the tensors.
    share: share of their numbers that become zero.
  """

  def __init__(self, members: Mapping[Path, _Member], share: float) -> None:
    self._members = members
    self._share = share
    self._found = once(self._search)

  def kept(self, member: _Member, start: int, sizes: np.ndarray) -> np.ndarray:
    """Returns which elements of a tensor are kept.

    Args:
      member: the tensor.
      start: place of the first element in it.
      sizes: their magnitudes.
    """
    cut, total, places = self._found()
    stop = places[member.path] + start + len(sizes)
    return cut.mask(sizes[::-1], total - stop)[::-1]

  def _search(self) -> tuple[Cut, int, dict[Path, int]]:
    """Returns the threshold, how many elements there are, and their places."""
    own = [one for one in self._members.values() if not self._is_copy(one)]
    counts = [one.leaf.size for one in own]
    begins = [0, *itertools.accumulate(counts)]
    total = begins[-1]
    readers = [Reader(one.leaf) for one in own]

    def flat(start: int, stop: int) -> np.ndarray:
      low, high = total - stop, total - start
      pieces = []
      for k in range(bisect.bisect_right(begins, low) - 1, len(own)):
        if begins[k] >= high:
          break
        a, b = max(low, begins[k]), min(high, begins[k + 1])
        if a < b:
          pieces.append(own[k].sizes(a - begins[k], b - begins[k], readers[k]))
      return np.concatenate(pieces)[::-1]

    wide = any(_is_wide(str(one.leaf.dtype)) for one in own)
    tensor = streaming.Tensor(
      own[0].path, (total,), [streaming.Source('prune', flat, wide)], None,
      rows=False, uniform=lambda *_: np.zeros(0), finite=False,
    )  # fmt: skip
    # As text a share may be a little less than what was meant: 0.29 · 100.
    gone = min(total, int(self._share * total * (1 + 1e-12)))
    [[cut]] = tensor.largest(lambda block: block.tensors, [[total - gone]])
    places = {one.path: at for one, at in zip(own, begins, strict=False)}
    for path, one in self._members.items():
      if path not in places:
        places[path] = places[one.twin]
    return cut, total, places

  def _is_copy(self, one: _Member) -> bool:
    """Whether a tensor is a copy of another one here, which counts for both."""
    other = self._members.get(one.twin)
    if other is None or other is one or other.leaf.dtype != one.leaf.dtype:
      return False
    return regions.same_bytes(other.leaf, one.leaf)


def _pruned(one: _Member, found: _Threshold) -> Leaf:
  """Returns a tensor with zeros."""
  leaf = one.leaf
  shape = leaf.shape or ()
  reader = Reader(leaf)

  def block(region: Region) -> Any:
    value = arithmetic.plain(reader(region), one.path, 'prune')
    flat = np.array(value).reshape(-1)
    start = regions.start_of(region, shape)
    if flat.size:
      flat[~found.kept(one, start, _sizes(flat, one))] = 0
    return flat.reshape(value.shape)

  # Blocks of the grid lie in C order; any other region is put together of them.
  made = regions.computed(leaf, shape, block, [leaf], anywhere=False)
  made = made.replace(heavy=True)
  return transposed(made, [1, 0]) if one.turned else made
