"""The public verbs: those on params of blox, for models of any framework.

A verb on a tree is the verb on params that the tree is made into, and its
result is made into a tree again. No verb is written twice.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import blox as bx
import jax

from surgery import errors, expect
from surgery.aliases import Optimizer
from surgery.host.manager import Host, default_host
from surgery.live import (
  applying,
  checkpoints,
  combining,
  extracting,
  migrating,
  routing,
  saving,
  sharded,
)
from surgery.live import check as checking
from surgery.live import optimizer as optimizing
from surgery.live import params as live
from surgery.live import verbs as blox
from surgery.live import weights as weighing
from surgery.model import layers as graphs
from surgery.model.checkpoint import Checkpoint
from surgery.model.layers import LayerTypes
from surgery.naming.paths import Path
from surgery.trees import converting, resolving
from surgery.trees.adapted import AdaptedTree, is_tree


def _is_node(value: Any) -> bool:
  return isinstance(value, (AdaptedTree, bx.Params))


class Lowering:
  """What a verb is given, with params in the place of models.

  Args:
    host: knows the frameworks.
    layers: types of layers, where the caller says them.
    saved: whether a model becomes a `Checkpoint` rather than params.
  """

  def __init__(
    self,
    host: Host | None,
    layers: LayerTypes | None = None,
    saved: bool = False,
  ) -> None:
    self._host = host or default_host()
    self._layers = layers
    self._saved = saved
    # Of a verb that finds sites: whether the caller says what is stacked.
    self.stacked: bool | None = None
    # The models, in the order in which they were met.
    self.trees: list[AdaptedTree] = []

  def any(self, value: Any) -> Any:
    """Returns an argument with params in the place of adapted trees."""
    if isinstance(value, AdaptedTree):
      return self._params(value)
    if isinstance(value, (str, bytes, bx.Params, Checkpoint, Host)):
      return value
    try:
      leaves = jax.tree.leaves(value, is_leaf=_is_node)
    except (TypeError, ValueError):
      return value
    if not any(map(is_tree, leaves)):
      return value
    one = lambda leaf: self._params(leaf) if is_tree(leaf) else leaf
    return jax.tree.map(one, value, is_leaf=_is_node)

  def model(self, value: Any) -> Any:
    """Returns an argument that is a model, or holds some, as params."""
    if isinstance(value, (str, bytes, bx.Params, Checkpoint)):
      return value
    lowered = self.any(value)
    if lowered is not value:
      return lowered
    leaves = jax.tree.leaves(value, is_leaf=_is_node)
    if any(map(_is_node, leaves)) or _has_files(value):
      return value
    kind = converting.kind_of(value, self._host)
    if kind is None:
      if any(one.knows(value) for one in self._host.trees.values()):
        raise errors.SurgeryError(
          f'expected params, found {type(value).__name__}, which has no arrays '
          'of its own. Give what its init returned, and say its layers by '
          'layers=surgery.layers(model, x).'
        )
      return value
    return self._params(converting.tree_of(value, kind, self._layers))

  def models(self, value: Any) -> Any:
    """Returns several models as params."""
    if not isinstance(value, (list, tuple)):
      return self.any(value)
    return [self.model(one) for one in value]

  def _params(self, tree: AdaptedTree) -> Any:
    if self._layers is not None:
      tree = converting.with_layers(tree, self._layers)
    self.trees.append(tree)
    params = converting.to_params(tree)
    if self.stacked is not None:
      converting.check_stacked(tree, params, self.stacked)
    if not self._saved:
      return params
    return checkpoints.to_tensors(checkpoints.to_checkpoint(params))

  def raised(self, result: Any) -> Any:
    """Returns what a verb returned, with trees in the place of params."""
    if isinstance(result, bx.Params):
      return self._tree(result)
    if isinstance(result, Checkpoint) or not _has_params(result):
      return result
    one = lambda leaf: self._tree(leaf) if _is_node(leaf) else leaf
    return jax.tree.map(one, result, is_leaf=_is_node)

  def _tree(self, params: bx.Params) -> Any:
    like = live.notes_of(params).get('tree')
    if like is None:
      like = min(self.trees, key=lambda tree: _distance(tree, params))
    return converting.from_params(params, like)


def _has_files(value: Any) -> bool:
  """Whether a list names files, or holds other models."""
  return isinstance(value, (list, tuple)) and any(
    isinstance(one, (str, Checkpoint)) for one in value
  )


def _has_params(value: Any) -> bool:
  if isinstance(value, Iterator):
    return False
  try:
    leaves = jax.tree.leaves(value, is_leaf=_is_node)
  except (TypeError, ValueError):
    return False
  return any(isinstance(leaf, bx.Params) for leaf in leaves)


def _distance(tree: AdaptedTree, params: bx.Params) -> tuple[bool, int]:
  """Returns how far a model is from params: by adapters, then by paths."""
  records = live.records_of(params)
  mine = set(tree._kind.slots(tree.base))
  held = {path for path in params.keys() if path not in records.owned}
  return tree.records != records, len(mine ^ held)


def on_trees(
  verb: Callable[..., Any],
  *models: str,
  many: Collection[str] = (),
  saved: bool = False,
  module: str = __name__,
) -> Any:
  """Returns a verb that takes models of any framework too.

  Args:
    verb: the verb on params.
    *models: its parameters that are models, or pytrees that hold some.
    many: those that are lists of models.
    saved: whether the verb looks at a `Checkpoint`.
    module: where the verb is public.
  """
  signature = inspect.signature(verb)
  typed = 'graph' in signature.parameters

  @functools.wraps(verb)
  def either(*args: Any, **kwargs: Any) -> Any:
    layers = kwargs.pop('layers', None) if typed else None
    try:
      given = signature.bind(*args, **kwargs)
    except TypeError:
      return verb(*args, **kwargs)  # It says what it takes.
    arguments = given.arguments
    lowering = Lowering(arguments.get('host'), layers, saved)
    if 'stacked' in signature.parameters:
      said = arguments.get('stacked'), arguments.get('layout')
      lowering.stacked = said != (None, None)
    # What comes out is of the kind of the first model that goes in.
    kinds: list[bool] = []
    for name, value in arguments.items():
      if name in many:
        arguments[name] = lowering.models(value)
      elif name in models:
        arguments[name] = lowering.model(value)
      elif name == 'inputs':
        arguments[name] = {k: lowering.model(v) for k, v in value.items()}
      else:
        continue
      kinds.append(bool(lowering.trees))
    if not lowering.trees:
      if layers is not None:
        raise errors.SurgeryError(
          f'{verb.__name__}: layers= goes with models of other frameworks. For '
          'params of blox give graph=, for a file nothing.'
        )
      return verb(*args, **kwargs)
    result = verb(*given.args, **given.kwargs)
    return lowering.raised(result) if kinds[0] else result

  either.__module__ = module
  if typed:
    either.__signature__ = _with_layers(signature)  # type: ignore[attr-defined]
    either.__annotations__ = {
      **verb.__annotations__,
      'layers': LayerTypes | None,
    }
    # From Python 3.13 on docstrings have no indentation of their own.
    plain = inspect.cleandoc(verb.__doc__ or '')
    either.__doc__ = plain.replace('  host: ', _LAYERS, 1)
  return either


_LAYERS = """  layers: the same for a model of another framework whose params
    are dicts, as `surgery.layers(model, x)` gives it.
  host: """


def _with_layers(signature: inspect.Signature) -> inspect.Signature:
  kept = list(signature.parameters.values())
  at = [p.name for p in kept].index('graph') + 1
  layers = inspect.Parameter(
    'layers',
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation='LayerTypes | None',
  )
  return signature.replace(parameters=[*kept[:at], layers, *kept[at:]])


def _whole(tree: Any) -> AdaptedTree | None:
  """Returns the one adapted tree in a pytree."""
  found = resolving.found(tree)
  return found[0] if len(found) == 1 else None


def check(
  model: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> tuple[Path, ...]:
  """Traces a call and raises if it uses a base without its adapter.

  Layers that read `params[path].value` themselves cannot be reached by any
  adapter, so merged params would give another result; this names their
  parameters, also where another layer asks for the same one as it should.
  Nothing is computed.

  Args:
    model: a module, or any function that takes params first.
    params: params with adapters; or an adapted tree, or what holds one, as
      linen's variables do.
    *args: further arguments of the call.
    **kwargs: further arguments of the call.

  Returns:
    The parameters that are rewritten, all of which were asked for, and whose
    bases reach no result but through their adapters.

  Raises:
    UnreachedError: naming the parameters that were never asked for, or read
      as they are stored.
    AdapterError: if no adapter is attached.

  Warns:
    DropoutWarning: if an adapter has dropout and the call, which is in
      training, is not one of `surgery.factored(model)`: it drops nothing.
  """
  tree = None if isinstance(params, bx.Params) else _whole(params)
  if tree is None:
    return checking.check(model, params, *args, **kwargs)
  expect.model(model, check)
  function, given = resolving.of_params(model, params)
  found = checking.check(function, given, *args, **kwargs)
  resolving.check_used(tree, model, params, args, kwargs)
  return found


def optimizer(tx: Optimizer, params: Any) -> Any:
  """Returns an optimizer that moves what trains and nothing else.

  See `surgery.live.optimizer`. Of models of other frameworks it takes and
  returns trees; its state holds what trains alone.
  """
  if not resolving.found(params):
    kind = None
    if not _has_params(params):
      kind = converting.kind_of(params, default_host())
    if kind is None:
      return optimizing.optimizer(tx, params)
    params = converting.tree_of(params, kind)
  inner = optimizing.optimizer(tx, Lowering(None).model(params))

  def init(params: Any) -> Any:
    return inner.init(Lowering(None).model(params))

  def update(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    lowering = Lowering(None)
    gradients = lowering.model(updates)
    held = None if params is None else lowering.model(params)
    extra = {key: lowering.any(value) for key, value in extra.items()}
    moved, state = inner.update(gradients, state, held, **extra)
    return lowering.raised(moved), state

  return type(inner)(init, update)


def trainable_mask(params: Any) -> Any:
  """Returns a mask for optax: True where a parameter trains.

  See `surgery.live.verbs.trainable_mask`. Of a model of another framework it
  has the model's structure, with False in the place of what is no array.
  """
  lowering = Lowering(None)
  lowered = lowering.model(params)
  if not lowering.trees:
    return blox.trainable_mask(lowered)
  mask = blox.trainable_mask(lowered)
  return converting.masked(mask, lowering.trees[0])


def load(
  path: saving.PathLike,
  *,
  like: Any = None,
  shardings: sharded.Shardings = None,
  host: Host | None = None,
) -> Any:
  """Loads what `save` wrote, or any flax msgpack file of nested dicts.

  Args:
    path: the file; its suffix tells the format.
    like: a model of another framework, whose structure what is loaded gets:
      its own arrays do not matter. `dict` gives nested dicts, as linen and
      haiku have them.
    shardings: how tensors are to lie on devices: a `jax.sharding.Sharding` for
      all, or a function from the path of a tensor and its leaf (which has
      `shape` and `dtype`) to one, or to None for JAX's usual place. Each device
      gets its part, and no device or process reads more than its own; a tensor
      of which this process reads a part only is not held against its digest.
      PRNG keys and scalars lie where JAX puts them.
    host: knows formats and adapters' types.

  Returns:
    Params; adapted ones if the file has adapters. With `like` a model of its
    framework, or an `AdaptedTree` of one. 64-bit arrays stay numpy arrays
    unless JAX's 64-bit mode is on.

  Raises:
    FormatError: if the file is not what it should be.
    UnknownAdapterType: if an adapter's type is not installed.
    ConfigError: if a tensor cannot lie as its sharding says.
    BaseMismatchError: if `like` has other parameters than the file.

  Example:
    mesh = jax.make_mesh((8,), ('data',))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    surgery.load('m.msgpack', shardings=lambda path, leaf: (
      rows if leaf.shape and leaf.shape[0] % 8 == 0 else whole
    ))

  Warns:
    UserWarning: if the file holds a half that `split()` made.
  """
  params = saving.load(path, shardings=shardings, host=host)
  if like is None:
    return params
  if like is dict:
    return converting.as_dicts(params)
  if isinstance(like, bx.Params):
    raise errors.SurgeryError(
      'load: like= is for models of other frameworks. Params of blox are what '
      'it gives without.'
    )
  if isinstance(like, AdaptedTree):
    tree = like
  else:
    kind = converting.kind_of(like, host or default_host())
    if kind is None:
      raise errors.SurgeryError(
        f'load: like: expected a model, or a tree of arrays, found '
        f'{type(like).__name__}.'
      )
    tree = converting.tree_of(like, kind)
  return converting.loaded(params, tree, str(path))


def layers(model: Any, *example: Any, **kwargs: Any) -> LayerTypes:
  """Returns types of layers and roles of axes, by path.

  Selectors (`type:Dense`) and adapters go by them: give them to a verb as
  `layers=`. Modules of nnx and equinox know their layers, and verbs ask them;
  of linen and haiku the params are dicts, so it is the module that is asked.
  Nothing is computed: the call is traced.

  Args:
    model: a module of linen, nnx or equinox, a transformed function of haiku,
      or a `bx.Graph`.
    *example: what the model is called with, arrays or shapes.
    **kwargs: the same by name.

  Raises:
    SurgeryError: if nothing is known of such a model.

  Example:
    known = surgery.layers(model, x)
    params = surgery.attach(params, lora, to='type:Dense', layers=known)
  """
  if graphs.is_graph(model):
    return graphs.of_graph(model)
  if isinstance(model, AdaptedTree):
    return converting.to_params(model)._notes['manifest'].layer_types
  for kind in default_host().trees.values():
    if kind.knows(model):
      return kind.layers(model, example, kwargs)
  raise errors.SurgeryError(
    'layers: expected a module of linen, nnx or equinox, a transformed '
    f'function of haiku, or a bx.Graph, found {type(model).__name__}. Give the '
    'module, not its params.'
  )


adapters = on_trees(blox.adapters, 'params')
apply = on_trees(applying.apply, 'model')
attach = on_trees(blox.attach, 'params')
cast = on_trees(blox.cast, 'params')
combine = on_trees(combining.combine, 'base', many=('models',))
combine_adapters = on_trees(blox.combine_adapters, 'params')
detach = on_trees(blox.detach, 'tree')
disable = on_trees(blox.disable, 'tree')
drop = on_trees(blox.drop, 'params')
enable = on_trees(blox.enable, 'tree')
extract_lora = on_trees(extracting.extract_lora, 'base', 'tuned')
freeze = on_trees(blox.freeze, 'params')
keep = on_trees(blox.keep, 'params')
load_adapter = on_trees(saving.load_adapter, 'params')
merge = on_trees(blox.merge, 'params')
migrate = on_trees(migrating.migrate, 'opt_state', 'before', 'after')
prune_ranks = on_trees(blox.prune_ranks, 'params')
regulariser = on_trees(weighing.regulariser, 'params')
rename = on_trees(blox.rename, 'params')
route = on_trees(routing.route, 'params')
save = on_trees(saving.save, 'params')
save_adapter = on_trees(saving.save_adapter, 'params')
stack_adapters = on_trees(routing.stack_adapters, many=('many',))
unfreeze = on_trees(blox.unfreeze, 'params')
weights = on_trees(weighing.weights, 'params')
with_weights = on_trees(weighing.with_weights, 'params')
