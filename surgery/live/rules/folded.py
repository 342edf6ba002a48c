"""Views of which axes were joined: a Kronecker product, blocks on a diagonal.

What is done to them is done to the view before, and its axes joined again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from surgery.live.rules import arithmetic, moves, products
from surgery.live.rules.table import Table
from surgery.live.views import Decline, Folded, Shape, View

RULES = Table()
rule = RULES.rule


def _divided(value: Any, like: Folded) -> Any:
  """Returns an operand with the axes that a view had before.

  Raises:
    Decline: if its axes were joined in another way, or cannot be divided.
  """
  if isinstance(value, Folded):
    if (value.groups, value.view.shape) != (like.groups, like.view.shape):
      raise Decline
    return value.view
  if not np.ndim(value):
    return value
  sizes: list[int] = []
  for size, group in zip(value.shape, like.groups, strict=True):
    # Of size one it is repeated along each of them.
    sizes += [like.view.shape[i] if size != 1 else 1 for i in group]
  if isinstance(value, View):
    return moves.reshape(value, new_sizes=sizes)
  return jax.lax.reshape(value, sizes)


def _elementwise(name: str, rules: Table) -> None:
  """Registers a primitive that takes elements that lie in one place."""

  @rule(name)
  def elementwise(*operands: Any, **params: Any) -> Folded:
    """Does it to the views before."""
    like = next(o for o in operands if isinstance(o, Folded))
    made = rules[name](*(_divided(o, like) for o in operands), **params)
    if type(made) is not View:
      raise Decline  # A square: what is known of it is not known of this.
    return like.of(made)


for _name in ('convert_element_type', 'neg', 'mul', 'div'):
  _elementwise(_name, arithmetic.RULES)
for _name in ('add', 'add_any', 'sub'):
  _elementwise(_name, arithmetic.RULES)
for _name in moves.EACH:
  _elementwise(_name, moves.RULES)


@rule('transpose')
def transpose(
  folded: Folded, *, permutation: Sequence[int], **_: Any
) -> Folded:
  """Turns the axes of groups together."""
  order = [i for to in permutation for i in folded.groups[to]]
  sizes = [len(folded.groups[to]) for to in permutation]
  return Folded(
    moves.transpose(folded.view, permutation=order), moves.runs(sizes)
  )


@rule('dot_general')
def dot_general(
  lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any
) -> Any:
  """The product with the view before, and an input divided likewise."""
  if isinstance(lhs, View) and isinstance(rhs, View):
    raise Decline
  summed, batch = dimension_numbers
  values = [lhs, rhs]
  numbers: list[list[list[int]]] = [[[], []], [[], []]]
  left = isinstance(lhs, Folded)
  folded: Folded = lhs if left else rhs
  x = rhs if left else lhs
  ours, theirs = (0, 1) if left else (1, 0)
  # Which axes of the view an axis of the input goes with.
  groups = {
    pair[theirs][k]: folded.groups[pair[ours][k]]
    for pair in (summed, batch)
    for k in range(len(pair[ours]))
  }
  starts: dict[int, int] = {}
  sizes: list[int] = []
  for axis, size in enumerate(x.shape):
    starts[axis] = len(sizes)
    group = groups.get(axis)
    sizes += [size] if group is None else [folded.view.shape[i] for i in group]
  for kind, pair in enumerate((summed, batch)):
    for k in range(len(pair[ours])):
      group = folded.groups[pair[ours][k]]
      start = starts[pair[theirs][k]]
      numbers[kind][ours] += group
      numbers[kind][theirs] += range(start, start + len(group))
  values[ours], values[theirs] = folded.view, jax.lax.reshape(x, sizes)
  made = products.dot_general(
    *values,
    dimension_numbers=tuple(tuple(map(tuple, pair)) for pair in numbers),
    **params,
  )
  return jax.lax.reshape(made, _shape(lhs, rhs, dimension_numbers))


def _shape(lhs: Any, rhs: Any, dimension_numbers: Any) -> Shape:
  """Returns the shape of a product."""
  (ls, rs), (lb, rb) = dimension_numbers
  batch = [lhs.shape[i] for i in lb]
  free = [
    value.shape[i]
    for value, used in ((lhs, {*ls, *lb}), (rhs, {*rs, *rb}))
    for i in range(len(value.shape))
    if i not in used
  ]
  return (*batch, *free)
