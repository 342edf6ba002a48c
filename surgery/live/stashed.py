"""Stashed values: traced values that a model keeps besides its results.

A layer may write `self.hidden = h`, or append it to a list, to be read after
the call. If the model is traced separately from its caller, such a value
belongs to a trace that has ended. So the objects that a model can reach are
searched before and after.
"""

from __future__ import annotations

import collections
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import blox as bx
import jax
import numpy as np

from surgery import jaxcompat

# Types that hold no other values, or that no model writes to.
_ATOMS = (
  str,
  bytes,
  int,
  float,
  complex,
  type(None),
  np.ndarray,
  np.generic,
  np.dtype,
  jax.Array,
  bx.Graph,
  type,
  types.ModuleType,
  types.BuiltinFunctionType,
)
_MUTABLE = (dict, list, set, collections.deque)
# Objects within objects, and functions by their names, are followed this far.
_DEPTH = 4
# Functions of these packages are no part of a model.
_LIBRARIES = (
  'blox',
  'builtins',
  'functools',
  'jax',
  'jaxlib',
  'numpy',
  'surgery',
)


class Stash:
  """The values that a model holds, as of now.

  Args:
    roots: a model, and other objects that its calls may write to.
  """

  def __init__(self, roots: Iterable[Any]) -> None:
    self._roots = list(roots)
    self._kept: dict[int, tuple[Any, Any]] = {}
    self._tracers: dict[int, Any] = {}
    # Tracers of an outer trace may be there already; only new ones matter.
    for value in self._all():
      if jaxcompat.is_traced(value):
        self._tracers[id(value)] = value
      elif isinstance(value, _MUTABLE):
        self._kept[id(value)] = value, value.copy()

  @property
  def grown(self) -> bool:
    """Whether the model holds new traced values."""
    return any(map(self._new, self._all()))

  def restore(self) -> None:
    """Removes entries that were added since and hold a new traced value."""
    for value, before in self._kept.values():
      if isinstance(value, dict):
        for name in [n for n, v in value.items() if self._holds(v)]:
          if name in before:
            value[name] = before[name]
          else:
            del value[name]
      # Entries of lists and sets have no names, so all are put back.
      elif any(map(self._holds, value)):
        value.clear()
        value.update(before) if isinstance(value, set) else value.extend(before)

  def _new(self, value: Any) -> bool:
    return jaxcompat.is_traced(value) and id(value) not in self._tracers

  def _holds(self, value: Any) -> bool:
    """Whether a value holds a new traced one, and is not itself restored."""
    if id(value) in self._kept or isinstance(value, bx.Module):
      return False
    return any(map(self._new, _reached([value], set(self._kept))))

  def _all(self) -> Iterator[Any]:
    return _reached(self._roots, set())


def _reached(roots: Iterable[Any], seen: set[int]) -> Iterator[Any]:
  """Yields containers and traced values that are reached from some values."""
  stack = [(root, 0) for root in roots]
  while stack:
    value, depth = stack.pop()
    if jaxcompat.is_traced(value):
      yield value
      continue
    if isinstance(value, _ATOMS) or id(value) in seen:
      continue
    seen.add(id(value))
    if isinstance(value, _MUTABLE):
      yield value
    if isinstance(value, bx.Module) and id(value.graph.root) not in seen:
      seen.add(id(value.graph.root))  # Once for all modules of a model.
      stack += ((m, 0) for _, m in value.graph.root.walk())
    below, further = _parts(value)
    if depth + further <= _DEPTH:
      stack += ((part, depth + further) for part in below)


def _parts(value: Any) -> tuple[Iterable[Any], int]:
  """Returns what a value holds, and by how much that counts as deeper."""
  if isinstance(value, dict):
    return list(value.values()), 0
  if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
    return list(value), 0
  if isinstance(value, functools.partial):
    return [value.func, value.args, value.keywords], 0
  if inspect.ismethod(value):
    return [value.__self__, value.__func__], 0
  if inspect.isfunction(value):
    return ([] if _is_library(value) else _captured(value)), 1
  methods = [
    part
    for kind in type(value).__mro__
    if not _is_library(kind)
    for part in vars(kind).values()
  ]
  held = getattr(value, '__dict__', None)
  return [held, *methods], 0 if isinstance(value, bx.Module) else 1


def _is_library(value: Any) -> bool:
  return str(value.__module__).partition('.')[0] in _LIBRARIES


def _captured(function: Callable[..., Any]) -> list[Any]:
  """Returns what a function holds or names: its closure, its globals."""
  code = function.__code__
  held = [function.__dict__, function.__defaults__, function.__kwdefaults__]
  for cell in function.__closure__ or ():
    try:
      held.append(cell.cell_contents)
    except ValueError:
      continue  # An empty cell: the name is not assigned yet.
  names = function.__globals__
  held += (names[n] for n in code.co_names if n in names)
  return held
