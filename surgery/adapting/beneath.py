"""What steps read of a parameter that adapters rewrite: what its layer gets.

A pass is given a checkpoint in which such a parameter answers as the layer is
answered, so that no pass can read the base beneath an adapter, those of plugins
included. What a pass then leaves alone is stored as it was, what it copies or
computes from has the adapter in it, and what it changes is an error, because
the adapter would rewrite it once more (`Checkpoint.stored`). So

    merge(step(params)) == step(merge(params))

or the step refuses. Passes that know about adapters, as `attach`, `rename` and
`cast` do, are given what is stored; they say so by `handles_adapters`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from surgery import errors
from surgery.contract import hookspecs
from surgery.host.manager import Host, default_host
from surgery.model import manifest
from surgery.model.checkpoint import (
  Beneath,
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  Index,
  grid,
)
from surgery.model.records import Chain, Records
from surgery.naming import paths
from surgery.naming.paths import Path

Pass = TypeVar('Pass', bound=Callable[..., Any])


def handles_adapters(pass_: Pass) -> Pass:
  """Says that a pass knows about adapters, and wants what is stored.

  It moves or changes records along with tensors, so that merging before it and
  behind it come to the same. Other passes are given parameters as layers get
  them, and may not change those that an adapter rewrites.

  Args:
    pass_: the pass.

  Example:
    @surgery.handles_adapters
    def forget(checkpoint, *, host):
      return surgery.detach(checkpoint, host=host)
  """

  @functools.wraps(pass_)
  def handling(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    # Another pass may call it with what that was given.
    if not isinstance(checkpoint, Checkpoint) or not checkpoint.shows_layers:
      return pass_(checkpoint, *args, **kwargs)
    host = kwargs.get('host') or default_host()
    before = checkpoint.stored(host, pass_.__name__)
    return seen(pass_(before, *args, **kwargs), host, checkpoint.seen)

  handling.handles_adapters = True  # type: ignore[attr-defined]
  return handling  # type: ignore[return-value]


def _handles(pass_: Any) -> bool:
  """Whether a pass, or what it wraps, is marked by `handles_adapters`."""
  while pass_ is not None:
    if getattr(pass_, 'handles_adapters', False):
      return True
    pass_ = getattr(pass_, '__wrapped__', None)
  return False


def performed(
  pass_: Callable[..., Any],
  verb: str,
  checkpoint: Checkpoint,
  arguments: Mapping[str, Any],
  host: Host,
) -> Any:
  """Runs a pass, on parameters as layers get them unless it handles adapters.

  Args:
    pass_: the pass.
    verb: its name.
    checkpoint: the model.
    arguments: its other arguments; models among them are seen likewise.
    host: knows the adapters' types.

  Raises:
    AdapterError: if it changes what an adapter rewrites.
  """
  if _handles(pass_):
    return pass_(checkpoint, **arguments)
  given = {}
  for name, value in arguments.items():
    if isinstance(value, Checkpoint):
      value = seen(value, host)
    elif name == 'inputs':
      value = Inputs(value, host)
    given[name] = value
  before = seen(checkpoint, host)
  result = pass_(before, **given)
  if not isinstance(result, Checkpoint) or before is checkpoint:
    return result
  return result.stored(host, verb, before.seen)


class Inputs(Mapping[str, Checkpoint]):
  """Models by alias, seen as layers get their parameters.

  Args:
    models: the models as they are stored.
    host: knows the adapters' types.
  """

  def __init__(self, models: Mapping[str, Checkpoint], host: Host) -> None:
    self._models = models
    self._host = host
    self._seen: dict[str, Checkpoint] = {}

  def __getitem__(self, alias: str) -> Checkpoint:
    if alias not in self._seen:
      self._seen[alias] = seen(self._models[alias], self._host)
    return self._seen[alias]

  def __iter__(self) -> Iterator[str]:
    return iter(self._models)

  def __len__(self) -> int:
    return len(self._models)


def seen(
  checkpoint: Checkpoint, host: Host, model: object | None = None
) -> Checkpoint:
  """Returns a model with parameters as layers get them; reads nothing.

  Args:
    checkpoint: the model as it is stored.
    host: knows the adapters' types.
    model: stands for the model, if it is a later state of one that was seen.

  Returns:
    The very checkpoint, if no adapter is attached to it.
  """
  if checkpoint.manifest.kind == manifest.ADAPTER:
    return checkpoint  # It has no base.
  records = checkpoint.records(host)
  if not records.adapters:
    return checkpoint
  # An object that is equal to no other one tells this model's parameters from
  # those of another one.
  model = object() if model is None else model
  leaves = dict(checkpoint)
  for path in records.answered:
    chain = records.chains.get(path, ())
    leaf = leaves.get(path)
    if leaf is not None and leaf.beneath is None:
      beneath = Beneath(path, leaf, model)
      leaves[path] = _seen(checkpoint, beneath, chain, records, host)
  return checkpoint.replace(leaves=leaves, seen=model)


def _seen(
  checkpoint: Checkpoint,
  beneath: Beneath,
  chain: Chain,
  records: Records,
  host: Host,
) -> Leaf:
  """Returns a parameter as its layer gets it."""
  leaf = beneath.leaf
  enabled = tuple(link for link in chain if link[0].enabled)
  saved = records.standing.get(beneath.path)
  if not enabled and saved is not None and saved in checkpoint:
    # A value that was saved with an adapter stands in place of the base.
    return checkpoint[saved].replace(
      trainable=leaf.trainable,
      metadata=leaf.metadata,
      base=leaf.base,
      beneath=beneath,
    )
  if not enabled or leaf.codes is not None:
    # Nothing can be computed from codes; `Leaf.replace` refuses it later.
    return leaf.replace(beneath=beneath)
  one = _Answer(checkpoint, beneath.path, enabled, records, host)
  part = None if leaf.part is None else one.part
  return leaf.replace(load=one.load, part=part, beneath=beneath)


class _Answer:
  """The value of a parameter that a layer gets, computed lazily.

  Args:
    checkpoint: the model as it is stored.
    path: the parameter.
    chain: the enabled adapters that rewrite it, innermost first.
    records: all adapters.
    host: whose hooks are asked.
  """

  def __init__(
    self,
    checkpoint: Checkpoint,
    path: Path,
    chain: Chain,
    records: Records,
    host: Host,
  ) -> None:
    self._checkpoint = checkpoint
    self._path = path
    self._chain = chain
    self._records = records
    self._host = host
    self._held: Any = None

  @functools.cached_property
  def _merged(self) -> Any:
    """Returns what would be stored if these adapters were merged.

    Raises:
      AdapterError: if they cannot be.
    """
    from surgery.adapting import merged

    for adapter, site in self._chain:
      adapter.check_met()
      merged.check_whole(self._checkpoint, adapter)
      said = self._host.ask(
        'surgery_merge_param',
        of=adapter.adapter,
        site=site.site,
        adapter=adapter.adapter,
      )
      if isinstance(said, hookspecs.Refusal):
        raise errors.AdapterError(
          f'{paths.show(self._path)}: adapter {adapter.name!r} cannot be '
          f'merged, so no step can read what the layer gets: {said.reason}. '
          'Detach it first, or select other tensors.'
        )
    return merged.Merged(
      self._checkpoint, self._chain, self._path, self._records, True
    )

  def load(self) -> Any:
    """Returns the whole parameter."""
    return self._merged.load(())

  def part(self, index: Index) -> Any:
    """Returns a block; see `Leaf.part`."""
    if self._merged.part is not None:
      return self._merged.part(index)
    if not index:
      return self.load()
    # It cannot be computed in blocks: it is held until its last block was read.
    held = self.load() if self._held is None else self._held
    last = list(grid(self._checkpoint[self._path].shape or ()))[-1]
    self._held = None if index == last else held
    return held[index]
