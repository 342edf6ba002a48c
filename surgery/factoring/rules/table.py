"""The table of rules, and what every rule needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from surgery.factoring.views import Decline, View

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


def ordered(value: Any, labels: Sequence[Any], wanted: Sequence[Any]) -> Any:
  """Returns an array whose axes have labels with these in a wanted order."""
  return value.transpose([list(labels).index(x) for x in wanted])


def is_number(scale: Any, number: float) -> bool:
  """Whether a scale is known to be a number."""
  return isinstance(scale, float) and scale == number
