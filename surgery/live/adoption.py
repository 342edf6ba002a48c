"""Designed-in adapters: layers that make their own weights, and tag them.

Such a layer lives in plain params. Its weights carry in their metadata what a
record would say, so that any verb can adopt them into one: from then on they
are an adapter like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import blox as bx

from surgery import errors
from surgery.adapting import attachment, drawing
from surgery.builtin.lora import LoRA
from surgery.contract.adapter import Adapter
from surgery.contract.site import Site
from surgery.live import described
from surgery.live import params as live
from surgery.model.records import AdapterRecord, Records, SiteRecord, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path

TAG = 'surgery'
# The name of the adapter of such layers.
NAME = 'default'

# Types of layers that this library itself offers; a tag names one of them.
_TYPES: Mapping[str, type[Adapter]] = {'lora': LoRA}


def tag(adapter: Adapter, site: Site, weight: str) -> dict[str, Any]:
  """Returns the metadata of a weight that a layer makes itself.

  It contains the whole record, so that a half of params with this weight alone
  can be adopted too.

  Args:
    adapter: type and configuration.
    site: the layer's parameter.
    weight: the weight's name, as `init` calls it.
  """
  return {
    **attachment.weight_metadata(adapter, NAME, site, weight),
    TAG: {
      'type': adapter.name,
      'config': adapter.config(),
      'param': site.to_json()['params'][0],
      'weight': weight,
    },
  }


def adapter_of(param: bx.Param) -> Adapter:
  """Returns type and configuration that a tagged weight was made with."""
  data = param.metadata[TAG]
  return _TYPES[data['type']].from_config(data['config'])


_Found = list[tuple[Path, bx.Param]]


def _orphans(params: bx.Params) -> _Found:
  owned = live.records_of(params).owned
  return [
    (path, param)
    for path, param in params.items()
    if path not in owned and described.owner_of(param)
  ]


def refuse_lost(many: Iterable[bx.Params]) -> None:
  """Raises unless the weights of adapters are on record.

  Args:
    many: params that are used together, e.g. halves: a record in one of them
      is enough.

  Raises:
    AdapterError: naming a weight whose record is lost.
  """
  many = list(many)
  owned: set[Path] | None = None
  for params in many:
    for path, param in _lost(_orphans(params)):
      if owned is None:
        owned = {path for one in many for path in live.records_of(one).owned}
      if path not in owned:
        _refuse([(path, param)])


def adopted(params: bx.Params) -> bx.Params:
  """Returns params in which every weight of an adapter is on record.

  Raises:
    AdapterError: if there are weights whose record is lost.
  """
  orphans = _orphans(params)
  if not orphans:
    return params
  _refuse(_lost(orphans))
  # The weights of one layer are one site, whose record has all of them.
  by_site: dict[tuple[str, Path], dict[str, bx.Param]] = {}
  for path, param in orphans:
    name = param.metadata[TAG]['param']['name']
    key = (described.owner_of(param) or '', (*path[:-1], name))
    by_site.setdefault(key, {})[path[-1]] = param
  records = live.records_of(params)
  for (name, site_path), weights in by_site.items():
    records = _with_site(records, name, site_path, weights)
  return live.with_records(params, records)


def _lost(orphans: _Found) -> _Found:
  # Weights that a layer makes itself are tagged with their record.
  return [(path, param) for path, param in orphans if TAG not in param.metadata]


def _refuse(lost: _Found) -> None:
  for path, param in lost:
    owner = described.owner_of(param)
    raise errors.AdapterError(
      f'{paths.show(path)}: a weight of adapter {owner!r} whose '
      'record is not in these params, so the model would be called without the '
      'adapter. plain.merge(adapted) loses records; write '
      'adapted.merge(plain), or load the adapter with surgery.load_adapter.'
    )


def site_record(
  adapter: Adapter, site: Site, stored: Mapping[str, str] | None = None
) -> SiteRecord:
  """Returns the record of a layer that makes its own weights.

  Args:
    adapter: type and configuration.
    site: the layer's parameter.
    stored: names of the weights in the layer, if they differ from the names
      of `init`.
  """
  shapes, _ = drawing.site_shapes(adapter, site)
  names = stored or {}
  specs = {
    weight: WeightSpec(
      (*site.layer, names.get(weight, weight)),
      tuple(struct.shape),
      str(struct.dtype),
      weight not in adapter.frozen,
    )
    for weight, struct in shapes.items()
  }
  return SiteRecord(site, specs, adapter)


def _with_site(
  records: Records,
  name: str,
  site_path: Path,
  weights: Mapping[str, bx.Param],
) -> Records:
  """Returns records with the site of a layer that makes its own weights."""
  first = next(iter(weights.values()))
  data, adapter = first.metadata[TAG], adapter_of(first)
  layer = paths.show(site_path[:-1])
  known = Site.from_json(
    {'layer': layer, 'params': [data['param']], 'types': ()}
  )
  stored = {p.metadata[TAG]['weight']: name for name, p in weights.items()}
  site = site_record(adapter, known, stored)
  if name not in records.names:
    return records.add(AdapterRecord(name, adapter, sites={site_path: site}))
  record = records.get(name)
  if type(record.adapter) is not type(adapter):
    raise errors.AdapterError(
      f'{paths.show(site_path)}: the layer has an adapter {name!r} of type '
      f"'{adapter.name}' of its own, and one of type '{record.adapter.name}' "
      'is attached. Attach under another name=.'
    )
  return records.replace(_joined(record, adapter, site))


def _joined(
  record: AdapterRecord, adapter: Adapter, site: SiteRecord
) -> AdapterRecord:
  """Returns a record with one more site, whose options may differ."""
  # One adapter has one configuration; the options of a single site are a
  # pattern of it.
  theirs = dataclasses.replace(record.adapter, patterns=())  # type: ignore[type-var]
  if adapter != theirs:
    patterns = {
      **{s: dict(v) for s, v in record.adapter.patterns},
      paths.literal(site.site.path): adapter.config(),
    }
    whole = dataclasses.replace(record.adapter, patterns=patterns)  # type: ignore[type-var]
    record = dataclasses.replace(record, adapter=whole)
  return dataclasses.replace(
    record, sites={**record.sites, site.site.path: site}
  )
