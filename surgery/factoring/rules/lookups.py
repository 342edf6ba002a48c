"""Rows that are looked up in a view."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from surgery.contract import lowrank
from surgery.contract.lowrank import ROW
from surgery.factoring.labelled import (
  multiplied,
  product,
)
from surgery.factoring.rules.products import joined, row_axis
from surgery.factoring.rules.table import Table, only, ordered
from surgery.factoring.views import (
  Decline,
  Factor,
  Looked,
  View,
  cast,
  times,
  widens,
)

RULES = Table()
rule = RULES.rule


@rule('gather')
def gather(view: Any, indices: Any, **params: Any) -> Any:
  """Rows of the factor that owns the axis, then the other factor.

  What an embedding looks up. A single index gives a view again.
  """
  only([view, indices])
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
  if view.rows is not None:
    row_axis(view, places, range(len(places)), 'gather')

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
      value = ordered(factor.value, axes, (_PLACE, axis, *rest))
    else:
      value = ordered(factor.value, axes, (axis, *rest))
    left = (_PLACE - i for i in range(len(places)))
    return Factor(look(value, indices), (*left, *rest))

  # What lies outside is filled once: NaN in a factor would be NaN in gradients.
  base, *rest = view.terms
  filled = params['mode'] == jax.lax.GatherScatterMode.FILL_OR_DROP
  if filled and not base.factors[0].owns(axis):
    raise Decline  # Nothing would be there to fill.
  if len(base.factors) != 1 or any(
    f.owns(axis) for t in view.terms for f in t.spreads
  ):
    raise Decline
  if places:
    # Rows have no input to drop; one row is a smaller parameter, which has.
    rest = [dataclasses.replace(t, dropout=None) for t in rest]
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
    [t.mapped(lambda f: f.renamed(names)) for t in terms], shape
  )
  if not places:
    return result  # One row is a smaller parameter.
  # Rows of activations are computed, in what they are cast to if they are next.
  narrow = result.dtype.itemsize < 4
  return Looked(result, computed) if narrow else computed(result)


def computed(view: View) -> Any:
  """Returns a view of activations as an array, in its own arithmetic."""
  whole = tuple(range(view.ndim))
  total = None
  for term in joined(view.terms, view.arithmetic):
    values = [cast(f.value, view.arithmetic) for f in term.factors]
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


# What is known of rows that nobody has used.
LOOKED = Table()


@LOOKED.rule('convert_element_type')
def converted(looked: Looked, *, new_dtype: Any, **_: Any) -> Any:
  """Sums rows in the dtype that they are cast to, if it is a wider one."""
  new = np.dtype(new_dtype)
  if not widens(looked.dtype, new):
    raise Decline
  view = looked.view
  return computed(view.like(view.terms, dtype=new))


# Names for the axes of indices while a gather is put together.
_PLACE = -10
