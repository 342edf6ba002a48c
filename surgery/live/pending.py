"""Adapters attached before initialisation, which gain sites with each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import blox as bx

from surgery import errors
from surgery.adapting import attachment, finding
from surgery.contract import config
from surgery.contract.adapter import DEFAULT_PARAMS
from surgery.contract.site import Site
from surgery.host import foreign, registering
from surgery.host.manager import Host
from surgery.live import described, placing
from surgery.model import layers
from surgery.model.checkpoint import Leaf
from surgery.model.records import AdapterRecord, Pending, Records
from surgery.naming import paths, selectors
from surgery.naming.paths import Path

if TYPE_CHECKING:
  from surgery.live.params import AdaptedParams


def _types(pending: Pending, layer: Path) -> layers.LayerTypes:
  """Returns the types of layers; asks the graph for one that was made later."""
  if pending.graph is not None and layer not in pending.types:
    return layers.of_graph(pending.graph)
  return pending.types


def _finder(record: AdapterRecord, layer: Path) -> finding.Finder:
  pending = record.pending
  assert pending is not None
  return finding.Finder(
    record.adapter,
    _NO_HOOKS,
    _types(pending, layer),
    pending.layouts,
    pending.stacked,
  )


class _NoHooks(Host):
  """Calls the adapter alone: no hook is called during initialisation."""

  def ask(self, hook: str, *, of: Any = None, **arguments: Any) -> Any:
    method = getattr(of, hook)
    names = registering.arguments_of(method.__func__)
    with foreign.code(f'{config.called(type(of))}: {hook}'):
      return method(**{name: arguments[name] for name in names})


_NO_HOOKS = _NoHooks(entry_points=False)


def _early(record: AdapterRecord) -> AbstractContextManager[None]:
  """Adds to errors that the adapter was attached before initialisation."""
  return errors.within(
    f'adapter {record.name!r} was attached before initialisation'
  )


def adopted(params: AdaptedParams, path: Path) -> AdaptedParams:
  """Returns params in which pending adapters have taken up a parameter."""
  for record in params._records.adapters:
    if record.pending is not None:
      params = _adopted_by(params, record, path)
  return params


def _candidates(
  params: AdaptedParams, record: AdapterRecord, path: Path
) -> dict[Path, finding.Info]:
  """Returns the parameters of a layer that could belong to one site."""
  layer = path[:-1]
  names = dict.fromkeys((*DEFAULT_PARAMS, *record.adapter.rewrites, path[-1]))
  found = {}
  for name in names:
    param = params._data.get((*layer, name))
    info = None if param is None else described.info_of(param)
    if info is not None and (*layer, name) not in params._records.owned:
      found[(*layer, name)] = info
  return found


def _adopted_by(
  params: AdaptedParams, record: AdapterRecord, path: Path
) -> AdaptedParams:
  """Returns params in which an adapter has taken up a parameter, if it serves.

  The layer makes its parameters one after another, so a site may begin with a
  kernel and gain a bias at a later call.
  """
  pending = record.pending
  assert pending is not None
  layer = path[:-1]
  info = _candidates(params, record, path)
  if path not in info:
    return params
  finder = _finder(record, layer)
  with _early(record):
    # An item that matches nothing may match a layer that is made later.
    found = finding.sites(finder, pending.selector, info, missing='pass')
  for site, met in found:
    old = record.sites.get(site.path)
    if old is not None and old.site.params == site.params:
      continue
    if path[-1] not in [p.name for p in site.params]:
      continue
    _refuse_ambiguous(record, site, finder, info)
    params = _grown(params, record, site, met)
    record = params._records.get(record.name)
  return params


def _refuse_ambiguous(
  record: AdapterRecord,
  site: Site,
  finder: finding.Finder,
  info: Mapping[Path, finding.Info],
) -> None:
  """Raises if a layer turns out to have another default parameter.

  Raises:
    SiteError: naming both parameters.
  """
  usual = finder.defaults(
    site.layer, {p[-1]: i for p, i in info.items() if p[:-1] == site.layer}
  )
  for other in record.sites.values():
    if (
      other.site.layer == site.layer
      and other.site.name not in usual
      and site.name in usual
      and not _named(record, other.site)
    ):
      raise errors.SiteError(
        f'{paths.show(other.site.path)} was adapted as the only matrix of its '
        f'layer, and now the layer makes {site.name!r}. Name the parameter: '
        f'to={paths.literal(site.path)!r}, or attach after initialisation.'
      )


def _named(record: AdapterRecord, site: Site) -> bool:
  """Whether the selector names a site's parameter, rather than its layer."""
  pending = record.pending
  return pending is not None and any(
    item.kind == 'all' or item.param(site.path)
    for item in pending.selector.positive
  )


def _grown(
  params: AdaptedParams, record: AdapterRecord, site: Site, met: Iterable[int]
) -> AdaptedParams:
  """Returns params in which an adapter has one more site, or a larger one."""
  pending = record.pending
  assert pending is not None and record.seed is not None
  interceptor = attachment.at(pending.interceptor, site)
  old = record.sites.get(site.path)
  kept = {} if old is None else old.weights

  def taken(path: Path) -> bool:
    if path not in params._data or path in {s.path for s in kept.values()}:
      return False
    _refuse_orphan(params, path)
    return True

  new = attachment.site_record(
    record.adapter, record.name, site, interceptor, taken
  )
  # A site that grows keeps the weights that it has.
  new = dataclasses.replace(new, weights={**new.weights, **kept})
  # The mistakes of a type show at the layer that is being made.
  attachment.check_apply(new)
  grown = record.with_site(new, met)
  known = described.info_of(params._data[site.path])
  info = {site.path: cast(finding.Info, known)}
  # Only the weights of this site are drawn, from what lies beneath it.
  single = dataclasses.replace(grown, sites={site.path: new})
  base = params._data[site.path].value
  names = {spec.path: name for name, spec in new.weights.items()}
  drawn = attachment.weight_leaves(
    _Stored(params),
    _inside(params._records, record.name),
    single,
    record.seed,
    info,
  )
  result = params._clone()
  for path, leaf in drawn.items():
    if path not in {s.path for s in kept.values()}:
      value = placing.weight(
        leaf.load(), base, record.adapter, site, names[path]
      )
      result._data[path] = bx.Param(value, leaf.trainable, dict(leaf.metadata))
  result._records = params._records.grown(grown, new)
  return result


def _refuse_orphan(params: AdaptedParams, path: Path) -> None:
  """Raises if the weight of an adapter without record is in the way.

  Raises:
    AdapterError: naming the weight.
  """
  owner = described.owner_of(params._data[path])
  if owner is not None and path not in params._records.owned:
    raise errors.AdapterError(
      f'{paths.show(path)}: these params hold a weight of adapter {owner!r} '
      'without its record, so an adapter attached before initialisation would '
      'not use it. Initialise the model, then load the weights with '
      'surgery.load_adapter.'
    )


def _inside(records: Records, name: str) -> Records:
  """Returns the adapters inside of one."""
  index = records.names.index(name)
  return Records(records.adapters[:index])


class _Stored(Mapping[Path, Any]):
  """Stored parameters as leaves, for weights that are drawn from a base."""

  def __init__(self, params: AdaptedParams) -> None:
    self._params = params

  def __getitem__(self, path: Path) -> Any:
    value = self._params._data[path].value
    return Leaf(lambda: value)

  def __iter__(self) -> Any:
    return iter(self._params._data)

  def __len__(self) -> int:
    return len(self._params._data)


def _check_served(
  params: AdaptedParams, record: AdapterRecord, finder: finding.Finder
) -> None:
  """Warns of layers that a pending adapter leaves out.

  Raises:
    SiteError: for a layer that the selector names, or an item or alternative
      of which no layer is served, with the reason.
  """
  assert record.pending is not None
  known = {p: described.info_of(one) for p, one in params._data.items()}
  info = {
    path: one
    for path, one in known.items()
    if one is not None and path not in params._records.owned
  }
  refused: list[finding.Refused] = []
  selector = record.pending.selector
  finding.sites(finder, selector, info, missing='sites', left=refused)
  attachment.warn(record.adapter, attachment.left_out(record.name, refused))


def _check_closed(
  params: AdaptedParams, record: AdapterRecord, universe: list[Path]
) -> None:
  """Raises if a pending adapter has not found all that its selector means.

  Raises:
    SelectorError: if an item of it, or an alternative of one, has matched
      nothing, or nothing by default.
    SiteError: if a layer that it names cannot be served.
  """
  pending = record.pending
  assert pending is not None
  finder = _finder(record, ())
  unmet = pending.unmet
  for item in pending.selector.items:
    met = _matched(item, universe, finder)
    if not met and (item.negate or item in unmet):
      raise selectors.nothing(item, universe, finder.names)
    selectors.check_choices(item, {*record.sites, *met}, universe)
  finding.check_axes(finder, universe)
  # The reason why no layer is served is more useful than that none was found.
  _check_served(params, record, finder)
  for item in unmet:
    raise errors.SelectorError(_unmet(item, universe, finder))


def closed(params: AdaptedParams) -> AdaptedParams:
  """Returns params in which no adapter is pending.

  Raises:
    SelectorError: if an item of a selector, or an alternative of one, has
      matched nothing.
    SiteError: if a layer that a selector names cannot be served.
    PluginError: if a type declares a name that no weight has.
  """
  # Parameters that no layer has asked for since the adapter was attached.
  for path in list(params._data):
    if path not in params._records.chains and path not in params._records.owned:
      params = adopted(params, path)
  records = params._records
  universe = [p for p in params._data if p not in records.owned]
  pending = [one for one in records.adapters if one.pending is not None]
  for record in pending:
    _check_found(params, record, universe)
  result = params._clone()
  if len(pending) == len(records.adapters):
    # Now that all parameters are there, these are the base.
    base = {path: params._data[path].value for path in universe}
    result._notes = {**params._notes, 'base': described.remembered(base)}
  result._records = records.closed()
  return result


def _check_found(
  params: AdaptedParams, record: AdapterRecord, universe: list[Path]
) -> None:
  """Checks what `attach` could not check before initialisation."""
  with _early(record):
    _check_closed(params, record, universe)
    sites = [one.site for one in record.sites.values()]
    attachment.check_patterns(record.adapter, sites)
    attachment.check_names(record)
  attachment.warn_of_ranks(record)


def _matched(
  item: selectors.Item, universe: list[Path], finder: finding.Finder
) -> list[Path]:
  """Returns the parameters that an item matches, or whose layer it matches."""
  return [
    p for p in universe if item.layer(p[:-1], finder.names) or item.param(p)
  ]


def _unmet(
  item: selectors.Item, universe: list[Path], finder: finding.Finder
) -> str:
  """Returns the message for an item that matches, but nothing by default."""
  met = _matched(item, universe, finder)
  shown = ', '.join(paths.literal(p) for p in met[:5])
  return (
    f'selector {item.written!r} matches layers, but no parameter of them that '
    f'an adapter serves by default. Name one: {shown}.'
  )
