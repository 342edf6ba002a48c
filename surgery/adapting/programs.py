"""Compiled programs, shared by all whose text is the same.

A draw depends on some of an adapter's options and not on others: `alpha` scales
what a layer gets, not what it starts with. Nor does a merge depend on how its
weights were drawn. What a formula depends on is known when it has been traced
and lowered, which takes far less time than compiling it. So programs are kept
by their text, and two adapters that compute alike share one.
"""

from __future__ import annotations

import collections
import hashlib
import re
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax

_ARGUMENT = re.compile(r'%arg\d+:')

# Shape, dtype, and whether the type is weak.
_Kind = tuple[tuple[int, ...], Any, bool]

# Texts that are known, of a few bytes each.
_NAMES = 4096


class Programs:
  """Compiled functions by what is asked for, and by their text.

  Args:
    most: how many are kept; those that were not used for longest go first.
  """

  def __init__(self, most: int) -> None:
    self._most = most
    self._lock = threading.Lock()
    self._texts: collections.OrderedDict[Hashable, Hashable] = (
      collections.OrderedDict()
    )
    self._made: collections.OrderedDict[Hashable, Callable[..., Any]] = (
      collections.OrderedDict()
    )

  def __len__(self) -> int:
    return len(self._made)

  def get(
    self, key: Hashable, function: Callable[..., Any], *like: Any
  ) -> Callable[..., Any]:
    """Returns a function compiled, or one with the same text that was.

    Args:
      key: what decides the function, but for its arguments.
      function: the function.
      *like: its arguments, or shapes and dtypes of them; it is to be called
        with such alone.
    """
    flat, tree = jax.tree.flatten(like)
    kinds = tuple(_kind(value) for value in flat)
    # With 64 bits a formula may have another text.
    config: Any = jax.config  # Its attributes are not typed.
    key = (key, kinds, tree, bool(config.jax_enable_x64))
    with self._lock:
      text = _found(self._texts, key)
      made = None if text is None else _found(self._made, text)
    if made is not None:
      return made
    # Not under the lock: an author's code runs here. Where two threads come at
    # once both lower it, and both take what is there first.
    compiled = jax.jit(function, keep_unused=True)
    text = _text(compiled, tree, kinds) or key
    with self._lock:
      _keep(self._texts, key, text, _NAMES)
      return _keep(self._made, text, compiled, self._most)


def _kind(value: Any) -> _Kind:
  """Returns what decides the program of an argument."""
  dtype = jax.dtypes.canonicalize_dtype(value.dtype)
  return tuple(value.shape), dtype, bool(getattr(value, 'weak_type', False))


def _text(compiled: Any, tree: Any, kinds: tuple[_Kind, ...]) -> bytes | None:
  """Returns a digest of a program's text; None if the text is not all of it."""
  structs = [
    jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)
    for shape, dtype, weak in kinds
  ]
  lowered = compiled.lower(*jax.tree.unflatten(tree, structs))
  text = lowered.as_text()
  # Python functions, and constants that are handed over, stand beside it. All
  # arguments are kept, so that others than those given are seen.
  entry = next(line for line in text.splitlines() if '@main(' in line)
  if 'callback' in text or len(_ARGUMENT.findall(entry)) != len(kinds):
    return None
  # Results and arguments are told apart by their names, and arguments by weak
  # types, which the text does not hold: another kind would be traced anew.
  said = f'{lowered.out_tree}\n{tree}\n{kinds}\n{text}'
  return hashlib.blake2b(said.encode(), digest_size=16).digest()


def _found(table: collections.OrderedDict[Any, Any], key: Any) -> Any:
  if key in table:
    table.move_to_end(key)
    return table[key]
  return None


def _keep(
  table: collections.OrderedDict[Any, Any], key: Any, value: Any, most: int
) -> Any:
  """Returns what a table holds for a key, which is the value if it is new."""
  kept = table.setdefault(key, value)
  table.move_to_end(key)
  while len(table) > most:
    table.popitem(last=False)
  return kept
