"""Prune: the smallest numbers of a tensor become zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import arithmetic


def prune(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  share: float,
  *,
  host: Host,
) -> Checkpoint:
  """Makes the smallest numbers of each tensor zero, by their magnitude.

  Of `n` numbers `floor(share · n)` become zero, those that are zero already
  among them; of equal ones the first. Each tensor is read as a whole.

  Args:
    checkpoint: the model.
    select: the tensors.
    share: share of the numbers that become zero, 0 to 1.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for another share, or a tensor that is not floating-point;
      and, when it is written, for one that has NaN.

  Example:
    prune: {select: '**/kernel', share: 0.5}
  """
  if not 0 <= share <= 1:
    raise errors.SurgeryError(f'share: expected 0 to 1, found {share}.')
  changed = {
    path: _pruned(leaf, path, share)
    for path, leaf in tensors.chosen(checkpoint, select, 'prune', host).items()
  }
  return tensors.edited(checkpoint, 'prune', changed=changed, host=host)


def _pruned(leaf: Leaf, path: Path, share: float) -> Leaf:
  arithmetic.check_number(leaf, path, 'prune')
  shape = leaf.shape or ()
  # As text a share may be a little less than what was meant: 0.29 · 100.
  count = int(share * leaf.size * (1 + 1e-12))
  reader = Reader(leaf)

  def load() -> Any:
    value = arithmetic.plain(reader(regions.whole(shape)), path, 'prune')
    with np.errstate(all='ignore'):
      sizes = np.abs(value.astype(arithmetic.wide(str(leaf.dtype)))).reshape(-1)
    if np.isnan(sizes).any():
      raise errors.SurgeryError(
        f'prune: {paths.show(path)}: has NaN, which has no magnitude. See '
        'surgery stats --finite.'
      )
    flat = np.array(value).reshape(-1)
    if count:
      # All below the limit go, and of those that equal it the first.
      limit = np.partition(sizes, count - 1)[count - 1]
      below = sizes < limit
      equal = np.flatnonzero(sizes == limit)
      flat[below] = 0
      flat[equal[: count - int(np.count_nonzero(below))]] = 0
    return flat.reshape(shape)

  # The numbers, their magnitudes in float64, and these once more, in parts.
  memory = leaf.nbytes * 2 + leaf.size * 18
  return leaf.replace(load=load, memory=memory, heavy=True)
