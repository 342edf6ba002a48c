"""What layers get of adapted parameters, as leaves that are computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import blocks, compute
from surgery.contract import hookspecs
from surgery.host import foreign
from surgery.host.manager import Host
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  Index,
)
from surgery.model.records import AdapterRecord, Chain, Records
from surgery.naming import paths
from surgery.naming.paths import Path


def check_order(records: Records, names: Sequence[str]) -> None:
  """Raises unless merging these adapters leaves the others as they are.

  Raises:
    OrderError: naming the adapter that is in the way.
  """
  _check_saved(records, names)
  for path, chain in records.chains.items():
    # Adapters that stay and lie inside of one that is merged: merging that one
    # first changes their base, unless both only add.
    inside: list[AdapterRecord] = []
    for adapter, _ in chain:
      if adapter.name not in names:
        inside.append(adapter)
        continue
      for other in inside:
        if adapter.adapter.adds and other.adapter.adds:
          continue
        raise errors.OrderError(
          f'{paths.show(path)}: adapter {adapter.name!r} '
          f"('{adapter.adapter.name}') was attached over {other.name!r} "
          f"('{other.adapter.name}') and they do not commute. Merge "
          f'{other.name!r} first, or both together.'
        )


def check_whole(
  checkpoint: Checkpoint, record: AdapterRecord, done: str = 'merged'
) -> None:
  """Raises unless all that one adapter rewrites and needs is there.

  Args:
    checkpoint: the model.
    record: the adapter.
    done: what is to be done with it, for messages.

  Raises:
    AdapterError: naming what is missing, or if it holds several adapters.
  """
  for path in record.needed():
    if path not in checkpoint:
      raise errors.AdapterError(
        f'{paths.show(path)}: adapter {record.name!r} cannot be {done} without '
        'it. Put the halves that split() made together first: a.merge(b).'
      )
  if record.route or _is_stacked(checkpoint, record):
    raise errors.AdapterError(
      f'adapter {record.name!r} holds several adapters, since '
      f'surgery.stack_adapters: stacked adapters cannot be {done}, as a layer '
      'has one parameter for all of them. Take the params of one adapter, as '
      'they were before they were stacked.'
    )


def _is_stacked(checkpoint: Checkpoint, record: AdapterRecord) -> bool:
  """Whether weights have an axis that the parameter does not have."""
  for path, one in record.sites.items():
    stack = _rank(checkpoint, path) - len(one.site.primary.shape)
    for spec in one.weights.values():
      if _rank(checkpoint, spec.path) - len(spec.shape) > stack:
        return True
  return False


def _rank(checkpoint: Checkpoint, path: Path) -> int:
  return len(checkpoint[path].shape or ())


def fold(
  checkpoint: Checkpoint,
  names: str | Sequence[str] | None,
  *,
  check_finite: bool,
  host: Host,
) -> Checkpoint:
  """Returns the checkpoint with adapters folded into the base; see `merge`.

  Raises:
    AdapterError: for an adapter that is unknown, disabled or incomplete.
    OrderError: if an adapter inside does not commute.
    SiteError: when a leaf is loaded, if a result is not finite.
  """
  records = checkpoint.records(host)
  merged = records.chosen(names)
  stood = {p: s.path for n in merged for p, s in records.get(n).saved.items()}
  for name in merged:
    _check_mergeable(checkpoint, records.get(name))
  check_order(records, merged)
  encode = _asked(records, merged, host)
  # The weights of merged adapters go, and so do values that they saved.
  gone = {p for n in merged for p in records.get(n).weight_paths()}
  leaves: dict[Path, Leaf] = {}
  for path, leaf in checkpoint.items():
    if path in gone:
      continue
    chain = tuple(
      link for link in records.chains.get(path, ()) if link[0].name in merged
    )
    if path in stood:
      # The value that the adapter saved becomes the base.
      leaf = _replaced(leaf, checkpoint[stood[path]])
    if chain:
      answer = Merged(checkpoint, chain, path, records, check_finite)
      stored = encode.get(path, ())
      load = functools.partial(answer.load, stored)
      leaf = leaf.replace(
        load=load, part=None if stored else answer.part, base=True
      )
    leaves[path] = leaf
  return checkpoint.replace(leaves=leaves, records=records.remove(merged))


def _check_mergeable(checkpoint: Checkpoint, record: AdapterRecord) -> None:
  """Raises unless an adapter is enabled and complete."""
  if not record.enabled:
    raise errors.AdapterError(
      f'adapter {record.name!r} is disabled, so layers do not get what it '
      'would merge. Enable it first, or detach it.'
    )
  record.check_met()
  check_whole(checkpoint, record)


def _check_saved(records: Records, names: Sequence[str]) -> None:
  """Raises if an adapter that stays has a value of its own for a parameter.

  Its value stands in place of the stored one, beneath all adapters: a merge
  into what is stored would be lost.

  Raises:
    OrderError: naming the parameter and both adapters.
  """
  for other in records.adapters:
    for path in other.saved if other.name not in names else ():
      for adapter, _ in records.chains.get(path, ()):
        if adapter.name in names:
          raise errors.OrderError(
            f'{paths.show(path)}: adapter {other.name!r} was saved with a '
            f'value of its own for this parameter, which {adapter.name!r} '
            f'rewrites. Merge {other.name!r} first, or both together.'
          )


class Merged:
  """A parameter as layers get it.

  Args:
    leaves: the model.
    chain: the adapters that are merged.
    path: the parameter.
    records: all adapters.
    check_finite: whether a result with NaN or infinity is an error.

  Attributes:
    part: returns a block of it; None if it comes in one piece.
  """

  def __init__(
    self,
    leaves: Mapping[Path, Leaf],
    chain: Chain,
    path: Path,
    records: Records,
    check_finite: bool,
  ) -> None:
    self._leaves = leaves
    self._chain = chain
    self._path = path
    self._chains = records.chains
    self._stored = records.stored
    self._check_finite = check_finite
    leaf = leaves[records.stored(path)]
    self._blocks = None
    if leaf.part is not None and leaf.shape is not None and leaf.dtype:
      self._blocks = blocks.of(
        chain,
        path,
        leaf.shape,
        leaf.dtype,
        leaf.part,
        self._fetch,
        records.chains,
      )
    self.part = None if self._blocks is None else self._part

  def _fetch(self, path: Path) -> Any:
    return self._leaves[self._stored(path)].load()

  def _part(self, index: Index) -> Any:
    assert self._blocks is not None
    if not index:
      return self.load(())
    return self._checked(self._blocks.part(index), index)

  def load(self, encode: Sequence[Callable[[Any], Any]]) -> Any:
    """Returns the whole, as plugins want it stored."""
    value = self._checked(
      blocks.answer(self._chain, self._path, self._fetch, self._chains), ()
    )
    for one in encode:
      where = f'{paths.show(self._path)}: what surgery_merge_param returned'
      with foreign.code(where):
        stored = one(value)
      said = Leaf(lambda: None, value.shape, str(value.dtype))
      wrong = said.mismatch(stored)
      if wrong is not None:
        raise errors.PluginError(
          f'{where} re-encodes the merged parameter as something else: {wrong}'
        )
      value = stored
    return value

  def _checked(self, value: Any, index: Index) -> Any:
    """Returns a block of the result, or the whole, if it is finite.

    Raises:
      SiteError: naming the first number that is not, and where it comes from.
    """
    if not self._check_finite or compute.finite(value):
      return value
    wrong = ~np.isfinite(np.asarray(value))
    first = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    starts = [cut.start for cut in index] + [0] * (wrong.ndim - len(index))
    where = [int(a) + b for a, b in zip(first, starts, strict=True)]
    raise errors.SiteError(
      f'{paths.show(self._path)}: the merged parameter has NaN or infinity, '
      f'first {np.asarray(value)[first]:g} at index {where}; nothing was '
      f'changed. {self._blamed(index)} To merge it anyway, give check-finite: '
      'false (check_finite=False).'
    )

  def _blamed(self, index: Index) -> str:
    """Returns which of the operands is not finite, in a sentence.

    The base is looked at first: what an adapter makes of it cannot be better.
    """
    leaf = self._leaves[self._path]
    base = leaf.part(index) if index and leaf.part else leaf.load()
    if not compute.finite(base):
      return (
        'The base has NaN or infinity itself, before any adapter: mend the '
        'base.'
      )
    for adapter, record in self._chain:
      specs = {**record.weights, **adapter.shared}
      for spec in specs.values():
        if not compute.finite(self._fetch(spec.path)):
          return (
            f'Weight {paths.show(spec.path)} of adapter {adapter.name!r} has '
            'NaN or infinity.'
          )
    names = ', '.join(repr(adapter.name) for adapter, _ in self._chain)
    return (
      f'Base and weights are finite: what {names} makes of them is too large '
      f'for {leaf.dtype}, or no number.'
    )


def _replaced(leaf: Leaf, by: Leaf) -> Leaf:
  """Returns a parameter of the base with the value that an adapter saved."""
  # Of the other all but what says whose it is.
  return by.replace(trainable=leaf.trainable, metadata=leaf.metadata, base=True)


def _asked(
  records: Records, names: Sequence[str], host: Host
) -> dict[Path, list[Callable[[Any], Any]]]:
  """Asks hooks whether they refuse, or re-encode the results."""
  encode: dict[Path, list[Callable[[Any], Any]]] = {}
  for name in names:
    adapter = records.get(name).adapter
    for record in records.get(name).sites.values():
      said = host.ask(
        'surgery_merge_param', of=adapter, site=record.site, adapter=adapter
      )
      if isinstance(said, hookspecs.Refusal):
        raise errors.AdapterError(
          f'{paths.show(record.site.path)}: adapter {name!r} cannot be merged: '
          f'{said.reason}.'
        )
      if said is not None:
        encode.setdefault(record.site.path, []).append(said)
  return encode
