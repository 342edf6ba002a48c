"""Migrate: an optimizer's state follows what was done to its params."""

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

# Passes that move values about: moments go the same way.
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
# Passes that change values, or nothing: moments stay.
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
  """Brings an optimizer's state from some params to what was made of them.

  Moments of parameters that stayed are carried over; of what was renamed, cut,
  joined, stacked or merged follow it, also into copies; of what is new begin as
  the optimizer begins. Counts and the like stay as they are.

  Args:
    opt_state: a state of optax for `before`, or for the half of it that trains:
      of adam, sgd with momentum and the like, in chains, masked, or by label.
      Any pytree will do that holds params of moments.
    before: the params that it is for, or their half that trains.
    after: what verbs or `surgery.apply` made of `before`.
    tx: the optimizer, e.g. `optax.adam(1e-3)`; needed where what begins is not
      zero, and where new parameters are masked or have labels.
    host: whose hooks are asked.

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
      'migrate: the state holds no params of moments. Give the state of an '
      'optimizer, of this library or optax.'
    )
  return moved


_NONE = object()


def _is_params(value: Any) -> bool:
  return isinstance(value, bx.Params)


def _walked(state: Any, fresh: Any, owner: str, moving: _Moving) -> Any:
  """Returns a state with all params of moments moved.

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
    'migrate: tx makes another state than this one, at '
    f'{type(state).__name__}. Give the optimizer that the state is of.'
  )


# States whose moments do not have the dtype of the params.
_WIDE = frozenset(('MultiStepsState',))


class _New:
  """Stands for what has no moments yet: not a number, until it is known."""

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
      'cannot be placed, as it was computed anew. Begin anew: tx.init(after).'
    )


def _new(leaf: Leaf, dtype: str) -> Leaf:
  load = _New(leaf)
  return leaf.replace(load=load, dtype=dtype, key=None, codes=leaf.codes)


class _Moving:
  """Moves params of moments from one structure to another.

  Args:
    before: the params that a state is for.
    after: the params that it is to be for.
    host: whose hooks are asked.

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
    """Returns what a state is to be for: all of `after`, or what trains."""
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
    dtypes = {
      str(p.value.dtype) for p in node.values() if hasattr(p.value, 'dtype')
    }
    dtype = dtypes.pop() if len(dtypes) == 1 else 'float32'
    result = self._replayed(self._moments(node), dtype)
    follows = all(
      one.value.dtype == self._before[path].value.dtype
      for path, one in node.items()
      if hasattr(one.value, 'dtype')
    )
    data = {}
    for path, param in target.items():
      masked = any(_is_masked(one.value) for one in node.values())
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
    """Returns the params that a node is to be for.

    Raises:
      SurgeryError: if the node is not for the params that were given.
    """
    mine = trained(self._after)
    if fresh is not _NONE and set(fresh.keys()) == mine:
      # What `surgery.optimizer` begins with, or any where nothing is disabled.
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
      f'migrate: the state is not for before, nor for its half that trains: '
      f'{which}. Give the params that the state was made for.'
    )

  def _moments(self, node: bx.Params) -> dict[Path, Leaf]:
    """Returns moments as leaves; those that there are none of are new."""
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

  # Doing again what was done.

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
    """Returns a parameter's leaf with its moments for values."""
    if not isinstance(moment.load, _Masked):
      dtype = str(moment.dtype) if moment.dtype else dtype
    return leaf.replace(
      load=moment.load, dtype=dtype, key=None, codes=leaf.codes
    )

  def _matched(self, moments: Mapping[Path, Leaf]) -> Mapping[Path, Leaf]:
    """Returns moments by the paths of `after`, of which nothing is known.

    Raises:
      SurgeryError: if one cannot be placed.
    """
    found: dict[Path, Leaf] = {}
    held = {id(p.value): path for path, p in self._before.items()}
    owned = live.records_of(self._after).owned
    lost = [p for p in self._before.keys() if p not in self._after]
    for path, param in self._after.items():
      old = path if path in self._before else held.get(id(param.value))
      if old is None:
        gone = [p for p in lost if p not in live.records_of(self._before).owned]
        if gone and path not in owned:
          raise errors.SurgeryError(
            f'migrate: {paths.show(gone[0])} is gone and {paths.show(path)} is '
            'new, and it is not known whether one was made of the other. Make '
            'after by verbs or surgery.apply, and give the very params that '
            'they returned.'
          )
        continue
      was, now = (np.shape(one.value) for one in (self._before[old], param))
      if was != now:
        raise errors.SurgeryError(
          f'migrate: {paths.show(path)}: was {was} and is {now}, and it is not '
          'known how. Make after by verbs or surgery.apply, and give the very '
          'params that they returned.'
        )
      if old in moments:
        found[path] = moments[old]
    return found

  # Values.

  def _begin(
    self, path: Path, param: bx.Param, fresh: Any, owner: str
  ) -> Callable[[], Any]:
    def begin() -> Any:
      if fresh is not _NONE:
        return fresh[path].value
      if owner not in _ZERO:
        raise errors.SurgeryError(
          f'migrate: {paths.show(path)} is new, and what '
          f'{owner or "the state"} begins with is not known. Give the '
          'optimizer: tx=….'
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
    leaf = result.get(path)
    if fresh is not _NONE and _is_masked(fresh[path].value):
      return fresh[path].value
    if leaf is not None and isinstance(leaf.load, _Masked):
      # Only who has the optimizer can say that it is not masked any more.
      return leaf.load.value if fresh is _NONE else begin()
    if leaf is not None and isinstance(leaf.load, _Whole):
      return leaf.load.value
    if leaf is None or isinstance(leaf.load, _New):
      return begin()
    value = leaf.load()
    if leaf.shape is None:
      return value
    if tuple(np.shape(value)) != tuple(np.shape(param.value)):
      raise errors.SurgeryError(
        f'migrate: {paths.show(path)}: moments of shape {np.shape(value)} for '
        f'a parameter of shape {np.shape(param.value)} cannot be placed. Begin '
        'anew: tx.init(after).'
      )
    if not isinstance(leaf.load, functools.partial):
      # It was made of several, of which some may be new.
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
  """Whether a value is what optax has where a transformation does nothing."""
  return type(value).__name__ == 'MaskedNode'


def _again(now: Checkpoint, change: Change, dtype: str) -> Checkpoint:
  """Does on moments what was done on params."""
  one = functools.partial(_one, host=change.host, dtype=dtype)
  if not isinstance(change.run, Recipe):
    return one(now, change.name, change.run, change.args, change.kwargs)
  recipe, models = change.run, change.kwargs
  for number, step in enumerate(recipe.steps):
    if step.on is not None or step.result is not None:
      raise errors.SurgeryError(
        f'migrate: step {number + 1} ({step.name}) of {recipe.origin} is about '
        'several models, and moments cannot be placed. Begin anew: '
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
  said = dict(
    inspect.signature(run).bind_partial(now, *args, **kwargs).arguments
  )
  said.pop(next(iter(said)))
  if name in _STRUCTURE:
    if name == 'copy':
      _check_copy(said)
    return run(now, **said, host=host)
  if name == 'merge':
    if said.get('with_') is not None:
      return now
    return detach.detach(now, said.get('names'), host=host)
  if name == 'attach' and said.get('from_') is not None:
    said['check_base'] = False  # Moments are not what it was made for.
  if name == 'tie':
    return run(now, **{**said, 'check': False}, host=host)
  if name == 'pad':
    return run(now, **{**said, 'value': np.nan}, host=host)
  if name == 'resize-vocab':
    return _resized(now, said, host)
  return _replaced(now, run(now, **said, host=host), name, dtype)


def _check_copy(said: Mapping[str, Any]) -> None:
  rules = said['rules']
  for rule in [rules] if isinstance(rules, str) else rules:
    if tensors.split_alias(rule)[0] is not None:
      raise errors.SurgeryError(
        f'migrate: copy {rule!r} is from another model, of which there are no '
        'moments. Begin anew: tx.init(after).'
      )


def _resized(
  now: Checkpoint, said: Mapping[str, Any], host: Host
) -> Checkpoint:
  changed = {}
  size, axis = said['size'], said.get('axis', 0)
  found = tensors.chosen(now, said['select'], 'resize-vocab', host)
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
  """Returns what a pass made, with moments for values.

  What stays where it is keeps its moments, what is new has none yet.

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
        f'migrate: {name} made {paths.show(path)} {leaf.shape} of '
        f'{now[path].shape}, and it is not known how moments follow. Begin '
        'anew: tx.init(after).'
      )
  return after.replace(leaves=leaves, checks=())
