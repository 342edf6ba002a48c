"""`factored`: a model whose low-rank parameters stay factored."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

import blox as bx
import jax
import numpy as np

from surgery import errors, expect, jaxcompat
from surgery.adapting import compute
from surgery.aliases import Array
from surgery.factoring import fallback
from surgery.factoring.views import Misrouted
from surgery.factoring.walking import DropoutLost, Kind, Note, Walk, makes
from surgery.live import adoption, dropping
from surgery.live import params as live
from surgery.live.stashed import Stash
from surgery.naming import paths
from surgery.trees import resolving
from surgery.trees.adapted import AdaptedTree

P = ParamSpec('P')
R = TypeVar('R')

# Raised by a model that needs the values of its inputs.
UNTRACEABLE = (
  jax.errors.ConcretizationTypeError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerBoolConversionError,
  jax.errors.TracerIntegerConversionError,
  jax.errors.NonConcreteBooleanIndexError,
)


def factored(model: Callable[P, R], *, strict: bool = False) -> Callable[P, R]:
  """Returns a model in which low-rank parameters stay factored.

  A layer that asks for a parameter with LoRA gets `W + s·A·B`. Written out, it
  costs the backward pass a dense gradient of `W` at each layer. The function
  that is returned computes `x·W + s·(x·A)·B` in its place, for any code that
  uses the parameter in a way that can be followed, and the dense array for the
  rest. Put it around the model, or around the loss, before differentiating,
  like `jax.checkpoint`. With a base in float32 its absence changes speed, and
  results by rounding alone.

  With a base in fewer bits the model by itself gives other results: it gets
  `W + s·A·B` rounded to the dtype in which `W` is stored, as a merge stores it,
  and most of a small update is lost. Here casts round `W` alone; factors are
  used as they are stored, or in the dtype in which the layer multiplies, or in
  float32 if that has 8 bits.

  Where a parameter ends up dense whose adapter gave a low-rank value, a
  `surgery.DenseFallbackWarning` says why, once for each parameter and reason.
  Types that give no low-rank value are dense by design, without a warning.

  A call of which nothing is traced (no jit, no grad) is the model's own, where
  bases are in float32 and nothing is dropped or routed.

  Dropout of adapters takes part where a call is in training: where the model's
  argument `is_training` is true, by its default if it is not given. A model
  that has no such argument may be called with it, and is in training by
  default, as blox's layers are. What is dropped derives from the number of
  calls, which the params count that are returned: go on with these, or each
  step drops the same. A traced call warns where they are thrown away.

  Args:
    model: a module, one of its methods (`factored(module.attend)`), or any
      function of which an argument holds params.
    strict: whether a parameter that would be warned of is an error.

  Returns:
    A function with the model's arguments and results, and none of its
    attributes.

  Raises:
    AdapterError: when called, if it is strict and a parameter ends up dense
      whose adapter gave a low-rank value.
    AdapterError: when called in training, if a parameter with dropout is used
      in a way that only a dense array can serve; likewise for routed params.

  Example:
    fast = surgery.factored(model)
    grads = jax.grad(lambda p, x: loss(fast(p, x)[0]))(params, x)
  """
  if isinstance(model, AdaptedTree):
    return _of_tree(model, strict)
  expect.model(model, factored)
  return _Factored(model, strict)


def _of_tree(tree: AdaptedTree, strict: bool) -> Callable[..., Any]:
  """Returns what calling an adapted module would be, factored."""
  return functools.partial(_Factored(resolving.bound(tree), strict), tree)


class _Factored(Generic[P, R]):
  """A model in which low-rank parameters stay factored.

  An object rather than a function, so that it goes to another process where
  the model does.
  """

  __wrapped__: Callable[P, R]

  def __init__(self, model: Callable[P, R], strict: bool) -> None:
    functools.update_wrapper(self, model, updated=())  # type: ignore[arg-type]
    self.__wrapped__ = model
    self.__name__ = getattr(model, '__name__', type(model).__name__)
    self._signature = inspect.signature(model)
    self._strict = strict
    self._seen: fallback.Seen = set()

  def __repr__(self) -> str:
    return f'surgery.factored({self.__wrapped__!r})'

  def __get__(self, instance: Any, owner: Any = None) -> Any:
    # As the attribute of a class it is a method, like the function it wraps.
    return self if instance is None else types.MethodType(self, instance)

  def __reduce__(self) -> Any:
    # What was warned of here was not warned of there.
    return _Factored, (self.__wrapped__, self._strict)

  def __copy__(self) -> _Factored[P, R]:
    return self

  def __deepcopy__(self, memo: Any) -> _Factored[P, R]:
    return self

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
    with dropping.seen_to():
      if not resolving.holds((args, kwargs)):
        return self._called(self.__wrapped__, args, kwargs)  # type: ignore[no-any-return]
      call = resolving.Call(self.__wrapped__, args, kwargs)
      if call.counters:
        drops, _ = _training(self._signature, call.args, call.kwargs)
        call.count(drops)
      made = self._called(call.model, call.args, call.kwargs)
      return call.finished(made)  # type: ignore[no-any-return]

  def _called(self, model: Any, args: Any, kwargs: Any) -> Any:
    if model is self.__wrapped__:
      # A function that is called with trees has them where it likes.
      _check_params(model, self._signature, args, kwargs)
    drops, routed, kwargs = _modes(self._signature, args, kwargs)
    lost: dict[paths.Path, list[Note]] = {}
    own_error = False
    try:
      leaves, tree = _flattened((args, kwargs))
      traced = any(map(jaxcompat.is_traced, leaves))
      if traced or drops or routed or _narrow((args, kwargs)):
        with _advised():
          return self._followed(model, leaves, tree, drops, traced)
    except NotFollowed as found:
      if drops or routed:
        what = 'dropout' if drops else 'adapter of each row'
        _refuse_dense(found, what)
      given = _all_params((args, kwargs))
      lost = {path: [found.note] for p in given for path in _low_rank(p)}
      own_error = found.model_raised
    # Outside of the handler: an error of the model's own has no context, and
    # comes before one of ours.
    if lost and self._strict and not own_error:
      self._report(lost)
    result = model(*args, **kwargs)
    self._report(lost)
    return result

  def _followed(
    self, model: Any, leaves: list[Any], tree: Any, drops: bool, traced: bool
  ) -> Any:
    """Returns the results of a call that is walked through."""
    walk = Walk(training=drops)
    prune = model is not self.__wrapped__
    result = walked(model, leaves, tree, walk, prune=prune)
    self._report(walk.losses())
    return _counted(result, traced) if drops else result

  def _report(self, losses: fallback.Losses) -> None:
    fallback.report(losses, strict=self._strict, seen=self._seen)


def _modes(
  signature: inspect.Signature, args: Any, kwargs: dict[str, Any]
) -> tuple[bool, bool, dict[str, Any]]:
  """Returns whether a call drops elements, and is routed, and its keywords.

  Raises:
    AdapterError: if it is both.
  """
  drops = any(map(_counters, _all_params((args, kwargs))))
  if drops:
    drops, kwargs = _training(signature, args, kwargs)
  else:
    kwargs = _arguments(signature, kwargs)
  routed = any(map(_is_routed, _all_params((args, kwargs))))
  if drops and routed:
    raise errors.AdapterError(
      'factored: routed params have no dropout, and this call is in '
      'training. Call it with is_training=False, or attach with dropout=0.'
    )
  return drops, routed, kwargs


@contextlib.contextmanager
def _advised() -> Iterator[None]:
  """Makes an error with advice of a use that only a dense array can serve."""
  try:
    yield
  except Misrouted as mistaken:
    raise errors.AdapterError(
      f'factored: {_named(mistaken.origin)} is routed, and '
      f"{mistaken.reason}. Rows have to be the leading axis of a layer's "
      'input.'
    ) from None
  except DropoutLost as dropped:
    raise errors.AdapterError(
      f'factored: {_named(dropped.origin)} has dropout, and '
      f'{str(dropped.because)!r} needs the dense parameter, to which dropout '
      'cannot be applied. Attach to other layers, or set dropout=0 for this '
      'one by patterns.'
    ) from None


def _refuse_dense(found: NotFollowed, what: str) -> NoReturn:
  """Raises for a call that cannot be computed densely instead.

  Raises:
    AdapterError: unless the model itself raised an error, which comes first.
  """
  cause = found.__cause__
  if found.model_raised and cause is not None:
    raise cause from None
  raise errors.AdapterError(
    f'factored: {found.reason}, so parameters would be dense, and a '
    f'dense parameter has no {what}.'
  ) from cause


def _check_params(
  model: Callable[..., Any],
  signature: inspect.Signature,
  args: Any,
  kwargs: dict[str, Any],
) -> None:
  """Raises if params are not where they belong, or have lost adapters.

  Raises:
    SurgeryError: if another argument stands in the place of params.
    AdapterError: for weights of an adapter that is not on record.
  """
  found = [
    value
    for value in _nodes((args, kwargs), bx.Params)
    if isinstance(value, bx.Params)
  ]
  with errors.within('factored'):
    adoption.refuse_lost(found)
  try:
    given = signature.bind(*args, **_arguments(signature, kwargs)).arguments
  except TypeError:
    return  # The model says what it takes.
  place = 'params' if 'params' in given else next(iter(given), '')
  if place != 'params' and not _is_layer(model):
    return  # Any argument of a function may hold params.
  if found and place and not _nodes(given[place], bx.Params):
    raise errors.SurgeryError(
      f'factored: expected bx.Params as {place!r}, found '
      f'{type(given[place]).__name__}, and params in another place. Call the '
      f'factored model as the model: fast({expect.arguments(model)}).'
    )


def _is_layer(model: Callable[..., Any]) -> bool:
  """Whether a model is a module or a method of one, which take params first."""
  return isinstance(getattr(model, '__self__', model), bx.Module)


def _flattened(tree: Any) -> tuple[list[Any], Any]:
  """Returns the leaves of a call, and its structure.

  Raises:
    NotFollowed: if JAX cannot flatten it.
  """
  try:
    return jax.tree.flatten(tree)
  except (TypeError, ValueError) as error:
    raise NotFollowed(f'arguments are no pytree ({_line(error)})') from error


def _line(error: Exception) -> str:
  """Returns the first line of a message."""
  return str(error).split('\n', 1)[0]


def _named(origin: Sequence[paths.Path]) -> str:
  return ', '.join(map(paths.show, origin)) or 'a parameter'


def _is_routed(params: live.AdaptedParams) -> bool:
  return any(a.enabled and a.route for a in params.records.adapters)


def _narrow(tree: Any) -> bool:
  """Whether a base has fewer than 32 bits, to which the model would round."""
  return any(
    compute.enabled(chain)
    and path in params
    and getattr(params[path].value, 'dtype', np.dtype('f4')).itemsize < 4
    for params in _all_params(tree)
    for path, chain in params.records.chains.items()
  )


def _takes(signature: inspect.Signature, name: str) -> bool:
  """Whether a function takes an argument by name."""
  return name in signature.parameters or any(
    p.kind is inspect.Parameter.VAR_KEYWORD
    for p in signature.parameters.values()
  )


def _arguments(
  signature: inspect.Signature, kwargs: dict[str, Any]
) -> dict[str, Any]:
  """Returns keyword arguments, less an `is_training` that is not taken."""
  if 'is_training' not in kwargs or _takes(signature, 'is_training'):
    return kwargs
  return {k: v for k, v in kwargs.items() if k != 'is_training'}


def arguments(
  model: Callable[..., Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
  """Returns the keyword arguments that a model is called with."""
  return _arguments(inspect.signature(model), kwargs)


def _training(
  signature: inspect.Signature, args: Any, kwargs: dict[str, Any]
) -> tuple[bool, dict[str, Any]]:
  """Returns whether a call is in training, and what the model is called with.

  Raises:
    AdapterError: if that is not known when the call is traced.
  """
  known = signature.parameters.get('is_training')
  if known is not None:
    given = signature.bind(*args, **kwargs)
    given.apply_defaults()
    value = given.arguments['is_training']
  else:
    value = kwargs.get('is_training', True)
    kwargs = _arguments(signature, kwargs)
  if jaxcompat.is_traced(value):
    raise errors.AdapterError(
      'factored: is_training is traced, and must be a Python bool. Pass it as '
      'a static argument, as by jax.jit(…, static_argnames=...).'
    )
  return bool(value), kwargs


class NotFollowed(Exception):  # noqa: N818 - the dense way is taken.
  """A call cannot be traced with its inputs unknown.

  Attributes:
    reason: why.
    model_raised: whether the model raised an exception, maybe one of its own.
    note: the reason, as it is written down for parameters.
  """

  def __init__(
    self, reason: str, model_raised: bool = False, failed: bool = False
  ) -> None:
    super().__init__(reason)
    self.reason = reason
    self.model_raised = model_raised
    self.note = Note(reason, Kind.FAILURE if failed else Kind.CALL)


def walked(
  model: Callable[..., Any],
  leaves: list[Any],
  tree: Any,
  walk: Walk,
  *,
  prune: bool = False,
) -> Any:
  """Returns what a model returns, with low-rank values kept factored.

  Args:
    model: the model.
    leaves: its arguments, flattened.
    tree: their structure.
    walk: goes through the jaxpr.
    prune: whether what reaches no result is left out first, as parameters are
      that a loop of a framework hands on.

  Raises:
    NotFollowed: if the call cannot be traced.
    DropoutLost: if a value with dropout would have been made dense.
  """
  call = _Call(model, leaves, tree)
  try:
    closed = jax.make_jaxpr(call.flat)(*call.traced)
  except Exception as error:
    # The dense way is taken, and raises it where it is the model's own.
    call.stash.restore()
    if isinstance(error, NotFollowed):
      raise
    if isinstance(error, UNTRACEABLE):
      reason = f'the model decides by values ({_line(error)})'
      raise NotFollowed(reason) from error
    reason = f'tracing raises {type(error).__name__} ({_line(error)})'
    raise NotFollowed(reason, model_raised=True) from error
  if prune:
    closed = jaxcompat.needed(closed)
  try:
    # The caller's setting has applied to the model, which is traced already.
    # The rules are ours, and rely on standard promotion.
    with jax.numpy_dtype_promotion('standard'):
      made = walk.closed(closed, call.traced)
    return call.result([walk.dense(v, 'result') for v in made])
  except (DropoutLost, Misrouted):
    raise
  except Exception as error:
    walk.notes.clear()  # What was kept factored till then will not be.
    what = f'{type(error).__name__}: {_line(error)}'
    reason = f'the walk through it fails ({what})'
    raise NotFollowed(reason, failed=True) from error


class _Call:
  """A call of a model as a function of its traced arguments alone.

  What is known stays known: the model may decide by a flag or a concrete array.

  Attributes:
    traced: the arguments that are traced.
    stash: what modules keep of the call.
  """

  def __init__(
    self, model: Callable[..., Any], leaves: list[Any], tree: Any
  ) -> None:
    self._model = model
    self._leaves = leaves
    self._tree = tree
    self._where = [i for i, v in enumerate(leaves) if jaxcompat.is_traced(v)]
    self.traced = [leaves[i] for i in self._where]
    self.stash = Stash([model, *leaves])
    # Of the results: those that are not traced, and their structure.
    self._known: list[Any] = []
    self._out: Any = None

  def flat(self, *traced: Array) -> list[Array]:
    """Calls the model, and returns those of its results that are traced.

    Raises:
      NotFollowed: if the call does more than a jaxpr can tell.
    """
    given = [*self._leaves]
    for i, value in zip(self._where, traced, strict=True):
      given[i] = value
    args, kwargs = jax.tree.unflatten(self._tree, given)
    found, self._out = jax.tree.flatten(self._model(*args, **kwargs))
    for value in found:
      if not jaxcompat.is_array_like(value) and not isinstance(value, str):
        raise NotFollowed(f'a result is a {type(value).__name__}')
    after, same = jax.tree.flatten((args, kwargs))
    if same != self._tree or any(map(operator.is_not, after, given)):
      raise NotFollowed('the model writes to an argument')
    if self.stash.grown:
      raise NotFollowed('a module keeps an intermediate value')
    # Not the traced values: they are of a trace that ends here.
    self._known = [None if jaxcompat.is_traced(v) else v for v in found]
    return [v for v in found if jaxcompat.is_traced(v)]

  def result(self, computed: Sequence[Array]) -> Any:
    """Returns what the model returns, given those results that were traced."""
    values = iter(computed)
    whole = [next(values) if v is None else v for v in self._known]
    return jax.tree.unflatten(self._out, whole)


def _low_rank(params: live.AdaptedParams) -> list[paths.Path]:
  """Returns the traced parameters for which adapters give a low-rank value."""
  if not any(map(jaxcompat.is_traced, jax.tree.leaves(params))):
    return []
  return [
    path
    for path, chain in params.records.chains.items()
    if compute.enabled(chain) and _gives_low_rank(params, path)
  ]


def _gives_low_rank(params: live.AdaptedParams, path: paths.Path) -> bool:
  try:
    answer = lambda: params._answered(path, params._fetch(path))
    return makes(jax.make_jaxpr(answer)().jaxpr)
  except Exception:  # Its weights lie in another argument: nothing is known.
    return False


# Dropout.


def _nodes(tree: Any, kind: type) -> list[Any]:
  """Returns the objects of a class in a pytree, or among arguments."""
  is_one = lambda value: isinstance(value, kind)
  try:
    leaves = jax.tree.leaves(tree, is_leaf=is_one)
  except (TypeError, ValueError):
    # Some argument is no pytree.
    args, kwargs = tree if isinstance(tree, tuple) else ((tree,), {})
    leaves = [*args, *kwargs.values()]
  return [leaf for leaf in leaves if is_one(leaf)]


def _all_params(tree: Any) -> Iterator[live.AdaptedParams]:
  yield from _nodes(tree, live.AdaptedParams)


def _counters(params: live.AdaptedParams) -> list[paths.Path]:
  """Returns the weights that count calls in training."""
  return dropping.counters(params.records)


# Without the count, each step would drop the same elements.
_UNCOUNTED = (
  'factored: a call in training counted in the params that it returned, and '
  'these were thrown away: the next call drops the same elements as this one. '
  'Return them from the loss and go on with them, as in y, params = '
  'fast(params, x); return loss(y), params.split()[1] under jax.grad(…, '
  'has_aux=True). Where a call is no training, say is_training=False.'
)


def _counted(tree: Any, traced: bool) -> Any:
  """Returns results in which params have counted one more call in training.

  Args:
    tree: the results.
    traced: whether it is a part of a program, as training steps are. Then it
      is a mistake to throw the params away.
  """

  def count(params: Any) -> Any:
    if not isinstance(params, live.AdaptedParams):
      return params
    values = {
      path: params[path].value for path in _counters(params) if path in params
    }
    after = live.with_values(
      params, {p: v.at[..., -1].add(1) for p, v in values.items()}
    )
    return live.watched(after, _UNCOUNTED) if traced and values else after

  is_params = lambda value: isinstance(value, live.AdaptedParams)
  return jax.tree.map(count, tree, is_leaf=is_params)
