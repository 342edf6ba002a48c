"""What each primitive makes of a view: a view again, or an array.

A rule is a function of the operands, of which at least one is a view, and of
the primitive's parameters. It returns the result, or raises `Decline`; then the
views are made dense and the primitive is bound as it stands. So a rule that is
missing or too careful costs time and never a result. Rules take parameters by
name and ignore those that they do not know to matter, since JAX adds some; a
parameter that changes what is computed must be looked at here
(tests/live/test_rules.py compares every rule with the dense arrays).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery.core import lowrank
from surgery.core.lowrank import RANK, ROW
from surgery.live.views import (
  EXACT,
  Decline,
  Dropout,
  Factor,
  Labels,
  Misrouted,
  Term,
  View,
  cast,
  multiplied,
  plain,
  product,
  times,
)

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}
# Primitives that use a view up: what they make is an array.
CONSUMERS = {'dot_general', 'conv_general_dilated', 'gather', 'reduce_sum'}


def rule(*names: str) -> Callable[[Rule], Rule]:
  """Registers a rule for some primitives."""

  def add(function: Rule) -> Rule:
    RULES.update(dict.fromkeys(names, function))
    return function

  return add


def _only(operands: Sequence[Any]) -> View:
  view, *rest = operands
  if not isinstance(view, View) or any(isinstance(o, View) for o in rest):
    raise Decline
  return view


# The value itself.


@rule('low_rank')
def low_rank(
  base: Any,
  a: Any,
  b: Any,
  *key: Any,
  axes: Any,
  scale: float,
  dropout: float,
  training: bool = False,
) -> View:
  """The base's terms and one more.

  A product in front of it that is like it is joined with it: two adapters on a
  layer are one of both ranks.
  """
  if isinstance(a, View) or isinstance(b, View):
    raise Decline
  view = base if isinstance(base, View) else plain(base)
  if axes[0] != tuple(range(view.ndim)):
    names = dict(enumerate(axes[0]))
    view = view.mapped(lambda f: f.renamed(names))
  sizes = {
    axis: size
    for value, owned in ((base, axes[0]), (a, axes[1]), (b, axes[2]))
    for axis, size in zip(owned, value.shape, strict=True)
    if axis >= 0
  }
  drop = None
  if dropout and training:
    (one,) = key
    if one.ndim:
      raise Decline  # A key for each member of an ensemble.
    drop = Dropout(dropout, one)
  term = Term((Factor(a, axes[1]), Factor(b, axes[2])), scale, (), drop)
  shape = tuple(sizes[axis] for axis in range(len(sizes)))
  return view.like((*view.terms, term), shape)


def joined(terms: Sequence[Term], dtype: Any) -> list[Term]:
  """Returns terms in which products of the same factors' axes are one.

  Args:
    terms: the terms of a view.
    dtype: in which factors are used.
  """
  result: list[Term] = []
  kinds: dict[Any, int] = {}
  for term in terms:
    if len(term.factors) == 1 or term.dropout is not None:
      result.append(term)
      continue
    spreads = tuple((id(f.value), f.axes) for f in term.spreads)
    kind = (tuple(f.axes for f in term.factors), spreads)
    at = kinds.setdefault(kind, len(result))
    if at == len(result):
      result.append(term)
      continue
    other = result[at]
    pairs = []
    for mine, theirs in zip(term.factors, other.factors, strict=True):
      pairs.append((cast(theirs.value, dtype), cast(mine.value, dtype)))
    # The scales may differ: they go into the second factor.
    pairs[1] = (
      times(pairs[1][0], other.scale),
      times(pairs[1][1], term.scale),
    )
    factors = tuple(
      Factor(jnp.concatenate(pair, f.axes.index(RANK)), f.axes)
      for pair, f in zip(pairs, term.factors, strict=True)
    )
    result[at] = dataclasses.replace(other, factors=factors, scale=1.0)
  return result


# Arithmetic that keeps what a view is.


@rule('convert_element_type')
def convert(view: View, *, new_dtype: Any, **_: Any) -> View:
  """Casts factors when they are used, where that rounds no other way."""
  new = jnp.dtype(new_dtype)
  if not jnp.issubdtype(new, jnp.floating):
    raise Decline

  def change(factor: Factor) -> Factor:
    value = factor.value
    narrower = jnp.promote_types(value.dtype, new) != new
    return Factor(cast(value, new), factor.axes) if narrower else factor

  return view.like([t.mapped(change) for t in view.terms], dtype=new)


@rule('neg')
def neg(view: View, **_: Any) -> View:
  """Changes the sign of scales."""
  return view.like([t.scaled(-1.0) for t in view.terms])


@rule('mul')
def mul(x: Any, y: Any, **_: Any) -> View:
  """Times a number, or an array that is constant along some axes."""
  view, other = (x, y) if isinstance(x, View) else (y, x)
  if isinstance(view, View) and isinstance(other, View):
    if view is other:
      return Squared(view)
    if _spread(view) is not None and _spread(other) is None:
      view, other = other, view
  return _multiplied(view, other)


@rule('div')
def div(x: Any, y: Any, **_: Any) -> View:
  """Divided by a number, or an array that is constant along some axes."""
  if not isinstance(x, View):
    raise Decline
  if isinstance(y, View):
    known = _spread(y)
    if known is None:
      raise Decline
    inverse = Factor(1 / cast(known.value, y.dtype), known.axes)
    return x.like([t.spread(inverse) for t in x.terms])
  return _multiplied(x, 1 / y)


def _spread(view: View) -> Factor | None:
  """Returns the one array that a view repeats; None if it is something else."""
  if len(view.terms) != 1:
    return None
  (term,) = view.terms
  if len(term.factors) != 1 or term.spreads or not _is(term.scale, 1.0):
    return None
  factor = term.factors[0]
  return factor if len(factor.axes) < view.ndim else None


def _is(scale: Any, number: float) -> bool:
  return isinstance(scale, float) and scale == number


def _multiplied(view: View, other: Any) -> View:
  if isinstance(other, View):
    factor = _spread(other)
    if factor is None:
      raise Decline
    factor = Factor(cast(factor.value, other.dtype), factor.axes)
  elif np.ndim(other) == 0 and not isinstance(other, jax.Array):
    return view.like([t.scaled(float(other)) for t in view.terms])
  else:
    axes = tuple(i for i in range(other.ndim) if other.shape[i] != 1)
    if len(axes) == view.ndim and view.ndim:
      raise Decline
    factor = Factor(other.reshape([other.shape[i] for i in axes]), axes)
  if not factor.axes:
    return view.like([t.scaled(factor.value) for t in view.terms])
  return view.like([t.spread(factor) for t in view.terms])


@rule('add', 'add_any')
def add(x: Any, y: Any, **_: Any) -> View:
  """The terms of both; an array is a term."""
  return _sum(x, y, 1.0)


@rule('sub')
def sub(x: Any, y: Any, **_: Any) -> View:
  """The terms of both, those of the second one with the other sign."""
  return _sum(x, y, -1.0)


def _sum(x: Any, y: Any, sign: float) -> View:
  views = [v if isinstance(v, View) else plain(jnp.asarray(v)) for v in (x, y)]
  if views[0].shape != views[1].shape:
    raise Decline  # One of them is repeated: rarely a kernel.
  second = [t.scaled(sign) if sign != 1.0 else t for t in views[1].terms]
  origin = tuple(dict.fromkeys((*views[0].origin, *views[1].origin)))
  dtype = jnp.promote_types(views[0].dtype, views[1].dtype)
  return View(views[0].shape, dtype, (*views[0].terms, *second), origin)


class Squared(View):
  """The square of a view, of which only a sum is known to be cheaper."""

  def __init__(self, view: View) -> None:
    super().__init__(view.shape, view.dtype, (), view.origin)
    self.view = view

  def dense(self) -> Any:
    """Returns the array."""
    value = self.view.dense()
    return value * value


@rule('square')
def square(view: View, **_: Any) -> View:
  """The square, for `reduce_sum`."""
  return Squared(_only([view]))


@rule('integer_pow')
def integer_pow(view: View, *, y: int, **_: Any) -> View:
  """The square, for `reduce_sum`."""
  if y != 2:
    raise Decline
  return Squared(_only([view]))


@rule('reduce_sum')
def reduce_sum(view: View, *, axes: Sequence[int], **_: Any) -> Any:
  """The squares of columns, summed: the norm that DoRA divides by.

  `view` is what was squared. `Σ(W + s·A·B)² = ΣW² + 2s·Σ(WᵀA)ᵀ∘B +
  s²·ΣB∘(AᵀA)B` over axes that A owns and B does not, or the other way round.
  """
  summed = set(axes)
  terms = joined(view.terms, view.dtype)
  if len(terms) != 2 or any(t.spreads for t in terms):
    raise Decline
  base, low = terms
  if len(base.factors) != 1 or len(low.factors) != 2:
    raise Decline
  whole = tuple(range(view.ndim))
  if sorted(base.factors[0].axes) != list(whole):
    raise Decline
  a, b = low.factors
  if not summed <= set(a.axes):
    a, b = b, a
  if not summed <= set(a.axes) or summed & set(b.axes):
    raise Decline
  kept = tuple(i for i in whole if i not in summed)
  cast_to = lambda f: cast(f.value, view.dtype)
  w, w_axes = cast_to(base.factors[0]), base.factors[0].axes
  fa, fb = cast_to(a), cast_to(b)
  scale = low.scale
  b_axes = tuple('q' if x == RANK else x for x in b.axes)
  a_names = tuple('q' if x == RANK else x for x in a.axes)
  a_kept = [x for x in a.axes if x in kept]
  if a_kept and not set(a_kept) <= set(b.axes):
    raise Decline  # Columns that both factors have a part of.
  both = tuple(x for x in kept if x in a.axes)
  wa = product(w, w_axes, fa, a_names, (*kept, 'q'))
  cross = (wa * _as(fb, b_axes, (*kept, 'q'))).sum(-1)
  pairs = (*both, 'q', "q'")
  gram = product(fa, a_names, fa, _primed(a_names), pairs)
  gb = product(gram, pairs, fb, _primed(b_axes), (*kept, 'q'))
  square_of = (gb * _as(fb, b_axes, (*kept, 'q'))).sum(-1)
  squares = (w * w).sum(tuple(w_axes.index(x) for x in summed))
  left = [x for x in w_axes if x not in summed]
  squares = _as(squares, tuple(left), kept)
  if not _is(base.scale, 1.0):
    squares = squares * base.scale**2
    cross = cross * base.scale
  total = squares + 2 * scale * cross + scale**2 * square_of
  # Rounding may leave a little less than nothing of a column of zeros.
  return jnp.maximum(total, 0)


def _primed(labels: Sequence[Any]) -> Labels:
  return tuple("q'" if x == 'q' else x for x in labels)


def _as(value: Any, labels: Sequence[Any], wanted: Sequence[Any]) -> Any:
  return value.transpose([list(labels).index(x) for x in wanted])


# What only moves.


@rule('transpose')
def transpose(view: View, *, permutation: Sequence[int], **_: Any) -> View:
  """Names the axes of factors anew."""
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
      )
      for t in _only([view]).terms
    ]
    return view.like(terms)


EACH = ('copy', 'copy_p', 'stop_gradient', 'pvary', 'pbroadcast')
for _name in EACH:
  _each(_name)


@rule('squeeze')
def squeeze(view: View, *, dimensions: Sequence[int], **_: Any) -> View:
  """Takes axes of size one off the factors that have them."""
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
  """Axes that are new, or repeated, are owned by no factor."""
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
  """Joins and divides axes that each factor owns together, or not at all."""
  if dimensions is not None or 0 in view.shape:
    raise Decline
  groups = _groups(view.shape, tuple(new_sizes))

  def change(factor: Factor) -> Factor:
    value, axes = factor.value, factor.axes
    for old, new in groups:
      real = [i for i in old if view.shape[i] != 1]
      have = [i for i in old if i in axes]
      if not have:
        continue
      if any(i not in axes for i in real):
        raise Decline  # Another factor owns a part of what becomes one axis.
      if len(old) == 1 and len(new) == 1:
        continue
      # Side by side, in order, at the place of the first.
      at = min(axes.index(i) for i in have)
      order = [i for i in range(len(axes)) if axes[i] not in have]
      order[at:at] = [axes.index(i) for i in have]
      if order != list(range(len(axes))):
        value = value.transpose(order)
        axes = tuple(axes[i] for i in order)
      sizes = list(value.shape)
      sizes[at : at + len(have)] = [new_sizes[i] for i in new]
      value = value.reshape(sizes)
      axes = (*axes[:at], *(_NEW + i for i in new), *axes[at + len(have) :])
    names = {old[0]: _NEW + new[0] for old, new in groups if old and new}
    renamed = tuple(
      x if x < 0 else names.get(x, x) if x < _NEW else x for x in axes
    )
    return Factor(value, tuple(x if x < 0 else x - _NEW for x in renamed))

  return view.mapped(change, new_sizes)


# Above all axes that there are: marks axes that have their new names.
_NEW = 1 << 20


def _groups(
  old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
  """Returns which axes of a shape become which of another, in small groups."""
  groups: list[tuple[list[int], list[int]]] = []
  i = j = 0
  while i < len(old) or j < len(new):
    ours: list[int] = []
    theirs: list[int] = []
    have = want = 1
    if i < len(old):
      ours, have, i = [i], old[i], i + 1
    if j < len(new):
      theirs, want, j = [j], new[j], j + 1
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


def _cut(value: Any, axis: int, cut: tuple[int, int, int]) -> Any:
  start, stop, stride = cut
  return jax.lax.slice_in_dim(value, start, stop, stride, axis)


def _cut_at(value: Any, axis: int, start: Any, size: int) -> Any:
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
  _only([view, *starts])
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
  """Turns the factors that own the axes around."""
  for axis in dimensions:
    view = view.along(axis, lambda v, at: jax.lax.rev(v, (at,)), view.shape)
  return view


@rule('concatenate')
def concatenate(*operands: Any, dimension: int, **_: Any) -> View:
  """Puts bases side by side; a product has zeros where others are."""
  views = [v if isinstance(v, View) else plain(v) for v in operands]
  bases, terms, start = [], [], 0
  total = sum(v.shape[dimension] for v in views)
  dtype = views[0].dtype
  for view in views:
    size = view.shape[dimension]
    base, *rest = view.terms
    whole = len(base.factors) == 1 and len(base.factors[0].axes) == view.ndim
    if not whole or base.spreads:
      raise Decline
    order = sorted(range(view.ndim), key=base.factors[0].axes.__getitem__)
    value = cast(base.factors[0].value, dtype).transpose(order)
    bases.append(times(value, base.scale))
    for term in rest:
      if len(term.factors) == 1:
        raise Decline
      terms.append(_padded(term, dimension, start, total - start - size))
    start += size
  shape = list(views[0].shape)
  shape[dimension] = total
  joint = plain(jnp.concatenate(bases, dimension))
  origin = tuple(dict.fromkeys(o for v in views for o in v.origin))
  return View(shape, dtype, (*joint.terms, *terms), origin)


def _padded(term: Term, axis: int, before: int, behind: int) -> Term:
  def pad(value: Any, at: int) -> Any:
    widths = [(0, 0, 0)] * value.ndim
    widths[at] = (before, behind, 0)
    return jax.lax.pad(value, jnp.zeros((), value.dtype), widths)

  if not any(f.owns(axis) for f in term.factors):
    raise Decline
  if any(f.owns(axis) for f in term.spreads):
    raise Decline
  return term.mapped(lambda f: f.along(axis, pad) if f.owns(axis) else f)


# What uses a view up.


@rule('dot_general')
def dot_general(
  lhs: Any,
  rhs: Any,
  *,
  dimension_numbers: Any,
  preferred_element_type: Any,
  out_sharding: Any = None,
  **params: Any,
) -> Any:
  """`x·W + s·(x·A)·B`, for any axes and from either side."""
  left = isinstance(lhs, View)
  if left and isinstance(rhs, View):
    raise Decline
  if out_sharding is not None:
    raise Decline
  view, x = (lhs, rhs) if left else (rhs, lhs)
  (ls, rs), (lb, rb) = dimension_numbers
  (xs, vs), (xb, vb) = ((rs, ls), (rb, lb)) if left else ((ls, rs), (lb, rb))
  x_labels = tuple(range(x.ndim))
  names: dict[int, Any] = dict(zip(vs, xs, strict=True))
  names.update(zip(vb, xb, strict=True))
  free = [i for i in range(view.ndim) if i not in names]
  names.update((i, ('v', i)) for i in free)
  x_free = [i for i in x_labels if i not in xs and i not in xb]
  if view.rows:
    names[ROW] = _row(view, x.shape, x_free, 'dot_general')
  v_free = [names[i] for i in free]
  out = (*xb, *(v_free + x_free if left else x_free + v_free))
  params['out_sharding'] = None
  return sum_of(view, x, x_labels, names, out, params, preferred_element_type)


def _row(
  view: View, shape: Sequence[int], free: Sequence[int], name: str
) -> int:
  """Returns the axis of an input whose elements are rows.

  Raises:
    Misrouted: if its leading free axis has another size.
  """
  if not free or shape[free[0]] != view.rows:
    found = f'{shape[free[0]]} of {tuple(shape)}' if free else 'none'
    raise Misrouted(
      view,
      f'{name} has an input whose leading free axis is {found}, and there is '
      f'an index for {view.rows} rows',
    )
  return free[0]


def sum_of(
  view: View,
  x: Any,
  x_labels: Labels,
  names: dict[int, Any],
  out: Labels,
  params: Any,
  dtype: Any,
) -> Any:
  """Returns the product of an array and a view, term by term.

  Args:
    view: the view.
    x: the array.
    x_labels: labels of its axes.
    names: labels of the view's axes.
    out: labels of the result.
    params: of the primitive.
    dtype: of the result.

  Raises:
    Decline: if a term does not take part in this way.
  """
  sums: dict[Any, tuple[Any, list[Factor]]] = {}
  inputs: dict[Any, Any] = {}
  for term in joined(view.terms, view.dtype):
    inner = [
      f for f in term.spreads if all(names[i] in x_labels for i in f.axes)
    ]
    outer = [f for f in term.spreads if f not in inner]
    if any(names[i] not in out for f in outer for i in f.axes):
      raise Decline  # It owns axes that are summed over and others.
    kind = tuple((id(f.value), f.axes) for f in inner)
    if kind not in inputs:
      value = x
      for f in inner:
        labels = tuple(names[i] for i in f.axes)
        value = multiplied(value, x_labels, f, labels)
      inputs[kind] = value
    made = _term(term, view, inputs[kind], x_labels, names, out, params, dtype)
    key = tuple((id(f.value), f.axes) for f in outer)
    known = sums.get(key)
    sums[key] = (made if known is None else jax.lax.add(known[0], made), outer)
  total = None
  for value, outer in sums.values():
    for f in outer:
      value = multiplied(value, out, f, tuple(names[i] for i in f.axes))
    total = value if total is None else jax.lax.add(total, value)
  return total


def _term(
  term: Term,
  view: View,
  x: Any,
  x_labels: Labels,
  names: dict[int, Any],
  out: Labels,
  params: Any,
  dtype: Any,
) -> Any:
  values = [cast(f.value, view.dtype) for f in term.factors]
  labels = [
    tuple('rank' if i == RANK else names[i] for i in f.axes)
    for f in term.factors
  ]
  for i in range(view.ndim):
    if names[i] in x_labels or any(f.owns(i) for f in term.factors):
      continue
    if view.shape[i] != 1:
      raise Decline  # It is repeated along an axis of the result.
    values[-1] = jax.lax.expand_dims(values[-1], (0,))
    labels[-1] = (names[i], *labels[-1])
  if len(values) == 1:
    made = product(x, x_labels, values[0], labels[0], out, params, dtype)
    return times(made, term.scale)
  if term.dropout is not None:
    x = term.dropout(x)
  summed = [name for name in x_labels if name not in out]
  if not any(name in labels[0] for name in summed):
    values, labels = values[::-1], labels[::-1]
  if labels[0][-1] == 'rank' and values[0].ndim > 1:
    # The gradient of a tall, thin matrix is a product for which XLA has no
    # quick way on CPU, that of a flat one has. The barrier keeps XLA from
    # turning it back.
    order = (values[0].ndim - 1, *range(values[0].ndim - 1))
    turned = jax.lax.transpose(values[0], order)
    values[0] = jax.lax.optimization_barrier(turned)
    labels[0] = ('rank', *labels[0][:-1])
  # Over what the first one owns alone; the rest is summed with the second.
  left = [
    name
    for name in x_labels
    if name in out or name not in labels[0] or name in labels[1]
  ]
  middle = (*left, *(n for n in labels[0] if n not in x_labels))
  h = product(x, x_labels, values[0], labels[0], middle, params)
  h = times(h, term.scale)
  return product(h, middle, values[1], labels[1], out, params, dtype)


@rule('conv_general_dilated')
def conv_general_dilated(x: Any, view: Any, **params: Any) -> Any:
  """A convolution with A, then B at each place.

  One factor owns the kernel's output axis alone, the other one the rest.
  """
  if isinstance(x, View) or params['batch_group_count'] != 1:
    raise Decline
  if params.get('out_sharding') is not None:
    raise Decline
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  out_axis, in_axis = numbers.rhs_spec[:2]
  feature = numbers.out_spec[1]
  total = None
  for term in joined(view.terms, view.dtype):
    value = x
    outer = []
    for f in term.spreads:
      if f.axes == (out_axis,):
        outer.append(f)
      elif f.axes == (in_axis,) and groups == 1:
        channel = (numbers.lhs_spec[1],)
        value = multiplied(value, tuple(range(x.ndim)), f, channel)
      else:
        raise Decline
    made = _conv_term(term, view, value, params, out_axis, groups)
    for f in outer:
      made = multiplied(made, tuple(range(made.ndim)), f, (feature,))
    total = made if total is None else jax.lax.add(total, made)
  return total


def _conv_term(
  term: Term, view: View, x: Any, params: Any, out_axis: int, groups: int
) -> Any:
  conv = jax.lax.conv_general_dilated
  if len(term.factors) == 1:
    factor = term.factors[0]
    if len(factor.axes) != view.ndim:
      raise Decline
    kernel = _as(cast(factor.value, view.dtype), factor.axes, range(view.ndim))
    return times(conv(x, kernel, **params), term.scale)
  a, b = term.factors
  if a.owns(ROW):
    return _conv_rows(term, view, x, params, out_axis, groups)
  if a.owns(out_axis):
    a, b = b, a
  if set(b.axes) != {out_axis, RANK}:
    raise Decline
  if term.dropout is not None:
    x = term.dropout(x)
  rank = a.value.shape[a.axes.index(RANK)]
  names = tuple(out_axis if i == RANK else i for i in a.axes)
  kernel = cast(a.value, view.dtype)
  present = [i for i in range(view.ndim) if i in names]
  kernel = _as(kernel, names, present).reshape(
    [
      rank if i == out_axis else view.shape[i] if i in names else 1
      for i in range(view.ndim)
    ]
  )
  if any(i not in names and view.shape[i] != 1 for i in range(view.ndim)):
    raise Decline
  if groups > 1:
    kernel = jnp.concatenate([kernel] * groups, out_axis)
  h = conv(x, kernel, **{**params, 'preferred_element_type': None})
  h = times(h, term.scale)
  feature = params['dimension_numbers'].out_spec[1]
  places = tuple(range(h.ndim))
  second = _as(cast(b.value, view.dtype), b.axes, (RANK, out_axis))
  made_as = params['preferred_element_type']
  exact = {**EXACT, 'precision': params['precision']}
  if groups == 1:
    labels = tuple('rank' if i == feature else i for i in places)
    return product(h, labels, second, ('rank', feature), places, exact, made_as)
  # Each group of channels has its own part of B.
  size = view.shape[out_axis] // groups
  h = h.reshape([*h.shape[:feature], groups, rank, *h.shape[feature + 1 :]])
  second = second.reshape(rank, groups, size)
  labels = (
    *places[:feature],
    'group',
    'rank',
    *places[feature + 1 :],
  )
  out = (*places[:feature], 'group', 'out', *places[feature + 1 :])
  made = product(
    h,
    labels,
    second,
    ('rank', 'group', 'out'),
    out,
    exact,
    made_as,
  )
  shape = [*made.shape]
  shape[feature : feature + 2] = [groups * size]
  return made.reshape(shape)


def _conv_rows(
  term: Term, view: View, x: Any, params: Any, out_axis: int, groups: int
) -> Any:
  """A convolution of each row with factors of its own."""
  numbers = params['dimension_numbers']
  at, to = numbers.lhs_spec[0], numbers.out_spec[0]
  _row(view, x.shape, [at], 'conv_general_dilated')

  def one(x: Any, values: Any) -> Any:
    factors = tuple(
      Factor(v, tuple(i for i in f.axes if i != ROW))
      for v, f in zip(values, term.factors, strict=True)
    )
    single = dataclasses.replace(term, factors=factors)
    made = _conv_term(
      single, view, jnp.expand_dims(x, at), params, out_axis, groups
    )
    return jnp.squeeze(made, to)

  rows = [f.axes.index(ROW) for f in term.factors]
  values = [f.value for f in term.factors]
  return jax.vmap(one, (at, rows), to)(x, values)


@rule('gather')
def gather(view: Any, indices: Any, **params: Any) -> Any:
  """Rows of the factor that owns the axis, then the other factor.

  What an embedding looks up. A single index gives a view again.
  """
  _only([view, indices])
  numbers, fill = params['dimension_numbers'], params['fill_value']
  if numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
    raise Decline
  (axis,) = numbers.start_index_map
  if numbers.collapsed_slice_dims != (axis,):
    raise Decline
  sizes = params['slice_sizes']
  if any(
    s != n
    for i, (s, n) in enumerate(zip(sizes, view.shape, strict=True))
    if i != axis
  ):
    raise Decline
  if fill is not None and not np.isnan(fill) and fill != 0:
    raise Decline  # A constant is not what the factors' product would be.
  places = indices.shape[:-1]
  if view.rows:
    _row(view, places, range(len(places)), 'gather')

  def looked_up(value: Any, indices: Any, fill: Any) -> Any:
    """Returns rows of an array: the axes of indices, then its other axes."""
    front = indices.ndim - 1
    return jax.lax.gather(
      value,
      indices,
      jax.lax.GatherDimensionNumbers(
        tuple(range(front, front + value.ndim - 1)), (0,), (0,)
      ),
      (1, *value.shape[1:]),
      unique_indices=params['unique_indices'],
      indices_are_sorted=params['indices_are_sorted'],
      mode=params['mode'],
      fill_value=fill,
    )

  def taken(factor: Factor, fill: Any) -> Factor:
    # A row of indices is a row of the input.
    axes = tuple(_PLACE if x == ROW else x for x in factor.axes)
    if not factor.owns(axis):
      return Factor(factor.value, axes)
    rest = tuple(x for x in axes if x not in (axis, _PLACE))
    look = functools.partial(looked_up, fill=fill)
    if factor.owns(ROW):
      look = jax.vmap(look)
      value = _as(factor.value, axes, (_PLACE, axis, *rest))
    else:
      value = _as(factor.value, axes, (axis, *rest))
    left = (_PLACE - i for i in range(len(places)))
    return Factor(look(value, indices), (*left, *rest))

  # What lies outside is filled once: NaN in a factor would be NaN in gradients.
  base, *rest = view.terms
  if len(base.factors) != 1 or any(
    f.owns(axis) for t in view.terms for f in t.spreads
  ):
    raise Decline
  terms = [
    base.mapped(lambda f: taken(f, fill)),
    *(t.mapped(lambda f: taken(f, 0)) for t in rest),
  ]
  others = [i for i in range(view.ndim) if i != axis]
  ndim = len(places) + len(others)
  # Where the result has the axes of a slice, and where those of indices.
  names = dict(zip(others, numbers.offset_dims, strict=True))
  front = [i for i in range(ndim) if i not in numbers.offset_dims]
  names.update({_PLACE - i: at for i, at in enumerate(front)})
  shape = [0] * ndim
  for i, at in enumerate(front):
    shape[at] = places[i]
  for i in others:
    shape[names[i]] = view.shape[i]
  result = view.like(
    [
      dataclasses.replace(t.mapped(lambda f: f.renamed(names)), dropout=None)
      for t in terms
    ],
    shape,
  )
  # Rows of activations are computed; one row is a smaller parameter.
  return computed(result) if places else result


def computed(view: View) -> Any:
  """Returns a view of activations as an array, in its own dtype."""
  whole = tuple(range(view.ndim))
  total = None
  for term in joined(view.terms, view.dtype):
    values = [cast(f.value, view.dtype) for f in term.factors]
    owned = term.factors[0].axes
    if len(values) == 1:
      made = values[0]
    else:
      a, b = term.factors
      owned = tuple(i for i in whole if a.owns(i) or b.owns(i))
      made = product(values[0], a.axes, values[1], b.axes, owned)
    made = times(lowrank.spread(made, owned, view.shape), term.scale)
    for f in term.spreads:
      made = multiplied(made, whole, f, f.axes)
    total = made if total is None else jax.lax.add(total, made)
  return total


# Names for the axes of indices while a gather is put together.
_PLACE = -10
