"""What dropping some tensors takes along, and what stands against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.editing import choosing, following
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerTypes
from surgery.model.records import AdapterRecord, SiteRecord
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection


def chosen(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  layer_types: LayerTypes | None,
  host: Host,
) -> set[Path]:
  """Returns the tensors that a selector means.

  Raises:
    SelectorError: for an item that matches nothing, or if nothing is left of
      what is selected.
  """
  types = layer_types
  if types is None:
    types = checkpoint.manifest.layer_types
  universe = checkpoint.replace(leaves=following.with_empty(checkpoint))
  found = set(choosing.chosen(universe, select, types, host))
  if not found:
    raise errors.SelectorError(
      'nothing is selected. Select at least one tensor.'
    )
  return found


def without_adapters(
  checkpoint: Checkpoint, names: str | Sequence[str] | None, host: Host
) -> Checkpoint:
  """Returns the checkpoint without adapters and all of their weights."""
  records = checkpoint.records(host)
  names = records.chosen(names)
  gone = {p for n in names for p in records.get(n).weight_paths()}
  leaves = {p: leaf for p, leaf in checkpoint.items() if p not in gone}
  return checkpoint.replace(leaves=leaves, records=records.remove(names))


def detached(
  checkpoint: Checkpoint,
  gone: Collection[Path],
  items: Iterable[selectors.Item],
  host: Host,
) -> Checkpoint:
  """Returns the checkpoint without adapters whose weights are all selected.

  Only `adapter:NAME` means the adapter; weights that any other selector matches
  are half of what an adapter needs.

  Args:
    checkpoint: the model.
    gone: the tensors that go.
    items: the items of the selector that name what goes.
    host: knows the adapters' types.
  """
  named = [i for i in items if i.kind == selectors.ADAPTER]
  records = checkpoint.records(host).adapters if named else ()
  names = [
    one.name
    for one in records
    if any(i.owned(one.name) for i in named) and gone_whole(one, gone)
  ]
  return without_adapters(checkpoint, names, host) if names else checkpoint


def gone_whole(record: AdapterRecord, gone: Collection[Path]) -> bool:
  """Whether all weights of an adapter go."""
  own = record.weight_paths()
  return bool(own) and all(path in gone for path in own)


def without(
  checkpoint: Checkpoint, gone: Collection[Path], host: Host
) -> Checkpoint:
  """Returns the checkpoint without some tensors.

  A site whose parameters all go takes its weights along, and an adapter
  without sites goes too. Codes of a quantised weight take its scales along.

  Args:
    checkpoint: the model.
    gone: the tensors.
    host: knows the adapters' types.

  Raises:
    AdapterError: if half a site would be left.
    QuantisedError: if codes would be left without their scales.
    SurgeryError: if half a parameter would be left, or nothing at all.
  """
  records = following.settled(checkpoint, host)
  gone = quantised.without(checkpoint, gone)
  for record in records.adapters:
    left, more = _left(record, gone)
    gone |= more
    records = (
      records.replace(left)
      if left is not None
      else records.remove([record.name])
    )
  leaves = {p: leaf for p, leaf in checkpoint.items() if p not in gone}
  if not leaves:
    raise errors.SurgeryError(
      f'nothing would be left of {len(checkpoint)} tensors. Select otherwise.'
    )
  return checkpoint.replace(
    leaves=leaves,
    records=records,
    manifest=checkpoint.manifest.replace(
      trees=_trees(checkpoint, leaves, gone),
      layer_types=following.layer_types(checkpoint, leaves),
    ),
  )


def _left(
  record: AdapterRecord, gone: set[Path]
) -> tuple[AdapterRecord | None, set[Path]]:
  """Returns the adapter without what goes, and the weights that go along."""
  sites = _sites_left(record, gone)
  more = {
    spec.path
    for path, site in record.sites.items()
    if path not in sites
    for spec in site.weights.values()
  }
  saved = {}
  for path, spec in record.saved.items():
    if path in gone:
      more.add(spec.path)
    elif spec.path in gone:
      raise _half(record, spec.path, path)
    else:
      saved[path] = spec
  shared = {spec.path for spec in record.shared.values()}
  if not sites and not saved:
    return None, more | shared
  for path in shared & gone:
    raise _half(record, path, next(iter((*sites, *saved))))
  if (len(sites), len(saved)) == (len(record.sites), len(record.saved)):
    return record, more
  return (
    dataclasses.replace(record, sites=sites, saved=saved),
    more,
  )


def _sites_left(
  record: AdapterRecord, gone: Collection[Path]
) -> dict[Path, SiteRecord]:
  """Returns the sites of an adapter whose parameters stay.

  Raises:
    AdapterError: if half a site would be left.
  """
  sites = {}
  for path, site in record.sites.items():
    base = following.base_of(site)
    parts = [*base, *(spec.path for spec in site.weights.values())]
    if all(p in gone for p in base):
      continue  # Its weights go along, whether they were selected or not.
    lost = [p for p in parts if p in gone]
    if lost:
      kept = next(p for p in parts if p not in gone)
      raise _half(record, lost[0], kept)
    sites[path] = site
  return sites


def _half(record: AdapterRecord, lost: Path, kept: Path) -> errors.AdapterError:
  return errors.AdapterError(
    f'{paths.show(lost)} would go and {paths.show(kept)} stay, and '
    f'adapter {record.name!r} needs both. Merge or detach the adapter first, '
    'or select the whole layer.'
  )


def _trees(
  checkpoint: Checkpoint,
  leaves: Mapping[Path, Leaf],
  gone: set[Path],
) -> dict[Path, Any]:
  """Returns the structures of the parameters that are left."""
  trees = checkpoint.manifest.trees
  left = {following.tree_of(path, trees) for path in leaves}
  for path in gone:
    tree = following.tree_of(path, trees)
    if tree is not None and tree in left:
      raise errors.SurgeryError(
        f'{paths.show(path)} would go and other parts of the parameter '
        f'{paths.show(tree)} stay. Select all of it.'
      )
  lost = {following.tree_of(path, trees) for path in gone}
  return {p: tree for p, tree in trees.items() if p not in lost}
