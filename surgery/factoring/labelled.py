"""Products of arrays whose axes have labels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from surgery.aliases import Array
from surgery.factoring import views
from surgery.factoring.views import (
  EXACT,
  Decline,
  DType,
  Factor,
  Labels,
  Shape,
)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How two arrays with labelled axes are multiplied.

  Attributes:
    turns: orders of their axes in which they are brought first, if in another.
    shapes: shapes to which they are brought then.
    numbers: dimension numbers of the product.
    shape: shape to which it is brought.
    order: order of its axes; None if they are in order.

  What is None is not done.
  """

  turns: tuple[Shape | None, Shape | None]
  shapes: tuple[Shape | None, Shape | None]
  numbers: Any
  shape: Shape | None
  order: tuple[int, ...] | None


def _matrix(
  labels: Labels, sizes: Shape, summed: Sequence[Hashable]
) -> tuple[Shape | None, Shape, int]:
  """Returns how an array is seen as a matrix.

  Args:
    labels: labels of its axes.
    sizes: its shape.
    summed: labels that are summed over, in the order that they shall have.

  Returns:
    The order of its axes, if it has to be turned; the shape of the matrix; and
    the axis of it that is summed over.
  """
  inner = [labels.index(label) for label in summed]
  outer = [i for i in range(len(labels)) if i not in inner]
  shape = (
    math.prod(sizes[i] for i in outer),
    math.prod(sizes[i] for i in inner),
  )
  if [*inner, *outer] == [*range(len(labels))]:
    return None, (shape[1], shape[0]), 0
  turn = (*outer, *inner)
  return None if turn == tuple(range(len(labels))) else turn, shape, 1


@functools.lru_cache(maxsize=8192)
def _plan(
  x_labels: Labels,
  x_shape: Shape,
  y_labels: Labels,
  y_shape: Shape,
  out: Labels,
) -> _Plan:
  common = [label for label in x_labels if label in y_labels]
  batch = [label for label in common if label in out]
  summed = [label for label in common if label not in out]
  outer = [label for label in (*x_labels, *y_labels) if label not in common]
  if any(label not in out for label in outer):
    raise Decline  # Summed over in one of them alone.
  # The primitive gives the axes that go along, then those of `x`, of `y`.
  found = [*batch, *outer]
  at = tuple(found.index(label) for label in out)
  order = None if at == tuple(range(len(at))) else at
  if batch or not summed or max(len(x_labels), len(y_labels)) <= 2:
    at_both = lambda labels: (
      tuple(map(x_labels.index, labels)),
      tuple(map(y_labels.index, labels)),
    )
    numbers = (at_both(summed), at_both(batch))
    return _Plan((None, None), (None, None), numbers, None, order)
  # As matrices: axes that are not summed over cost copies in the gradient.
  # The smaller one is turned, if they have them in another order.
  larger = x_labels if math.prod(x_shape) > math.prod(y_shape) else y_labels
  summed.sort(key=larger.index)
  x_turn, x_matrix, x_axis = _matrix(x_labels, x_shape, summed)
  y_turn, y_matrix, y_axis = _matrix(y_labels, y_shape, summed)
  shapes = (
    None if x_matrix == x_shape else x_matrix,
    None if y_matrix == y_shape else y_matrix,
  )
  sizes = dict(zip((*x_labels, *y_labels), (*x_shape, *y_shape), strict=True))
  shape = tuple(sizes[label] for label in found)
  numbers = (((x_axis,), (y_axis,)), ((), ()))
  return _Plan((x_turn, y_turn), shapes, numbers, shape, order)


def product(
  x: Array,
  x_labels: Labels,
  y: Array,
  y_labels: Labels,
  out: Labels,
  params: Mapping[str, Any] = EXACT,
  dtype: DType | None = None,
) -> Array:
  """Returns the product of two arrays, summed over labels that `out` lacks.

  Args:
    x: an array.
    x_labels: labels of its axes.
    y: another array.
    y_labels: labels of its axes; equal ones go together.
    out: labels of the result.
    params: further parameters of the primitive `dot_general`.
    dtype: in which it is summed, and which it has.

  Raises:
    Decline: if an axis of one array alone would have to be summed over.
  """
  plan = _plan(x_labels, x.shape, y_labels, y.shape, out)
  if plan.turns[0] is not None:
    x = jax.lax.transpose(x, plan.turns[0])
  if plan.turns[1] is not None:
    y = jax.lax.transpose(y, plan.turns[1])
  if plan.shapes[0] is not None:
    x = jax.lax.reshape(x, plan.shapes[0])
  if plan.shapes[1] is not None:
    y = jax.lax.reshape(y, plan.shapes[1])
  # Not the primitive itself: within shard_map one may vary over axes of the
  # mesh over which the other does not.
  made = jax.lax.dot_general(
    x, y, plan.numbers, **{**params, 'preferred_element_type': dtype}
  )
  if plan.shape is not None and plan.shape != made.shape:
    made = jax.lax.reshape(made, plan.shape)
  return made if plan.order is None else jax.lax.transpose(made, plan.order)


def multiplied(x: Array, labels: Labels, by: Factor, names: Labels) -> Array:
  """Returns an array times one that owns some of its axes.

  Args:
    x: the array.
    labels: labels of its axes.
    by: what it is multiplied by.
    names: labels of the axes of `by`.
  """
  axes = [labels.index(name) for name in names]
  return jax.lax.mul(
    x, views.beside(views.cast(by.value, x.dtype), axes, x.ndim)
  )
