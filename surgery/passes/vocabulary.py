"""Resize-vocab: embeddings and output layers for another vocabulary."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from surgery import errors, once
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import arithmetic, rows
from surgery.passes.fill import generator
from surgery.passes.slicing import taken


def resize_vocab(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  size: int | None = None,
  *,
  axis: int = 0,
  multiple_of: int = 1,
  new: Literal['mean', 'zero', 'random'] = 'mean',
  scale: float = 0.02,
  seed: int = 0,
  host: Host,
) -> Checkpoint:
  """Cuts or extends the axis of the vocabulary.

  Tokens that stay are copied. New ones are at the end: the mean of all old
  ones, so that they are as likely as an average token; or zero; or drawn from a
  normal distribution around the mean. What is drawn depends on the seed, the
  token and the place in its row, so that a head that is a copy of the
  embedding, or its transpose, stays one.

  Args:
    checkpoint: the model.
    select: embeddings, or output kernels and biases.
    size: number of tokens; by default as many as there are.
    axis: the axis of tokens: 0 of an embedding, -1 of an output layer.
    multiple_of: the number is rounded up to a multiple of it, e.g. 128.
    new: what new tokens hold.
    scale: standard deviation of random ones.
    seed: the seed of random ones.
    host: knows the adapters' types.

  Raises:
    SurgeryError: if every tensor has that size already.
    CastError: when it is written, for a token that has NaN or infinity, of
      which new ones would be made.
    AdapterError: for a tensor with an adapter.

  Example:
    resize-vocab: {select: '**/embedding', size: 50304}
    resize-vocab: {select: '**/embedding', multiple-of: 128}
  """
  if size is None and multiple_of == 1:
    raise errors.SurgeryError('give size, or multiple-of, or both.')
  if multiple_of < 1:
    raise errors.SurgeryError(
      f'multiple-of: expected a number of 1 or more, found {multiple_of}.'
    )
  if size is not None and size < 1:
    raise errors.SurgeryError(f'expected at least one token, found {size}.')
  if not (math.isfinite(scale) and scale >= 0):
    raise errors.SurgeryError(
      f'scale: expected a number of 0 or more, found {scale}.'
    )
  changed = {}
  found = tensors.chosen(checkpoint, select, 'resize-vocab', host)
  for path, leaf in found.items():
    assert leaf.shape is not None
    at = regions.axis_of(axis, leaf.shape, path)
    wanted = leaf.shape[at] if size is None else size
    # Rounded up, since what runs quickest are sizes that divide evenly.
    wanted = -(-wanted // multiple_of) * multiple_of
    if leaf.shape[at] > wanted:
      changed[path] = taken(leaf, at, range(wanted))
    elif leaf.shape[at] < wanted:
      # Cutting rows needs no arithmetic, so it works for any dtype; new rows
      # do.
      arithmetic.check_number(leaf, path, 'resize-vocab')
      if not leaf.shape[at]:
        raise errors.SurgeryError(f'{paths.show(path)}: has no tokens.')
      changed[path] = _extended(leaf, path, at, wanted, new, scale, seed)
  if not changed:
    shown = ', '.join(f'{paths.show(p)} is {leaf}' for p, leaf in found.items())
    raise errors.SurgeryError(
      f'nothing would change: {shown}. Give another size, or another axis.'
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

  @once.once
  def mean() -> np.ndarray:
    """Returns the mean of old tokens."""
    if new == 'zero':
      return np.zeros(rest)
    return rows.mean(reader, path, axis)

  def block(region: Region) -> Any:
    cut = region[axis]
    # A block may lie in the old tokens, in the new ones, or in both.
    inner = slice(min(cut.start, old), min(cut.stop, old))
    kept = reader((*region[:axis], inner, *region[axis + 1 :]))
    if cut.stop <= old:
      return kept
    others = (*region[:axis], *region[axis + 1 :])
    places = range(max(cut.start, old), cut.stop)
    values = np.broadcast_to(
      mean()[others], (len(places), *regions.sizes(others))
    )
    if new == 'random':
      # One stream of random numbers for each token, so that blocks do not
      # matter.
      noise = [_noise(seed, token, rest)[others] for token in places]
      values = values + np.stack(noise) * scale
    added = arithmetic.narrowed(
      np.moveaxis(values, 0, axis), dtype, path, 'resize-vocab',
      region=(*region[:axis], slice(places.start, cut.stop)),
    )  # fmt: skip
    xp = regions.namespace(kept)
    return xp.concatenate([kept, added], axis=axis)

  return regions.computed(leaf, shape, block, [leaf])


def _noise(seed: int, token: int, shape: regions.Shape) -> np.ndarray:
  """Returns normal numbers for a token, the same for each tensor.

  So an embedding and its copy in the head get the same rows.
  """
  stream = generator(seed, ('resize-vocab',), token)
  return stream.standard_normal(shape, np.float32).astype(np.float64)
