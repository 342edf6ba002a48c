"""The verbs: params in, params out. Nothing that the caller holds changes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import blox as bx
import jax

from surgery.core import errors, layers, paths, selectors
from surgery.core.adapter import Adapter
from surgery.core.checkpoint import Checkpoint
from surgery.core.host import Host, default_host
from surgery.core.paths import Path
from surgery.core.selection import Selection
from surgery.live import convert, designed
from surgery.live import params as live
from surgery.passes import attach as attaching
from surgery.passes import detach as detaching
from surgery.passes import enable as enabling
from surgery.passes import finding
from surgery.passes import freeze as freezing
from surgery.passes import merge as merging

Tree = TypeVar('Tree')
Names = str | Sequence[str] | None
Select = selectors.Text | Selection


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
  """What `adapters` says of one adapter.

  Attributes:
    name: its name.
    type: name of its type.
    config: its configuration.
    sites: paths of the primary parameters of its sites.
    enabled: whether it takes part in what layers get.
    size: number of elements of its weights.
    nbytes: number of bytes of its weights.
    pending: whether it still looks for sites, until params are locked.
  """

  name: str
  type: str
  config: Mapping[str, Any]
  sites: tuple[Path, ...]
  enabled: bool
  size: int
  nbytes: int
  pending: bool

  def __repr__(self) -> str:
    state = 'enabled' if self.enabled else 'disabled'
    state += ', looking for sites' if self.pending else ''
    config = ', '.join(f'{k}={v!r}' for k, v in self.config.items())
    return (
      f'AdapterInfo({self.name}: {self.type}({config}) on {len(self.sites)} '
      f'sites, {self.size:,} weights, {state})'
    )


def _is_params(value: Any) -> bool:
  return isinstance(value, bx.Params)


def _params(value: Any, verb: str) -> bx.Params:
  """Returns params whose adapters are all on record.

  Raises:
    SurgeryError: if `value` is something else.
    AdapterError: if it holds adapter weights without their records.
  """
  if not _is_params(value):
    raise errors.SurgeryError(
      f'{verb}: expected bx.Params, found {type(value).__name__}.'
    )
  return designed.adopted(value)


def _holding(tree: Any, names: Names, verb: str) -> None:
  """Raises unless some params in a pytree have the named adapters.

  Raises:
    SurgeryError: if there are no params in it.
    AdapterError: for an unknown name.
  """
  found = [
    live.records_of(designed.adopted(p))
    for p in jax.tree.leaves(tree, is_leaf=_is_params)
    if _is_params(p)
  ]
  if not found:
    raise errors.SurgeryError(
      f'{verb}: expected params, or a pytree that holds some, found '
      f'{type(tree).__name__} without any.'
    )
  known = [n for records in found for n in records.names]
  if names is None and not known:
    raise errors.AdapterError('no adapter is attached.')
  if names is not None and not _listed(names):
    raise errors.AdapterError(f'{verb}: no adapter was named.')
  for name in () if names is None else _listed(names):
    if name not in known:
      # The fullest of them says best what there is.
      max(found, key=len).get(name)


def _each(
  tree: Tree, names: Names, verb: str, change: Callable[[bx.Params], bx.Params]
) -> Tree:
  """Applies a verb to all params in a pytree that have the adapters."""
  _holding(tree, names, verb)
  wanted = None if names is None else _listed(names)

  def one(value: Any) -> Any:
    if not _is_params(value):
      return value
    params = designed.adopted(value)
    mine = live.records_of(params).names
    if not [n for n in mine if wanted is None or n in wanted]:
      return value
    return change(params)

  return jax.tree.map(one, tree, is_leaf=_is_params)


def _listed(names: str | Sequence[str]) -> list[str]:
  return [names] if isinstance(names, str) else list(names)


def _present(params: bx.Params, names: Names) -> list[str]:
  """Returns those of the named adapters that these params have."""
  mine = live.records_of(params).names
  wanted = mine if names is None else _listed(names)
  return [n for n in mine if n in wanted]


@contextlib.contextmanager
def _told(host: Host | None, verb: str, **arguments: Any) -> Iterator[Host]:
  """Tells observers of a verb."""
  host = host or default_host()
  with host.observed(verb, arguments):
    yield host


def _passed(
  params: bx.Params,
  host: Host,
  change: Callable[..., Checkpoint],
  *args: Any,
  **kwargs: Any,
) -> bx.Params:
  """Applies a pass to params in memory."""
  before = convert.to_checkpoint(params)
  after = change(before, *args, host=host, **kwargs)
  return convert.to_params(after, host, like=params)


def _layer_types(params: bx.Params, graph: Any) -> layers.LayerTypes:
  if graph is not None:
    if not layers.is_graph(graph):
      raise errors.SurgeryError(
        f'graph: expected a bx.Graph, found {type(graph).__name__}.'
      )
    return layers.of_graph(graph)
  manifest = live.notes_of(params).get('manifest')
  return manifest.layer_types if manifest is not None else {}


# The verbs.


def attach(
  params: bx.Params,
  adapter: Adapter,
  *,
  to: Select,
  name: str = 'default',
  seed: int = 0,
  graph: bx.Graph | None = None,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  host: Host | None = None,
) -> live.AdaptedParams:
  """Attaches an adapter: layers get their parameters adapted from now on.

  Unlocked params may be attached to before the first forward pass; what is not
  there yet is adapted when it is made, and `locked()` ends that. Where
  initialisation is under `vmap`, all members begin with one draw; attach
  afterwards, with `stacked=`, for a draw each.

  Args:
    params: the model's params; not changed.
    adapter: type and configuration, e.g. `surgery.LoRA(rank=8)`.
    to: which layers or parameters, as selectors or a selection; a layer means
      its default parameter, `'all'` every parameter that the type can serve.
    name: the adapter's name.
    seed: from which its weights derive, with name and path; the model's own
      Rng is not touched.
    graph: the model's graph, for `type:` selectors and for roles of axes.
    stacked: number of axes stacked in front of parameters (scanned layers,
      ensembles), or such numbers by selector.
    layout: a letter an axis (`s` stacked, `i` input, `o` output), e.g. `'ioo'`
      for an einsum kernel `(d, heads, head)`, or such letters by selector; the
      last axis is the output by default.
    host: whose plugins are asked.

  Returns:
    Params with the adapter.

  Raises:
    SelectorError: if a selector or pattern matches nothing.
    SiteError: if a parameter cannot be served.
    ConfigError: for a wrong configuration.
    AdapterError: if the name is taken, or params hold weights of an adapter
      without its record.

  Example:
    params = surgery.attach(params, surgery.LoRA(rank=8), to='**/{query,value}')
  """
  params = _params(params, 'attach')
  written = list(to) if isinstance(to, Selection) else to
  with _told(host, 'attach', name=name, to=written, seed=seed) as host:
    result = _passed(
      params,
      host,
      attaching.attach,
      adapter,
      to=to,
      name=name,
      seed=seed,
      stacked=stacked,
      layout=layout,
      graph=graph,
      layer_types=_layer_types(params, graph),
      pending=not params.is_locked,
    )
  assert isinstance(result, live.AdaptedParams)
  shown = (
    [paths.literal(p) for p in to]
    if isinstance(to, Selection)
    else selectors.parse(to).text
  )
  adapters = {
    **live.notes_of(params).get('adapters', {}),
    name: {'seed': seed, 'to': shown},
  }
  notes = {**live.notes_of(params), 'adapters': adapters}
  return live.with_records(result, result.records, notes)  # type: ignore[return-value]


def freeze(
  params: bx.Params,
  select: Select | None = None,
  *,
  policy: str | None = None,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> bx.Params:
  """Freezes parameters: all but adapters' weights, or what is named.

  Make the optimizer state after freezing: flags are part of the structure.

  Args:
    params: the model's params; not changed.
    select: what to freeze, as selectors or a selection; a layer means
      everything beneath it.
    policy: a named policy instead, e.g. one that a plugin offers.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    PluginError: for a policy that nobody knows.
  """
  params = _params(params, 'freeze')
  with _told(host, 'freeze', policy=policy) as host:
    return _passed(
      params,
      host,
      freezing.freeze,
      select,
      policy=policy,
      layer_types=_layer_types(params, graph),
    )


def unfreeze(
  params: bx.Params,
  select: Select | None = None,
  *,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> bx.Params:
  """Lets train again what `freeze` froze, and nothing else.

  Running statistics and other state that never trained stay as they are.

  Args:
    params: the model's params; not changed.
    select: which, as selectors or a selection; all by default.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    SurgeryError: if `freeze` froze none of what is selected.
  """
  params = _params(params, 'unfreeze')
  with _told(host, 'unfreeze') as host:
    return _passed(
      params,
      host,
      freezing.unfreeze,
      select,
      layer_types=_layer_types(params, graph),
    )


def enable(
  tree: Tree, names: Names = None, *, host: Host | None = None
) -> Tree:
  """Switches adapters on; all by default.

  Args:
    tree: params, or a pytree that holds some, e.g. an optimizer state.
    names: an adapter, several, or None for all.
    host: whose observers are told.

  Raises:
    AdapterError: for an unknown name.
  """
  return _switched(tree, names, True, 'enable', host)


def disable(
  tree: Tree, names: Names = None, *, host: Host | None = None
) -> Tree:
  """Switches adapters off: layers get the base as it is stored.

  Args:
    tree: params, or a pytree that holds some, e.g. an optimizer state.
    names: an adapter, several, or None for all.
    host: whose observers are told.

  Raises:
    AdapterError: for an unknown name.
  """
  return _switched(tree, names, False, 'disable', host)


def _switched(
  tree: Tree, names: Names, enabled: bool, verb: str, host: Host | None
) -> Tree:
  def change(params: bx.Params) -> bx.Params:
    records = enabling.switched(
      live.records_of(params), _present(params, names), enabled
    )
    return live.with_records(params, records)

  with _told(host, verb, names=names):
    return _each(tree, names, verb, change)


def merge(
  params: bx.Params,
  names: Names = None,
  *,
  check_finite: bool = True,
  host: Host | None = None,
) -> bx.Params:
  """Folds adapters into the base; their weights are gone.

  The base becomes what layers got, bit for bit: float32 arithmetic, rounded
  once to the parameter's dtype.

  Args:
    params: the model's params; not changed.
    names: an adapter, several, or None for all.
    check_finite: whether a result with NaN or infinity is an error.
    host: whose plugins are asked.

  Returns:
    Params without these adapters; plain `bx.Params` if none is left.

  Raises:
    AdapterError: for an unknown name, or an adapter that is disabled.
    OrderError: if an adapter inside of one does not commute with it.
    SiteError: if a result is not finite.
  """
  params = _params(params, 'merge')
  with _told(host, 'merge', names=names) as host:
    return _passed(
      params, host, merging.merge, names, check_finite=check_finite
    )


def detach(
  tree: Tree, names: Names = None, *, host: Host | None = None
) -> Tree:
  """Takes adapters off: their weights are gone, the base is as it was.

  Args:
    tree: params, or a pytree that holds some, e.g. an optimizer state.
    names: an adapter, several, or None for all.
    host: whose observers are told.

  Raises:
    AdapterError: for an unknown name.
  """
  with _told(host, 'detach', names=names) as told:

    def change(params: bx.Params) -> bx.Params:
      return _passed(params, told, detaching.detach, _present(params, names))

    return _each(tree, names, 'detach', change)


def adapters(params: bx.Params) -> list[AdapterInfo]:
  """Returns what there is to know of each adapter, innermost first."""
  params = _params(params, 'adapters')
  infos = []
  for record in live.records_of(params).adapters:
    weights = [
      params[p].value
      for p in record.weight_paths()
      if p in params and hasattr(params[p].value, 'dtype')
    ]
    infos.append(
      AdapterInfo(
        record.name,
        record.adapter.name,
        record.adapter.config(),
        tuple(record.sites),
        record.enabled,
        sum(w.size for w in weights),
        sum(w.size * w.dtype.itemsize for w in weights),
        record.pending is not None,
      )
    )
  return infos


def trainable_mask(params: bx.Params) -> bx.Params:
  """Returns a mask for optax: True where a parameter trains.

  `optax.masked(tx, mask)` transforms what is True; `optax.freeze` wants the
  opposite, `jax.tree.map(operator.not_, mask)`.

  Args:
    params: the model's params.

  Returns:
    Params of the same structure with a bool for every array.
  """
  if not _is_params(params):
    raise errors.SurgeryError(
      f'trainable_mask: expected bx.Params, found {type(params).__name__}.'
    )
  data = {
    path: param.replace(
      value=jax.tree.map(lambda _, p=param: p.trainable, param.value)
    )
    for path, param in params.items()
  }
  return live.make(
    data, params.is_locked, live.records_of(params), live.notes_of(params)
  )
