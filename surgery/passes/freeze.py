"""Freeze and unfreeze: which parameters train."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from surgery import errors
from surgery.adapting.beneath import handles_adapters
from surgery.contract.site import Site
from surgery.editing import choosing, marks
from surgery.editing.marks import ALONG, MARK, OURS
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerTypes
from surgery.model.records import AdapterRecord
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

ADAPTERS = 'adapters'


def _frozen(leaf: Leaf, mark: str = OURS) -> Leaf:
  if not leaf.trainable:
    return leaf
  return leaf.replace(trainable=False, metadata={**leaf.metadata, MARK: mark})


def _marks(checkpoint: Checkpoint, host: Host) -> Callable[[Path], str]:
  """Returns with which mark a parameter is frozen.

  If adapters are attached and other parameters of the base are frozen, what
  trains of the base has been let train with the adapters.
  """
  owned = checkpoint.records(host).owned
  begun = bool(owned) and any(
    marks.is_ours(leaf)
    for path, leaf in checkpoint.items()
    if path not in owned
  )

  def mark(path: Path) -> str:
    known = path in owned or checkpoint[path].base
    return ALONG if begun and not known else OURS

  return mark


def _thawed(leaf: Leaf) -> Leaf:
  metadata = {k: v for k, v in leaf.metadata.items() if k != MARK}
  return leaf.replace(trainable=True, metadata=metadata)


def _site(path: Path, name: str, leaf: Leaf, types: LayerTypes) -> Site:
  """Returns a parameter as hooks are shown it."""
  known = types.get(path[:-1])
  spec = choosing.shown(name, leaf)
  return Site(path[:-1], (spec,), known.names if known else ())


def _trains(
  site: Site, owner: AdapterRecord | None, policy: str, host: Host
) -> bool | None:
  """Asks who knows the policy, the owning adapter first."""
  if owner is None and policy == ADAPTERS:
    return False
  adapter = None if owner is None else owner.adapter
  return host.ask('surgery_freeze_param', of=adapter, site=site, policy=policy)


@handles_adapters
def freeze(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection | None = None,
  *,
  policy: str | None = None,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Freezes parameters: by selector, by policy, or all but adapters' weights.

  Parameters that are frozen already stay frozen.

  Args:
    checkpoint: the model.
    select: what to freeze; a layer means everything beneath it.
    policy: name of a policy that decides for each parameter whether it trains;
      `adapters` where neither is given. It is one name, without arguments; if
      nothing trains any more, a warning is given.
    layer_types: types of layers; by default those of the checkpoint.
    host: whose hooks are asked.

  Raises:
    SelectorError: for a selector that matches nothing, or a policy that
      freezes nothing.
    PluginError: for a policy that no plugin knows.
    AdapterError: under a policy, if an adapter still looks for parameters,
      since those to come would not be frozen.

  Example:
    freeze
    freeze: '**/embedding'
  """
  if select is not None and policy is not None:
    raise errors.SurgeryError('give a selector or a policy, not both.')
  types = (
    checkpoint.manifest.layer_types if layer_types is None else layer_types
  )
  mark = _marks(checkpoint, host)
  if select is not None:
    chosen = set(choosing.chosen(checkpoint, select, types, host))
    leaves = {
      path: _frozen(leaf, mark(path)) if path in chosen else leaf
      for path, leaf in checkpoint.items()
    }
    return checkpoint.replace(leaves=leaves)
  policy = policy or ADAPTERS
  # Weights of layers to come would be made as `init` says, and train.
  for record in checkpoint.records(host).adapters:
    record.check_met()
  # A policy is asked with the name that `init` gave a weight, which is not that
  # under which it is stored.
  owners = {
    spec.path: (record, name)
    for record in checkpoint.records(host).adapters
    for name, spec in record.weights()
  }
  answers, leaves = set(), {}
  for path, leaf in checkpoint.items():
    owner, name = owners.get(path, (None, path[-1]))
    trains = _trains(_site(path, name, leaf, types), owner, policy, host)
    # A policy may return a bool of numpy, which is not Python's True.
    answers.add(trains if trains is None else bool(trains))
    leaves[path] = (
      leaf if trains is None or trains else _frozen(leaf, mark(path))
    )
  _check_answers(policy, answers, leaves)
  return checkpoint.replace(leaves=leaves)


def _check_answers(
  policy: str, answers: set[bool | None], leaves: Mapping[Path, Leaf]
) -> None:
  """Raises, or warns, if a policy cannot have been meant as it was written.

  Args:
    policy: its name.
    answers: what it said of parameters.
    leaves: the parameters afterwards.

  Raises:
    PluginError: if nobody knows it.
    SelectorError: if it freezes nothing; what was frozen before counts.
  """
  if not answers - {None}:
    raise errors.PluginError(
      f'no plugin knows the policy {policy!r}. `surgery plugins` lists '
      'plugins and their hooks.'
    )
  if False not in answers:
    raise errors.SelectorError(
      f'policy {policy!r} freezes nothing: it lets all {len(leaves)} '
      'parameters train. A policy is a whole name; is it misspelt?'
    )
  # Without adapters our own is how a base is frozen before they are attached.
  if policy != ADAPTERS and not any(leaf.trainable for leaf in leaves.values()):
    warnings.warn(
      f'freeze: under policy {policy!r} nothing trains any more. A policy is '
      'a whole name; is it misspelt, or is it for another model?',
      UserWarning,
      stacklevel=2,
    )


@handles_adapters
def unfreeze(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection | None = None,
  *,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Lets parameters train again that `freeze` froze, and only those.

  Args:
    checkpoint: the model.
    select: which; all that `freeze` froze by default.
    layer_types: types of layers; by default those of the checkpoint.
    host: whose hooks are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    SurgeryError: if `freeze` froze none of what is selected.

  Example:
    unfreeze: '**/output'
  """
  types = (
    checkpoint.manifest.layer_types if layer_types is None else layer_types
  )
  chosen = set(
    checkpoint
    if select is None
    else choosing.chosen(checkpoint, select, types, host)
  )
  ours = {p for p in chosen if marks.is_ours(checkpoint[p])}
  if not ours:
    others = [p for p in chosen if not checkpoint[p].trainable]
    hint = (
      f' {paths.show(min(others))} is not trainable, but freeze did not do '
      'that.'
      if others
      else ''
    )
    raise errors.SurgeryError(
      f'freeze froze none of the {len(chosen)} selected parameters.{hint}'
    )
  leaves = {
    path: _thawed(leaf) if path in ours else leaf
    for path, leaf in checkpoint.items()
  }
  return checkpoint.replace(leaves=leaves)
