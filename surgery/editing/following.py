"""What else there is of a model has to follow what a pass does to tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from surgery import errors
from surgery.contract.adapter import Adapter
from surgery.contract.site import Site
from surgery.host.manager import Host
from surgery.model import manifest
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerTypes
from surgery.model.records import AdapterRecord, Records, SiteRecord, WeightSpec
from surgery.naming.paths import Path

# Metadata of a weight that a layer made itself: what a record would say of it,
# so that it is known where records are lost.
TAG = 'surgery'


def check_model(checkpoint: Checkpoint) -> None:
  """Raises unless the checkpoint is a whole model.

  Args:
    checkpoint: what a pass was given.

  Raises:
    FormatError: if it is an adapter without its base, or a patch.
  """
  manifest.check_no_patch(checkpoint.manifest, checkpoint.origin)
  if checkpoint.manifest.kind == manifest.ADAPTER:
    raise errors.FormatError(
      f'{checkpoint.origin or "this"} is an adapter without its base, '
      'not a model. Attach it to its base first.'
    )


def settled(checkpoint: Checkpoint, host: Host) -> Records:
  """Returns the adapters, none of which looks for sites.

  Raises:
    AdapterError: if one does: it would find or miss what it should not.
  """
  records = checkpoint.records(host)
  for record in records.adapters:
    if record.pending is not None:
      raise errors.AdapterError(
        f'adapter {record.name!r} still looks for sites. Initialise '
        'the model and lock its params first.'
      )
  return records


def base_of(site: SiteRecord) -> list[Path]:
  """Returns the parameters that a site rewrites."""
  return [(*site.site.layer, spec.name) for spec in site.site.params]


def tree_of(path: Path, trees: Mapping[Path, Any]) -> Path | None:
  """Returns the parameter of which a tensor is a part, if it is one."""
  if not trees:
    return None
  above = (path[:n] for n in range(1, len(path) + 1))
  return next((a for a in above if a in trees), None)


def with_empty(checkpoint: Checkpoint) -> dict[Path, Leaf]:
  """Returns the leaves, and one for each parameter without any tensor."""
  leaves = dict(checkpoint)
  trees = checkpoint.manifest.trees
  full = {tree_of(path, trees) for path in checkpoint}
  leaves.update((p, Leaf(lambda: None)) for p in trees if p not in full)
  return leaves


def interceptor(record: AdapterRecord, site: Site, host: Host) -> Any:
  """Asks who stands between a site's parameters and the layer."""
  if record.pending is None:
    return host.ask('surgery_intercept_param', of=record.adapter, site=site)
  who = record.pending.interceptor
  return who.at(site) if isinstance(who, Adapter) else who


def recast(records: Records, dtypes: Mapping[Path, str], host: Host) -> Records:
  """Returns records of which parameters and weights got other dtypes.

  Args:
    records: the adapters.
    dtypes: names of the new dtypes by path.
    host: whose hooks are asked.
  """

  def spec(old: WeightSpec) -> WeightSpec:
    return dataclasses.replace(old, dtype=dtypes.get(old.path, old.dtype))

  for record in records.adapters:
    sites = {}
    for path, one in record.sites.items():
      layer = one.site.layer
      params = tuple(
        dataclasses.replace(p, dtype=dtypes.get((*layer, p.name), p.dtype))
        for p in one.site.params
      )
      site = dataclasses.replace(one.site, params=params)
      weights = {n: spec(w) for n, w in one.weights.items()}
      who = interceptor(record, site, host)
      sites[path] = dataclasses.replace(
        one, site=site, weights=weights, interceptor=who
      )
    shared = {n: spec(w) for n, w in record.shared.items()}
    saved = {p: spec(w) for p, w in record.saved.items()}
    records = records.replace(
      dataclasses.replace(record, sites=sites, shared=shared, saved=saved)
    )
  return records


def retagged(
  metadata: Mapping[str, Any],
  change: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Mapping[str, Any]:
  """Returns a weight's metadata in which what it says of its parameter changed.

  Args:
    metadata: of any parameter or weight.
    change: from what a tag says of the parameter to what it should say.
  """
  said = metadata.get(TAG)
  if not isinstance(said, Mapping) or not isinstance(
    said.get('param'), Mapping
  ):
    return metadata
  return {**metadata, TAG: {**said, 'param': dict(change(said['param']))}}


def layer_types(
  checkpoint: Checkpoint, leaves: Mapping[Path, Leaf]
) -> LayerTypes:
  """Returns the types of layers but of those that lost all that they had."""
  types = checkpoint.manifest.layer_types
  above = lambda some: {p[:n] for p in some for n in range(len(p))}
  lost = above(checkpoint) - above(leaves)
  return {p: t for p, t in types.items() if p not in lost} if types else types
