"""Products and convolutions with a view: what it is kept for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from surgery.aliases import Array
from surgery.contract.lowrank import RANK, ROW
from surgery.factoring.labelled import multiplied, product
from surgery.factoring.rules.table import Table, one_view, ordered
from surgery.factoring.views import (
  EXACT,
  Axes,
  Decline,
  Dropout,
  DType,
  Factor,
  Labels,
  Misrouted,
  Operand,
  Term,
  View,
  cast,
  plus,
  times,
)
from surgery.live.primitives import flat_primitive

RULES = Table()
rule = RULES.rule


def joined(terms: Sequence[Term], dtype: DType) -> list[Term]:
  """Returns terms, with products whose factors own the same axes joined.

  Two adapters on a layer are then one product of both ranks.

  Args:
    terms: the terms of a view.
    dtype: in which factors are used.
  """
  result: list[Term] = []
  kinds: dict[Hashable, int] = {}
  for term in terms:
    if len(term.factors) == 1 or term.dropout is not None:
      # A base; or a product whose input is one of its own.
      result.append(term)
      continue
    kind = (tuple(f.axes for f in term.factors), _identity(term.spreads))
    at = kinds.setdefault(kind, len(result))
    if at == len(result):
      result.append(term)
    else:
      result[at] = _side_by_side(result[at], term, dtype)
  return result


def _side_by_side(first: Term, second: Term, dtype: DType) -> Term:
  """Returns two products as one, their factors joined along the rank."""
  pairs = [
    (cast(f.value, dtype), cast(g.value, dtype))
    for f, g in zip(first.factors, second.factors, strict=True)
  ]
  # The scales may differ: they go into the second factor.
  one, other = pairs[1]
  pairs[1] = (times(one, first.scale), times(other, second.scale))
  factors = tuple(
    Factor(jnp.concatenate(pair, f.axes.index(RANK)), f.axes)
    for pair, f in zip(pairs, second.factors, strict=True)
  )
  return dataclasses.replace(first, factors=factors, scale=1.0)


def _identity(factors: Sequence[Factor]) -> tuple[tuple[int, Axes], ...]:
  """Returns what equals that of other factors if they are the same arrays."""
  return tuple((id(f.value), f.axes) for f in factors)


@dataclasses.dataclass(frozen=True)
class _Labelled:
  """A product of an array and a view whose axes have labels.

  Attributes:
    x: labels of the array's axes.
    names: labels of the view's axes.
    out: labels of the result.
    params: of the primitive `dot_general`.
    dtype: of the result; None for that of the operands.
  """

  x: Labels
  names: Mapping[int, Hashable]
  out: Labels
  params: Mapping[str, Any]
  dtype: DType | None

  def of(self, factor: Factor) -> Labels:
    """Returns labels of the axes of a factor."""
    return tuple('rank' if i == RANK else self.names[i] for i in factor.axes)

  def divided(
    self, spreads: Sequence[Factor]
  ) -> tuple[list[Factor], list[Factor]]:
    """Returns by what of them the input is multiplied, and the result.

    Raises:
      Decline: for one that owns axes that are summed over, and others.
    """
    inner = [f for f in spreads if set(self.of(f)) <= set(self.x)]
    outer = [f for f in spreads if f not in inner]
    if not all(set(self.of(f)) <= set(self.out) for f in outer):
      raise Decline
    return inner, outer

  def scaled(self, value: Array, labels: Labels, by: Sequence[Factor]) -> Array:
    """Returns an array times others that own some of its axes."""
    for factor in by:
      value = multiplied(value, labels, factor, self.of(factor))
    return value


@rule('dot_general')
def dot_general(
  lhs: Operand,
  rhs: Operand,
  *,
  dimension_numbers: Any,
  preferred_element_type: Any,
  out_sharding: Any = None,
  **params: Any,
) -> Array:
  """Computes `x·W + s·(x·A)·B`, for any axes and from either side."""
  if out_sharding is not None:
    raise Decline
  view, x, left = one_view(lhs, rhs)
  # Each axis of the view that is summed over, or goes along, has the label of
  # the axis of `x` that it meets; the others have labels of their own.
  (ls, rs), (lb, rb) = dimension_numbers
  (xs, vs), (xb, vb) = ((rs, ls), (rb, lb)) if left else ((ls, rs), (lb, rb))
  x_labels = tuple(range(x.ndim))
  names: dict[int, Any] = dict(zip((*vs, *vb), (*xs, *xb), strict=True))
  free = [i for i in range(view.ndim) if i not in names]
  names.update((i, ('v', i)) for i in free)
  x_free = [i for i in x_labels if i not in (*xs, *xb)]
  if view.rows is not None:
    names[ROW] = row_axis(view, x.shape, x_free, 'dot_general')
  # The primitive's order: batch axes, then those of the left, of the right.
  v_free = [names[i] for i in free]
  out = (*xb, *(v_free + x_free if left else x_free + v_free))
  dtype = preferred_element_type
  if view.arithmetic != view.dtype and dtype is None:
    # The base is used as it is, all else in the wider arithmetic.
    dtype = view.arithmetic
  params['out_sharding'] = None
  return _sum(view, x, _Labelled(x_labels, names, out, params, dtype))


def row_axis(
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


def _sum(view: View, x: Array, how: _Labelled) -> Array:
  """Returns the product of an array and a view, term by term.

  Raises:
    Decline: if a term does not take part in this way.
  """
  # Inputs that terms share are made once, and what is multiplied by the same
  # arrays afterwards is added up first: DoRA scales one sum, not two terms.
  inputs: dict[Hashable, Array] = {}
  sums: dict[Hashable, tuple[Array, list[Factor]]] = {}
  for term in joined(view.terms, view.arithmetic):
    inner, outer = how.divided(term.spreads)
    wide = _is_wide(term, view)
    kind = (wide, _identity(inner))
    if kind not in inputs:
      value = cast(x, view.arithmetic) if wide else x
      inputs[kind] = how.scaled(value, how.x, inner)
    # Parameters that are for 8 bits, as an algorithm, are not for more.
    exact = dataclasses.replace(how, params=EXACT) if wide else how
    made = _term(term, view, inputs[kind], exact)
    key = _identity(outer)
    known = sums[key][0] if key in sums else None
    sums[key] = plus(known, made), outer
  total = None
  for value, outer in sums.values():
    total = plus(total, how.scaled(value, how.out, outer))
  assert total is not None  # A view has a term at least.
  return total


def _is_wide(term: Term, view: View) -> bool:
  """Whether a term is used in a wider dtype than the view's.

  A base in 8 bits is multiplied as it is, as the layer would; an update, or a
  scale, would lose all its digits.
  """
  alone = len(term.factors) == 1 and not term.spreads
  return not alone and view.arithmetic != view.dtype


def _used(term: Term, view: View) -> DType:
  """Returns the dtype in which the factors of a term are used."""
  return view.arithmetic if _is_wide(term, view) else view.dtype


def _term(term: Term, view: View, x: Array, how: _Labelled) -> Array:
  """Returns the product of an array and a term of a view.

  Raises:
    Decline: if the term is repeated along an axis of the result.
  """
  values = [cast(f.value, _used(term, view)) for f in term.factors]
  labels = [how.of(f) for f in term.factors]
  for i in range(view.ndim):
    # An axis that no factor owns: the product has it if `x` does, or if it has
    # one element.
    if how.names[i] in how.x or any(f.owns(i) for f in term.factors):
      continue
    if view.shape[i] != 1:
      raise Decline
    values[-1] = jax.lax.expand_dims(values[-1], (0,))
    labels[-1] = (how.names[i], *labels[-1])
  if len(values) == 1:
    made = product(
      x, how.x, values[0], labels[0], how.out, how.params, how.dtype
    )
    return times(made, term.scale)
  if term.dropout is not None:
    x, x_labels = _dropped(x, how, term.dropout, view)
    how = dataclasses.replace(how, x=x_labels)
  # The factor that owns what is summed over goes first, so that what lies
  # between the two products has the rank in the place of those axes.
  summed = [name for name in how.x if name not in how.out]
  if not any(name in labels[0] for name in summed):
    values, labels = values[::-1], labels[::-1]
  if not any(name in how.out for name in labels[0]):
    values[0], labels[0] = _flat(values[0], labels[0])
  # Over what the first one owns alone; the rest is summed with the second.
  left = [
    name
    for name in how.x
    if name in how.out or name not in labels[0] or name in labels[1]
  ]
  middle = (*left, *(n for n in labels[0] if n not in how.x))
  h = product(x, how.x, values[0], labels[0], middle, how.params)
  # Scaled here, where the array is smallest.
  h = times(h, term.scale)
  return product(
    h, middle, values[1], labels[1], how.out, how.params, how.dtype
  )


def _dropped(
  x: Array, how: _Labelled, dropout: Dropout, view: View
) -> tuple[Array, Labels]:
  """Returns an input with elements dropped, and labels of its axes."""
  labels = how.x
  for i in dropout.key.axes:
    if how.names[i] not in labels:
      # Each member of an ensemble drops elements of an input of its own.
      x = jnp.broadcast_to(x, (view.shape[i], *x.shape))
      labels = (how.names[i], *labels)
  return dropout(x, labels, how.names), labels


def _flat(value: Array, labels: Labels) -> tuple[Array, Labels]:
  """Returns a factor with its rank in front.

  The gradient of a tall, thin matrix is a product for which XLA has no quick
  way on CPU, that of a flat one has.
  """
  if labels[-1] != 'rank' or value.ndim == 1:
    return value, labels
  order = (value.ndim - 1, *range(value.ndim - 1))
  turned = jax.lax.transpose(value, order)
  return flat_primitive().bind(turned), ('rank', *labels[:-1])


@rule('conv_general_dilated')
def conv_general_dilated(x: Operand, view: View, **params: Any) -> Array:
  """Convolves with the sum once; what differentiates it has the factors.

  A kernel is small beside what it is moved over, so the sum costs nothing, and
  the gradient of the input is one convolution too. Those of the factors are a
  convolution with A, then B at each place, differentiated. Dropout, rows with
  factors of their own, and scales of rows or columns need that at once, and so
  does a dtype to which the sum would be rounded: a small update would be lost.
  """
  if isinstance(x, View) or params['batch_group_count'] != 1:
    raise Decline
  if params.get('out_sharding') is not None:
    raise Decline
  for term in view.terms:
    _divided(term, view, params)  # Declines here, not while differentiating.
    if term.dropout is not None and term.dropout.key.axes:
      raise Decline  # Keys for parts of a kernel, as members have.
  apart = view.rows is not None or view.dropped or view.dtype.itemsize < 4
  if apart or any(t.spreads for t in view.terms):
    return _conv_terms(x, view, params)
  return _conv_sum(x, view, params)


def _conv_sum(x: Array, view: View, params: Mapping[str, Any]) -> Array:
  """Returns a convolution with the sum, whose tangents use the factors."""
  leaves, tree = jax.tree.flatten(view)

  def conv(x: Array, *leaves: Array) -> Array:
    kernel = jax.tree.unflatten(tree, leaves).dense()
    return jax.lax.conv_general_dilated(x, kernel, **params)

  summed = jax.custom_jvp(conv)

  @functools.partial(summed.defjvp, symbolic_zeros=True)
  def jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, *leaves = primals
    x_moves, *moves = (
      not isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents
    )
    # A convolution is linear in each operand, so its tangent is a sum of one
    # part for the input and one for the factors that move.
    parts = []
    if x_moves:
      parts.append(conv(tangents[0], *leaves))
    where = [i for i, moved in enumerate(moves) if moved]
    if where:
      _, part = jax.jvp(
        lambda *moving: _conv_moving(x, tree, leaves, where, moving, params),
        [leaves[i] for i in where],
        [tangents[1 + i] for i in where],
      )
      parts.append(part)
    y = summed(x, *leaves)
    return y, functools.reduce(jax.lax.add, parts)

  return summed(x, *leaves)


def _conv_moving(
  x: Array,
  tree: Any,
  leaves: Sequence[Array],
  where: Sequence[int],
  moving: Sequence[Array],
  params: Mapping[str, Any],
) -> Array:
  """Returns a convolution with those terms of a view whose arrays move.

  Args:
    x: the input.
    tree: structure of the view.
    leaves: arrays of the view.
    where: which of them move.
    moving: those that do, traced.
    params: of the primitive.
  """
  values = [*leaves]
  for i, value in zip(where, moving, strict=True):
    values[i] = value
  view = jax.tree.unflatten(tree, values)
  known = {id(v) for v in moving}
  # The tangent of the other terms is zero; a frozen base is one of them.
  terms = [
    t
    for t in view.terms
    if known & {id(t.scale), *(id(f.value) for f in t.factors)}
  ]
  return _conv_terms(x, view.like(terms), params)


def _conv_terms(x: Array, view: View, params: Mapping[str, Any]) -> Array:
  """Returns a convolution with A, then B at each place, for each term."""
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  out_axis, in_axis = numbers.rhs_spec[:2]
  feature = numbers.out_spec[1]
  total = None
  made_as = params['preferred_element_type']
  if view.arithmetic != view.dtype and made_as is None:
    params = {**params, 'preferred_element_type': view.arithmetic}
  for term in joined(view.terms, view.arithmetic):
    value = cast(x, _used(term, view))
    outer = []
    for f in term.spreads:
      # A scale of outputs is one of the result, a scale of inputs one of the
      # input, unless channels are in groups: then several share an input axis.
      if f.axes == (out_axis,):
        outer.append(f)
      elif f.axes == (in_axis,) and groups == 1:
        channel = (numbers.lhs_spec[1],)
        value = multiplied(value, tuple(range(x.ndim)), f, channel)
      else:
        raise Decline
    made = _conv_term(term, view, value, params)
    for f in outer:
      made = multiplied(made, tuple(range(made.ndim)), f, (feature,))
    total = plus(total, made)
  assert total is not None  # A view has a term at least.
  return total


def _divided(
  term: Term, view: View, params: Mapping[str, Any]
) -> tuple[Factor, Factor | None, int]:
  """Returns how a term takes part in a convolution.

  Returns:
    A factor to convolve with; the other one, which owns the kernel's axis of
    outputs or of inputs alone, if there is one; and that axis.

  Raises:
    Decline: if no factor does, or nobody owns an axis.
  """
  owned = {x for f in term.factors for x in f.axes}
  if any(i not in owned and view.shape[i] != 1 for i in range(view.ndim)):
    raise Decline
  outputs, inputs = params['dimension_numbers'].rhs_spec[:2]
  if len(term.factors) == 1:
    if len(term.factors[0].axes) != view.ndim:
      raise Decline
    return term.factors[0], None, outputs
  # Inputs in groups are divided among the outputs: no factor owns them alone.
  axes = (outputs,) if params['feature_group_count'] != 1 else (outputs, inputs)
  a, b = term.factors
  for axis, (one, other) in itertools.product(axes, ((a, b), (b, a))):
    if set(other.axes) - {ROW} == {axis, RANK} and not one.owns(axis):
      return one, other, axis
  raise Decline


def _conv_term(
  term: Term, view: View, x: Array, params: Mapping[str, Any]
) -> Array:
  """Returns the convolution of an array with a term of a kernel."""
  conv = jax.lax.conv_general_dilated
  numbers, groups = params['dimension_numbers'], params['feature_group_count']
  a, b, axis = _divided(term, view, params)
  if b is None:
    kernel = ordered(cast(a.value, _used(term, view)), a.axes, range(view.ndim))
    return times(conv(x, kernel, **params), term.scale)
  if a.owns(ROW):
    return _conv_rows(term, view, x, params)
  if term.dropout is not None:
    x = term.dropout(x, tuple(range(x.ndim)), {})
  kernel = _kernel_of_ranks(a, view, axis)
  second = ordered(cast(b.value, view.arithmetic), b.axes, (RANK, axis))
  if axis == numbers.rhs_spec[1]:
    # B owns the inputs: inputs to ranks at each place, then a convolution.
    channel = numbers.lhs_spec[1]
    places = tuple(range(x.ndim))
    middle: Labels = tuple('rank' if i == channel else i for i in places)
    h = product(x, places, second, ('rank', channel), middle)
    return conv(times(h, term.scale), kernel, **params)
  # B owns the outputs: a convolution to ranks, then ranks to outputs at each
  # place. Each group of inputs gives all ranks, so A is there once a group.
  if groups > 1:
    kernel = jnp.concatenate([kernel] * groups, axis)
  h = conv(x, kernel, **{**params, 'preferred_element_type': None})
  return _outputs_of_ranks(times(h, term.scale), second, params)


def _kernel_of_ranks(a: Factor, view: View, axis: int) -> Array:
  """Returns a factor as a kernel that has the rank at one of its axes.

  Args:
    a: the factor.
    view: the kernel that it is a factor of.
    axis: the axis of the kernel that the other factor owns.
  """
  names = tuple(axis if i == RANK else i for i in a.axes)
  present = [i for i in range(view.ndim) if i in names]
  value = ordered(cast(a.value, view.arithmetic), names, present)
  # Axes that no factor owns have one element, as `_divided` saw to.
  sizes = [1] * view.ndim
  for i, size in zip(present, value.shape, strict=True):
    sizes[i] = size
  return value.reshape(sizes)


def _outputs_of_ranks(
  h: Array, second: Array, params: Mapping[str, Any]
) -> Array:
  """Returns a convolution's outputs, given the ranks at each place.

  Args:
    h: its channels are the ranks, those of each group of inputs in turn.
    second: the factor from ranks to outputs, `(rank, out)`.
    params: of the primitive.
  """
  groups = params['feature_group_count']
  feature = params['dimension_numbers'].out_spec[1]
  places = tuple(range(h.ndim))
  made_as = params['preferred_element_type']
  exact = {**EXACT, 'precision': params['precision']}
  if groups == 1:
    middle: Labels = tuple('rank' if i == feature else i for i in places)
    return product(h, middle, second, ('rank', feature), places, exact, made_as)
  # Each group of channels has its own part of B.
  rank, outputs = second.shape
  second = second.reshape(rank, groups, outputs // groups)
  h = h.reshape([*h.shape[:feature], groups, rank, *h.shape[feature + 1 :]])
  before, behind = places[:feature], places[feature + 1 :]
  made = product(
    h,
    (*before, 'group', 'rank', *behind),
    second,
    ('rank', 'group', 'out'),
    (*before, 'group', 'out', *behind),
    exact,
    made_as,
  )
  return made.reshape(
    [*made.shape[:feature], outputs, *made.shape[feature + 2 :]]
  )


def _conv_rows(
  term: Term, view: View, x: Array, params: Mapping[str, Any]
) -> Array:
  """Returns a convolution of each row with factors of its own."""
  numbers = params['dimension_numbers']
  at, to = numbers.lhs_spec[0], numbers.out_spec[0]
  row_axis(view, x.shape, [at], 'conv_general_dilated')

  def one(x: Array, values: Sequence[Array]) -> Array:
    factors = tuple(
      Factor(v, tuple(i for i in f.axes if i != ROW))
      for v, f in zip(values, term.factors, strict=True)
    )
    single = dataclasses.replace(term, factors=factors)
    # A batch of one, since a convolution has a batch axis.
    made = _conv_term(single, view, jnp.expand_dims(x, at), params)
    return jnp.squeeze(made, to)

  rows = [f.axes.index(ROW) for f in term.factors]
  values = [f.value for f in term.factors]
  return jax.vmap(one, (at, rows), to)(x, values)
