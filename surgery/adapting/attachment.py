"""Attaches an adapter: weights beside a base, and the record of its sites."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from surgery import errors
from surgery.adapting import blocks, compute, drawing, finding, ranks
from surgery.adapting.beneath import handles_adapters
from surgery.contract import config
from surgery.contract.adapter import Adapter
from surgery.contract.site import Site
from surgery.host.manager import Host
from surgery.model import layouts, quantised
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
  LeftOut,
)
from surgery.model.layers import LayerTypes
from surgery.model.records import (
  AdapterRecord,
  Pending,
  Records,
  SiteRecord,
  WeightSpec,
  written,
)
from surgery.model.sizes import (
  dtype_name,
)
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection


def check_name(name: str, records: Records) -> None:
  """Raises unless an adapter may get that name.

  Raises:
    AdapterError: if the name is taken, empty, or has characters that weight
      names cannot hold.
  """
  if not isinstance(name, str) or not name or set(name) & set('./\0'):
    raise errors.AdapterError(
      f'adapter name {name!r}: expected some text without dots and slashes.'
    )
  if name in records.names:
    raise errors.AdapterError(
      f'adapter {name!r} is attached already, as '
      f"'{records.get(name).adapter.name}'. Give another name=, or detach it."
    )


def check_adapter(adapter: Any) -> Adapter:
  """Raises unless `adapter` is a configured adapter type.

  Raises:
    ConfigError: saying what was found.
  """
  if isinstance(adapter, type) and issubclass(adapter, Adapter):
    raise errors.ConfigError(
      f'expected a configured adapter, found the class {adapter.__name__}. '
      f'Write {adapter.__name__}(…).'
    )
  if not isinstance(adapter, Adapter):
    raise errors.ConfigError(
      f'expected an adapter, e.g. surgery.LoRA(rank=8), found {adapter!r} '
      f'({type(adapter).__name__}).'
    )
  return adapter


def weight_path(
  layer: Path,
  param: str,
  weight: str,
  adapter: str,
  taken: Callable[[Path], bool],
) -> Path:
  """Returns where a weight is stored, beside the parameter it belongs to.

  Args:
    layer: path of the layer.
    param: the site's primary parameter.
    weight: the name that `init` gave the weight.
    adapter: the adapter's name.
    taken: whether something is stored at a path already.

  Raises:
    AdapterError: if every spelling is taken.
  """
  names = [f'{weight}.{adapter}.{param}']
  if param == 'kernel':
    names.insert(0, weight if adapter == 'default' else f'{weight}.{adapter}')
  for name in names:
    if not taken((*layer, name)):
      return (*layer, name)
  raise errors.AdapterError(
    f'{paths.show((*layer, names[-1]))}: the name is taken. Give the adapter '
    'another name=.'
  )


def shared_path(weight: str, adapter: str) -> Path:
  """Returns where a weight is stored that an adapter's sites share."""
  return (f'surgery.{adapter}', weight)


def info_of(
  leaves: Mapping[Path, Leaf], records: Records
) -> dict[Path, finding.Info]:
  """Returns the parameters that an adapter may rewrite."""
  owned = records.owned
  return {
    path: finding.Info(
      leaf.shape, leaf.dtype or '', tuple(leaf.metadata.get('sharding') or ())
    )
    for path, leaf in leaves.items()
    if leaf.shape is not None and leaf.key is None and path not in owned
  }


def intercept(host: Host, adapter: Adapter, site: Site) -> Any:
  """Returns the interceptor between a site's stored parameters and the layer.

  Raises:
    PluginError: if no hook returns one.
  """
  who = host.ask('surgery_intercept_param', of=adapter, site=site)
  if who is None:
    raise errors.PluginError(
      f'{paths.show(site.path)}: no interceptor was returned for adapter type '
      f"'{adapter.name}'."
    )
  return who


def at(who: Any, site: Site) -> Any:
  """Returns an interceptor with the options that hold for one site."""
  return who.at(site) if isinstance(who, Adapter) else who


def trains(adapter: Adapter, weight: str, dtype: str) -> bool:
  """Whether a weight of an adapter trains: not frozen, and not of integers."""
  inexact = dtype.startswith(('float', 'bfloat', 'complex'))
  return inexact and weight not in adapter.frozen


def site_record(
  adapter: Adapter,
  name: str,
  site: Site,
  who: Any,
  taken: Callable[[Path], bool],
) -> SiteRecord:
  """Returns the record of a site, with the weights that `init` will return."""
  drawn, _ = drawing.site_shapes(who, site)
  weights = {}
  for weight, struct in drawn.items():
    dtype = dtype_name(struct.dtype)
    weights[weight] = WeightSpec(
      weight_path(site.layer, site.name, weight, name, taken),
      tuple(struct.shape),
      dtype,
      trains(adapter, weight, dtype),
    )
  return SiteRecord(site, weights, who)


def check_apply(
  record: SiteRecord, shared: Mapping[str, WeightSpec] = MappingProxyType({})
) -> None:
  """Evaluates `apply` at a site, on shapes alone, for each parameter.

  Once for all sites that look alike, so that a mistake shows here rather than
  at the first call.

  Args:
    record: the site.
    shared: weights that the adapter's sites share.

  Raises:
    PluginError: naming the site, if `apply` fails or returns no array of the
      parameter's shape.
  """
  who, site = record.interceptor, record.site
  kinds = compute.kinds_of(record, shared)
  for spec in site.params:
    uses = functools.partial(_uses, who, spec.name, kinds)
    with compute.calling('apply', who, site):
      compute.anonymously(uses, site)


def _uses(who: Any, name: str, kinds: compute.Kinds, site: Site) -> Any:
  return compute.uses(who, site, name, kinds)


def check_names(record: AdapterRecord) -> None:
  """Raises if a type declares something about weights that it does not have.

  With a misspelt name in `frozen` a weight would train, with one in `rank_axes`
  it would not be cut when ranks are pruned.

  Raises:
    PluginError: naming it, and weights that there are; or for an axis that a
      weight lacks, and ranks that differ.
  """
  kind = record.adapter
  if not (kind.frozen or kind.rank_axes) or not record.sites:
    return
  known = {name for name, _ in record.weights()}
  for name in kind.frozen:
    if name not in known:
      called = config.called(type(kind))
      raise errors.PluginError(
        f'{called}: {name!r} is declared in `frozen`, but neither init nor '
        'init_shared returned a weight of that name, so the weight that was '
        f'meant would train.{errors.suggest(name, known)}'
      )
  for name in kind.rank_axes:
    if name not in known:
      called = config.called(type(kind))
      raise errors.PluginError(
        f'{called}: {name!r} is declared in `rank_axes`, and init returned no '
        f'weight of that name.{errors.suggest(name, known)} Subclasses inherit '
        'it: set rank_axes = {} if the type has no rank.'
      )
  for site in record.sites.values():
    ranks.axes_of(record, site)


def weight_metadata(
  adapter: Adapter,
  name: str,
  site: Site | None,
  weight: str,
  stacked: Sequence[Any] = (),
) -> dict[str, Any]:
  """Returns the metadata of a weight: its owner, and sharding from the base."""
  metadata: dict[str, Any] = {'adapter': name}
  if site is not None and site.primary.sharding:
    axes = adapter.sharding(site, weight)
    if axes is not None:
      metadata['sharding'] = (*stacked, *axes)
  return metadata


def check_patterns(adapter: Adapter, sites: Sequence[Site]) -> None:
  """Raises if a pattern decides the options of no site.

  Raises:
    SelectorError: naming the pattern, and the nearest sites or the pattern that
      decides before it.
  """
  selectors.check_deciding(
    [selector for selector, _ in adapter.patterns],
    {s.path: s.types for s in sites},
    'patterns',
  )


@handles_adapters
def attach(
  checkpoint: Checkpoint,
  adapter: Adapter,
  *,
  to: selectors.Text | selectors.Selector | Selection,
  name: str = 'default',
  seed: int = 0,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  layer_types: LayerTypes | None = None,
  graph: Any = None,
  pending: bool = False,
  host: Host,
) -> Checkpoint:
  """Attaches an adapter.

  Args:
    checkpoint: the model.
    adapter: type and configuration.
    to: which layers or parameters; a layer means its default sites, `all`
      every site that the type can serve.
    name: the adapter's name.
    seed: from which its weights derive, with name and path.
    stacked: number of axes stacked in front of parameters, or such numbers by
      selector; by default what types of layers say, otherwise 0.
    layout: a letter an axis (`s` stacked, `i` input, `o` output), or such
      letters by selector; by default what types of layers say, or what is
      known of a checkpoint that PyTorch wrote, otherwise the last axis is the
      output.
    layer_types: types of layers; by default those of the checkpoint.
    graph: the graph that types of layers made later are taken from.
    pending: whether layers to come may match.
    host: whose hooks are asked.

  Returns:
    The checkpoint with the adapter's weights, drawn when they are asked for.

  Raises:
    SelectorError: if a selector or pattern matches nothing.
    SiteError: if a parameter cannot be served.
    ConfigError: for a wrong configuration.
    AdapterError: if the name is taken.
    PluginError: if `init` or `apply` fails, or a name in `frozen` or
      `rank_axes` is that of no weight.
  """
  adapter = check_adapter(adapter)
  records = checkpoint.records(host)
  check_name(name, records)
  if not isinstance(seed, int) or isinstance(seed, bool):
    raise errors.ConfigError(f'seed: expected an integer, found {seed!r}.')
  where = to if isinstance(to, Selection) else selectors.parse(to)
  finder = finding.Finder(
    adapter,
    host,
    checkpoint.manifest.layer_types if layer_types is None else layer_types,
    finding.layout_pairs(layout),
    finding.stacked_pairs(stacked),
    layouts.found(checkpoint, checkpoint.manifest),
  )
  info = info_of(checkpoint, records)
  # Shared weights may depend on all sites, so that such a type cannot wait for
  # layers to come.
  waiting = None
  if pending and isinstance(where, selectors.Selector) and not _shares(adapter):
    waiting = _pending(adapter, where, finder, graph, host)
  refused: list[finding.Refused] = []
  found = _found(finder, where, info, waiting, pending, refused)
  sites = [site for site, _ in found]
  for site in sites:
    for spec in site.params:
      quantised.refuse(checkpoint[*site.layer, spec.name], 'attach')
  if waiting is None:
    # Of layers to come nothing is known yet: `locked()` checks these.
    check_patterns(adapter, sites)
    finding.check_axes(finder, info)
  else:
    met = frozenset().union(*(indices for _, indices in found))
    waiting = dataclasses.replace(waiting, met=waiting.met | met)
  taken = checkpoint.__contains__
  site_records = {}
  for site in sites:
    who = intercept(host, adapter, site)
    site_records[site.path] = site_record(adapter, name, site, who, taken)
  shared, shared_leaves = _shared(adapter, sites, seed, name, taken)
  _check_distinct(adapter, site_records.values(), shared)
  record = AdapterRecord(
    name,
    adapter,
    True,
    site_records,
    shared,
    seed,
    waiting,
    to=_text(where),
  )
  for one in site_records.values():
    check_apply(one, shared)
  if waiting is None:
    check_names(record)
  leaves = inserted(
    marked(checkpoint, records),
    {**weight_leaves(checkpoint, records, record, seed, info), **shared_leaves},
  )
  left = left_out(name, refused)
  warn(adapter, left)
  large = warn_of_ranks(record)
  return checkpoint.replace(
    leaves=leaves,
    records=records.add(record),
    left_out=(*checkpoint.left_out, *left),
    remarks=(
      *checkpoint.remarks,
      *layouts.remarks(taken_layouts(finder, sites), 'attach'),
      *(() if large is None else (large,)),
    ),
  )


def _shares(adapter: Adapter) -> bool:
  """Whether a type has weights that its sites share."""
  return type(adapter).init_shared is not Adapter.init_shared


def _found(
  finder: finding.Finder,
  where: selectors.Selector | Selection,
  info: Mapping[Path, finding.Info],
  waiting: Pending | None,
  pending: bool,
  refused: list[finding.Refused],
) -> list[tuple[Site, frozenset[int]]]:
  """Returns the sites, each with the numbers of the items that mean it.

  Args:
    finder: knows adapter, types and layouts.
    where: the selector or selection.
    info: all parameters that may be rewritten.
    waiting: what the adapter waits for, if layers to come may match.
    pending: whether there may be layers to come.
    refused: a list that gets the layers that are left out.
  """
  try:
    return finding.sites(
      finder,
      where,
      info,
      missing='pass' if waiting else 'error',
      left=None if waiting else refused,
    )
  except errors.SelectorError as error:
    if not (pending and _shares(finder.adapter)):
      raise
    raise errors.SelectorError(
      f"{error} Adapter type '{finder.adapter.name}' shares weights between "
      'sites, so it needs all layers now. Initialise the model first.'
    ) from None


def _check_distinct(
  adapter: Adapter,
  found: Iterable[SiteRecord],
  shared: Mapping[str, WeightSpec],
) -> None:
  """Raises if a shared weight has the name of a site's own.

  Raises:
    PluginError: naming the site and the weight; `apply` would get one of them.
  """
  for one in found:
    for weight in set(shared) & set(one.weights):
      raise errors.PluginError(
        f"{paths.show(one.site.path)}: adapter type '{adapter.name}' returns a "
        f'weight {weight!r} from both init and init_shared. Rename one.'
      )


def _text(where: selectors.Selector | Selection) -> str | tuple[str, ...]:
  """Returns a selector, or the paths of a selection, for the record."""
  if isinstance(where, Selection):
    return tuple(map(paths.literal, where))
  return written(where.text)


def warn_of_ranks(record: AdapterRecord) -> str | None:
  """Warns of sites with a larger rank than any matrix of their shape.

  Returns:
    The text of the warning, if there is one.
  """
  large = large_ranks(record)
  if large is not None:
    warnings.warn(f'attach: {large}.', errors.SiteWarning, stacklevel=3)
  return large


def large_ranks(record: AdapterRecord) -> str | None:
  """Returns which sites have a larger rank than any matrix of their shape.

  It computes what it says, so that it is no error: PEFT allows it, and a small
  head is often adapted with the rank of all other layers.

  Args:
    record: an adapter whose type says by `rank_axes` what ranks are.
  """
  found: dict[Path, tuple[Site, int]] = {}
  for path, one in record.sites.items():
    side = min(one.site.in_size, one.site.out_size)
    for weight, axis in record.adapter.rank_axes.items():
      spec = one.weights.get(weight)
      if spec is not None and spec.shape[axis] > side:
        found[path] = one.site, spec.shape[axis]
  if not found:
    return None
  path, (site, rank) = next(iter(found.items()))
  side = min(site.in_size, site.out_size)
  shown = errors.listed(paths.show(path) for path in found)
  return (
    f"rank {rank} of adapter type '{record.adapter.name}' exceeds the smaller "
    f'side of {site.in_size}×{site.out_size}, of which rank {side} makes any '
    f'update: {shown}. A smaller one is given by patterns='
    f"{{{paths.literal(path)!r}: {{'rank': {side}}}}}"
  )


def taken_layouts(
  finder: finding.Finder, sites: Iterable[Site]
) -> dict[layouts.Layout, list[Path]]:
  """Returns the layouts that are inferred for PyTorch's, by parameters."""
  found: dict[layouts.Layout, list[Path]] = {}
  for site in sites:
    for spec in site.params:
      path = (*site.layer, spec.name)
      one = finder.taken(path)
      if one is not None:
        found.setdefault(one, []).append(path)
  return found


def left_out(name: str, refused: Iterable[finding.Refused]) -> list[LeftOut]:
  """Returns the layers that an adapter leaves out, each once.

  Args:
    name: the adapter's name.
    refused: the layers, as each item of a selector yields them.
  """
  found: dict[Path, LeftOut] = {}
  for one in refused:
    named = one.how != 'any'
    if one.layer not in found or named:
      found[one.layer] = LeftOut(one.layer, name, one.reason, named)
  return list(found.values())


def warn(adapter: Adapter, left: Iterable[LeftOut]) -> None:
  """Warns of layers that a selector names in part and that are left out."""
  left = [one for one in left if one.named]
  if not left:
    return
  shown = errors.listed(
    (f'{paths.show(one.path)} ({one.reason})' for one in left), separator='; '
  )
  warnings.warn(
    f"attach: adapter type '{adapter.name}' cannot serve {len(left)} of the "
    f'layers that the selector matches, and leaves them as they are: {shown}'
    ". If this is meant, take them out with '!'.",
    errors.SiteWarning,
    stacklevel=2,
  )


def marked(checkpoint: Checkpoint, records: Records) -> dict[Path, Leaf]:
  """Returns the leaves, known to be the base if no adapter is attached yet.

  Args:
    checkpoint: the model before an adapter is attached.
    records: the adapters that it has.
  """
  # Parameters that unlocked params get later could not be distinguished from
  # ones that were changed.
  if records.adapters or not checkpoint.manifest.locked:
    return dict(checkpoint)
  return {
    path: leaf if leaf.base else leaf.replace(base=True)
    for path, leaf in checkpoint.items()
  }


def _pending(
  adapter: Adapter,
  where: selectors.Selector,
  finder: finding.Finder,
  graph: Any,
  host: Host,
) -> Pending:
  """Returns the sites that the adapter looks for until params are locked."""
  item = where.needs('type', 'term')
  if item is not None and graph is None:
    raise errors.SelectorError(
      f'selector {item.written!r}: before initialisation the types of layers '
      'come from the graph. Give graph=, or attach after initialisation.'
    )
  if item is not None and item.kind == 'term':
    raise errors.SelectorError(
      f'selector {item.written!r}: a term of a plugin is answered when an '
      'adapter is attached, and layers may still be added. Lock the params '
      'first.'
    )
  unknown = Site((), (), known=False)
  who = host.ask('surgery_intercept_param', of=adapter, site=unknown)
  return Pending(
    where, frozenset(), finder.layouts, finder.stacked, finder.types, graph, who
  )


def _shared(
  adapter: Adapter,
  sites: Sequence[Site],
  seed: int,
  name: str,
  taken: Callable[[Path], bool],
) -> tuple[dict[str, WeightSpec], dict[Path, Leaf]]:
  """Returns the weights that sites share: specifications, and leaves."""
  if not _shares(adapter):
    return {}, {}
  drawn = drawing.draw_shared(adapter, sites, seed, name)
  specs, leaves = {}, {}
  for weight, value in drawn.items():
    path = shared_path(weight, name)
    if taken(path):
      raise errors.AdapterError(f'{paths.show(path)}: the name is taken.')
    trainable = trains(adapter, weight, str(value.dtype))
    specs[weight] = WeightSpec(
      path, tuple(value.shape), str(value.dtype), trainable
    )
    leaves[path] = Leaf(
      functools.partial(_same, value),
      tuple(value.shape),
      str(value.dtype),
      trainable,
      weight_metadata(adapter, name, None, weight),
      fresh=True,
    )
  return specs, leaves


def _same(value: Any) -> Any:
  return value


class _Group:
  """Sites of one kind, drawn together when the first one is loaded."""

  def __init__(self, draw: Callable[[], list[dict[str, Any]]]) -> None:
    self._draw = draw
    self._drawn: list[dict[str, Any]] | None = None
    self._left = 0

  def expect(self) -> None:
    self._left += 1

  def load(self, index: int, weight: str) -> Any:
    """Returns one weight; the last one that is expected releases them all."""
    if self._drawn is None:
      self._drawn = self._draw()
    value = self._drawn[index][weight]
    self._left -= 1
    if self._left == 0:
      self._drawn, self._left = None, 0
    return value


def weight_leaves(
  leaves: Mapping[Path, Leaf],
  inner: Records,
  record: AdapterRecord,
  seed: int,
  info: Mapping[Path, finding.Info],
) -> dict[Path, Leaf]:
  """Returns the weights of an adapter's sites as leaves, drawn lazily.

  Args:
    leaves: the model.
    inner: the adapters that are attached already.
    record: the adapter.
    seed: from which the weights derive.
    info: shapes of the parameters.
  """

  def base(site: Site, name: str) -> Any:
    path = (*site.layer, name)
    chain = compute.enabled(inner.chains.get(path, ()))
    fetch = lambda p: leaves[inner.stored(p)].load()
    if not chain:
      return fetch(path)
    return blocks.answer(chain, path, fetch, inner.chains)

  groups: dict[Any, list[SiteRecord]] = {}
  for one in record.sites.values():
    whole = info[one.site.path]
    stack = whole.shape[: len(whole.shape) - len(one.site.primary.shape)]
    _, used = drawing.site_shapes(one.interceptor, one.site)
    # Sites whose weights derive from their base are drawn one by one.
    alone = one.site.path if used else None
    key = (one.interceptor, one.site.anonymous, stack, alone)
    groups.setdefault(key, []).append(one)
  made: dict[Path, Leaf] = {}
  for (who, _, stack, _), members in groups.items():
    sites = [m.site for m in members]
    keys = drawing.keys(seed, record.name, [s.path for s in sites])
    group = _Group(
      functools.partial(drawing.draw, who, sites, stack, keys, base)
    )
    for index, member in enumerate(members):
      whole = info[member.site.path]
      front = whole.sharding[: len(stack)] or (None,) * len(stack)
      for weight, spec in member.weights.items():
        group.expect()
        made[spec.path] = Leaf(
          functools.partial(group.load, index, weight),
          (*stack, *spec.shape),
          spec.dtype,
          spec.trainable,
          weight_metadata(
            record.adapter, record.name, member.site, weight, front
          ),
          fresh=True,
        )
  return made


def inserted(
  leaves: Mapping[Path, Leaf], new: Mapping[Path, Leaf]
) -> dict[Path, Leaf]:
  """Returns leaves with the new ones behind the others of their layer."""
  by_layer: dict[Path, list[Path]] = {}
  for path in new:
    by_layer.setdefault(path[:-1], []).append(path)
  last = {path[:-1]: path for path in leaves if path[:-1] in by_layer}
  result: dict[Path, Leaf] = {}
  for path, leaf in leaves.items():
    result[path] = leaf
    if last.get(path[:-1]) == path:
      result.update((p, new[p]) for p in by_layer[path[:-1]])
  result.update((p, leaf) for p, leaf in new.items() if p not in result)
  return result
