"""What a caller gave, checked where arguments are easily exchanged."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

from surgery import aliases, errors


def params(value: Any, verb: Callable[..., Any]) -> Any:
  """Returns `value` if it is params.

  Args:
    value: what was given.
    verb: the public function that was called.

  Raises:
    SurgeryError: if it is something else, with the order of the arguments.
  """
  if not isinstance(value, aliases.Params):
    raise wrong(verb, 'bx.Params', value)
  return value


def path(value: Any, verb: Callable[..., Any]) -> str | os.PathLike[str]:
  """Returns `value` if it is a path.

  Raises:
    SurgeryError: if it is something else, with the order of the arguments.
  """
  if not isinstance(value, (str, os.PathLike)):
    raise wrong(verb, 'a path', value)
  return value


def model(value: Any, verb: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `value` if it can be called.

  Raises:
    SurgeryError: if it is something else, with the order of the arguments.
  """
  if not callable(value):
    raise wrong(verb, 'a module or a function', value)
  found: Callable[..., Any] = value
  return found


def names(value: Any) -> list[str]:
  """Returns names of adapters as a list.

  Raises:
    SurgeryError: if it is neither a name nor several.
  """
  listed = [value] if isinstance(value, str) else value
  if isinstance(listed, Iterable):
    listed = list(listed)
    if all(isinstance(name, str) for name in listed):
      return listed
  raise errors.SurgeryError(
    f'expected the name of an adapter, or several, found {value!r}.'
  )


def wrong(
  verb: Callable[..., Any], expected: str, value: Any
) -> errors.SurgeryError:
  """Returns the error for an argument of the wrong kind."""
  name = _name(verb)
  return errors.SurgeryError(
    f'{name}: expected {expected}, found {type(value).__name__}. '
    f'Write surgery.{name}({arguments(verb)}).'
  )


def _name(verb: Callable[..., Any]) -> str:
  # A module that defines `open` could not use Python's.
  return 'open' if verb.__name__ == 'open_checkpoint' else verb.__name__


def arguments(verb: Callable[..., Any]) -> str:
  """Returns the arguments of a function that have to be given, as text."""
  parameters = inspect.signature(verb).parameters.values()
  required = [
    p.name if p.kind is not p.KEYWORD_ONLY else f'{p.name}=…'
    for p in parameters
    if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
  ]
  variable = any(p.kind is p.VAR_POSITIONAL for p in parameters)
  return ', '.join([*required, *(['…'] if variable else [])])
