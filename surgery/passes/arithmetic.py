"""Add, subtract, scale and matmul: arithmetic on tensors, rounded once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import following, regions, rounding, tensors
from surgery.editing import nonfinite as nonfinites
from surgery.editing.nonfinite import NonFinite
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.once import once
from surgery.passes import concat

Terms = str | Sequence[str] | Mapping[str, float]


def wide(dtype: str) -> str:
  """Returns the dtype in which numbers of a dtype are added up.

  Twice as wide as float32, so that a sum of those, or a product with a weight,
  is rounded when it is narrowed and not before.

  Args:
    dtype: its full name; one that `check_number` accepts.
  """
  return 'complex128' if dtype.startswith('complex') else 'float64'


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
    f'{paths.show(path)} is {leaf.dtype}; expected a floating-point '
    'dtype. Select other tensors, or cast it first.'
  )


def check_real(dtype: str, path: Path) -> None:
  """Raises for complex numbers, which have no order.

  Raises:
    SurgeryError: naming the tensor.
  """
  if dtype.startswith('complex'):
    raise errors.SurgeryError(
      f'{paths.show(path)} is {dtype}; expected real numbers, which have an '
      'order. Select other tensors.'
    )


def plain(value: Any, path: Path, verb: str) -> np.ndarray:
  """Returns an array of numpy.

  Arithmetic is numpy's everywhere, so that params and files get the same bits.

  Raises:
    SurgeryError: for a traced value.
  """
  if regions.of_jax(value):
    from surgery import jaxcompat

    if jaxcompat.is_traced(value):
      raise errors.SurgeryError(
        f'{verb}: {paths.show(path)} is a traced value. Do surgery outside of '
        'jit.'
      )
  return np.asarray(value)


def narrowed(
  block: np.ndarray,
  dtype: str,
  path: Path,
  verb: str,
  *,
  inputs: Sequence[np.ndarray] = (),
  region: Region = (),
  nonfinite: NonFinite = 'refuse',
) -> Any:
  """Returns a result in the dtype of its tensor, rounded once.

  Args:
    block: the result.
    dtype: name of the tensor's dtype.
    path: the tensor, for messages.
    verb: the pass, for messages.
    inputs: what it was computed from, in which NaN and infinity may be.
    region: where in the tensor it is.
    nonfinite: whether NaN and infinity may be new.

  Raises:
    CastError: for NaN and infinity that no input has.
  """
  if rounding.is_float(dtype):
    after = rounding.rounded(block, dtype)
  else:
    with np.errstate(all='ignore'):
      after = block.astype(regions.dtype_of(dtype))
  return nonfinites.checked(
    block,
    after,
    path,
    verb,
    inputs=inputs,
    start=[cut.start for cut in region],
    nonfinite=nonfinite,
  )


# So many elements are computed at a time: as float64 a processor's cache holds
# them, and memory is not asked for again.
_PIECE = 1 << 16


def check_holds(
  dtype: str, path: Path, other: Leaf, name: Path, what: str
) -> None:
  """Raises if what is computed would be complex, and the tensor is real.

  Args:
    dtype: of the tensor.
    path: the tensor.
    other: what it is computed with.
    name: path of that.
    what: `result`, `product`, …

  Raises:
    SurgeryError: naming both.
  """
  if str(other.dtype).startswith('complex') > dtype.startswith('complex'):
    raise errors.SurgeryError(
      f'{paths.show(name)} is {other.dtype} and {paths.show(path)} is '
      f'{dtype}, which cannot hold the {what}.'
    )


def elementwise(
  values: Sequence[np.ndarray],
  compute: Callable[..., np.ndarray],
  dtype: str,
  path: Path,
  verb: str,
  region: Region,
  nonfinite: NonFinite,
) -> Any:
  """Returns what is computed of elements at the same place, as `narrowed` does.

  Args:
    values: arrays of one shape.
    compute: from arrays of any one shape to their result, in a wide dtype.
    dtype: name of the tensor's dtype.
    path: the tensor, for messages.
    verb: the pass, for messages.
    region: where in the tensor it is.
    nonfinite: whether NaN and infinity may be new.

  Raises:
    CastError: for NaN and infinity that no input has.
  """
  flat = [value.reshape(-1) for value in values]
  after = np.empty(len(flat[0]), regions.dtype_of(dtype))
  with np.errstate(all='ignore'):  # What is wrong is found behind it.
    for start in range(0, len(after), _PIECE):
      cut = slice(start, start + _PIECE)
      piece = compute(*(value[cut] for value in flat))
      if not nonfinites.within(piece, dtype):
        # All of it once more, to say where, and whether an input is so.
        return narrowed(
          compute(*values), dtype, path, verb, inputs=values, region=region,
          nonfinite=nonfinite,
        )  # fmt: skip
      if rounding.is_float(dtype):
        piece = rounding.rounded(piece, dtype)
      after[cut] = piece
  return after.reshape(values[0].shape)


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
  partial: bool = False,
  nonfinite: NonFinite = 'refuse',
  inputs: tensors.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Adds tensors to others: `x + scale · Σ weight · term`.

  Products and sums are those of float64, and what comes out is rounded once to
  the dtype of X. So sums of float32 and narrower tensors are rounded once, and
  those of float64 at each term.

  Args:
    checkpoint: the model.
    terms: rules `TERM -> X`, or `ALIAS::TERM` for a tensor of the same name in
      another input; with weights as `{RULE: WEIGHT}`.
    scale: a factor for all terms.
    partial: whether tensors that the model or an input lacks are left as they
      are; otherwise they are an error.
    nonfinite: `allow` lets NaN and infinity be written that no tensor of the
      sum has.
    inputs: other checkpoints by alias.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a tensor that an input has
      and another lacks.
    SurgeryError: if shapes differ, or something is not floating-point.
    CastError: when it is written, for a sum that is too large or NaN.

  Example:
    add: {'tuned::**/mlp/**': 0.4, 'base::**/mlp/**': -0.4}
    add: {terms: 'delta/** -> net/**', scale: 0.5}
  """
  return _added(
    checkpoint, terms, scale, 'add', partial, nonfinite, inputs, host
  )


def subtract(
  checkpoint: Checkpoint,
  terms: Terms,
  *,
  scale: float = 1,
  partial: bool = False,
  nonfinite: NonFinite = 'refuse',
  inputs: tensors.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Subtracts tensors from others: `x - scale · Σ weight · term`.

  It is computed as `add` does.

  Args:
    checkpoint: the model.
    terms: rules `TERM -> X`, or `ALIAS::TERM` for a tensor of the same name in
      another input; with weights as `{RULE: WEIGHT}`.
    scale: a factor for all terms.
    partial: whether tensors that the model or an input lacks are left as they
      are; otherwise they are an error.
    nonfinite: `allow` lets NaN and infinity be written that no tensor of the
      sum has.
    inputs: other checkpoints by alias.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a tensor that an input has
      and another lacks.
    SurgeryError: if shapes differ, or something is not floating-point.
    CastError: when it is written, for a sum that is too large or NaN.

  Example:
    subtract: 'base::**/kernel'
  """
  return _added(
    checkpoint, terms, -scale, 'subtract', partial, nonfinite, inputs, host
  )


def _added(
  checkpoint: Checkpoint,
  terms: Terms,
  scale: float,
  verb: str,
  partial: bool,
  nonfinite: NonFinite,
  inputs: tensors.Inputs | None,
  host: Host,
) -> Checkpoint:
  if isinstance(terms, Mapping):
    weighted = dict(terms)
  else:
    weighted = dict.fromkeys(tensors.texts(terms), 1.0)
  if not weighted:
    raise errors.RenameError('expected terms, found none.')
  sums: dict[Path, list[tuple[Leaf, float, Path]]] = {}
  # Tensors that another model lacks get none of the terms: half of them would
  # be a wrong scale.
  lacking: set[Path] = set()
  for rule, weight in weighted.items():
    if not math.isfinite(weight * scale):
      raise errors.SurgeryError(
        f'{rule!r}: expected a finite weight, found {weight * scale}.'
      )
    found = terms_of(checkpoint, rule, inputs, host)
    missing = lacking_of(checkpoint, rule, found, host)
    if missing and not partial:
      raise errors.RenameError(f'{rule!r}: {listed(missing)}')
    lacking.update(path for path, _ in missing)
    for old, leaf, new in found:
      if new in checkpoint:
        check_number(leaf, old, verb)
        sums.setdefault(new, []).append((leaf, float(weight) * scale, old))
  changed = {
    path: _sum(checkpoint[path], parts, path, verb, nonfinite)
    for path, parts in sums.items()
    if path not in lacking
  }
  if not changed:
    raise errors.RenameError(
      'no tensor is in all of the models, so nothing would be added. Change '
      'the rules.'
    )
  return tensors.edited(checkpoint, verb, changed=changed, host=host)


def terms_of(
  checkpoint: Checkpoint,
  rule: str,
  inputs: tensors.Inputs | None,
  host: Host,
) -> list[tuple[Path, Leaf, Path]]:
  """Returns the tensors that a rule adds, with their paths and targets."""
  alias, _ = tensors.split_alias(rule)
  source = tensors.aliased(checkpoint, alias, inputs)
  owned: Collection[Path] = ()
  if alias is not None:
    # What an adapter does is in the parameters that it rewrites.
    owned = following.settled(source, host).owned
  found = tensors.pairs(checkpoint, [rule], inputs)
  kept = [(old, leaf, new) for old, leaf, new, _ in found if old not in owned]
  if not kept:
    raise errors.RenameError(
      f'{rule!r} matches nothing but weights of adapters. Change the rule.'
    )
  return kept


def lacking_of(
  checkpoint: Checkpoint,
  rule: str,
  found: Sequence[tuple[Path, Leaf, Path]],
  host: Host,
) -> list[tuple[Path, str]]:
  """Returns what a rule names that the model or the other input lacks.

  Returns:
    Paths in the model, each with who lacks which tensor, in words.
  """
  alias, text = tensors.split_alias(rule)
  lacking = [
    (new, f'no {paths.show(new)} to which {_named(alias, old)} could be added')
    for old, _, new in found
    if new not in checkpoint
  ]
  if lacking or alias is None:
    return lacking
  back = tensors.reverse(text)
  if back is None:
    return []
  reached = {new for _, _, new in found}
  owned = following.settled(checkpoint, host).owned
  for path in checkpoint:
    if path in reached or path in owned:
      continue
    source = back.apply(path)
    if source is not None:
      said = f'{alias} has no {paths.show(source)}'
      lacking.append((path, said))
  return lacking


def _named(alias: str | None, path: Path) -> str:
  return f'{alias}::{paths.show(path)}' if alias else paths.show(path)


_SHOWN = 5


def listed(missing: Sequence[tuple[Path, str]]) -> str:
  """Returns what is missing, in a sentence, and what to do."""
  shown = ', '.join(said for _, said in missing[:_SHOWN])
  more = len(missing) - _SHOWN
  shown += f' and {more} more' if more > 0 else ''
  if missing[0][1].startswith('no '):
    return (
      f'there is {shown}. Change the rule, copy instead, or give partial: true '
      'to leave such tensors out.'
    )
  return (
    f'{shown}, and the model has. Without a term such a tensor gets a wrong '
    'scale. Change the rule, copy or untie the tensor first, or give partial: '
    'true to leave such tensors as they are.'
  )


def _sum(
  leaf: Leaf,
  parts: Sequence[tuple[Leaf, float, Path]],
  path: Path,
  verb: str,
  nonfinite: NonFinite,
) -> Leaf:
  dtype = check_number(leaf, path, verb)
  assert leaf.shape is not None
  for other, _, name in parts:
    if other.shape != leaf.shape:
      raise errors.SurgeryError(
        f'{paths.show(name)} is {other.shape} and {paths.show(path)} '
        f'is {leaf.shape}; they have to be alike.'
      )
    check_holds(dtype, path, other, name, 'result')
  within = np.dtype(wide(dtype))
  readers = [Reader(leaf), *(Reader(other) for other, _, _ in parts)]

  weights = [weight for _, weight, _ in parts]

  def total(first: np.ndarray, *terms: np.ndarray) -> np.ndarray:
    result = first.astype(within)
    for term, weight in zip(terms, weights, strict=True):
      if weight == 1:
        result += term
      else:
        result += np.multiply(term, within.type(weight), dtype=within)
    return result

  def block(region: Region) -> Any:
    values = [plain(read(region), path, verb) for read in readers]
    return elementwise(values, total, dtype, path, verb, region, nonfinite)

  sources = [leaf, *[p[0] for p in parts]]
  return regions.computed(leaf, leaf.shape, block, sources)


def scale(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  by: float,
  *,
  nonfinite: NonFinite = 'refuse',
  host: Host,
) -> Checkpoint:
  """Multiplies tensors by a number, in float64, and rounds once.

  Args:
    checkpoint: the model.
    select: the tensors.
    by: the number.
    nonfinite: `allow` lets NaN and infinity be written that the tensor has not.
    host: knows the adapters' types.

  Raises:
    SurgeryError: for a tensor that is not floating-point.
    CastError: when it is written, for a product that is too large or NaN.

  Example:
    scale: {select: '**/residual/kernel', by: 0.5}
  """
  if not math.isfinite(by):
    raise errors.SurgeryError(f'expected a finite number, found {by}.')
  changed = {}
  for path, leaf in tensors.chosen(checkpoint, select, 'scale', host).items():
    changed[path] = _scaled(leaf, by, path, nonfinite)
  return tensors.edited(checkpoint, 'scale', changed=changed, host=host)


def _scaled(leaf: Leaf, by: float, path: Path, nonfinite: NonFinite) -> Leaf:
  dtype = check_number(leaf, path, 'scale')
  assert leaf.shape is not None
  within = np.dtype(wide(dtype))
  reader = Reader(leaf)

  def product(value: np.ndarray) -> np.ndarray:
    return np.multiply(value, within.type(by), dtype=within)

  def block(region: Region) -> Any:
    values = [plain(reader(region), path, 'scale')]
    return elementwise(values, product, dtype, path, 'scale', region, nonfinite)

  return regions.computed(leaf, leaf.shape, block, [leaf])


def matmul(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  scale: float = 1,
  keep: bool = False,
  nonfinite: NonFinite = 'refuse',
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
    nonfinite: `allow` lets NaN and infinity be written that no factor has.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: if shapes do not fit.
    CastError: when it is written, for a product that is too large or NaN.

  Example:
    matmul: '**/kernel_{a,b} -> **/kernel'
  """

  def make(target: Path, parts: list[Path], leaves: list[Leaf]) -> Leaf:
    return _product(target, parts, leaves, scale, nonfinite)

  return concat.joined(checkpoint, rules, 'matmul', make, keep, host)


def _product_shape(
  parts: Sequence[Path], leaves: Sequence[Leaf]
) -> tuple[int, ...]:
  """Returns the shape of a product of matrices, with stacked axes in front.

  Raises:
    SurgeryError: naming the first matrix that does not fit.
  """
  shape = leaves[0].shape or ()
  for path, leaf in zip(parts, leaves, strict=True):
    check_number(leaf, path, 'matmul')
    own = leaf.shape or ()
    first = leaf is leaves[0]
    fits = len(own) >= 2 and own[:-2] == shape[:-2]
    if not fits or (not first and own[-2] != shape[-1]):
      raise errors.SurgeryError(
        f'{paths.show(path)}: a matrix of {own} cannot follow one of {shape}.'
      )
    shape = own if first else (*shape[:-1], own[-1])
  return shape


def _product(
  target: Path,
  parts: Sequence[Path],
  leaves: Sequence[Leaf],
  by: float,
  nonfinite: NonFinite,
) -> Leaf:
  shape = _product_shape(parts, leaves)
  dtype = str(leaves[0].dtype)
  within = np.dtype('complex128' if dtype.startswith('complex') else 'float64')

  def block(region: Region) -> Any:
    result: Any = None
    read = []
    for leaf in leaves:
      rows = regions.whole(leaf.shape or ())
      # Rows of the result need rows of the first factor only.
      cut = region[:-1] if result is None else region[:-2]
      value = Reader(leaf)((*cut, *rows[len(cut) :]))
      read.append(plain(value, target, 'matmul'))
      # In float64 (or complex128) and rounded once at the end, on one thread,
      # so that bits do not depend on the machine.
      factor = read[-1].astype(within)
      with steady(), np.errstate(all='ignore'):
        result = factor if result is None else result @ factor
    with np.errstate(all='ignore'):
      result = result[..., region[-1]] * by
    return narrowed(
      result, dtype, target, 'matmul', inputs=[v.reshape(-1) for v in read],
      region=region, nonfinite=nonfinite,
    )  # fmt: skip

  # In blocks even if all is in memory: how a product is divided decides how it
  # is rounded, and a file must get the same bits as params.
  sizes = [leaf.size for leaf in leaves]
  like = tensors.together(leaves)
  made = regions.computed(like, shape, block, leaves, cut=True)
  memory = within.itemsize * (sum(sizes) + 2 * min(math.prod(shape), 1 << 20))
  return made.replace(memory=memory, heavy=True)
