"""Rows that are looked up in a view."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from surgery.aliases import Array
from surgery.contract import lowrank
from surgery.contract.lowrank import ROW
from surgery.factoring.labelled import multiplied, product
from surgery.factoring.rules.products import joined, row_axis
from surgery.factoring.rules.table import Table, only, ordered
from surgery.factoring.views import (
  Decline,
  Factor,
  Looked,
  Operand,
  View,
  cast,
  plus,
  times,
  widens,
)

RULES = Table()
rule = RULES.rule

# Names for the axes of indices while a gather is put together.
_PLACE = -10


@rule('gather')
def gather(view: View, indices: Array, **params: Any) -> Operand:
  """Looks rows up in the factor that owns the axis, then uses the other factor.

  This is what an embedding does. A single index gives a view again.
  """
  only([view, indices])
  lookup = _Lookup(_axis(view, params), indices, params)
  places = lookup.places
  if view.rows is not None:
    # A row of indices is a row of the input.
    row_axis(view, places, range(len(places)), 'gather')
  _check_terms(view, lookup)
  base, *rest = view.terms
  if places:
    # Rows have no input to drop; one row is a smaller parameter, which has.
    rest = [dataclasses.replace(t, dropout=None) for t in rest]
  # What lies outside is filled in the base alone: NaN in a factor would be NaN
  # in gradients.
  fill = params['fill_value']
  terms = [
    base.mapped(lambda f: lookup.taken(f, fill)),
    *(t.mapped(lambda f: lookup.taken(f, 0)) for t in rest),
  ]
  names = lookup.names(view.ndim)
  shape = [0] * len(names)
  for axis, to in names.items():
    shape[to] = places[_PLACE - axis] if axis < 0 else view.shape[axis]
  result = view.like(
    [t.mapped(lambda f: f.renamed(names)) for t in terms], shape
  )
  if not places:
    return result  # One row is a smaller parameter.
  # Rows are activations, which are computed. If the table is stored in fewer
  # bits that waits for a cast, which says in which dtype they are used.
  narrow = result.dtype.itemsize < 4
  return Looked(result, computed) if narrow else computed(result)


@dataclasses.dataclass(frozen=True)
class _Lookup:
  """A gather of whole rows along one axis of a view.

  Attributes:
    axis: the axis of the view that the indices count along.
    indices: integers, `(*places, 1)`.
    params: of the primitive.
  """

  axis: int
  indices: Array
  params: Mapping[str, Any]

  @property
  def places(self) -> tuple[int, ...]:
    """Shape of the indices."""
    return self.indices.shape[:-1]

  def names(self, ndim: int) -> dict[int, int]:
    """Returns the axes of the result by those of indices and of the view."""
    # `offset_dims` says where the result has the axes of a slice. Those of the
    # indices are, in order, what is left.
    offset = self.params['dimension_numbers'].offset_dims
    others = [i for i in range(ndim) if i != self.axis]
    names = dict(zip(others, offset, strict=True))
    total = len(self.places) + len(others)
    front = [i for i in range(total) if i not in offset]
    names.update({_PLACE - i: at for i, at in enumerate(front)})
    return names

  def taken(self, factor: Factor, fill: Any) -> Factor:
    """Returns the rows of a factor, or the factor if it has no such axis."""
    axes = tuple(_PLACE if x == ROW else x for x in factor.axes)
    if not factor.owns(self.axis):
      return Factor(factor.value, axes)
    rest = tuple(x for x in axes if x not in (self.axis, _PLACE))
    look = functools.partial(self._looked_up, fill=fill)
    if factor.owns(ROW):
      # Each row of indices looks up in the factor of its own adapter.
      look = jax.vmap(look)
      value = ordered(factor.value, axes, (_PLACE, self.axis, *rest))
    else:
      value = ordered(factor.value, axes, (self.axis, *rest))
    places = (_PLACE - i for i in range(len(self.places)))
    return Factor(look(value, self.indices), (*places, *rest))

  def _looked_up(self, value: Array, indices: Array, fill: Any) -> Array:
    """Returns rows of an array: the axes of indices, then its other axes."""
    front = indices.ndim - 1
    return jax.lax.gather(
      value,
      indices,
      jax.lax.GatherDimensionNumbers(
        tuple(range(front, front + value.ndim - 1)), (0,), (0,)
      ),
      (1, *value.shape[1:]),
      unique_indices=self.params['unique_indices'],
      indices_are_sorted=self.params['indices_are_sorted'],
      mode=self.params['mode'],
      fill_value=fill,
    )


def _axis(view: View, params: Mapping[str, Any]) -> int:
  """Returns the axis along which whole rows are looked up.

  Raises:
    Decline: if something else is gathered, or what is outside is filled with a
      number other than zero.
  """
  numbers, fill = params['dimension_numbers'], params['fill_value']
  if numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
    raise Decline
  (axis,) = numbers.start_index_map
  if numbers.collapsed_slice_dims != (axis,):
    raise Decline
  sizes = enumerate(zip(params['slice_sizes'], view.shape, strict=True))
  if any(size != whole for i, (size, whole) in sizes if i != axis):
    raise Decline
  if fill is not None and not np.isnan(fill) and fill != 0:
    raise Decline  # A constant is not what the factors' product would be.
  return int(axis)


def _check_terms(view: View, lookup: _Lookup) -> None:
  """Raises `Decline` unless rows of each term can be looked up alone."""
  base = view.terms[0]
  if len(base.factors) != 1:
    raise Decline
  filled = lookup.params['mode'] == jax.lax.GatherScatterMode.FILL_OR_DROP
  if filled and not base.factors[0].owns(lookup.axis):
    raise Decline  # Nothing would be there to fill.
  if any(f.owns(lookup.axis) for t in view.terms for f in t.spreads):
    raise Decline


def computed(view: View) -> Array:
  """Returns a view of activations as an array, in its own arithmetic."""
  whole = tuple(range(view.ndim))
  total = None
  for term in joined(view.terms, view.arithmetic):
    values = [cast(f.value, view.arithmetic) for f in term.factors]
    owned = term.factors[0].axes
    made = values[0]
    if len(values) > 1:
      a, b = term.factors
      owned = tuple(i for i in whole if a.owns(i) or b.owns(i))
      made = product(values[0], a.axes, values[1], b.axes, owned)
    made = times(lowrank.spread(made, owned, view.shape), term.scale)
    for f in term.spreads:
      made = multiplied(made, whole, f, f.axes)
    total = plus(total, made)
  assert total is not None  # A view has a base at least.
  return total


# What is known of rows that nobody has used.
LOOKED = Table()


@LOOKED.rule('convert_element_type')
def converted(looked: Looked, *, new_dtype: Any, **_: Any) -> Array:
  """Sums rows in the dtype that they are cast to, if it is a wider one."""
  new = np.dtype(new_dtype)
  if not widens(looked.dtype, new):
    raise Decline
  view = looked.view
  return computed(view.like(view.terms, dtype=new))
