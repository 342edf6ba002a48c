"""Migrate: an optimizer's state follows the changes of its params."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors, expect
from surgery.aliases import Optimizer, Params
from surgery.editing import devices, regions, tensors
from surgery.host.manager import Host, default_host
from surgery.live import adoption, lineage
from surgery.live import params as live
from surgery.live.lineage import Change
from surgery.live.optimizer import trained
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import detach, reshape, slicing
from surgery.recipes import definitions
from surgery.recipes.recipe import Recipe

# Passes that only move values: moments are moved in the same way.
_STRUCTURE = frozenset(
  (
    'concat',
    'copy',
    'detach',
    'drop',
    'keep',
    'move',
    'permute',
    'prune-ranks',
    'prune_ranks',
    'rename',
    'renumber',
    'repeat',
    'reshape',
    'slice',
    'split',
    'stack',
    'transpose',
    'unstack',
    'untie',
  )
)
# Passes that change values in place, or nothing: moments stay.
_VALUES = frozenset(('add', 'assert', 'cast', 'scale', 'subtract'))
# States whose moments begin at zero.
_ZERO = frozenset(
  (
    'EmaState',
    'MultiStepsState',
    'ScaleByAdaMaxState',
    'ScaleByAdamState',
    'ScaleByAmsgradState',
    'ScaleByBeliefState',
    'ScaleByLionState',
    'ScaleByNovogradState',
    'ScaleByRmsState',
    'ScaleByRStdDevState',
    'ScaleByRStdDevWithCountState',
    'ScaleByRmsWithCountState',
    'ScaleByYogiState',
    'TraceState',
  )
)


@devices.transfers()
def migrate(
  opt_state: Any,
  before: Params,
  after: Params,
  *,
  tx: Optimizer | None = None,
  host: Host | None = None,
) -> Any:
  """Adapts an optimizer's state to params that verbs have changed.

  Moments of unchanged parameters are kept. They follow parameters that were
  renamed, cut, joined, stacked, merged or copied. Moments of new parameters
  begin as the optimizer begins. Counts and the like stay as they are.

  Args:
    opt_state: a state of optax for `before`, or for the half of it that trains:
      of adam, sgd with momentum and the like, in chains, masked, or by label;
      or any other pytree of `bx.Params` of moments.
    before: the params that it is for, or their half that trains.
    after: the params that verbs or `surgery.apply` returned.
    tx: the optimizer, e.g. `optax.adam(1e-3)`; needed if its moments do not
      begin at zero, and if new parameters are masked or have labels.
    host: offers the hooks.

  Returns:
    The state for `after`, or for its half that trains.

  Raises:
    SurgeryError: for a moment that cannot be placed.

  Example:
    after = surgery.apply(before, {'slice': {'select': 'mlp', 'keep': '0:64'}})
    opt_state = surgery.migrate(opt_state, before, after)
  """
  before = adoption.adopted(expect.params(before, migrate))
  after = adoption.adopted(expect.params(after, migrate))
  moving = _Moving(before, after, host or default_host())
  fresh: Any = _NONE
  if tx is not None:
    fresh = tx.init(moving.part(opt_state))
  moved = _walked(opt_state, fresh, '', moving)
  if not moving.met:
    raise errors.SurgeryError(
      'migrate: opt_state contains no bx.Params. Give the state of an '
      'optimizer, of this library or optax.'
    )
  return moved


_NONE = object()


def _is_params(value: Any) -> bool:
  return isinstance(value, bx.Params)


def _walked(state: Any, fresh: Any, owner: str, moving: _Moving) -> Any:
  """Returns a state in which all params of moments are moved.

  Args:
    state: the state, or a part of it.
    fresh: the same part of the optimizer's first state, or `_NONE`.
    owner: name of the type that the part belongs to.
    moving: moves params.
  """
  if _is_params(state):
    return moving.moved(state, fresh, owner)
  if isinstance(state, tuple) and hasattr(state, '_fields'):
    name = type(state).__name__
    parts = {f: operator.attrgetter(f) for f in state._fields}
    return type(state)(**_each(state, parts, fresh, name, moving))
  if type(state) in (tuple, list):
    items = {str(k): operator.itemgetter(k) for k in range(len(state))}
    return type(state)(_each(state, items, fresh, owner, moving).values())
  if type(state) is dict:
    items = {key: operator.itemgetter(key) for key in state}
    return _each(state, items, fresh, owner, moving)
  return _walked_node(state, fresh, moving)


def _walked_node(state: Any, fresh: Any, moving: _Moving) -> Any:
  """Returns a node of a class that only JAX knows, with its params moved."""
  leaves, tree = jax.tree.flatten(state, is_leaf=_is_params)
  if not any(map(_is_params, leaves)):
    return state
  others: list[Any] = [_NONE] * len(leaves)
  if fresh is not _NONE:
    others = jax.tree.leaves(fresh, is_leaf=_is_params)
    if len(others) != len(leaves):
      raise _other_optimizer(state)
  name = type(state).__name__
  moved = [
    _walked(one, new, name, moving) if _is_params(one) else one
    for one, new in zip(leaves, others, strict=True)
  ]
  return jax.tree.unflatten(tree, moved)


def _each(
  state: Any,
  parts: Mapping[Any, Callable[[Any], Any]],
  fresh: Any,
  owner: str,
  moving: _Moving,
) -> dict[Any, Any]:
  """Returns the moved parts of a state, by name."""
  found = {}
  for name, get in parts.items():
    new = _NONE
    if fresh is not _NONE:
      try:
        new = get(fresh)
      except (AttributeError, KeyError, IndexError, TypeError):
        raise _other_optimizer(state) from None
    found[name] = _walked(get(state), new, owner, moving)
  return found


def _other_optimizer(state: Any) -> errors.SurgeryError:
  return errors.SurgeryError(
    'migrate: tx.init makes a state of another structure, at '
    f'{type(state).__name__}. Give the optimizer that made opt_state.'
  )


# States whose moments do not have the dtype of the params.
_WIDE = frozenset(('MultiStepsState',))


class _New:
  """Stands for moments that do not exist yet, as NaN until they begin."""

  def __init__(self, leaf: Leaf) -> None:
    self._shape = leaf.shape

  def __call__(self) -> Any:
    return np.full(self._shape or (), np.nan, np.float32)


class _Masked(_New):
  """Stands for moments that a masked transformation does not have."""

  def __init__(self, leaf: Leaf, value: Any) -> None:
    super().__init__(leaf)
    self.value = value


class _Whole(_New):
  """Stands for moments of another shape than their parameter's.

  Adafactor has a row and a column of a matrix, and one number where it has
  none. They follow a parameter that only gets another name or place.
  """

  def __init__(self, leaf: Leaf, path: Path, value: Any) -> None:
    super().__init__(leaf)
    self._path = path
    self.value = value

  def __call__(self) -> Any:
    raise errors.SurgeryError(
      f'migrate: {paths.show(self._path)}: moments of shape '
      f'{tuple(np.shape(self.value))} for a parameter of shape {self._shape} '
      'cannot follow, since the parameter was computed anew. Start again with '
      'tx.init(after).'
    )


def _new(leaf: Leaf, dtype: str) -> Leaf:
  load = _New(leaf)
  return leaf.replace(load=load, dtype=dtype, key=None, codes=leaf.codes)


# What to do if only the passes that changed params could tell.
_LINEAGE = (
  'Make after by verbs or surgery.apply, and give the very params that they '
  'returned.'
)


class _Moving:
  """Moves params of moments from one structure to another.

  Args:
    before: the params that a state is for.
    after: the params that it will be for.
    host: offers the hooks.

  Attributes:
    met: whether any were moved.
  """

  def __init__(self, before: bx.Params, after: bx.Params, host: Host) -> None:
    self._before = before
    self._after = after
    self._host = host
    self._changes = lineage.between(before, after)
    self.met = False

  def part(self, state: Any) -> bx.Params:
    """Returns what a state will be for: all of `after`, or what trains."""
    nodes = [
      one
      for one in jax.tree.leaves(state, is_leaf=_is_params)
      if _is_params(one)
    ]
    whole = all(set(n.keys()) == set(self._before.keys()) for n in nodes)
    return self._after if whole else self._after.split()[0]

  def moved(self, node: bx.Params, fresh: Any, owner: str) -> bx.Params:
    """Returns params of moments for `after`.

    Args:
      node: params of moments for `before`.
      fresh: those that the optimizer begins with, or `_NONE`.
      owner: name of the state's type.
    """
    self.met = True
    target = self._target(node, fresh)
    arrays = {
      path: str(one.value.dtype)
      for path, one in node.items()
      if hasattr(one.value, 'dtype')
    }
    dtypes = set(arrays.values())
    dtype = dtypes.pop() if len(dtypes) == 1 else 'float32'
    result = self._replayed(self._moments(node), dtype)
    # Whether moments have the dtypes of params, and so follow a cast.
    follows = all(
      found == str(self._before[path].value.dtype)
      for path, found in arrays.items()
    )
    # A masked transformation may have masked what is new: only tx knows.
    masked = any(_is_masked(one.value) for one in node.values())
    data = {}
    for path, param in target.items():
      begin = self._begin(path, param, fresh, '' if masked else owner)
      value = self._value(path, param, result, fresh, begin)
      if fresh is not _NONE:
        value = _cast(value, fresh[path])
      elif follows and owner not in _WIDE:
        value = _cast(value, param)
      data[path] = param.replace(value=value)
    return live.make(
      data, target.is_locked, live.records_of(target), live.notes_of(target)
    )

  def _target(self, node: bx.Params, fresh: Any) -> bx.Params:
    """Returns the params that a node will be for.

    Raises:
      SurgeryError: if the node is not for `before`, nor a half of it.
    """
    mine = trained(self._after)
    if fresh is not _NONE and set(fresh.keys()) == mine:
      # An optimizer of the half that trains, as `surgery.optimizer` makes it.
      return self._after.split(lambda path, _: path in mine)[0]
    found = set(node.keys())
    if found == set(self._before.keys()):
      return self._after
    if found == set(self._before.split()[0].keys()):
      return self._after.split()[0]
    if found == trained(self._before):
      return self._after.split(lambda path, _: path in mine)[0]
    extra = sorted(found - set(self._before.keys()))
    lost = sorted(set(self._before.keys()) - found)
    which = (
      f'{paths.show(extra[0])} is not in before'
      if extra
      else (f'{paths.show(lost[0])} has none')
    )
    raise errors.SurgeryError(
      f'migrate: opt_state is not for before, nor for its half that trains: '
      f'{which}. Give the params that it was made for.'
    )

  def _moments(self, node: bx.Params) -> dict[Path, Leaf]:
    """Returns moments as leaves, with stand-ins for those of another shape."""
    leaves: dict[Path, Leaf] = {}
    for path, param in node.items():
      value, own = param.value, self._before[path].value
      if _is_masked(value):
        like = Leaf(lineage.unknown, tuple(np.shape(own)))
        leaves[path] = like.replace(load=_Masked(like, value))
        continue
      shape = getattr(value, 'shape', None)
      if shape is not None and tuple(shape) != tuple(np.shape(own)):
        like = Leaf(lineage.unknown, tuple(np.shape(own)), str(value.dtype))
        leaves[path] = like.replace(load=_Whole(like, path, value))
        continue
      leaves[path] = Leaf(
        functools.partial(_same, value),
        None if shape is None else tuple(shape),
        None if shape is None else str(value.dtype),
      )
    return leaves

  # The passes that changed the params, done again on moments.

  def _replayed(
    self, moments: Mapping[Path, Leaf], dtype: str
  ) -> Mapping[Path, Leaf]:
    """Returns moments by the paths of `after`."""
    if self._changes is None:
      return self._matched(moments)
    if not self._changes:
      return moments
    start = self._changes[0].before
    leaves = {
      path: self._as(leaf, moments[path], dtype)
      if path in moments
      else _new(leaf, dtype)
      for path, leaf in start.items()
    }
    now = start.replace(leaves=leaves)
    for change in self._changes:
      now = _again(now, change, dtype)
    return now

  def _as(self, leaf: Leaf, moment: Leaf, dtype: str) -> Leaf:
    """Returns a parameter's leaf whose values are its moments."""
    if not isinstance(moment.load, _Masked):
      dtype = str(moment.dtype) if moment.dtype else dtype
    return leaf.replace(
      load=moment.load, dtype=dtype, key=None, codes=leaf.codes
    )

  def _matched(self, moments: Mapping[Path, Leaf]) -> Mapping[Path, Leaf]:
    """Returns moments by the paths of `after`, without a known lineage.

    Names and identical arrays decide.

    Raises:
      SurgeryError: if they leave open where a moment belongs.
    """
    found: dict[Path, Leaf] = {}
    held = {id(p.value): path for path, p in self._before.items()}
    for path, param in self._after.items():
      old = path if path in self._before else held.get(id(param.value))
      if old is None:
        self._check_new(path)
        continue
      was, now = (np.shape(one.value) for one in (self._before[old], param))
      if was != now:
        raise errors.SurgeryError(
          f'migrate: {paths.show(path)}: had the shape {was} and has {now}, '
          f'and it is not known how. {_LINEAGE}'
        )
      if old in moments:
        found[path] = moments[old]
    return found

  def _check_new(self, path: Path) -> None:
    """Raises if a new parameter may have been made of one that is gone."""
    if path in live.records_of(self._after).owned:
      return  # A weight of an adapter is made of no other parameter.
    owned = live.records_of(self._before).owned
    gone = (p for p in self._before.keys() if p not in self._after)
    for one in gone:
      if one not in owned:
        raise errors.SurgeryError(
          f'migrate: {paths.show(one)} is gone and {paths.show(path)} is new, '
          f'and it is not known whether one was made of the other. {_LINEAGE}'
        )

  # Values.

  def _begin(
    self, path: Path, param: bx.Param, fresh: Any, owner: str
  ) -> Callable[[], Any]:
    def begin() -> Any:
      if fresh is not _NONE:
        return fresh[path].value
      if owner not in _ZERO:
        raise errors.SurgeryError(
          f'migrate: {paths.show(path)} is new, and the first value of '
          f'{owner or "the state"} is not known. Give the optimizer: tx=….'
        )
      return jax.tree.map(jnp.zeros_like, param.value)

    if fresh is not _NONE and path not in fresh:
      raise _other_optimizer(fresh)
    return begin

  def _value(
    self,
    path: Path,
    param: bx.Param,
    result: Mapping[Path, Leaf],
    fresh: Any,
    begin: Callable[[], Any],
  ) -> Any:
    """Returns the moments of a parameter.

    Args:
      path: its path.
      param: the parameter of `after`.
      result: the moments that followed, by path.
      fresh: those that the optimizer begins with, or `_NONE`.
      begin: returns the first moments of a new parameter.
    """
    if fresh is not _NONE and _is_masked(fresh[path].value):
      return fresh[path].value
    leaf = result.get(path)
    load = None if leaf is None else leaf.load
    if isinstance(load, _Masked):
      # Only the optimizer knows that it is no longer masked.
      return load.value if fresh is _NONE else begin()
    if isinstance(load, _Whole):
      return load.value
    if leaf is None or isinstance(load, _New):
      return begin()
    value = leaf.load()
    if leaf.shape is None:
      return value
    if tuple(np.shape(value)) != tuple(np.shape(param.value)):
      raise errors.SurgeryError(
        f'migrate: {paths.show(path)}: moments of shape {np.shape(value)} do '
        f'not fit a parameter of shape {np.shape(param.value)}. Start again '
        'with tx.init(after).'
      )
    if not isinstance(leaf.load, functools.partial):
      # It was made of several tensors, and the moments of new ones are NaN.
      lost = jnp.isnan(value)
      if bool(lost.any()):
        value = jnp.where(lost, begin(), value)
    return value


def _cast(value: Any, param: bx.Param) -> Any:
  """Returns moments in the dtype of a parameter."""
  dtype = getattr(value, 'dtype', None)
  now = getattr(param.value, 'dtype', None)
  if dtype is None or now is None or dtype == now:
    return value
  return jnp.asarray(value).astype(now)


def _same(value: Any) -> Any:
  return value


def _is_masked(value: Any) -> bool:
  """Whether a value is optax's placeholder for a masked parameter."""
  return type(value).__name__ == 'MaskedNode'


def _again(now: Checkpoint, change: Change, dtype: str) -> Checkpoint:
  """Does a pass, or a recipe, again on moments."""
  one = functools.partial(_one, host=change.host, dtype=dtype)
  if not isinstance(change.run, Recipe):
    return one(now, change.name, change.run, change.args, change.kwargs)
  recipe, models = change.run, change.kwargs
  for number, step in enumerate(recipe.steps):
    if step.on is not None or step.result is not None:
      raise errors.SurgeryError(
        f'migrate: step {number + 1} ({step.name}) of {recipe.origin} uses '
        'several models, so moments cannot follow. Start again with '
        'tx.init(after).'
      )
    definition = definitions.find(step.name, change.host)
    given = definition.bound(definition.read(step.value), models, now)
    now = one(now, step.name, definition.function, (), given)
  return now


def _one(
  now: Checkpoint,
  name: str,
  run: Callable[..., Checkpoint],
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
  *,
  host: Host,
  dtype: str,
) -> Checkpoint:
  """Does one pass on moments."""
  if name in _VALUES:
    return now
  given = dict(
    inspect.signature(run).bind_partial(now, *args, **kwargs).arguments
  )
  given.pop(next(iter(given)))
  # Passes that move values are done on moments as they are.
  if name in _STRUCTURE:
    if name == 'copy':
      _check_copy(given)
    return run(now, **given, host=host)
  # Merging takes adapters off; their moments go with them.
  if name == 'merge':
    if given.get('with_') is not None:
      return now
    return detach.detach(now, given.get('names'), host=host)
  if name == 'attach' and given.get('from_') is not None:
    given['check_base'] = False  # Moments do not have the base's values.
  if name == 'tie':
    return run(now, **{**given, 'check': False}, host=host)
  # New elements have no moments yet: NaN, which the optimizer's first state
  # replaces.
  if name == 'pad':
    return run(now, **{**given, 'value': np.nan}, host=host)
  if name == 'resize-vocab':
    return _resized(now, given, host)
  return _replaced(now, run(now, **given, host=host), name, dtype)


def _check_copy(given: Mapping[str, Any]) -> None:
  rules = given['rules']
  for rule in [rules] if isinstance(rules, str) else rules:
    if tensors.split_alias(rule)[0] is not None:
      raise errors.SurgeryError(
        f'migrate: copy {rule!r} reads another model, whose moments are not '
        'known. Start again with tx.init(after).'
      )


def _resized(
  now: Checkpoint, given: Mapping[str, Any], host: Host
) -> Checkpoint:
  changed = {}
  size, axis = given['size'], given.get('axis', 0)
  found = tensors.chosen(now, given['select'], 'resize-vocab', host)
  for path, leaf in found.items():
    shape = leaf.shape or ()
    at = regions.axis_of(axis, shape, path)
    if shape[at] > size:
      changed[path] = slicing.taken(leaf, at, range(size))
    elif shape[at] < size:
      more = size - shape[at]
      changed[path] = reshape.padded(leaf, at, 0, more, np.nan, 'resize-vocab')
  return tensors.edited(now, 'resize-vocab', changed=changed, host=host)


def _replaced(
  now: Checkpoint, after: Checkpoint, name: str, dtype: str
) -> Checkpoint:
  """Returns the result of a pass with moments for values.

  Tensors that keep their names keep their moments; new ones have none yet.

  Raises:
    SurgeryError: for a tensor that has another shape now.
  """
  leaves: dict[Path, Leaf] = {}
  origins = {id(leaf.load): leaf for leaf in now.values()}
  for path, leaf in after.items():
    if id(leaf.load) in origins:
      leaves[path] = leaf
    elif path not in now:
      leaves[path] = _new(leaf, dtype)
    elif leaf.shape == now[path].shape:
      old = now[path]
      leaves[path] = leaf.replace(
        load=old.load, part=old.part, dtype=old.dtype, codes=leaf.codes
      )
    else:
      raise errors.SurgeryError(
        f'migrate: {name} changed the shape of {paths.show(path)} from '
        f'{now[path].shape} to {leaf.shape}, and it is not known how moments '
        'follow. Start again with tx.init(after).'
      )
  return after.replace(leaves=leaves, checks=())
