"""Rules for views whose axes were joined: Kronecker products, diagonal blocks.

The operation is done to the view before the reshape, and then its axes are
joined again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from surgery.factoring.rules import arithmetic, moves, products
from surgery.factoring.rules.table import Table
from surgery.factoring.views import Axes, Decline, Folded, Operand, Shape, View

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
  """Registers a primitive that works element by element."""

  @rule(name)
  def elementwise(*operands: Any, **params: Any) -> Folded:
    """Does it to the views before the reshape."""
    like = next(o for o in operands if isinstance(o, Folded))
    made = rules[name](*(_divided(o, like) for o in operands), **params)
    if type(made) is not View:
      raise Decline  # A square: what is known of it is not known of this.
    return like.of(made)


for _name in (
  *('convert_element_type', 'neg', 'mul', 'div'),
  *('add', 'add_any', 'sub'),
):
  _elementwise(_name, arithmetic.RULES)
for _name in moves.EACH:
  _elementwise(_name, moves.RULES)


@rule('transpose')
def transpose(
  folded: Folded, *, permutation: Sequence[int], **_: Any
) -> Folded:
  """Moves the axes of each group together."""
  order = [i for to in permutation for i in folded.groups[to]]
  sizes = [len(folded.groups[to]) for to in permutation]
  return Folded(
    moves.transpose(folded.view, permutation=order), moves.runs(sizes)
  )


@rule('dot_general')
def dot_general(
  lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any
) -> Any:
  """Multiplies the view before by an input whose axes are divided likewise."""
  if isinstance(lhs, View) and isinstance(rhs, View):
    raise Decline
  summed, batch = dimension_numbers
  ours, theirs = (0, 1) if isinstance(lhs, Folded) else (1, 0)
  values = [lhs, rhs]
  folded, x = values[ours], values[theirs]
  # The sizes that each axis of the input is divided into.
  divided: list[Axes] = [(size,) for size in x.shape]
  for pair in (summed, batch):
    for mine, axis in zip(pair[ours], pair[theirs], strict=True):
      divided[axis] = tuple(folded.view.shape[i] for i in folded.groups[mine])
  groups: list[tuple[Axes, ...]] = [(), ()]
  groups[ours], groups[theirs] = folded.groups, moves.runs(map(len, divided))
  values[ours] = folded.view
  values[theirs] = jax.lax.reshape(x, [n for sizes in divided for n in sizes])
  made = products.dot_general(
    *values,
    dimension_numbers=(_apart(summed, groups), _apart(batch, groups)),
    **params,
  )
  return jax.lax.reshape(made, _shape(lhs, rhs, dimension_numbers))


def _apart(
  pair: Sequence[Sequence[int]], groups: Sequence[Sequence[Axes]]
) -> tuple[Axes, ...]:
  """Returns axes of two operands as those that they were joined from."""
  return tuple(
    tuple(i for axis in axes for i in own[axis])
    for axes, own in zip(pair, groups, strict=True)
  )


def _shape(lhs: Operand, rhs: Operand, dimension_numbers: Any) -> Shape:
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
