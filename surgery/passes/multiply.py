"""Multiply: tensors by others, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.nonfinite import NonFinite
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import arithmetic


def multiply(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  nonfinite: NonFinite = 'refuse',
  inputs: tensors.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Multiplies tensors by others: `x · factor`, in float64, rounded once.

  A factor has the shape of the tensor, or one that is repeated to it as in
  numpy: of fewer axes, which are the last ones, or with axes of size one. It
  may be boolean or of integers, as masks are.

  Args:
    checkpoint: the model.
    rules: rules `FACTOR -> X`, or `ALIAS::FACTOR` for a tensor of the same name
      in another input.
    nonfinite: `allow` lets NaN and infinity be written that neither has.
    inputs: other checkpoints by alias.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, a tensor that the model or an
      input lacks, or one that has two factors.
    SurgeryError: if shapes do not fit, or X is not floating-point.
    CastError: when it is written, for a product that is too large or NaN.

  Example:
    multiply: 'masks/** -> net/**'
    multiply: 'other::**/scale'
  """
  factors: dict[Path, tuple[Path, Leaf]] = {}
  for rule in tensors.texts(rules):
    found = arithmetic.terms_of(checkpoint, rule, inputs, host)
    lacking = arithmetic.lacking_of(checkpoint, rule, found, host)
    if lacking:
      shown = '; '.join(said for _, said in lacking[:5])
      raise errors.RenameError(f'{rule!r}: {shown}. Change the rule.')
    for old, leaf, new in found:
      if new in factors:
        raise errors.RenameError(
          f'{paths.show(new)} has two factors, {paths.show(factors[new][0])} '
          f'and {paths.show(old)}. Write a step for each.'
        )
      factors[new] = old, leaf
  changed = {
    new: _product(checkpoint[new], leaf, new, old, nonfinite)
    for new, (old, leaf) in factors.items()
  }
  return tensors.edited(checkpoint, 'multiply', changed=changed, host=host)


def _product(
  leaf: Leaf, factor: Leaf, path: Path, name: Path, nonfinite: NonFinite
) -> Leaf:
  dtype = arithmetic.check_number(leaf, path, 'multiply')
  own = regions.array(factor, name, 'multiply')
  shape = leaf.shape or ()
  front = len(shape) - len(own)
  if front < 0 or any(
    n not in (1, m) for n, m in zip(own, shape[front:], strict=True)
  ):
    raise errors.SurgeryError(
      f'{paths.show(name)} is {own} and cannot be repeated to {shape}, the '
      f'shape of {paths.show(path)}.'
    )
  arithmetic.check_holds(dtype, path, factor, name, 'product')
  within = np.dtype(arithmetic.wide(dtype))
  read, other = Reader(leaf), Reader(factor)

  def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.multiply(x.astype(within), y.astype(within))

  def block(region: Region) -> Any:
    # Where the factor is repeated there is one place of it for all.
    there = tuple(
      slice(0, 1) if n == 1 else cut
      for n, cut in zip(own, region[front:], strict=True)
    )
    x = arithmetic.plain(read(region), path, 'multiply')
    y = arithmetic.plain(other(there), name, 'multiply')
    y = np.broadcast_to(y, x.shape)
    return arithmetic.elementwise(
      [x, y], product, dtype, path, 'multiply', region, nonfinite
    )

  return regions.computed(leaf, shape, block, [leaf, factor])
