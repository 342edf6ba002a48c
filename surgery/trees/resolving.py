"""What the code of a model is given in the place of an adapted tree.

A function is called with the user's own structure, of which each adapted array
is what its adapters answer. To `factored`, `check` and `explain` that is a
function of `bx.Params`: the params are made of the tree, and the structure is
put around what they answer inside of the call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors, jaxcompat
from surgery.host.manager import default_host
from surgery.live import dropping, reads
from surgery.live import params as live
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.trees.adapted import AdaptedTree, flat, is_tree
from surgery.trees.converting import bare, to_params

# Which step of a training a call is, where dropout of adapters depends on it.
STEP = 'dropout_step'


def answered(params: live.AdaptedParams) -> dict[Path, Any]:
  """Returns what layers get of params, by path, without adapters' weights.

  Raises:
    AdapterError: if they are a half.
  """
  records = params.records
  missing = live.missing_of(params)
  if missing:
    more = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
    raise errors.AdapterError(
      f'{paths.show(missing[0])}{more} that an adapter needs are not in this '
      'tree, which is a half that split() or a framework made. Put the halves '
      'together before calling the model: half.merge(rest), or '
      'equinox.combine(half, rest).'
    )
  found = {}
  for path, param in params.items():
    if path in records.owned:
      continue
    if path in records.chains or path in records.standing:
      found[path] = params._answered(path, params._fetch(path))
    else:
      found[path] = param.value
  return found


def resolved(tree: AdaptedTree) -> Any:
  """Returns the user's structure with adapted arrays."""
  return tree._kind.build(tree.base, answered(to_params(tree)))


def holds(tree: Any) -> bool:
  """Whether there is an adapted tree among some arguments."""
  return bool(found(tree))


def found(tree: Any) -> list[AdaptedTree]:
  """Returns the adapted trees in a pytree, or among arguments."""
  try:
    leaves = jax.tree.leaves(tree, is_leaf=is_tree)
  except (TypeError, ValueError):
    # Some argument is no pytree.
    args, kwargs = tree if isinstance(tree, tuple) else ((tree,), {})
    leaves = [*args, *kwargs.values()]
  return [leaf for leaf in leaves if is_tree(leaf)]


def _is_params(value: Any) -> bool:
  return isinstance(value, live.AdaptedParams)


def _written_to(value: Any) -> Any:
  """Returns a module that may be written to as a tree; all else as it is."""
  if is_tree(value) or isinstance(value, (bx.Params, jax.Array, np.ndarray)):
    return value
  for kind in default_host().trees.values():
    if kind.writes and kind.owns(value):
      return bare(value, kind)
  return value


class Call:
  """A call of a user's function in which trees are arguments.

  Attributes:
    model: the same call as a function of params.
    args: its arguments, with params in the place of trees.
    kwargs: the same by name.
  """

  def __init__(
    self, function: Callable[..., Any], args: Any, kwargs: Any
  ) -> None:
    # Modules that have no adapter are written to like those that have one.
    args = tuple(map(_written_to, args))
    kwargs = {key: _written_to(value) for key, value in kwargs.items()}
    self._trees = found((args, kwargs))
    params = [to_params(tree) for tree in self._trees]
    # Keys of dropout are made of the number of the call.
    self.counters = [
      (tree, path)
      for tree, one in zip(self._trees, params, strict=True)
      for path in dropping.counters(one.records)
    ]
    self._step = None
    if self.counters and STEP not in inspect.signature(function).parameters:
      self._step = kwargs.get(STEP)
      kwargs = {k: v for k, v in kwargs.items() if k != STEP}
    params = [self._at_step(one) for one in params]
    made = iter(params)
    one = lambda value: next(made) if is_tree(value) else value
    self.args, self.kwargs = jax.tree.map(one, (args, kwargs), is_leaf=is_tree)
    self._function = function
    self._counted = False
    # What a call has changed in each of the models: paths, and boxes.
    self._changed: list[dict[Path, Any]] = []
    called = lambda *args, **kwargs: self._called(*args, **kwargs)
    self.model = functools.wraps(function, updated=())(called)

  def _at_step(self, params: live.AdaptedParams) -> live.AdaptedParams:
    """Returns params that have counted as many calls as the caller says."""
    if self._step is None:
      return params
    return live.with_values(
      params,
      {
        path: jnp.asarray(params[path].value).at[..., -1].set(self._step)
        for path in dropping.counters(params.records)
      },
    )

  def count(self, drops: bool) -> None:
    """Sees to it that the next call drops other elements.

    Args:
      drops: whether this call is in training.

    Raises:
      AdapterError: if it is, and nobody says which step it is.
    """
    if not drops or self._step is not None:
      return
    for tree, path in self.counters:
      if not tree._kind.writes:
        raise errors.AdapterError(
          f'factored: {paths.show(path)} belongs to an adapter with dropout, '
          'and this call is in training. Say which step it is, '
          f'fast(…, {STEP}=step), or each step drops the same elements; where '
          'a call is no training, is_training=False.'
        )
    self._counted = True

  def _called(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the function; returns its result and what it has changed."""
    built: list[tuple[Any, dict[Path, Any]]] = []

    def one(value: Any) -> Any:
      if not _is_params(value):
        return value
      tree = self._trees[len(built)]
      answers = answered(value)
      built.append((tree._kind.build(tree.base, answers), answers))
      return built[-1][0]

    arguments = args, kwargs
    args, kwargs = jax.tree.map(one, arguments, is_leaf=_is_params)
    result = self._function(*args, **kwargs)
    _refuse_adapted(result, self._adapted(built))
    self._changed = [
      tree._kind.changes(model, given)
      for tree, (model, given) in zip(self._trees, built, strict=True)
    ]
    for number, changes in enumerate(self._changed):
      self._refuse_written(number, changes, built, arguments)
    return result, [_arrays(one) for one in self._changed]

  def _adapted(
    self, built: Sequence[tuple[Any, Mapping[Path, Any]]]
  ) -> dict[int, Path]:
    """Returns paths of adapted arrays by their identity."""
    return {
      id(given[path]): path
      for tree, (_, given) in zip(self._trees, built, strict=True)
      for path in (*tree.records.chains, *tree.records.standing)
      if given[path] is not None
    }

  def _refuse_written(
    self,
    number: int,
    changes: dict[Path, Any],
    built: Sequence[tuple[Any, Mapping[Path, Any]]],
    arguments: Any,
  ) -> None:
    """Leaves adapted arrays out of changes.

    Loops of a framework hand on all that a model has, as it was.

    Args:
      number: which of the models.
      changes: what is another than before; of this adapted arrays are removed.
      built: all models, and what they were given.
      arguments: of the call, with params in the place of trees.

    Raises:
      AdapterError: naming an adapted array that the model writes.
    """
    tree, (_, given) = self._trees[number], built[number]
    written = {
      path: changes.pop(path)
      for path in (*tree.records.chains, *tree.records.standing)
      if path in changes
    }
    unknown = {}
    for path, leaf in written.items():
      value = None if leaf is None else tree._kind.unweighted(leaf)
      if jaxcompat.is_traced(value):
        unknown[path] = value
      elif value is None or not np.array_equal(value, given[path]):
        raise _written(path)
    if not unknown:
      return

    def again(values: Mapping[Path, Any]) -> dict[Path, Any]:
      made: list[Any] = []

      def one(value: Any) -> Any:
        if not _is_params(value):
          return value
        at = len(made)
        answers = {**built[at][1], **(values if at == number else {})}
        model = self._trees[at]._kind.build(self._trees[at].base, answers)
        made.append((model, answers))
        return model

      args, kwargs = jax.tree.map(one, arguments, is_leaf=_is_params)
      self._function(*args, **kwargs)
      after = tree._kind.changes(*made[number])
      kept = {**values, **{p: after[p] for p in values if p in after}}
      return {p: tree._kind.unweighted(v) for p, v in kept.items()}

    copied = reads.copies(again, {path: given[path] for path in unknown})
    for path in unknown:
      if path not in copied:
        raise _written(path)

  def finished(self, result: tuple[Any, Any]) -> Any:
    """Writes into the models what the call has changed; returns its result."""
    returned, arrays = result
    if self._counted:
      for tree, path in self.counters:
        ((_, weight),) = [w for w in flat(tree.weights) if w[0] == path]
        value = jnp.asarray(tree._kind.unweighted(weight))
        tree._kind.set_weight(weight, value.at[..., -1].add(1))
    for tree, changes, values in zip(
      self._trees, self._changed, arrays, strict=True
    ):
      if changes:
        tree._kind.write(tree.base, _with_arrays(changes, values))
    return returned


def _written(path: Path) -> errors.AdapterError:
  return errors.AdapterError(
    f'{paths.show(path)}: the model writes this parameter, and an adapter '
    'rewrites it: it would be folded in again at every call. Attach elsewhere, '
    'or merge or disable the adapter.'
  )


def _arrays(changes: Mapping[Path, Any]) -> dict[str, Any]:
  """Returns what is computed of some changes: boxes are static."""
  return {paths.show(path): jax.tree.leaves(v) for path, v in changes.items()}


def _with_arrays(
  changes: Mapping[Path, Any], values: Mapping[str, Any]
) -> dict[Path, Any]:
  return {
    path: jax.tree.unflatten(jax.tree.structure(v), values[paths.show(path)])
    for path, v in changes.items()
  }


def _refuse_adapted(result: Any, adapted: Mapping[int, Path]) -> None:
  """Raises if a result is an adapted parameter.

  Raises:
    AdapterError: naming it.
  """
  for leaf in jax.tree.leaves(result):
    path = adapted.get(id(leaf))
    if path is not None:
      raise errors.AdapterError(
        f'{paths.show(path)}: the function returns this parameter, adapted. '
        'Whoever goes on with it takes it for the base, which is lost, and '
        'adapts it again. Return what was computed, not the parameters: leave '
        "'params' out of mutable=[…], e.g. mutable=['batch_stats']. To fold "
        'adapters in use surgery.merge.'
      )


def of_params(
  function: Callable[..., Any], holder: Any
) -> tuple[Callable[..., Any], live.AdaptedParams]:
  """Returns a function as one of params, and these.

  Args:
    function: takes a tree first, or what holds one.
    holder: the tree, or what holds it.
  """
  (tree,) = found(holder)

  def called(params: Any, *args: Any, **kwargs: Any) -> Any:
    call = Call(function, (holder, *args), kwargs)
    first, *rest = call.args
    given = jax.tree.map(
      lambda one: params if _is_params(one) else one, first, is_leaf=_is_params
    )
    return call.model(given, *rest, **call.kwargs)

  return functools.wraps(function, updated=())(called), to_params(tree)


def check_used(
  tree: AdaptedTree,
  function: Callable[..., Any],
  holder: Any,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> None:
  """Raises if a function does not use an adapted array of a tree.

  Raises:
    UnreachedError: naming the parameters.
  """
  values = answered(to_params(tree))

  def called(values: Mapping[Path, Any]) -> Any:
    model = tree._kind.build(tree.base, values)
    given = jax.tree.map(
      lambda one: model if is_tree(one) else one, holder, is_leaf=is_tree
    )
    return function(given, *args, **kwargs)

  used = reads.influences(called, values)
  adapted = (*tree.records.chains, *tree.records.standing)
  unused = [path for path in dict.fromkeys(adapted) if path not in used]
  if unused:
    shown = errors.listed(map(paths.show, unused))
    raise errors.UnreachedError(
      f'{len(unused)} of {len(adapted)} adapted parameters change no result of '
      f'this call: {shown}. Either the call does not use them, or the model '
      'holds them elsewhere, too.',
      unused,
    )


def bound(tree: AdaptedTree) -> Callable[..., Any]:
  """Returns the function that a call of the adapted model is.

  Raises:
    SurgeryError: if it is data.
  """
  return tree._kind.function(tree.base)


def is_params(value: Any) -> bool:
  """Whether a value is params of blox."""
  return isinstance(value, bx.Params)
