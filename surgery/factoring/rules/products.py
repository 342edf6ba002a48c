"""Products and convolutions with a view: what it is kept for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from surgery.contract.lowrank import RANK, ROW
from surgery.factoring.labelled import (
  multiplied,
  product,
)
from surgery.factoring.rules.table import Table, ordered
from surgery.factoring.views import (
  EXACT,
  Decline,
  Factor,
  Labels,
  Misrouted,
  Term,
  View,
  cast,
  times,
)
from surgery.live.primitives import flat_primitive

RULES = Table()
rule = RULES.rule


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
  if view.rows is not None:
    names[ROW] = row_axis(view, x.shape, x_free, 'dot_general')
  v_free = [names[i] for i in free]
  out = (*xb, *(v_free + x_free if left else x_free + v_free))
  params['out_sharding'] = None
  return sum_of(view, x, x_labels, names, out, params, preferred_element_type)


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
  if view.arithmetic != view.dtype:
    # The base is used as it is, all else in the wider arithmetic.
    dtype = view.arithmetic if dtype is None else dtype
  for term in joined(view.terms, view.arithmetic):
    inner = [
      f for f in term.spreads if all(names[i] in x_labels for i in f.axes)
    ]
    outer = [f for f in term.spreads if f not in inner]
    if any(names[i] not in out for f in outer for i in f.axes):
      raise Decline  # It owns axes that are summed over and others.
    wide = _is_wide(term, view)
    kind = (wide, *((id(f.value), f.axes) for f in inner))
    if kind not in inputs:
      value = cast(x, view.arithmetic) if wide else x
      for f in inner:
        labels = tuple(names[i] for i in f.axes)
        value = multiplied(value, x_labels, f, labels)
      inputs[kind] = value
    # Parameters that are for 8 bits, as an algorithm, are not for more.
    how = EXACT if wide else params
    made = _term(term, view, inputs[kind], x_labels, names, out, how, dtype)
    key = tuple((id(f.value), f.axes) for f in outer)
    known = sums.get(key)
    sums[key] = (made if known is None else jax.lax.add(known[0], made), outer)
  total = None
  for value, outer in sums.values():
    for f in outer:
      value = multiplied(value, out, f, tuple(names[i] for i in f.axes))
    total = value if total is None else jax.lax.add(total, value)
  return total


def _is_wide(term: Term, view: View) -> bool:
  """Whether a term is used in a wider dtype than the view's.

  A base in 8 bits is multiplied as it is, as the layer would; an update, or a
  scale, would lose all its digits.
  """
  alone = len(term.factors) == 1 and not term.spreads
  return not alone and view.arithmetic != view.dtype


def _used(term: Term, view: View) -> Any:
  """Returns the dtype in which the factors of a term are used."""
  return view.arithmetic if _is_wide(term, view) else view.dtype


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
  values = [cast(f.value, _used(term, view)) for f in term.factors]
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
    for i in term.dropout.key.axes:
      if names[i] not in x_labels:
        # Each member of an ensemble drops elements of an input of its own.
        size = view.shape[i]
        x = jnp.broadcast_to(x, (size, *x.shape))
        x_labels = (names[i], *x_labels)
    x = term.dropout(x, x_labels, names)
  summed = [name for name in x_labels if name not in out]
  if not any(name in labels[0] for name in summed):
    values, labels = values[::-1], labels[::-1]
  alone = not any(name in out for name in labels[0])
  if alone and labels[0][-1] == 'rank' and values[0].ndim > 1:
    # The gradient of a tall, thin matrix is a product for which XLA has no
    # quick way on CPU, that of a flat one has.
    order = (values[0].ndim - 1, *range(values[0].ndim - 1))
    turned = jax.lax.transpose(values[0], order)
    values[0] = flat_primitive().bind(turned)
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
  """One convolution with the sum; what differentiates it has the factors.

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
    _divided(term, view, params)
    if term.dropout is not None and term.dropout.key.axes:
      raise Decline  # Keys for parts of a kernel, as members have.
  apart = view.rows is not None or view.dropped or view.dtype.itemsize < 4
  if apart or any(t.spreads for t in view.terms):
    return _conv_terms(x, view, params)
  return _conv_sum(x, view, params)


def _conv_sum(x: Any, view: View, params: Any) -> Any:
  leaves, tree = jax.tree.flatten(view)

  def conv(x: Any, *leaves: Any) -> Any:
    kernel = jax.tree.unflatten(tree, leaves).dense()
    return jax.lax.conv_general_dilated(x, kernel, **params)

  summed = jax.custom_jvp(conv)

  @functools.partial(summed.defjvp, symbolic_zeros=True)
  def jvp(primals: Any, tangents: Any) -> Any:
    x, *leaves = primals
    x_moves, *moves = (
      not isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents
    )
    parts = []
    if x_moves:
      parts.append(conv(tangents[0], *leaves))
    where = [i for i, moved in enumerate(moves) if moved]

    def by_terms(*moving: Any) -> Any:
      values = [*leaves]
      for i, value in zip(where, moving, strict=True):
        values[i] = value
      view = jax.tree.unflatten(tree, values)
      known = {id(v) for v in moving}
      terms = [
        t
        for t in view.terms
        if known & {id(t.scale), *(id(f.value) for f in t.factors)}
      ]
      return _conv_terms(x, view.like(terms), params)

    if where:
      _, part = jax.jvp(
        by_terms,
        [leaves[i] for i in where],
        [tangents[1 + i] for i in where],
      )
      parts.append(part)
    y = summed(x, *leaves)
    return y, functools.reduce(jax.lax.add, parts)

  return summed(x, *leaves)


def _conv_terms(x: Any, view: View, params: Any) -> Any:
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
    total = made if total is None else jax.lax.add(total, made)
  return total


def _divided(
  term: Term, view: View, params: Any
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
  a, b = term.factors
  for axis in (outputs, inputs):
    if axis == inputs and params['feature_group_count'] != 1:
      continue
    for one, other in ((a, b), (b, a)):
      alone = {x for x in other.axes if x != ROW} == {axis, RANK}
      if alone and not one.owns(axis):
        return one, other, axis
  raise Decline


def _conv_term(term: Term, view: View, x: Any, params: Any) -> Any:
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
  rank = a.value.shape[a.axes.index(RANK)]
  names = tuple(axis if i == RANK else i for i in a.axes)
  kernel = cast(a.value, view.arithmetic)
  present = [i for i in range(view.ndim) if i in names]
  kernel = ordered(kernel, names, present).reshape(
    [
      rank if i == axis else view.shape[i] if i in names else 1
      for i in range(view.ndim)
    ]
  )
  second = ordered(cast(b.value, view.arithmetic), b.axes, (RANK, axis))
  if axis == numbers.rhs_spec[1]:
    # Inputs to ranks at each place, then a convolution.
    channel = numbers.lhs_spec[1]
    places = tuple(range(x.ndim))
    middle: Labels = tuple('rank' if i == channel else i for i in places)
    h = product(x, places, second, ('rank', channel), middle)
    return conv(times(h, term.scale), kernel, **params)
  if groups > 1:
    kernel = jnp.concatenate([kernel] * groups, axis)
  h = conv(x, kernel, **{**params, 'preferred_element_type': None})
  h = times(h, term.scale)
  feature = params['dimension_numbers'].out_spec[1]
  places = tuple(range(h.ndim))
  made_as = params['preferred_element_type']
  exact = {**EXACT, 'precision': params['precision']}
  if groups == 1:
    middle = tuple('rank' if i == feature else i for i in places)
    return product(h, middle, second, ('rank', feature), places, exact, made_as)
  # Each group of channels has its own part of B.
  size = view.shape[axis] // groups
  h = h.reshape([*h.shape[:feature], groups, rank, *h.shape[feature + 1 :]])
  second = second.reshape(rank, groups, size)
  labels: Labels = (
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


def _conv_rows(term: Term, view: View, x: Any, params: Any) -> Any:
  """A convolution of each row with factors of its own."""
  numbers = params['dimension_numbers']
  at, to = numbers.lhs_spec[0], numbers.out_spec[0]
  row_axis(view, x.shape, [at], 'conv_general_dilated')

  def one(x: Any, values: Any) -> Any:
    factors = tuple(
      Factor(v, tuple(i for i in f.axes if i != ROW))
      for v, f in zip(values, term.factors, strict=True)
    )
    single = dataclasses.replace(term, factors=factors)
    made = _conv_term(single, view, jnp.expand_dims(x, at), params)
    return jnp.squeeze(made, to)

  rows = [f.axes.index(ROW) for f in term.factors]
  values = [f.value for f in term.factors]
  return jax.vmap(one, (at, rows), to)(x, values)
