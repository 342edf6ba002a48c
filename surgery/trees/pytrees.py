"""Models that are pytrees of JAX: nested containers, whatever the framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from surgery import errors
from surgery.contract.trees import Slot, Tree
from surgery.live import described
from surgery.naming import paths
from surgery.naming.paths import Path

_SCALARS = (bool, int, float, complex)


def is_array(value: Any) -> bool:
  """Whether a value is an array, or the shape of one."""
  return hasattr(value, 'shape') and hasattr(value, 'dtype')


def trains(value: Any) -> bool:
  """Whether an array can train: JAX has gradients of it."""
  dtype = getattr(value, 'dtype', None)
  if dtype is None or described.is_key(value):
    return False
  return bool(jnp.issubdtype(dtype, jnp.inexact))


def segments(key: Any) -> tuple[str, ...]:
  """Returns a key of JAX's path of a leaf as segments of ours.

  A name such as haiku's `mlp/~/linear_0` is split at its slashes.

  Raises:
    SurgeryError: if it is a key of a dict and no name.
  """
  if isinstance(key, jax.tree_util.SequenceKey):
    return (str(key.idx),)
  if isinstance(key, jax.tree_util.GetAttrKey):
    return (key.name,)
  if not isinstance(key.key, str | int):
    raise errors.SurgeryError(
      'expected bx.Params, or a model whose dicts have names for keys, found a '
      f'dict with the key {key.key!r}. Give the params themselves, not a dict '
      'of them.'
    )
  return tuple(str(key.key).split('/'))


def path_of(keys: Iterable[Any]) -> Path:
  """Returns JAX's path of a leaf as a path of ours."""
  return tuple(part for key in keys for part in segments(key))


def refuse_twice(name: str, found: Iterable[Path]) -> None:
  """Raises if two leaves have one path.

  Raises:
    SurgeryError: naming the path.
  """
  seen = set()
  for path in found:
    if path in seen:
      raise errors.SurgeryError(
        f'{name} has two arrays of the path {paths.show(path)}: keys of dicts '
        'are split at slashes, and numbers are read as text. Rename one key.'
      )
    seen.add(path)


class Pytrees(Tree):
  """Models that JAX can flatten with paths, and unflatten.

  What is no array is left as it is: functions, text.
  """

  name = 'a pytree'
  # Numbers of Python are parameters where containers are plain.
  scalars = False

  def is_box(self, value: Any) -> bool:
    """Whether a value is a box of the framework around one array."""
    return False

  def slot(self, path: Path, leaf: Any) -> Slot | None:
    """Returns a leaf as a slot; None if it holds no array."""
    if is_array(leaf) or (self.scalars and type(leaf) in _SCALARS):
      return Slot(leaf, trains(leaf))
    return None

  def boxed(self, leaf: Any, value: Any) -> Any:
    """Returns a value in the box that a leaf is."""
    return value

  def _leaves(self, value: Any) -> tuple[list[tuple[Path, Any]], Any]:
    # A half has None where it lacks an array.
    is_leaf = lambda one: one is None or self.is_box(one)
    found, structure = jax.tree_util.tree_flatten_with_path(
      value, is_leaf=is_leaf
    )
    return [(path_of(keys), leaf) for keys, leaf in found], structure

  def slots(self, value: Any) -> dict[Path, Slot]:
    """Returns the arrays of a model by path."""
    leaves, _ = self._leaves(value)
    found = {}
    refuse_twice(self.name, (path for path, _ in leaves))
    for path, leaf in leaves:
      slot = self.slot(path, leaf)
      if slot is not None and path:
        found[path] = slot
    return found

  def build(
    self, like: Any, values: Mapping[Path, Any], rest: Any = dataclasses.MISSING
  ) -> Any:
    """Returns a model of the same structure with other arrays."""
    leaves, structure = self._leaves(like)
    made = []
    for path, leaf in leaves:
      if path in values:
        made.append(self.boxed(leaf, values[path]))
      elif rest is dataclasses.MISSING or leaf is None:
        made.append(leaf)
      else:
        made.append(rest)
    return jax.tree.unflatten(structure, made)

  def join(self, first: Any, second: Any) -> Any:
    """Returns the whole of two halves."""
    ones, _ = self._leaves(first)
    others, structure = self._leaves(second)
    if [path for path, _ in ones] != [path for path, _ in others]:
      raise errors.AdapterError(
        'merge: the halves have other structures. Split one tree and merge its '
        'halves.'
      )
    made = [
      one if self._lacks(path, other) and one is not None else other
      for (path, one), (_, other) in zip(ones, others, strict=True)
    ]
    return jax.tree.unflatten(structure, made)

  def _lacks(self, path: Path, leaf: Any) -> bool:
    return leaf is None or (self.is_box(leaf) and not self.slot(path, leaf))


class Plain(Pytrees):
  """Nested dicts, lists, tuples and dataclasses, as haiku's params are."""

  name = 'a plain tree'
  scalars = True

  def owns(self, value: Any) -> bool:
    """Whether a value is a container in which there are arrays."""
    if isinstance(value, (str, bytes)) or is_array(value) or value is None:
      return False
    if isinstance(value, type):
      return False
    leaves = jax.tree.leaves(value)
    if len(leaves) == 1 and leaves[0] is value:
      return False  # No container.
    return any(map(is_array, leaves))

  def knows(self, model: Any) -> bool:
    """Whether `layers` can be asked: arrays know nothing of layers."""
    return False

  def rebuilt(self, like: Any, values: Mapping[Path, Any]) -> Any:
    """Returns dicts with other keys; only what dicts hold can move.

    Raises:
      SurgeryError: if the structure has other containers than dicts.
    """
    if not _are_dicts(like):
      return super().rebuilt(like, values)
    return _nested(like, values, self._kept(like, values))

  def _kept(self, like: Any, values: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns boxed leaves, by path."""
    leaves = dict(self._leaves(like)[0])
    return {
      path: self.boxed(leaves[path], value) if path in leaves else value
      for path, value in values.items()
    }


def _are_dicts(value: Any) -> bool:
  if isinstance(value, Mapping):
    return all(isinstance(k, str) for k in value) and all(
      _are_dicts(v)
      for v in value.values()
      if isinstance(v, (Mapping, list, tuple))
    )
  return not isinstance(value, (list, tuple))


def _nested(
  like: Mapping[str, Any],
  values: Mapping[Path, Any],
  leaves: Mapping[Path, Any],
) -> Any:
  """Returns nested dicts that hold leaves under other paths.

  A name with slashes that `like` has stays whole.
  """
  made: dict[str, Any] = {}
  whole = sorted((tuple(k.split('/')) for k in like), key=len, reverse=True)
  beneath: dict[str, dict[Path, Any]] = {}
  for path, leaf in leaves.items():
    front = next((w for w in whole if path[: len(w)] == w), path[:1])
    # haiku keeps modules in one dict and parameters in one beneath it.
    if any(len(w) > 1 for w in whole) and front == path[:1]:
      front = path[:-1] or path
    name, rest = '/'.join(front), path[len(front) :]
    if rest:
      beneath.setdefault(name, {})[rest] = leaf
    else:
      made[name] = leaf
  for name, inner in beneath.items():
    old = like.get(name)
    old = old if isinstance(old, Mapping) else {}
    made[name] = _nested(old, inner, inner)
  kind = type(like)
  return made if kind is dict else _of_kind(kind, made)


def _of_kind(kind: Callable[..., Any], made: dict[str, Any]) -> Any:
  try:
    return kind(made)
  except TypeError:
    return made
