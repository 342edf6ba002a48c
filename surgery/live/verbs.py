"""The verbs: params in, params out. Nothing that the caller holds changes.

Given a `Checkpoint` they return one: then a verb is its pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import blox as bx
import jax

from surgery import errors, expect
from surgery.adapting import attachment as attaching
from surgery.adapting import finding
from surgery.aliases import Params
from surgery.contract.adapter import Adapter
from surgery.host.manager import Host, default_host
from surgery.live import adoption, applying, checkpoints, lineage, traced_checks
from surgery.live import params as live
from surgery.live.dispatch import said, takes_checkpoints, told, types_of
from surgery.live.plain import BloxParams
from surgery.model import layers
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import cast as casting
from surgery.passes import combine_adapters as combining
from surgery.passes import detach as detaching
from surgery.passes import drop as dropping
from surgery.passes import enable as enabling
from surgery.passes import freeze as freezing
from surgery.passes import keep as keeping
from surgery.passes import merge as merging
from surgery.passes import prune_ranks as pruning
from surgery.passes import rename as renaming

Tree = TypeVar('Tree')
# Params or a checkpoint: what goes in comes out.
Model = TypeVar('Model', bound='Params | Checkpoint')
Names = str | Sequence[str] | None
Select = selectors.Text | Selection

# Where a pass does not select by types of layers.
_NO_GRAPH = object()


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
  """Information about an adapter, from `adapters`.

  Attributes:
    name: its name.
    type: name of its type.
    config: its configuration.
    sites: paths of the primary parameters of its sites.
    enabled: whether it takes part in what layers get.
    size: number of elements of its weights.
    nbytes: number of bytes of its weights.
    pending: whether it still looks for sites, until params are locked.
    saved: paths of the parameters for which it has a value of its own, since
      they were trained with it before it was saved.
  """

  name: str
  type: str
  config: Mapping[str, Any]
  sites: tuple[Path, ...]
  enabled: bool
  size: int
  nbytes: int
  pending: bool
  saved: tuple[Path, ...] = ()

  def __repr__(self) -> str:
    state = 'enabled' if self.enabled else 'disabled'
    state += ', looking for sites' if self.pending else ''
    config = ', '.join(f'{k}={v!r}' for k, v in self.config.items())
    if self.saved:
      state += f', saved with {len(self.saved)} parameters'
    return (
      f'AdapterInfo({self.name}: {self.type}({config}) on {len(self.sites)} '
      f'sites, {self.size:,} weights, {state})'
    )


def _is_params(value: Any) -> bool:
  return isinstance(value, bx.Params)


def _params(value: Any, verb: Callable[..., Any]) -> bx.Params:
  """Returns params whose adapters are all on record.

  Raises:
    SurgeryError: if `value` is something else.
    AdapterError: if it holds adapter weights without their records.
  """
  return adoption.adopted(expect.params(value, verb))


def _holding(tree: Any, names: Names, verb: str) -> None:
  """Raises unless some params in a pytree have the named adapters.

  Raises:
    SurgeryError: if there are no params in it.
    AdapterError: for an unknown name.
  """
  found = [
    live.records_of(adoption.adopted(p))
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
  if names is not None and not expect.names(names):
    raise errors.AdapterError(f'{verb}: no adapter was named.')
  for name in () if names is None else expect.names(names):
    if name not in known:
      # The error of the params with most adapters lists most names.
      max(found, key=len).get(name)


def _each(
  tree: Tree, names: Names, verb: str, change: Callable[[bx.Params], bx.Params]
) -> Tree:
  """Applies a verb to all params in a pytree that have the adapters."""
  _holding(tree, names, verb)
  wanted = None if names is None else expect.names(names)

  def one(value: Any) -> Any:
    if not _is_params(value):
      return value
    params = adoption.adopted(value)
    mine = live.records_of(params).names
    if not [n for n in mine if wanted is None or n in wanted]:
      return value
    return change(params)

  return jax.tree.map(one, tree, is_leaf=_is_params)


def _present(params: bx.Params, names: Names) -> list[str]:
  """Returns those of the named adapters that these params have."""
  mine = live.records_of(params).names
  wanted = mine if names is None else expect.names(names)
  return [n for n in mine if n in wanted]


def _verb(
  change: Callable[..., Checkpoint],
  verb: Callable[..., Any],
  params: Any,
  host: Host | None,
  graph: Any = None,
  /,
  *args: Any,
  **options: Any,
) -> bx.Params:
  """Does a verb: its pass on params, whose options are those of the pass.

  Args:
    change: the pass.
    verb: the verb, for messages.
    params: what the caller gave.
    host: whose plugins are asked.
    graph: the model's graph, where the pass selects by types of layers.
    *args: what the pass takes.
    **options: the same; observers get those that are plain data.
  """
  params = _params(params, verb)
  arguments = said(change, options)
  if graph is not _NO_GRAPH:
    options['layer_types'] = _layer_types(params, graph)
  with told(host, verb.__name__, **arguments) as host:
    return _passed(params, host, change, *args, **options)


def _passed(
  params: bx.Params,
  host: Host,
  change: Callable[..., Checkpoint],
  *args: Any,
  **kwargs: Any,
) -> bx.Params:
  """Applies a pass to params in memory."""
  before = checkpoints.to_checkpoint(params)
  after = change(before, *args, host=host, **kwargs)
  result = checkpoints.to_params(after, host, like=params)
  return lineage.remembered(
    result, params, before, change.__name__, change, args, kwargs, host
  )


def _layer_types(params: bx.Params, graph: Any) -> layers.LayerTypes:
  if graph is not None:
    return types_of(graph)
  manifest = live.notes_of(params).get('manifest')
  return manifest.layer_types if manifest is not None else {}


# The verbs.


@overload
def attach(
  params: Params,
  adapter: Adapter,
  *,
  to: Select,
  name: str = 'default',
  seed: int = 0,
  graph: bx.Graph | None = None,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  host: Host | None = None,
) -> live.AdaptedParams: ...


@overload
def attach(
  params: Checkpoint,
  adapter: Adapter,
  *,
  to: Select,
  name: str = 'default',
  seed: int = 0,
  graph: bx.Graph | None = None,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  host: Host | None = None,
) -> Checkpoint: ...


@takes_checkpoints(attaching.attach)
def attach(
  params: Any,
  adapter: Adapter,
  *,
  to: Select,
  name: str = 'default',
  seed: int = 0,
  graph: bx.Graph | None = None,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  host: Host | None = None,
) -> Any:
  """Attaches an adapter: layers get their parameters adapted from now on.

  Unlocked params may be attached to before the first forward pass; what is not
  there yet is adapted when it is made, and `locked()` ends that. Where
  initialisation is under `vmap`, all members begin with one draw; attach
  afterwards, with `stacked=`, for a draw each.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
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
    SiteError: if a parameter or layer that is named cannot be served; one that
      a pattern names in part is left out with a `SiteWarning`.
    ConfigError: for a wrong configuration.
    AdapterError: if the name is taken, or params hold weights of an adapter
      without its record.

  Example:
    params = surgery.attach(params, surgery.LoRA(rank=8), to='**/{query,value}')
  """
  params = _params(params, attach)
  written = list(to) if isinstance(to, Selection) else to
  with told(host, 'attach', name=name, to=written, seed=seed) as host:
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
  return result


@takes_checkpoints(freezing.freeze)
def freeze(
  params: Model,
  select: Select | None = None,
  *,
  policy: str | None = None,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> Model:
  """Freezes parameters: all but adapters' weights, or what is named.

  Make the optimizer state after freezing: flags are part of the structure.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    select: what to freeze, as selectors or a selection; a layer means
      everything beneath it.
    policy: a named policy instead, e.g. one that a plugin offers.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    PluginError: for a policy that nobody knows.
  """
  return _verb(
    freezing.freeze, freeze, params, host, graph, select, policy=policy
  )


@takes_checkpoints(freezing.unfreeze)
def unfreeze(
  params: Model,
  select: Select | None = None,
  *,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> Model:
  """Lets train again what `freeze` froze, and nothing else.

  Running statistics and other state that never trained stay as they are.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    select: which, as selectors or a selection; all by default.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    SurgeryError: if `freeze` froze none of what is selected.
  """
  return _verb(freezing.unfreeze, unfreeze, params, host, graph, select)


@takes_checkpoints(enabling.enable)
def enable(
  tree: Tree, names: Names = None, *, host: Host | None = None
) -> Tree:
  """Switches adapters on; all by default.

  Args:
    tree: params, a pytree that holds some, e.g. an optimizer state, or a
      `Checkpoint`.
    names: an adapter, several, or None for all.
    host: its observers are notified.

  Raises:
    AdapterError: for an unknown name.
  """
  return _switched(tree, names, True, 'enable', host)


@takes_checkpoints(enabling.disable)
def disable(
  tree: Tree, names: Names = None, *, host: Host | None = None
) -> Tree:
  """Switches adapters off: layers get the base as it is stored.

  Their weights do not train as long as they are off: `split()` counts them as
  the rest, and `trainable_mask` is False. Their flags stay for when they are
  enabled again. Split again, and `migrate` the optimizer's state.

  Args:
    tree: params, a pytree that holds some, e.g. an optimizer state, or a
      `Checkpoint`.
    names: an adapter, several, or None for all.
    host: its observers are notified.

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

  with told(host, verb, names=names):
    return _each(tree, names, verb, change)


@overload
def merge(
  params: Params,
  names: Names = None,
  *,
  check_finite: bool = True,
  checkify: bool = False,
  host: Host | None = None,
) -> BloxParams: ...


@overload
def merge(
  params: Checkpoint,
  names: Names = None,
  *,
  check_finite: bool = True,
  checkify: bool = False,
  host: Host | None = None,
) -> Checkpoint: ...


@takes_checkpoints(merging.merge)
def merge(
  params: Any,
  names: Names = None,
  *,
  check_finite: bool = True,
  checkify: bool = False,
  host: Host | None = None,
) -> Any:
  """Folds adapters into the base; their weights are gone.

  The base becomes what layers got, bit for bit: float32 arithmetic, rounded
  once to the parameter's dtype.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    names: an adapter, several, or None for all.
    check_finite: whether a result with NaN or infinity is an error.
    checkify: whether traced results are checked too, by
      `jax.experimental.checkify`. The function that calls this has to be
      transformed by `checkify.checkify` then.
    host: whose plugins are asked.

  Returns:
    Params without these adapters; plain `bx.Params` if none is left. Under
    `jit` and other transformations values are not known, so `check_finite`
    looks at nothing and the result may have NaN or infinity; `checkify=True`
    checks it when the program runs.

  Raises:
    AdapterError: for an unknown name, or an adapter that is disabled.
    OrderError: if an adapter inside of one does not commute with it.
    SiteError: if a result is not finite.
    ConfigError: for `checkify` without `check_finite`.

  Example:
    merge = lambda params: surgery.merge(params, checkify=True)
    error, plain = checkify.checkify(jax.jit(merge))(params)
    error.throw()
  """
  params = _params(params, merge)
  if checkify:
    traced_checks.refuse_nothing_to_check(
      'merge', check_finite, 'check_finite=False'
    )
  with told(host, 'merge', names=names) as host:
    result = _passed(
      params, host, merging.merge, names, check_finite=check_finite
    )
  if checkify:
    records = live.records_of(params)
    left = live.records_of(result).names
    gone = [a for a in records.adapters if a.name not in left]
    rewritten = {
      (*one.site.layer, spec.name)
      for record in gone
      for one in record.sites.values()
      for spec in one.site.params
    }
    traced_checks.check_merged(result, sorted(rewritten))
  return result


@takes_checkpoints(combining.combine_adapters)
def combine_adapters(
  params: Model,
  weights: Mapping[str, float],
  *,
  method: str = 'linear',
  name: str = 'combined',
  rank: int | None = None,
  density: float = 0.5,
  set: Mapping[str, Any] | None = None,
  seed: int = 0,
  keep: bool = False,
  host: Host | None = None,
) -> Model:
  """Combines several adapters that add an update to their base into one LoRA.

  Their updates are combined, with their scales, so ranks, scales and types may
  differ. Factors are not combined: their sums would have cross terms.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    weights: the weight of each adapter in the sum.
    method: `linear` or `cat`, `Σ w·Δ`, exactly, of the sum of the ranks; `svd`,
      the nearest to that of rank `rank`; or any method that combines models
      (`ties`, `dare_linear`, `slerp`, …), whose result is brought to `rank`.
    name: name of the new adapter.
    rank: its rank; of `linear` and `cat` the sum of the ranks by default, of
      others the largest rank.
    density: share of an update that is kept, for methods that have it.
    set: further options of the method, e.g. `{'rescale': 'l1'}`.
    seed: random seed of methods that drop elements.
    keep: whether the others stay, disabled, since their updates are in the sum;
      otherwise they are detached.
    host: whose plugins are asked.

  Raises:
    AdapterError: for an unknown name, or a type that does not add.
    ConfigError: for a density, rank, weight or method that cannot be.

  Example:
    params = surgery.combine_adapters(params, {'a': 0.7, 'b': 0.3})
  """
  return _verb(
    combining.combine_adapters,
    combine_adapters,
    params,
    host,
    _NO_GRAPH,
    weights=weights,
    method=method,
    name=name,
    rank=rank,
    density=density,
    set=set,
    seed=seed,
    keep=keep,
  )


@overload
def detach(
  tree: Params, names: Names = None, *, host: Host | None = None
) -> BloxParams: ...


@overload
def detach(
  tree: Checkpoint, names: Names = None, *, host: Host | None = None
) -> Checkpoint: ...


@overload
def detach(
  tree: Tree, names: Names = None, *, host: Host | None = None
) -> Tree: ...


@takes_checkpoints(detaching.detach)
def detach(tree: Any, names: Names = None, *, host: Host | None = None) -> Any:
  """Takes adapters off: their weights are gone, the base is as it is stored.

  What was loaded with an adapter in the place of a parameter, as a head that
  was trained along, goes too. A parameter of the base that was trained in place
  (`unfreeze`) stays as it was trained: nothing else is known of it.

  Args:
    tree: params, a pytree that holds some, e.g. an optimizer state, or a
      `Checkpoint`.
    names: an adapter, several, or None for all.
    host: its observers are notified.

  Raises:
    AdapterError: for an unknown name.
  """
  with told(host, 'detach', names=names) as host:
    asked = host

    def change(params: bx.Params) -> bx.Params:
      return _passed(params, asked, detaching.detach, _present(params, names))

    return _each(tree, names, 'detach', change)


@takes_checkpoints(casting.cast)
def cast(
  params: Model,
  to: Any,
  *,
  keep: Select | None = None,
  overflow: bool = False,
  underflow: bool = False,
  checkify: bool = False,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> Model:
  """Casts floating-point parameters to another dtype, rounding once.

  Adapters' weights are cast too; adapters go on computing in float32. Arrays
  stay on their devices; float64 stays a numpy array unless JAX's 64-bit mode is
  on.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    to: the dtype: `'bf16'`, `'f16'`, `'f32'`, `'f8_e4m3fn'` and so on, a full
      name, or e.g. `jnp.bfloat16`.
    keep: what stays as it is, as selectors or a selection; `'SELECTOR=DTYPE'`
      is cast to that dtype instead.
    overflow: whether finite values may become infinite or NaN.
    underflow: whether more than half of a parameter's numbers may become zero;
      a `RuntimeWarning` says how many do if they are more than 1 %.
    checkify: whether that is checked of traced values too, by
      `jax.experimental.checkify`. The function that calls this has to be
      transformed by `checkify.checkify` then.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Returns:
    Params, or a `Checkpoint`, in the dtype. Under `jit` and other
    transformations values are not known, so finite values may become infinite
    whatever `overflow` says; `checkify=True` checks that when the program runs.

  Raises:
    ConfigError: for a dtype that is unknown, or no floating-point one; for
      `checkify` with `overflow`.
    SelectorError: for a selector that matches nothing.
    CastError: for a finite value that the dtype cannot hold, or if most of a
      parameter would become zero; of a `Checkpoint` when the tensor is asked
      for.
    SurgeryError: if there is nothing to cast.

  Example:
    half = surgery.cast(params, 'bf16', keep='**/norm')
  """
  params = _params(params, cast)
  if checkify:
    traced_checks.refuse_nothing_to_check('cast', not overflow, 'overflow=True')
  result = _verb(
    casting.cast,
    cast,
    params,
    host,
    graph,
    to=to,
    keep=keep,
    overflow=overflow,
    underflow=underflow,
  )
  if checkify:
    traced_checks.check_cast(params, result)
  return result


@takes_checkpoints(renaming.rename)
def rename(
  params: Model, rules: str | Sequence[str], *, host: Host | None = None
) -> Model:
  """Gives parameters and layers other names; adapters go along.

  A model finds its parameters by the names of its modules, so params with other
  names are for another model.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    rules: `'OLD -> NEW'`, or several, which hold at once; the first that
      matches a path decides. `*`, `**`, `{a,b}` and `<i>` stand on the right
      for what they matched.
    host: whose plugins are asked.

  Raises:
    RenameError: for a rule that cannot be read or decides nothing, and if two
      parameters would get one name.
    AdapterError: for an adapter that cannot follow.

  Example:
    params = surgery.rename(params, ['net/h<i> -> net/block<i+1>'])
  """
  return _verb(renaming.rename, rename, params, host, _NO_GRAPH, rules=rules)


@takes_checkpoints(dropping.drop)
def drop(
  params: Model,
  select: Select,
  *,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> Model:
  """Leaves out parameters, and the adapters' weights that belong to them.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    select: what to leave out, as selectors or a selection; a layer means
      everything beneath it.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    AdapterError: if half of what an adapter needs would be left.
    SurgeryError: if nothing would be left.
  """
  return _verb(dropping.drop, drop, params, host, graph, select)


@takes_checkpoints(keeping.keep)
def keep(
  params: Model,
  select: Select,
  *,
  graph: bx.Graph | None = None,
  host: Host | None = None,
) -> Model:
  """Leaves out all other parameters, and adapters that have no site then.

  Args:
    params: the model's params, or a `Checkpoint`; not changed.
    select: what to keep, as selectors or a selection; a layer means everything
      beneath it.
    graph: the model's graph, for `type:` selectors.
    host: whose plugins are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    AdapterError: if half of what an adapter needs would be left.
  """
  return _verb(keeping.keep, keep, params, host, graph, select)


@takes_checkpoints(pruning.prune_ranks)
def prune_ranks(
  params: Model,
  keep: Mapping[Any, Any],
  *,
  name: str = 'default',
  host: Host | None = None,
) -> Model:
  """Keeps some ranks of an adapter, site by site, and leaves out the others.

  The adapter's type says which axes of its weights are the rank
  (`Adapter.rank_axes`). Options stay as they are, so the scale `alpha / rank`
  does, and each rank that is kept counts as it did. Give `surgery.migrate` the
  params before and after, and an optimizer's state follows. Of layers that are
  stacked in one parameter all keep the same ranks.

  Args:
    params: the model's params, or a `Checkpoint`; not changed. Under `jit` the
      ranks that stay have to be known, since they decide shapes.
    keep: by site, numbers of the ranks that stay, from 0, or a flag for each
      rank; none leaves the site's base alone. A site is the path of the
      parameter that is rewritten, as a tuple or as text; sites that are not
      named keep all.
    name: the adapter's name.
    host: whose plugins are asked.

  Raises:
    AdapterError: for an unknown adapter, site or rank, or a type that does not
      say what its rank is.
    PluginError: if what the type says does not fit its weights.

  Example:
    after = surgery.prune_ranks(params, {'net/h0/query/kernel': [0, 3]})
    opt_state = surgery.migrate(opt_state, params, after)
  """
  params = _params(params, prune_ranks)
  ranks = pruning.plain(keep)
  result = _verb(
    pruning.prune_ranks, prune_ranks, params, host, _NO_GRAPH, ranks, name=name
  )
  return applying.of_jax(result, params)


def adapters(
  params: Params | Checkpoint, *, host: Host | None = None
) -> list[AdapterInfo]:
  """Returns information about each adapter, innermost first.

  Args:
    params: the model's params, or a `Checkpoint`.
    host: knows the adapters' types, for a `Checkpoint`.
  """
  if isinstance(params, Checkpoint):
    records = params.records(host or default_host())
    leaves: Mapping[Path, Leaf] = params
  else:
    params = _params(params, adapters)
    records = live.records_of(params)
    leaves = checkpoints.to_checkpoint(params)
  infos = []
  for record in records.adapters:
    weights = [leaves[p] for p in record.weight_paths() if p in leaves]
    infos.append(
      AdapterInfo(
        record.name,
        record.adapter.name,
        record.adapter.config(),
        tuple(record.sites),
        record.enabled,
        sum(w.size for w in weights),
        sum(w.nbytes for w in weights),
        record.pending is not None,
        tuple(record.saved),
      )
    )
  return infos


def trainable_mask(params: Params) -> BloxParams:
  """Returns a mask for optax: True where a parameter trains.

  `optax.masked(tx, mask)` transforms what is True and hands on what is not, as
  it is: given gradients of frozen weights, it moves them by these. To train,
  use `surgery.optimizer(tx, params)`. `optax.freeze` wants the opposite mask,
  `jax.tree.map(operator.not_, mask)`. Weights of an adapter that is disabled
  do not train.

  Args:
    params: the model's params.

  Returns:
    Params of the same structure with a bool for every array.
  """
  expect.params(params, trainable_mask)
  with errors.within('trainable_mask'):
    adoption.refuse_lost([params])
  idle = live.records_of(params).idle
  data = {}
  for path, param in params.items():
    trains = param.trainable and path not in idle
    data[path] = param.replace(
      value=jax.tree.map(lambda _, t=trains: t, param.value)
    )
  return live.make(
    data, params.is_locked, live.records_of(params), live.notes_of(params)
  )
