"""Lineage: the passes that made params, kept beside them.

`surgery.migrate` uses it to let an optimizer's state follow. It is no part of
the pytree, so a transformation returns params without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import blox as bx

from surgery.host.manager import Host
from surgery.live import params as live
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.recipes.recipe import Recipe

# At most this many passes are remembered.
_MOST = 64
_MASK = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class Change:
  """One pass on params, or one recipe.

  Attributes:
    name: the pass.
    before: its input, without values.
    after: fingerprints of its result: of all parameters, and of those that
      train.
    run: the pass, or the recipe.
    args: its arguments after the checkpoint.
    kwargs: its named arguments.
    host: the host that it was run with.
  """

  name: str
  before: Checkpoint
  after: tuple[int, int]
  run: Callable[..., Checkpoint] | Recipe
  args: tuple[Any, ...]
  kwargs: Mapping[str, Any]
  host: Host


class Lineage(tuple[Change, ...]):
  """Passes, oldest first. It is neither pickled nor copied."""

  def __reduce__(self) -> Any:
    return (Lineage, ())

  def __deepcopy__(self, memo: Any) -> Lineage:
    return self


def unknown() -> Any:
  """Stands for a value that is not kept."""
  raise AssertionError('Lineage has no values.')


def fingerprints(params: bx.Params | Checkpoint) -> tuple[int, int]:
  """Returns hashes of names, shapes and flags: of all, and of what trains."""
  whole = half = 0
  for path, one in params.items():
    value = one if isinstance(one, Leaf) else one.value
    found = hash((path, tuple(getattr(value, 'shape', None) or ()))) & _MASK
    # A sum, since the order of parameters does not matter.
    whole = (whole + found * (2 if one.trainable else 3)) & _MASK
    if one.trainable:
      half = (half + found * 2) & _MASK
  return whole, half


def remembered(
  after: bx.Params,
  before: bx.Params,
  given: Checkpoint,
  name: str,
  run: Callable[..., Checkpoint] | Recipe,
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
  host: Host,
) -> bx.Params:
  """Returns params with one more pass in their lineage.

  Args:
    after: the result of the pass.
    before: the params that it was given.
    given: the same as a checkpoint.
    name: the pass.
    run: the pass, or the recipe.
    args: its arguments after the checkpoint.
    kwargs: its named arguments.
    host: the host that it was run with.
  """
  if isinstance(run, Recipe):
    # Their values would be kept alive as long as the params.
    kwargs = {alias: _emptied(one, host) for alias, one in kwargs.items()}
  change = Change(
    name,
    _emptied(given, host),
    fingerprints(after),
    run,
    args,
    kwargs,
    host,
  )
  known = (*changes(before), change)[-_MOST:]
  return live.with_lineage(after, Lineage(known))


def _emptied(checkpoint: Checkpoint, host: Host) -> Checkpoint:
  """Returns a checkpoint without values."""
  leaves = {
    path: leaf.with_fields(load=unknown, part=None, source=None)
    for path, leaf in checkpoint.items()
  }
  records = checkpoint.records(host)
  return checkpoint.replace(leaves=leaves, records=records, checks=())


def changes(params: bx.Params) -> tuple[Change, ...]:
  """Returns the passes that made params, oldest first."""
  found = live.lineage_of(params)
  if found and not set(fingerprints(params)) & set(found[-1].after):
    return ()  # They were changed since, by something else than a verb.
  return found


def between(before: bx.Params, after: bx.Params) -> tuple[Change, ...] | None:
  """Returns the passes that made some params of others.

  Returns:
    The passes, oldest first; none if both are alike; None if that is unknown.
  """
  known, own = changes(after), changes(before)
  if own:
    for k in reversed(range(len(known))):
      if known[k] is own[-1]:
        return known[k + 1 :]
  start = set(fingerprints(before))
  # Params without lineage may be the input of one of the passes.
  for k in range(len(known)):
    if start & set(fingerprints(known[k].before)):
      return known[k:]
  return () if start & set(fingerprints(after)) else None
