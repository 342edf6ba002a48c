"""An optimizer for what trains: frozen and disabled weights stay as they are.

`optax.masked` hands the gradients of what it masks on as updates, so frozen
weights move. Here the optimizer gets the weights that train and nothing else:
what is frozen has no state, no decay and no part in a global norm, and its
update is zero whatever its gradient is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp

from surgery import errors
from surgery.aliases import Optimizer
from surgery.live import adoption, described
from surgery.live import params as live
from surgery.naming import paths
from surgery.naming.paths import Path

# The weights that train, for each of the params in a pytree.
_Plan = list[frozenset[Path]]


def trained(params: bx.Params) -> frozenset[Path]:
  """Returns the paths of what an optimizer may move.

  That is what is flagged as trainable and holds real or complex numbers, less
  the weights of adapters that are disabled.
  """
  disabled = {
    path
    for record in live.records_of(params).adapters
    if not record.enabled
    for path in record.weight_paths()
  }
  return frozenset(
    path
    for path, param in params.items()
    if param.trainable and path not in disabled and _has_numbers(param.value)
  )


def _has_numbers(value: Any) -> bool:
  return any(map(_is_number, jax.tree.leaves(value)))


def _is_number(leaf: Any) -> bool:
  dtype = getattr(leaf, 'dtype', None)
  if dtype is None:
    return isinstance(leaf, (float, complex))
  return bool(jnp.issubdtype(dtype, jnp.inexact))


def optimizer(tx: Optimizer, params: Any) -> Any:
  """Returns an optimizer that updates trainable parameters only.

  Frozen parameters, and the weights of disabled adapters, get an update of
  zero, even if their gradients are NaN. They have no state, do not decay and do
  not count in a global norm: wrap the whole chain, clipping included. States,
  masks and labels of `tx` are for the half that trains, so give masks and
  labels as functions, or for `params.split()[0]`.

  It takes gradients of all params, or of the half that trains, and returns
  updates of the same structure; the state is the same for both. JAX gives no
  gradients of integers and keys: they get an update of zero where `params` are
  given, and keys stay as the gradients have them; where a `bx.Rng` is in
  params, differentiate and update `params.split()[0]`.

  Args:
    tx: an optimizer of optax, e.g. `optax.adamw(1e-3)`, or a chain of
      transformations.
    params: the model's params, frozen as they will be trained, their half that
      trains, or a pytree of params and arrays that train.

  Returns:
    An `optax.GradientTransformation`. It raises an `AdapterError` if it is
    called with params whose trainable weights are others.

  Raises:
    SurgeryError: if there are no params, nothing trains, or optax is missing.

  Example:
    tx = surgery.optimizer(optax.adamw(1e-3), params)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  """
  try:
    import optax
  except ImportError as error:
    raise errors.SurgeryError(
      'optimizer: optax is not installed. Install it: pip install optax.'
    ) from error
  if isinstance(tx, optax.MultiSteps):
    tx = tx.gradient_transformation()
  if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
    raise errors.SurgeryError(
      'optimizer: expected an optimizer of optax and params, found '
      f'{type(tx).__name__} and {type(params).__name__}.'
    )
  # A linesearch gets further arguments, and other optimizers ignore them.
  inner = optax.with_extra_args_support(tx)
  with errors.within('optimizer'):
    adoption.refuse_lost(_all_params(params))
  # Which weights train is compared in each call: the state has no place for
  # others.
  plan = [trained(one) for one in _all_params(params)]
  if not any(plan):
    raise errors.SurgeryError(
      f'optimizer: nothing trains in this {type(params).__name__}. Expected '
      'bx.Params, or a pytree that holds some, with trainable parameters; see '
      'surgery.unfreeze and surgery.enable.'
    )

  def init(params: Any) -> Any:
    _check(plan, params, 'params')
    return _explained(inner.init, _half(params))

  def update(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    _check(plan, updates, 'gradients')
    half = None
    if params is not None:
      _check(plan, params, 'params')
      half = _half(params)
      extra = {k: _extra(value, params) for k, value in extra.items()}
    moved, state = _explained(
      inner.update, _half(updates), state, half, **extra
    )
    return _whole(updates, moved, params), state

  return optax.GradientTransformationExtraArgs(init, update)


# Halves of pytrees that hold params.


def _is_params(value: Any) -> bool:
  return isinstance(value, bx.Params)


def _all_params(tree: Any) -> list[bx.Params]:
  leaves = jax.tree.leaves(tree, is_leaf=_is_params)
  return [leaf for leaf in leaves if _is_params(leaf)]


def _mapped(change: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Applies a function to all params in a pytree; other leaves train."""
  one = lambda value, *others: (
    change(value, *others) if _is_params(value) else (others or (value,))[0]
  )
  return jax.tree.map(one, tree, *rest, is_leaf=_is_params)


def _split(params: bx.Params) -> tuple[bx.Params, bx.Params]:
  mine = trained(params)
  return params.split(lambda path, _: path in mine)


def _half(tree: Any) -> Any:
  """Returns a pytree with the trainable half of all its params."""
  return _mapped(lambda params: _split(params)[0], tree)


def _whole(gradients: Any, moved: Any, params: Any) -> Any:
  """Returns updates with the structure of the gradients.

  Args:
    gradients: pytree of gradients.
    moved: updates of trainable parameters.
    params: pytree of the params, which have the dtypes; or None.
  """

  def filled(gradient: bx.Params, update: bx.Params, own: bx.Params) -> Any:
    values = {}
    for path, param in gradient.items():
      if path in update:
        values[path] = update[path].value
      else:
        like = own[path].value if path in own else param.value
        values[path] = jax.tree.map(_still, like, param.value)
    return live.with_values(gradient, values)

  return _mapped(
    filled, gradients, moved, gradients if params is None else params
  )


def _still(value: Any, gradient: Any) -> Any:
  """Returns the update that changes no bit of a value.

  Negative zero, since adding the positive one turns -0.0 into 0.0.
  """
  dtype = getattr(value, 'dtype', None)
  if described.is_key(value) or dtype == jax.dtypes.float0:
    return gradient  # Keys have no zero, and optax leaves float0 alone.
  if dtype is None:
    return type(value)() if isinstance(value, (int, float, complex)) else value
  zero = -0.0 if jnp.issubdtype(dtype, jnp.inexact) else 0
  return jnp.full_like(value, zero)


def _extra(value: Any, params: Any) -> Any:
  """Returns a further argument of an update for the half that trains.

  Linesearches get a function of the params, and a gradient.
  """
  if callable(value) and not _is_params(value):

    @functools.wraps(value, updated=())
    def of_half(half: Any, *args: Any, **kwargs: Any) -> Any:
      join = lambda whole, mine: mine.merge(_split(whole)[1])
      return value(_mapped(join, params, half), *args, **kwargs)

    return of_half
  return _half(value) if _all_params(value) else value


def _explained(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  try:
    return run(*args, **kwargs)
  except (ValueError, TypeError, KeyError) as error:
    error.add_note(
      'surgery.optimizer passes only trainable parameters to its optimizer. '
      'Give masks and labels as functions of params, or for '
      'params.split()[0].'
    )
    raise


# Checks that the trainable weights are the same as before.


def _check(plan: _Plan, tree: Any, what: str) -> None:
  """Raises unless the same weights train as when the optimizer was made.

  Raises:
    AdapterError: naming a weight that has been frozen or unfrozen.
  """
  found = _all_params(tree)
  if len(found) != len(plan):
    raise errors.SurgeryError(
      f'optimizer: it was made for a pytree with {len(plan)} bx.Params, but '
      f'the {what} contain {len(found)}. Give {what} of the structure of the '
      'params.'
    )
  for params, expected in zip(found, plan, strict=True):
    now = trained(params)
    if now != expected:
      raise errors.AdapterError(_changed(params, expected, now, what))


def _changed(
  params: bx.Params,
  expected: frozenset[Path],
  now: frozenset[Path],
  what: str,
) -> str:
  absent = sorted(path for path in expected if path not in params)
  if absent:
    return (
      f'optimizer: {_listed(absent)} trained when the optimizer was made and '
      f'{_are(absent)} not in the {what}. Give the {what} of all trainable '
      'weights; after a change of the params make the optimizer again and '
      'migrate its state with surgery.migrate.'
    )
  lost, new = sorted(expected - now), sorted(now - expected)
  parts = []
  if lost:
    parts.append(f'{_listed(lost)} trained and {_are(lost)} frozen or disabled')
  if new:
    parts.append(f'{_listed(new)} did not train and {_do(new)} now')
  return (
    f'optimizer: since it was made, other weights train: {"; ".join(parts)} '
    f'(in the {what}). Make the optimizer again after freezing, and migrate '
    'its state: tx = surgery.optimizer(…, after); state = '
    'surgery.migrate(state, before, after, tx=tx).'
  )


def _listed(found: Sequence[Path]) -> str:
  shown = ', '.join(map(paths.show, found[:5]))
  return shown + (f' and {len(found) - 5} more' if len(found) > 5 else '')


def _are(found: Sequence[Path]) -> str:
  return 'is' if len(found) == 1 else 'are'


def _do(found: Sequence[Path]) -> str:
  return 'does' if len(found) == 1 else 'do'
