"""Rules that only move elements: axes of factors are renamed, cut, reshaped."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery.aliases import Array
from surgery.factoring.rules.table import Table, only
from surgery.factoring.views import (
  Axes,
  Decline,
  DType,
  Factor,
  Folded,
  Operand,
  Term,
  View,
  cast,
  plain,
  times,
)

RULES = Table()
rule = RULES.rule


@rule('transpose')
def transpose(view: View, *, permutation: Sequence[int], **_: Any) -> View:
  """Gives the axes of factors their new numbers."""
  names = {old: new for new, old in enumerate(permutation)}
  shape = [view.shape[i] for i in permutation]
  return view.mapped(lambda f: f.renamed(names), shape)


def _each(name: str) -> None:
  """Registers a primitive that does one thing to each factor."""

  @rule(name)
  def each(view: View, *, primitive: Any, **params: Any) -> View:
    """Binds the primitive for each factor."""
    bind = lambda value: primitive.bind(value, **params)
    change = lambda f: Factor(bind(f.value), f.axes)
    terms = [
      dataclasses.replace(
        t.mapped(change),
        scale=bind(t.scale) if isinstance(t.scale, jax.Array) else t.scale,
        dropout=t.dropout,  # Keys are no numbers.
      )
      for t in only([view]).terms
    ]
    return view.like(terms)


EACH = ('copy', 'copy_p', 'name', 'stop_gradient', 'pvary', 'pbroadcast')
for _name in EACH:
  _each(_name)


@rule('sharding_constraint')
def sharding_constraint(
  view: View, *, sharding: Any, layout: Any, unconstrained_dims: Any, **_: Any
) -> View:
  """Lays factors out over the mesh as the axes that they own."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    raise Decline
  if layout is not None or unconstrained_dims:
    raise Decline
  names = (*sharding.spec, *[None] * (view.ndim - len(sharding.spec)))

  def change(factor: Factor) -> Factor:
    where = [None if x < 0 else names[x] for x in factor.axes]
    own = jax.sharding.NamedSharding(
      sharding.mesh, jax.sharding.PartitionSpec(*where)
    )
    value = jax.lax.with_sharding_constraint(factor.value, own)
    return Factor(value, factor.axes)

  return view.mapped(change)


@rule('squeeze')
def squeeze(view: View, *, dimensions: Sequence[int], **_: Any) -> View:
  """Removes axes of size one from the factors that have them."""
  gone = {d % view.ndim for d in dimensions}
  return _without(view, gone)


def _without(view: View, gone: set[int]) -> View:
  """Returns a view without some axes of size one."""
  kept = [i for i in range(view.ndim) if i not in gone]
  names = {old: new for new, old in enumerate(kept)}

  def change(factor: Factor) -> Factor:
    at = [i for i, x in enumerate(factor.axes) if x in gone]
    value = jnp.squeeze(factor.value, tuple(at)) if at else factor.value
    axes = tuple(x for x in factor.axes if x not in gone)
    return Factor(value, axes).renamed(names)

  return view.mapped(change, [view.shape[i] for i in kept])


@rule('broadcast_in_dim')
def broadcast_in_dim(
  view: View,
  *dynamic: Any,
  shape: Sequence[int],
  broadcast_dimensions: Sequence[int],
  **_: Any,
) -> View:
  """Leaves axes that are new, or repeated, to no factor."""
  if dynamic:
    raise Decline
  repeated = {
    i
    for i, to in enumerate(broadcast_dimensions)
    if view.shape[i] == 1 and shape[to] != 1
  }
  kept = [to for i, to in enumerate(broadcast_dimensions) if i not in repeated]
  view = _without(view, repeated)
  names = dict(enumerate(kept))
  return view.mapped(lambda f: f.renamed(names), shape)


@rule('reshape')
def reshape(
  view: View, *, new_sizes: Sequence[int], dimensions: Any = None, **_: Any
) -> View:
  """Joins and divides axes that each factor owns together, or not at all.

  Where factors own a part each of what becomes one axis, the view remembers.
  """
  if dimensions is not None or 0 in view.shape:
    raise Decline
  sizes: list[int] = []
  counts: list[int] = []
  for old, new in _groups(view.shape, tuple(new_sizes)):
    if len(new) == 1 and _torn(view, old):
      sizes += [view.shape[i] for i in old]
      counts.append(len(old))
    else:
      sizes += [new_sizes[i] for i in new]
      counts += [1] * len(new)
  if len(sizes) == len(counts):
    return _reshaped(view, sizes)
  before = view if sizes == list(view.shape) else _reshaped(view, sizes)
  return Folded(before, runs(counts))


def runs(counts: Iterable[int]) -> tuple[tuple[int, ...], ...]:
  """Returns groups of neighbouring axes, by how many each has."""
  axes = itertools.count()
  return tuple(tuple(itertools.islice(axes, count)) for count in counts)


def _torn(view: View, axes: Sequence[int]) -> bool:
  """Whether a factor owns some of axes that become one, and not all."""
  real = {i for i in axes if view.shape[i] != 1}
  return any(
    not real <= set(factor.axes) and any(map(factor.owns, axes))
    for term in view.terms
    for factor in term.parts()
  )


def _reshaped(view: View, new_sizes: Sequence[int]) -> View:
  groups = _groups(view.shape, tuple(new_sizes))
  if any(_torn(view, old) for old, _ in groups):
    raise Decline
  return view.mapped(lambda f: _regrouped(f, groups, new_sizes), new_sizes)


def _regrouped(
  factor: Factor, groups: Sequence[Group], new_sizes: Sequence[int]
) -> Factor:
  """Returns a factor of a view some of whose axes become others together."""
  value, axes = factor.value, factor.axes
  # The numbers of old and new axes overlap, so new ones are marked until all
  # groups are done.
  names = {old[0]: new[0] for old, new in groups if old and new}
  for old, new in groups:
    have = [i for i in old if i in axes]
    if not have or (len(old) == 1 and len(new) == 1):
      continue
    value, axes = _side_by_side(value, axes, have)
    at = axes.index(have[0])
    sizes = list(value.shape)
    sizes[at : at + len(have)] = [new_sizes[i] for i in new]
    value = value.reshape(sizes)
    axes = (*axes[:at], *(_NEW + i for i in new), *axes[at + len(have) :])
  return Factor(value, tuple(_renamed(x, names) for x in axes))


def _renamed(axis: int, names: Mapping[int, int]) -> int:
  """Returns the new name of an axis; `RANK` and `ROW` keep theirs."""
  if axis < 0:
    return axis
  return axis - _NEW if axis >= _NEW else names.get(axis, axis)


def _side_by_side(
  value: Array, axes: Axes, have: Sequence[int]
) -> tuple[Array, Axes]:
  """Returns an array in which some axes are neighbours, in order."""
  at = min(axes.index(i) for i in have)
  order = [i for i in range(len(axes)) if axes[i] not in have]
  order[at:at] = [axes.index(i) for i in have]
  if order == list(range(len(axes))):
    return value, axes
  return value.transpose(order), tuple(axes[i] for i in order)


# Above all axes that there are: marks axes that have their new names.
_NEW = 1 << 20

# Axes of a shape, and those of another that have the same elements.
Group = tuple[list[int], list[int]]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[Group]:
  """Returns which axes of a shape become which of another, in small groups."""
  groups: list[Group] = []
  i = j = 0
  while i < len(old) or j < len(new):
    ours: list[int] = []
    theirs: list[int] = []
    have = want = 1
    if i < len(old):
      ours, have, i = [i], old[i], i + 1
    if j < len(new):
      theirs, want, j = [j], new[j], j + 1
    # The side with fewer elements takes its next axis, until both have as many.
    while have != want:
      if have < want:
        have *= old[i]
        ours.append(i)
        i += 1
      else:
        want *= new[j]
        theirs.append(j)
        j += 1
    groups.append((ours, theirs))
  return groups


def _cut(value: Array, axis: int, cut: tuple[int, int, int]) -> Array:
  start, stop, stride = cut
  return jax.lax.slice_in_dim(value, start, stop, stride, axis)


def _cut_at(value: Array, axis: int, start: Array, size: int) -> Array:
  # As the primitive has it: what begins before the array begins with it. The
  # function would count from the end, which has been done.
  start = jnp.maximum(start, 0)
  return jax.lax.dynamic_slice_in_dim(value, start, size, axis)


@rule('slice')
def slice_(
  view: View,
  *,
  start_indices: Sequence[int],
  limit_indices: Sequence[int],
  strides: Sequence[int] | None,
  **_: Any,
) -> View:
  """Cuts the factors that own the axis."""
  shape = list(view.shape)
  for axis, (start, stop) in enumerate(
    zip(start_indices, limit_indices, strict=True)
  ):
    stride = strides[axis] if strides is not None else 1
    if (start, stop, stride) == (0, view.shape[axis], 1):
      continue
    shape[axis] = len(range(start, stop, stride))
    cut = functools.partial(_cut, cut=(start, stop, stride))
    view = view.along(axis, cut, shape)
  return view


@rule('dynamic_slice')
def dynamic_slice(
  view: View, *starts: Any, slice_sizes: Sequence[int], **_: Any
) -> View:
  """Cuts the factors that own the axis."""
  only([view, *starts])
  shape = list(view.shape)
  for axis, size in enumerate(slice_sizes):
    if size == view.shape[axis]:
      continue
    shape[axis] = size
    cut = functools.partial(_cut_at, start=starts[axis], size=size)
    view = view.along(axis, cut, shape)
  return view


@rule('split')
def split(
  view: View, *, sizes: Sequence[int], axis: int, **_: Any
) -> list[View]:
  """Cuts the factors that own the axis."""
  stops = np.cumsum(sizes)
  whole = [(0, n) for n in view.shape]
  parts = []
  for stop, size in zip(stops, sizes, strict=True):
    cut = [*whole]
    cut[axis] = (int(stop - size), int(stop))
    parts.append(
      slice_(
        view,
        start_indices=[c[0] for c in cut],
        limit_indices=[c[1] for c in cut],
        strides=None,
      )
    )
  return parts


@rule('rev')
def rev(view: View, *, dimensions: Sequence[int], **_: Any) -> View:
  """Reverses the factors that own the axes."""
  for axis in dimensions:
    view = view.along(axis, lambda v, at: jax.lax.rev(v, (at,)), view.shape)
  return view


@rule('concatenate')
def concatenate(*operands: Operand, dimension: int, **_: Any) -> View:
  """Concatenates bases; a product gets zeros where the other bases are."""
  views = [v if isinstance(v, View) else plain(v) for v in operands]
  total = sum(v.shape[dimension] for v in views)
  dtype = views[0].dtype
  bases, terms, start = [], [], 0
  for view in views:
    base, *rest = view.terms
    bases.append(_whole(base, view.ndim, dtype))
    behind = total - start - view.shape[dimension]
    terms += [_padded(term, dimension, start, behind) for term in rest]
    start += view.shape[dimension]
  shape = list(views[0].shape)
  shape[dimension] = total
  joint = plain(jnp.concatenate(bases, dimension))
  origin = tuple(dict.fromkeys(o for v in views for o in v.origin))
  return View(shape, dtype, (*joint.terms, *terms), origin)


def _whole(base: Term, ndim: int, dtype: DType) -> Array:
  """Returns a base as an array.

  Raises:
    Decline: if it does not own all axes, or is scaled along some.
  """
  factor = base.factors[0]
  whole = len(base.factors) == 1 and len(factor.axes) == ndim
  if not whole or base.spreads:
    raise Decline
  order = sorted(range(ndim), key=factor.axes.__getitem__)
  return times(cast(factor.value, dtype).transpose(order), base.scale)


def _padded(term: Term, axis: int, before: int, behind: int) -> Term:
  """Returns a product with zeros along an axis, where other views are.

  Raises:
    Decline: if it is a second base, or zeros in its factors are not enough.
  """

  def pad(value: Array, at: int) -> Array:
    widths = [(0, 0, 0)] * value.ndim
    widths[at] = (before, behind, 0)
    return jax.lax.pad(value, jnp.zeros((), value.dtype), widths)

  if len(term.factors) == 1 or not any(f.owns(axis) for f in term.factors):
    raise Decline
  if any(f.owns(axis) for f in term.parts() if f not in term.factors):
    raise Decline
  return term.mapped(lambda f: f.along(axis, pad) if f.owns(axis) else f)
