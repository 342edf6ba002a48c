"""`AdaptedTree`: a model of any framework, and the adapters beside it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from surgery import errors
from surgery.contract.trees import Tree
from surgery.model.records import Records
from surgery.naming import paths
from surgery.naming.paths import Path

_KEYS = tuple(map(jax.tree_util.GetAttrKey, ('base', 'weights')))
# What a flag says of a parameter: whether it trains, and its metadata.
Flag = tuple[bool, Mapping[str, Any]]


class Flags(Mapping[Path, Flag]):
  """What is known of parameters beside their arrays, as static data."""

  def __init__(self, flags: Mapping[Path, Flag]) -> None:
    self._flags = dict(flags)
    # Of text, numbers and containers of these: their repr is one to one.
    self._token = repr(
      sorted((p, t, sorted(m.items())) for p, (t, m) in self._flags.items())
    )

  def __getitem__(self, path: Path) -> Flag:
    return self._flags[path]

  def __iter__(self) -> Iterator[Path]:
    return iter(self._flags)

  def __len__(self) -> int:
    return len(self._flags)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Flags) and self._token == other._token

  def __hash__(self) -> int:
    return hash(self._token)


class AdaptedTree:
  """A model of any framework with adapters, or with flags of what trains.

  Made by the verbs (`surgery.attach`, `surgery.freeze`, …). As a pytree it has
  the arrays of the model and those of the adapters, so that `jax.jit`,
  `jax.grad` and optax work on it. A function that expects the model itself is
  called through `surgery.factored`, which gives it a model with adapted arrays.

  Attributes:
    base: the model, in its own structure and unadapted.
    weights: nested dicts of the adapters' weights, by the segments of their
      paths.
    records: the adapters, innermost first.
  """

  __slots__ = (
    '__weakref__',
    '_aliases',
    '_flags',
    '_kind',
    '_notes',
    'base',
    'records',
    'weights',
  )

  base: Any
  weights: dict[str, Any]
  records: Records
  _kind: Tree
  _flags: Flags
  _aliases: tuple[tuple[Path, Path], ...]
  # What is known beside the arrays. No part of the pytree, as in params.
  _notes: Mapping[str, Any]

  def __init__(self) -> None:
    raise TypeError('AdaptedTree is made by surgery.attach and surgery.freeze.')

  def resolve(self) -> Any:
    """Returns the model with its parameters adapted, as `factored` gives it.

    The arrays are dense, unless this is called inside of
    `surgery.factored(…)`. To go on without adapters use `surgery.merge`.

    Raises:
      AdapterError: if this is a half that `split` made.
    """
    from surgery.trees import resolving

    return resolving.resolved(self)

  # Halves.

  def split(
    self, predicate: Callable[[Path, Any], bool] | None = None
  ) -> tuple[AdaptedTree, AdaptedTree]:
    """Returns two halves, each with None in the place of what it lacks.

    Args:
      predicate: says of a path and an array whether it goes into the first; by
        default, whether it trains.
    """
    from surgery.trees import halves

    return halves.split(self, predicate)

  def merge(self, other: AdaptedTree) -> AdaptedTree:
    """Returns the whole of two halves; where both have an array, `other`'s.

    Raises:
      AdapterError: if they are not of one tree.
    """
    from surgery.trees import halves

    return halves.merge(self, other)

  # What is none of a model's: loud rather than unadapted.

  def __contains__(self, key: object) -> bool:
    # Frameworks ask containers for keys of theirs. There are none.
    return False

  def __getitem__(self, key: Any) -> NoReturn:
    raise self._unresolved(f'[{key!r}]')

  def __iter__(self) -> Iterator[Any]:
    raise self._unresolved('iteration')

  def __getattr__(self, name: str) -> Any:
    if name.startswith('_'):
      raise AttributeError(name)
    raise _UnresolvedError(str(self._unresolved(f'.{name}')))

  def _unresolved(self, what: str) -> errors.AdapterError:
    held = type(self.base).__name__
    return errors.AdapterError(
      f'{what} was asked of an adapted {held}, which is no {held}: without '
      'surgery.factored a model would go on unadapted. Wrap the function that '
      'takes the model, fast = surgery.factored(function), and call fast with '
      'this tree in the place of the model; the unadapted model is .base.'
    )

  def __repr__(self) -> str:
    lines = [f'AdaptedTree of {type(self.base).__name__}']
    for record in self.records.adapters:
      state = '' if record.enabled else ', disabled'
      lines.append(
        f'# {record.name}: {record.adapter!r} on {len(record.sites)} '
        f'sites{state}'
      )
    return '\n'.join(lines)

  def __reduce__(self) -> Any:
    notes = {k: v for k, v in self._notes.items() if k == 'manifest'}
    return make, (
      self._kind,
      self.base,
      self.weights,
      self.records,
      self._flags,
      self._aliases,
      notes,
    )

  def tree_flatten_with_keys(self) -> tuple[Any, Any]:
    """Flattens into the model and the weights."""
    children = (self.base, self.weights)
    keyed = tuple(zip(_KEYS, children, strict=True))
    return keyed, self._aux()

  def _aux(self) -> tuple[Any, ...]:
    return self._kind, self.records.anonymous(), self._flags, self._aliases

  def tree_flatten(self) -> tuple[Any, Any]:
    """Flattens as `tree_flatten_with_keys`, without keys."""
    return (self.base, self.weights), self._aux()

  @classmethod
  def tree_unflatten(cls, aux: Any, children: Any) -> AdaptedTree:
    """Unflattens what was flattened."""
    kind, records, flags, aliases = aux
    base, weights = children
    return make(kind, base, weights, records, flags, aliases, {})


class _UnresolvedError(errors.AdapterError, AttributeError):
  """An attribute of the model that was asked of the tree."""


jax.tree_util.register_pytree_with_keys(
  AdaptedTree,
  AdaptedTree.tree_flatten_with_keys,
  AdaptedTree.tree_unflatten,
  AdaptedTree.tree_flatten,
)


def make(
  kind: Tree,
  base: Any,
  weights: dict[str, Any],
  records: Records,
  flags: Flags,
  aliases: tuple[tuple[Path, Path], ...],
  notes: Mapping[str, Any],
) -> AdaptedTree:
  """Returns a tree of its parts."""
  _refuse_bytes()
  tree = object.__new__(AdaptedTree)
  tree._kind = kind
  tree.base = base
  tree.weights = weights
  tree.records = records
  tree._flags = flags
  tree._aliases = aliases
  tree._notes = notes
  return tree


def _state_dict(tree: Any) -> NoReturn:
  raise errors.AdapterError(
    'flax.serialization knows nothing of adapters: what it writes of an '
    'adapted tree could not be told from a model. Write surgery.save(path, '
    'tree), and surgery.load(path, like=model) to read it; of a TrainState '
    'save params so, and its other parts as ever.'
  )


@functools.cache
def _registered(serialization: Any) -> None:
  refuse = lambda tree, *rest: _state_dict(tree)
  serialization.register_serialization_state(AdaptedTree, refuse, refuse)


def _refuse_bytes() -> None:
  """Tells flax, where it is imported, that it cannot write a tree by itself."""
  serialization = sys.modules.get('flax.serialization')
  if serialization is not None:
    _registered(serialization)


def is_tree(value: Any) -> bool:
  """Whether a value is an adapted tree."""
  return isinstance(value, AdaptedTree)


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
  """Returns nested dicts that hold values by the segments of their paths."""
  found: dict[str, Any] = {}
  for path, value in flat.items():
    node = found
    for part in path[:-1]:
      node = node.setdefault(part, {})
      if not isinstance(node, dict):
        raise errors.AdapterError(
          f'{paths.show(path)}: this weight lies beneath another. Attach under '
          'another name=.'
        )
    node[path[-1]] = value
  return found


def flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
  """Yields the values in nested dicts by path, but None."""
  if type(tree) is dict:
    for key, value in tree.items():
      yield from flat(value, (*path, key))
  elif tree is not None:
    yield path, tree
