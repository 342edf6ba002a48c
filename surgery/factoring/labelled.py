"""Products of arrays whose axes have labels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from surgery.factoring import views
from surgery.factoring.views import EXACT, Decline, Factor, Labels, Shape


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How two arrays with labelled axes are multiplied.

  Attributes:
    turns: orders of their axes in which they are brought first, if in another.
    shapes: shapes to which they are brought then.
    numbers: dimension numbers of the product.
    shape: shape to which it is brought.
    order: order of its axes; None if they are in order.
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
  sizes = dict(zip((*x_labels, *y_labels), (*x_shape, *y_shape), strict=True))
  outer = [
    label
    for label in (*x_labels, *y_labels)
    if label not in batch and label not in summed
  ]
  if any(label not in out for label in outer):
    raise Decline  # Summed over in one of them alone.
  found = [*batch, *outer]
  order = tuple(found.index(label) for label in out)
  shape: Shape | None = tuple(sizes[label] for label in found)
  shapes: tuple[Shape | None, Shape | None] = (None, None)
  numbers: Any = (
    (
      tuple(map(x_labels.index, summed)),
      tuple(map(y_labels.index, summed)),
    ),
    (tuple(map(x_labels.index, batch)), tuple(map(y_labels.index, batch))),
  )
  turns: tuple[Shape | None, Shape | None] = (None, None)
  if not batch and summed and max(len(x_labels), len(y_labels)) > 2:
    # As matrices: axes that are not summed over cost copies in the gradient.
    # The smaller one is turned, if they have them in another order.
    larger = x_labels if math.prod(x_shape) > math.prod(y_shape) else y_labels
    summed.sort(key=larger.index)
    x_turn, x_matrix, x_axis = _matrix(x_labels, x_shape, summed)
    y_turn, y_matrix, y_axis = _matrix(y_labels, y_shape, summed)
    turns = (x_turn, y_turn)
    shapes = (
      None if x_matrix == x_shape else x_matrix,
      None if y_matrix == y_shape else y_matrix,
    )
    numbers = (((x_axis,), (y_axis,)), ((), ()))
  else:
    shape = None
  return _Plan(
    turns,
    shapes,
    numbers,
    shape,
    None if order == tuple(range(len(order))) else order,
  )


def product(
  x: Any,
  x_labels: Labels,
  y: Any,
  y_labels: Labels,
  out: Labels,
  params: Mapping[str, Any] = EXACT,
  dtype: Any = None,
) -> Any:
  """Returns the product of two arrays, summed over labels that `out` lacks.

  Args:
    x: an array.
    x_labels: labels of its axes.
    y: another array.
    y_labels: labels of its axes; equal ones go together.
    out: labels of the result.
    params: of the primitive `dot_general`, as far as they are not said here.
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


def multiplied(x: Any, labels: Labels, by: Factor, names: Labels) -> Any:
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
