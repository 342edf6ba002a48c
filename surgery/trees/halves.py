"""Halves of adapted trees: what trains, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery import errors
from surgery.live import params as live
from surgery.model.records import unite
from surgery.naming.paths import Path
from surgery.trees.adapted import AdaptedTree, flat, make, nested
from surgery.trees.converting import to_params


def split(
  tree: AdaptedTree, predicate: Callable[[Path, Any], bool] | None
) -> tuple[AdaptedTree, AdaptedTree]:
  """Returns what a predicate is true of, and the rest; see `AdaptedTree`."""
  params = to_params(tree)
  if predicate is None:
    chosen = params.trains
  else:
    given = predicate
    chosen = lambda path, param: bool(given(path, param.value))
  first, rest = (_half(tree, half) for half in params.split(chosen))
  # What is no array of the model stands in the second half alone.
  kind = tree._kind
  mine = {p: slot.value for p, slot in kind.slots(first.base).items()}
  lacking = dict.fromkeys(kind.slots(tree.base))
  first.base = kind.build(first.base, {**lacking, **mine}, None)
  return first, rest


def _half(tree: AdaptedTree, params: live.AdaptedParams) -> AdaptedTree:
  """Returns some of a tree's arrays in the structure of the whole."""
  kind, owned = tree._kind, tree.records.owned
  values = {p: params[p].value for p in params.keys() if p not in owned}
  lacking = dict.fromkeys(kind.slots(tree.base))
  weights = {
    path: weight for path, weight in flat(tree.weights) if path in params
  }
  return make(
    kind,
    kind.build(tree.base, {**lacking, **values}),
    nested({**dict.fromkeys(owned), **weights}),
    tree.records,
    tree._flags,
    tree._aliases,
    tree._notes,
  )


def merge(tree: AdaptedTree, other: AdaptedTree) -> AdaptedTree:
  """Returns the whole of two halves; see `AdaptedTree`."""
  if not isinstance(other, AdaptedTree):
    raise errors.AdapterError(
      f'merge: expected the other half, an AdaptedTree, found '
      f'{type(other).__name__}.'
    )
  records = unite(tree.records, other.records)
  if tree._flags != other._flags or type(tree._kind) is not type(other._kind):
    raise errors.AdapterError(
      'merge: the halves are of two trees, of which other parameters train or '
      'have other metadata. Split one tree and merge its halves.'
    )
  kind = tree._kind
  base = kind.join(tree.base, other.base)
  weights = _both(tree.weights, other.weights)
  return make(
    kind, base, weights, records, tree._flags, tree._aliases, tree._notes
  )


def _both(first: Any, second: Any) -> Any:
  if type(first) is dict and type(second) is dict:
    return {k: _both(first.get(k), second.get(k)) for k in {**first, **second}}
  return first if second is None else second
