"""The table of rules, and what every rule needs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from surgery.aliases import Array
from surgery.factoring.views import Decline, Operand, View

Rule = Callable[..., Any]


class Table(dict[str, Rule]):
  """Rules by the primitives that they are for."""

  def rule(self, *names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for some primitives."""

    def add(function: Rule) -> Rule:
      self.update(dict.fromkeys(names, function))
      return function

    return add


def only(operands: Sequence[Any]) -> View:
  """Returns the first operand.

  Raises:
    Decline: if it is no view, or another one is.
  """
  view, *rest = operands
  if not isinstance(view, View) or any(isinstance(o, View) for o in rest):
    raise Decline
  return view


def one_view(lhs: Operand, rhs: Operand) -> tuple[View, Array, bool]:
  """Returns which of two operands is a view, the other, and if it is the left.

  Raises:
    Decline: if both are views.
  """
  if isinstance(lhs, View):
    if isinstance(rhs, View):
      raise Decline
    return lhs, rhs, True
  assert isinstance(rhs, View)
  return rhs, lhs, False


def ordered(
  value: Array, labels: Sequence[Hashable], wanted: Sequence[Hashable]
) -> Array:
  """Returns an array whose axes have labels with these in a wanted order."""
  return value.transpose([list(labels).index(x) for x in wanted])


def is_number(scale: Any, number: float) -> bool:
  """Whether a scale is known to be a number."""
  return isinstance(scale, float) and scale == number
