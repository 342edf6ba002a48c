"""Add, subtract, scale and matmul: arithmetic on tensors, rounded once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.core import errors, paths, selectors
from surgery.core.checkpoint import Checkpoint, Leaf
from surgery.core.host import Host
from surgery.core.once import once
from surgery.core.paths import Path
from surgery.core.selection import Selection
from surgery.passes import concat, editing, regions, rounding
from surgery.passes.regions import Reader, Region

Terms = str | Sequence[str] | Mapping[str, float]


def wide(dtype: str) -> str:
  """Returns the dtype in which numbers of a dtype are added up.

  Args:
    dtype: its full name; one that `check_number` accepts.
  """
  if dtype in ('float64', 'complex128', 'complex64'):
    return dtype
  return 'float32' if rounding.is_float(dtype) else dtype


def check_number(leaf: Leaf, path: Path, verb: str) -> str:
  """Returns the dtype of a tensor that has arithmetic.

  Raises:
    SurgeryError: for a dtype that has none.
  """
  regions.array(leaf, path, verb)
  assert leaf.dtype is not None
  if rounding.is_float(leaf.dtype) or leaf.dtype.startswith('complex'):
    return leaf.dtype
  raise errors.SurgeryError(
    f'{verb}: {paths.show(path)} is {leaf.dtype}; expected a floating-point '
    'dtype. Select other tensors, or cast it first.'
  )


def plain(value: Any, path: Path, verb: str) -> np.ndarray:
  """Returns an array of numpy.

  Arithmetic is numpy's everywhere, so that params and files get the same bits.

  Raises:
    SurgeryError: for a traced value.
  """
  if regions.of_jax(value):
    import jax

    if isinstance(value, jax.core.Tracer):
      raise errors.SurgeryError(
        f'{verb}: {paths.show(path)} is a traced value. Do surgery outside of '
        'jit.'
      )
  return np.asarray(value)


def narrowed(block: np.ndarray, dtype: str, path: Path, verb: str) -> Any:
  """Returns a result in the dtype of its tensor, rounded once.

  Raises:
    CastError: for a finite value that the dtype cannot hold.
  """
  if not rounding.is_float(dtype):
    return block.astype(regions.dtype_of(dtype))
  after = rounding.rounded(block, dtype)
  if rounding.lost(block, after) is not None:
    raise errors.CastError(
      f'{verb}: {paths.show(path)}: a result is too large for {dtype}, whose '
      f'largest number is {rounding.largest(dtype):g}. Cast it to a wider '
      'dtype first.'
    )
  return after


@once
def _pools() -> Any:
  import threadpoolctl

  return threadpoolctl.ThreadpoolController()


def steady() -> contextlib.AbstractContextManager[Any]:
  """Keeps products and decompositions on one thread while it is entered.

  How a product is shared among threads decides how it is rounded.
  """
  pools: contextlib.AbstractContextManager[Any] = _pools().limit(
    limits=1, user_api='blas'
  )
  return pools


def add(
  checkpoint: Checkpoint,
  terms: Terms,
  *,
  scale: float = 1,
  inputs: editing.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Adds tensors to others: `x + scale · Σ weight · term`.

  All terms are added in float32 or wider, and the sum is rounded once.

  Args:
    checkpoint: the model.
    terms: rules `TERM -> X`, or `ALIAS::TERM` for a tensor of the same name in
      another input; with weights as `{RULE: WEIGHT}`.
    scale: a factor for all terms.
    inputs: other checkpoints by alias.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing.
    SurgeryError: if shapes differ, or something is not floating-point.

  Example:
    add: {'tuned::**/mlp/**': 0.4, 'base::**/mlp/**': -0.4}
    add: {terms: 'delta/** -> net/**', scale: 0.5}
  """
  return _added(checkpoint, terms, scale, 'add', inputs, host)


def subtract(
  checkpoint: Checkpoint,
  terms: Terms,
  *,
  scale: float = 1,
  inputs: editing.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Subtracts tensors from others: `x - scale · Σ weight · term`.

  Args:
    checkpoint: the model.
    terms: rules `TERM -> X`, or `ALIAS::TERM` for a tensor of the same name in
      another input; with weights as `{RULE: WEIGHT}`.
    scale: a factor for all terms.
    inputs: other checkpoints by alias.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing.
    SurgeryError: if shapes differ, or something is not floating-point.

  Example:
    subtract: 'base::**/kernel'
  """
  return _added(checkpoint, terms, -scale, 'subtract', inputs, host)


def _added(
  checkpoint: Checkpoint,
  terms: Terms,
  scale: float,
  verb: str,
  inputs: editing.Inputs | None,
  host: Host,
) -> Checkpoint:
  if isinstance(terms, Mapping):
    weighted = dict(terms)
  else:
    weighted = dict.fromkeys(editing.texts(terms, verb), 1.0)
  if not weighted:
    raise errors.RenameError(f'{verb}: expected terms, found none.')
  sums: dict[Path, list[tuple[Leaf, float, Path]]] = {}
  for rule, weight in weighted.items():
    if not math.isfinite(weight * scale):
      raise errors.SurgeryError(
        f'{verb}: {rule!r}: expected a finite weight, found {weight * scale}.'
      )
    found = editing.pairs(checkpoint, [rule], verb, inputs)
    for old, leaf, new, _ in found:
      check_number(leaf, old, verb)
      sums.setdefault(new, []).append((leaf, float(weight) * scale, old))
  changed = {}
  for path, parts in sums.items():
    if path not in checkpoint:
      raise errors.RenameError(
        f'{verb}: there is no {paths.show(path)} to which '
        f'{paths.show(parts[0][2])} could be added. Change the rule, or copy '
        'instead.'
      )
    changed[path] = _sum(checkpoint[path], parts, path, verb)
  return editing.edited(checkpoint, verb, changed=changed, host=host)


def _sum(
  leaf: Leaf, parts: Sequence[tuple[Leaf, float, Path]], path: Path, verb: str
) -> Leaf:
  dtype = check_number(leaf, path, verb)
  assert leaf.shape is not None
  for other, _, name in parts:
    if other.shape != leaf.shape:
      raise errors.SurgeryError(
        f'{verb}: {paths.show(name)} is {other.shape} and {paths.show(path)} '
        f'is {leaf.shape}; they have to be alike.'
      )
    if str(other.dtype).startswith('complex') > dtype.startswith('complex'):
      raise errors.SurgeryError(
        f'{verb}: {paths.show(name)} is {other.dtype} and {paths.show(path)} '
        f'is {dtype}, which cannot hold the result.'
      )
  dtypes = [wide(str(one.dtype)) for one in (leaf, *[p[0] for p in parts])]
  within = np.result_type(*dtypes)
  base = Reader(leaf)
  readers = [(Reader(other), weight) for other, weight, _ in parts]

  def block(region: Region) -> Any:
    total = plain(base(region), path, verb).astype(within)
    for reader, weight in readers:
      term = plain(reader(region), path, verb).astype(within)
      if weight != 1:
        term *= within.type(weight)
      total += term
    return narrowed(total, dtype, path, verb)

  sources = [leaf, *[p[0] for p in parts]]
  return regions.computed(leaf, leaf.shape, block, sources)


def scale(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  by: float,
  *,
  host: Host,
) -> Checkpoint:
  """Multiplies tensors by a number.

  Args:
    checkpoint: the model.
    select: the tensors.
    by: the number.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for a tensor that is not floating-point.

  Example:
    scale: {select: '**/residual/kernel', by: 0.5}
  """
  if not math.isfinite(by):
    raise errors.SurgeryError(f'scale: expected a finite number, found {by}.')
  changed = {}
  for path, leaf in editing.chosen(checkpoint, select, 'scale', host).items():
    changed[path] = _scaled(leaf, by, path)
  return editing.edited(checkpoint, 'scale', changed=changed, host=host)


def _scaled(leaf: Leaf, by: float, path: Path) -> Leaf:
  dtype = check_number(leaf, path, 'scale')
  assert leaf.shape is not None
  within = np.dtype(wide(dtype))
  reader = Reader(leaf)

  def block(region: Region) -> Any:
    value = plain(reader(region), path, 'scale').astype(within)
    value *= within.type(by)
    return narrowed(value, dtype, path, 'scale')

  return regions.computed(leaf, leaf.shape, block, [leaf])


def matmul(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  scale: float = 1,
  keep: bool = False,
  host: Host,
) -> Checkpoint:
  """Replaces matrices by their product, in the order of the braces.

  Axes in front of the last two are stacked matrices. It is computed in float64
  and rounded once.

  Args:
    checkpoint: the model.
    rules: `MANY -> ONE`, as `'**/{a,b} -> **/kernel'`.
    scale: a factor.
    keep: whether the factors stay, too.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: if shapes do not fit.

  Example:
    matmul: '**/kernel_{a,b} -> **/kernel'
  """

  def make(target: Path, parts: list[Path], leaves: list[Leaf]) -> Leaf:
    return _product(target, parts, leaves, scale)

  return concat.joined(checkpoint, rules, 'matmul', make, keep, host)


def _product(
  target: Path, parts: Sequence[Path], leaves: Sequence[Leaf], by: float
) -> Leaf:
  shape = leaves[0].shape or ()
  for path, leaf in zip(parts, leaves, strict=True):
    check_number(leaf, path, 'matmul')
    own = leaf.shape or ()
    first = leaf is leaves[0]
    if (
      len(own) < 2
      or own[:-2] != shape[:-2]
      or (not first and own[-2] != shape[-1])
    ):
      raise errors.SurgeryError(
        f'matmul: {paths.show(path)}: a matrix of {own} cannot follow one of '
        f'{shape}.'
      )
    shape = own if first else (*shape[:-1], own[-1])
  dtype = str(leaves[0].dtype)
  within = np.dtype('complex128' if dtype.startswith('complex') else 'float64')

  def block(region: Region) -> Any:
    result: Any = None
    for leaf in leaves:
      rows = regions.whole(leaf.shape or ())
      # Rows of the result need rows of the first factor only.
      cut = region[:-1] if result is None else region[:-2]
      read = Reader(leaf)((*cut, *rows[len(cut) :]))
      factor = plain(read, target, 'matmul').astype(within)
      with steady():
        result = factor if result is None else result @ factor
    result = result[..., region[-1]]
    return narrowed(result * by, dtype, target, 'matmul')

  sizes = [leaf.size for leaf in leaves]
  like = editing.together(leaves)
  made = regions.computed(like, shape, block, leaves, cut=True)
  memory = within.itemsize * (sum(sizes) + 2 * min(math.prod(shape), 1 << 20))
  return made.replace(memory=memory, heavy=True)
