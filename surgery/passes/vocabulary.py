"""Resize-vocab: embeddings and output layers for another vocabulary."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import arithmetic
from surgery.passes.fill import generator
from surgery.passes.slicing import taken


def resize_vocab(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  size: int,
  *,
  axis: int = 0,
  new: Literal['mean', 'zero', 'random'] = 'mean',
  scale: float = 0.02,
  seed: int = 0,
  host: Host,
) -> Checkpoint:
  """Cuts or extends the axis of the vocabulary.

  Tokens that stay are copied. New ones are at the end: the mean of all old
  ones, so that they are as likely as an average token; or zero; or drawn from a
  normal distribution around the mean.

  Args:
    checkpoint: the model.
    select: embeddings, or output kernels and biases.
    size: number of tokens.
    axis: the axis of tokens: 0 of an embedding, -1 of an output layer.
    new: what new tokens hold.
    scale: standard deviation of random ones.
    seed: the seed of random ones.
    host: knows the adapters' types.

  Raises:
    SurgeryError: if every tensor has that size already.
    AdapterError: for a tensor with an adapter.

  Example:
    resize-vocab: {select: '**/embedding', size: 50304}
  """
  if size < 1:
    raise errors.SurgeryError(f'expected at least one token, found {size}.')
  changed = {}
  found = tensors.chosen(checkpoint, select, 'resize-vocab', host)
  for path, leaf in found.items():
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    if leaf.shape[at] > size:
      changed[path] = taken(leaf, at, range(size))
    elif leaf.shape[at] < size:
      arithmetic.check_number(leaf, path, 'resize-vocab')
      if not leaf.shape[at]:
        raise errors.SurgeryError(f'{paths.show(path)}: has no tokens.')
      changed[path] = _extended(leaf, path, at, size, new, scale, seed)
  if not changed:
    raise errors.SurgeryError(
      f'{len(found)} tensors have {size} tokens already. Give '
      'another size, or another axis.'
    )
  return tensors.edited(checkpoint, 'resize-vocab', changed=changed, host=host)


def _extended(
  leaf: Leaf,
  path: Path,
  axis: int,
  size: int,
  new: str,
  scale: float,
  seed: int,
) -> Leaf:
  """Returns a tensor with more tokens."""
  assert leaf.shape is not None and leaf.dtype is not None
  reader = Reader(leaf)
  old, dtype = leaf.shape[axis], leaf.dtype
  rest = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
  shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
  cache: list[np.ndarray] = []

  def more() -> np.ndarray:
    """Returns new tokens, on the first axis."""
    if not cache:
      cache.append(_new(reader, path, axis, size - old, new, scale, seed))
    return cache[0]

  def block(region: Region) -> Any:
    cut = region[axis]
    inner = slice(min(cut.start, old), min(cut.stop, old))
    kept = reader((*region[:axis], inner, *region[axis + 1 :]))
    if cut.stop <= old:
      return kept
    others = (*region[:axis], *region[axis + 1 :])
    places = slice(max(cut.start - old, 0), cut.stop - old)
    values = more()
    # The mean is one token that stands for all.
    values = values[places] if len(values) > 1 else values
    values = values[(slice(None), *others)]
    count = places.stop - places.start
    values = np.broadcast_to(values, (count, *values.shape[1:]))
    # A token that is NaN or infinite makes the mean so.
    added = arithmetic.narrowed(
      np.moveaxis(values, 0, axis), dtype, path, 'resize-vocab',
      inputs=[values.reshape(-1)],
      region=(*region[:axis], slice(max(cut.start, old), cut.stop)),
    )  # fmt: skip
    xp = regions.namespace(kept)
    return xp.concatenate([kept, added], axis=axis)

  del rest
  return regions.computed(leaf, shape, block, [leaf])


def _new(
  reader: Reader,
  path: Path,
  axis: int,
  count: int,
  new: str,
  scale: float,
  seed: int,
) -> np.ndarray:
  """Returns new tokens as float64, or float32 if random, on the first axis."""
  shape = reader.shape
  rest = (*shape[:axis], *shape[axis + 1 :])
  if new == 'zero':
    return np.zeros((1, *rest))
  total = np.zeros(rest)
  # A few tokens at a time: the sum does not depend on how many.
  step = max(1, (1 << 20) // max(1, int(np.prod(rest))))
  for start in range(0, shape[axis], step):
    cut = slice(start, min(start + step, shape[axis]))
    region = (
      *regions.whole(shape[:axis]),
      cut,
      *regions.whole(shape)[axis + 1 :],
    )
    value = arithmetic.plain(reader(region), path, 'resize-vocab')
    total += value.astype(np.float64).sum(axis=axis)
  mean = (total / shape[axis])[None]
  if new == 'mean':
    return mean
  stream = generator(seed, path)
  drawn = stream.standard_normal((count, *rest), np.float32) * scale
  return np.asarray(mean + drawn)
