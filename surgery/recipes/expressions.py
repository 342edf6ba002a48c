"""Expressions of variables in recipes: `${1 - t}`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from surgery import errors

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
  ast.FloorDiv: operator.floordiv,
  ast.Mod: operator.mod,
  ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
  ast.USub: operator.neg,
  ast.UAdd: operator.pos,
}
# A recipe that somebody sent must not keep a machine busy: 9 ** 9 ** 9.
_LONGEST, _LARGEST = 200, 1 << 64

_WHAT = (
  'expected a variable, or an expression of numbers and variables with + - * / '
  '// % ** and parentheses'
)


def evaluated(text: str, variable: Callable[[str], Any]) -> int | float:
  """Returns the number that an expression gives.

  Args:
    text: the expression, in Python's syntax.
    variable: returns the value of a variable.

  Raises:
    RecipeError: for anything else, and for a result that is no finite number.
  """
  try:
    tree = ast.parse(text.strip(), mode='eval') if text.strip() else None
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    tree = None
  if tree is None or len(text) > _LONGEST:
    raise errors.RecipeError(f'{text!r:.80}: {_WHAT}.')
  try:
    found = _value(tree.body, text, variable)
  except (ZeroDivisionError, OverflowError) as error:
    raise errors.RecipeError(f'{text!r}: {error}.') from None
  return found


def _value(
  node: ast.expr, text: str, variable: Callable[[str], Any]
) -> int | float:
  if isinstance(node, ast.Name):
    return _number(variable(node.id), text, f'the variable {node.id!r} is')
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return _number(node.value, text, 'it has')
  if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
    return _UNARY[type(node.op)](_value(node.operand, text, variable))
  if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
    left = _value(node.left, text, variable)
    right = _value(node.right, text, variable)
    if isinstance(node.op, ast.Pow) and abs(right) > 64:
      raise errors.RecipeError(
        f'{text!r}: expected an exponent up to 64, found {right}.'
      )
    return _number(_BINARY[type(node.op)](left, right), text, 'it gives')
  raise errors.RecipeError(f'{text!r:.80}: {_WHAT}.')


def _number(value: Any, text: str, what: str) -> int | float:
  """Returns a value that is a number.

  Raises:
    RecipeError: for any other.
  """
  if (
    isinstance(value, bool)
    or not isinstance(value, (int, float))
    or not math.isfinite(value)
    or (isinstance(value, int) and abs(value) >= _LARGEST)
  ):
    raise errors.RecipeError(
      f'{text!r}: expected numbers, {what} {value!r:.80}.'
    )
  return value
