"""The laws that every adapter type obeys, each a function of a case.

They come from what went wrong in other libraries; a docstring says the law, and
a broken one says where, by how much, and how to see it again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors, jaxcompat
from surgery.adapting import drawing, ranks
from surgery.contract import config
from surgery.contract.adapter import Adapter
from surgery.factoring import explain as explaining
from surgery.factoring import walking
from surgery.factoring.transform import factored
from surgery.live import described, saving, verbs
from surgery.live import params as live
from surgery.live import weights as access
from surgery.model.checkpoint import open_checkpoint
from surgery.naming import paths
from surgery.testing import hurry, models
from surgery.testing.cases import (
  ABOUT,
  LAWS,
  Case,
  Declared,
  Law,
  plain,
  snapshot,
)

# Laws about dtypes are checked for all of them, others in float32.
ALL_DTYPES: set[str] = set()
# Laws that do not depend on the kind of layer.
ONE_KIND: set[str] = set()


def _law(
  *, dtypes: bool = False, kinds: bool = True, about: str = ''
) -> Callable[[Law], Law]:
  """Returns a decorator that makes a law of a function.

  Args:
    dtypes: whether it is checked for all dtypes.
    kinds: whether it is checked for all kinds of layers.
    about: the attribute of a type that says that the law holds for it.
  """

  def add(law: Law) -> Law:
    name = law.__name__
    LAWS[name] = law
    if about:
      ABOUT[name] = about
    if dtypes:
      ALL_DTYPES.add(name)
    if not kinds:
      ONE_KIND.add(name)
    return law

  return add


# The beginning.


@_law(dtypes=True)
def identity_at_start(case: Case) -> None:
  """A new adapter changes no output, unless it is declared that it does."""
  model = case.model()
  before, after = model(model.params), model(case.attached(model))
  if case.declared.identity:
    case.close(before, after, 'outputs before and after attaching')
  elif np.array_equal(before, after):
    raise case.broken(
      'it is declared not to be the identity at the start, and it is.'
    )


@_law()
def random_weights_do_something(case: Case) -> None:
  """With other weights an adapter changes outputs."""
  model = case.model()
  before, after = model(model.params), model(case.trained(model))
  if np.array_equal(before, after):
    raise case.broken('outputs are those of the base, whatever its weights.')


@_law(dtypes=True)
def outputs_are_finite(case: Case) -> None:
  """Outputs and gradients have neither NaN nor infinity, and keep the dtype."""
  model = case.model()
  gradients = _gradients(model)
  before = model(model.params)
  for state, params in (
    ('as it begins', case.attached(model)),
    ('with other weights', case.trained(model)),
  ):
    after = model(params)
    if after.dtype != before.dtype:
      raise case.broken(f'outputs are {after.dtype}, were {before.dtype}.')
    if not np.isfinite(np.asarray(after, np.float32)).all():
      raise case.broken(f'outputs {state} have NaN or infinity.')
    for path, grad in gradients(params).items():
      if not np.isfinite(np.asarray(grad, np.float32)).all():
        raise case.broken(
          f'the gradient {state} has NaN or infinity.', paths.show(path)
        )


def _gradients(
  model: models.Model,
) -> Callable[[bx.Params], dict[Any, Any]]:
  """Returns a function from params to the gradients of what trains, by path."""
  both = _both(model)
  return lambda params: both(params)[1]


def _both(
  model: models.Model,
) -> Callable[[bx.Params], tuple[Any, dict[Any, Any]]]:
  """Returns a function from params to outputs, and gradients by path."""

  def loss(half: bx.Params, rest: bx.Params) -> Any:
    y = model(half.merge(rest))
    return (y.astype(jnp.float32) ** 2).sum(), y

  compiled = hurry.compiled(jax.grad(loss, has_aux=True))

  def both(params: bx.Params) -> tuple[Any, dict[Any, Any]]:
    gradients, y = compiled(*params.split())
    return y, {p: g.value for p, g in gradients.items()}

  return both


@_law(kinds=False)
def seeds_decide_the_weights(case: Case) -> None:
  """The same seed gives the same weights; the base has no part in the draw."""
  model = case.model()
  one, two = case.attached(model, seed=3), case.twin().attached(model, seed=3)
  case.same_params(one, two, 'weights of one seed')
  rest = one.split(lambda path, p: not models.is_weight(p))[0]
  case.same_params(model.params, _as_plain(rest), 'the base after attaching')


@_law(kinds=False)
def what_is_drawn_depends_on_the_seed(case: Case) -> None:
  """Weights that look drawn at random differ from seed to seed."""
  model = case.model()
  one, two = case.attached(model, seed=3), case.attached(model, seed=4)
  [record] = live.records_of(one).adapters
  # What is computed from the base is the same for all seeds, and may be.
  derived = {
    spec.path
    for site in record.sites.values()
    if drawing.site_shapes(site.interceptor, site.site)[1]
    for spec in site.weights.values()
  }
  for name, spec in record.weights():
    a, b = plain(one[spec.path].value), plain(two[spec.path].value)
    same = a.tobytes() == b.tobytes()
    if not case.declared.seeded and not same:
      raise case.broken(
        f'{name!r} is another for another seed, and it is declared that '
        'nothing is (seeded = False).',
        paths.show(spec.path),
      )
    looks_drawn = len(np.unique(a)) > max(3, a.size // 2)
    if (
      case.declared.seeded
      and same
      and looks_drawn
      and (spec.path not in derived)
    ):
      raise case.broken(
        f'{name!r} has the same numbers for every seed. Draw them from the '
        "key that init is given: surgery.named_key(key, 'name'). Declare "
        'seeded = False if they are not drawn but computed.',
        paths.show(spec.path),
      )


@_law(kinds=False)
def how_axes_are_stored_does_not_matter(case: Case) -> None:
  """On a kernel that is stored as (outputs, inputs) it does the same."""
  model, host = case.model(), case.host
  kernels = [
    path
    for path, param in model.params.items()
    if path[-1] == 'kernel' and np.ndim(param.value) == 2
  ]
  if not kernels or model.options.get('layout'):
    return
  params = model.params.unlocked()
  for path in kernels:
    params[path] = params[path].replace(value=params[path].value.T)
  turned = dataclasses.replace(
    model,
    params=params.locked(),
    options={**model.options, 'layout': {'**/kernel': 'oi'}},
  )
  straight, other = case.trained(model, seed=3), case.trained(turned, seed=3)
  for path, param in straight.items():
    if models.is_weight(param):
      what = f"{paths.show(path)}, drawn for a kernel of layout 'io' and 'oi'"
      case.close(plain(param.value), plain(other[path].value), what)
  if not case.declared.mergeable:
    return
  one, two = verbs.merge(straight, host=host), verbs.merge(other, host=host)
  for path in kernels:
    what = f"{paths.show(path)}, merged with layout 'io' and 'oi'"
    case.close(one[path].value, two[path].value.T, what)


def _as_plain(params: bx.Params) -> bx.Params:
  plain = bx.Params()
  for path, param in params.items():
    plain[path] = param
  return plain.locked()


# Merging, detaching, disabling.


@_law(dtypes=True)
def merged_is_adapted(case: Case) -> None:
  """What is merged is what layers got, to the bit."""
  if not case.declared.mergeable:
    return
  model = case.model()
  params = case.trained(model)
  merged = verbs.merge(params, host=case.host)
  case.same(model(params), model(merged), 'outputs adapted and merged')
  if any(map(models.is_weight, merged.values())):
    raise case.broken('weights of the adapter are left after merging.')


@_law(dtypes=True)
def file_merge_is_live_merge(case: Case) -> None:
  """Merging a file gives the bits that merging params gives."""
  if not case.declared.mergeable:
    return
  model, host = case.model(), case.host
  params = case.trained(model)
  with tempfile.TemporaryDirectory() as folder:
    before, after = pathlib.Path(folder, 'a.msgpack'), pathlib.Path(folder, 'b')
    saving.save(before, params, host=host)
    merged = verbs.merge(open_checkpoint(before, host=host), host=host)
    merged.write(after, host=host, format='msgpack')
    found = open_checkpoint(after, host=host, format='msgpack')
    for path, param in verbs.merge(params, host=host).items():
      if described.is_key(param.value):
        continue
      a, b = np.asarray(param.value), np.asarray(found[path].load())
      if a.dtype != b.dtype or a.tobytes() != b.tobytes():
        raise case.broken('the file has other bits.', paths.show(path))


@_law(kinds=False)
def merging_twice_is_refused(case: Case) -> None:
  """What has been merged cannot be merged again."""
  if not case.declared.mergeable:
    return
  model = case.model()
  merged = verbs.merge(case.trained(model), host=case.host)
  case.raises(lambda: verbs.merge(merged, host=case.host), 'merging again')


@_law(kinds=False)
def what_is_not_finite_is_not_merged(case: Case) -> None:
  """A merge that gives NaN is refused, and the params stay as they were."""
  if not case.declared.mergeable:
    return
  model = case.model()
  trained = case.trained(model)
  weights = [p for p in trained.values() if models.is_weight(p) and p.trainable]
  # Where nothing trains, what is not finite comes from the base.
  spoilt, rest = trained.split(
    lambda path, p: (
      p.trainable
      and models.is_weight(p) is bool(weights)
      and jnp.issubdtype(p.value.dtype, jnp.inexact)
    )
  )
  params = jax.tree.map(lambda w: w * jnp.nan, spoilt).merge(rest)
  before = snapshot(params)
  case.raises(lambda: verbs.merge(params, host=case.host), 'merging NaN')
  if before != snapshot(params):
    raise case.broken('the refused merge changed the params.')


@_law(about='adds')
def several_adapters_work_together(case: Case) -> None:
  """Merging two is merging one by one; the other one stays at work."""
  model, host = case.model(), case.host
  first = case.attached(model, name='a')
  # The name of one is a part of the other's.
  both = models.stirred(case.attached(model, params=first, name='ab', seed=1))
  if not case.declared.mergeable:
    return
  expected = model(both)
  inner = verbs.merge(both, 'a', host=host)
  case.close(expected, model(inner), 'outputs with the inner one merged')
  if ['ab'] != [info.name for info in verbs.adapters(inner, host=host)]:
    raise case.broken("merging 'a' left other adapters than 'ab'.")
  if type(case.adapter).adds:
    outer = verbs.merge(both, 'ab', host=host)
    case.close(expected, model(outer), 'outputs with the outer one merged')
  one_by_one = verbs.merge(inner, 'ab', host=host)
  case.close(expected, model(one_by_one), 'outputs merged one by one')
  at_once = verbs.merge(both, host=host)
  case.close(model(one_by_one), model(at_once), 'merging at once')


@_law(kinds=False, about='adds')
def what_adds_does_not_look_at_the_base(case: Case) -> None:
  """Of a type with `adds`, what is added to any base is the same."""
  if not type(case.adapter).adds or not case.declared.mergeable:
    return
  model, host = case.model(), case.host
  params = case.trained(model)

  def update(change: Callable[[Any], Any]) -> dict[Any, Any]:
    """Returns what is added to a base that was changed."""
    moved = params.unlocked()
    for path, param in model.params.items():
      if jnp.issubdtype(param.value.dtype, jnp.floating):
        moved[path] = param.replace(value=change(param.value))
    merged = verbs.merge(moved.locked(), host=host)
    return {
      path: np.asarray(merged[path].value) - np.asarray(moved[path].value)
      for path in verbs.adapters(params, host=host)[0].sites
    }

  usual, other = update(lambda value: value), update(lambda v: 1 - v / 2)
  for path, added in usual.items():
    case.close(added, other[path], f'what is added to {paths.show(path)}')


@_law(about='rank_axes')
def pruning_a_rank_is_masking_it(case: Case) -> None:
  """Of a type with `rank_axes`, a rank that is pruned counts as zeros do."""
  if not type(case.adapter).rank_axes:
    return
  model, host = case.model(), case.host
  params = case.trained(model)
  [record] = live.records_of(params).adapters
  values = access.weights(params)
  keep: dict[Any, list[int]] = {}
  masked: dict[Any, dict[str, Any]] = {}
  for path, site in record.sites.items():
    axes = ranks.axes_of(record, site)
    for name, axis in axes.items():
      value, shape = values[path][name], site.weights[name].shape
      # Stacked layers are axes in front.
      axis += value.ndim - len(shape)
      # Every second one goes, so that the first and the last have no say.
      keep[path] = list(range(0, value.shape[axis], 2))
      stays = jnp.isin(jnp.arange(value.shape[axis]), jnp.array(keep[path]))
      along = [-1 if at == axis else 1 for at in range(value.ndim)]
      masked.setdefault(path, {})[name] = value * stays.reshape(along)
  zeros = access.with_weights(params, 'default', masked)
  pruned = verbs.prune_ranks(params, keep, host=host)
  case.close(model(zeros), model(pruned), 'outputs masked and pruned')


@_law(dtypes=True)
def detaching_restores_the_base(case: Case) -> None:
  """Detached params are the base, bit for bit."""
  model = case.model()
  detached = verbs.detach(case.trained(model), host=case.host)
  case.same_params(model.params, detached, 'base and detached params')


@_law()
def disabling_gives_the_base(case: Case) -> None:
  """Disabled, outputs are the base's; enabled again, they are as before."""
  model, host = case.model(), case.host
  params = case.trained(model)
  off = verbs.disable(params, 'default', host=host)
  case.same(model(model.params), model(off), 'outputs of base and disabled')
  on = verbs.enable(off, 'default', host=host)
  case.same(model(params), model(on), 'outputs before and after')
  if case.declared.mergeable:
    case.raises(lambda: verbs.merge(off, host=host), 'merging what is disabled')


# Saving.


@_law(dtypes=True)
def saved_is_loaded(case: Case) -> None:
  """Saved and loaded, params answer as before, whatever seed there is."""
  model, host = case.model(), case.host
  params = case.trained(model, seed=5)
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'm.msgpack')
    saving.save(file, params, host=host)
    loaded = saving.load(file, host=host)
  case.same_params(params, loaded, 'saved and loaded params')
  case.same(model(params), model(loaded), 'outputs before and after')


@_law()
def an_adapter_is_saved_alone(case: Case) -> None:
  """An adapter's file holds no base; on its base it works as before."""
  model, host = case.model(), case.host
  params = case.trained(model, seed=5)
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'a.msgpack')
    saving.save_adapter(file, params, 'default', host=host)
    alone = open_checkpoint(file, host=host)
    for path in alone:
      if path in model.params:
        raise case.broken('the file holds the base.', paths.show(path))
    loaded = saving.load_adapter(file, model.params, host=host)
  case.same(model(params), model(loaded), 'outputs before and after')


@_law(kinds=False)
def configuration_is_data(case: Case) -> None:
  """A configuration survives JSON, and is equal to a copy of itself."""
  import json

  data = json.loads(json.dumps(case.adapter.config()))
  again = type(case.adapter).from_config(data)
  if again != case.adapter or hash(again) != hash(case.adapter):
    raise case.broken(f'{again!r} is read back, and it is not equal.')
  if copy.deepcopy(case.adapter) != case.adapter:
    raise case.broken('a copy of the adapter is not equal to it.')


# Training.


@_law()
def training_changes_the_adapter_alone(case: Case) -> None:
  """Frozen, only the adapter's weights have gradients, and all of them do."""
  model, host = case.model(), case.host
  params = verbs.freeze(case.trained(model), host=host)
  base = {p for p, one in params.items() if not models.is_weight(one)}
  gradients = _gradients(model)(params)
  for path in base & gradients.keys():
    raise case.broken('the base has a gradient.', paths.show(path))
  for path, gradient in gradients.items():
    if not np.asarray(gradient, np.float32).any():
      raise case.broken(
        'the gradient is zero, so it never learns. Declare the weight in '
        '`frozen` if that is meant.',
        paths.show(path),
      )
  if bool(gradients) is not case.declared.trains:
    raise case.broken(
      'nothing trains. Declare `trains = False` if that is meant.'
      if case.declared.trains
      else 'it is declared to have no weights that train, and it has.'
    )


@_law()
def what_is_declared_frozen_does_not_train(case: Case) -> None:
  """No weight in `frozen` trains, not after freezing and unfreezing either."""
  if not case.adapter.frozen:
    return
  model, host = case.model(), case.host
  params = case.attached(model)
  thawed = verbs.unfreeze(verbs.freeze(params, host=host), host=host)
  [record] = live.records_of(params).adapters
  for name, spec in record.weights():
    if name not in case.adapter.frozen:
      continue
    for state, some in (('', params), (' after unfreezing', thawed)):
      if some[spec.path].trainable:
        raise case.broken(f'{name!r} trains{state}.', paths.show(spec.path))


# Names.


@_law(kinds=False)
def names_that_are_parts_of_others_do_not_matter(case: Case) -> None:
  """An adapter on `query` leaves `query2` alone."""
  model = case.model()
  # Patterns may be about the other layer.
  plain: Adapter = dataclasses.replace(case.adapter, patterns=())  # type: ignore[type-var]
  params = case.attached(model, to='net/layers/query', adapter=plain)
  for path, param in params.items():
    if models.is_weight(param) and 'query2' in path:
      raise case.broken('it has weights there.', paths.show(path))
  detached = verbs.detach(params, host=case.host)
  case.same_params(model.params, detached, 'detached params')


@_law(kinds=False)
def wrong_names_change_nothing(case: Case) -> None:
  """Unknown and taken names are refused, and nothing changes."""
  model, host = case.model(), case.host
  params = case.attached(model)
  before = snapshot(params)
  for verb in (verbs.detach, verbs.disable, verbs.merge):
    call = functools.partial(verb, params, 'x', host=host)
    case.raises(call, 'unknown name')
  case.raises(lambda: case.attached(model, params=params), 'a name twice')
  for name in ('', 'a.b', 'a/b', '..'):
    call = functools.partial(case.attached, model, name=name)
    case.raises(call, f'the name {name!r}')
  if before != snapshot(params):
    raise case.broken('a refused call changed the params.')


@_law(kinds=False)
def what_the_caller_holds_stays(case: Case) -> None:
  """Attaching, merging and saving change nothing that was passed in."""
  model, host = case.model(), case.host
  config, before = case.adapter.config(), snapshot(model.params)
  params = case.trained(model)
  held = snapshot(params)
  model(params)
  if case.declared.mergeable:
    verbs.merge(params, host=host)
  if before != snapshot(model.params) or held != snapshot(params):
    raise case.broken('params that were passed in have changed.')
  if config != case.adapter.config():
    raise case.broken('the configuration has changed.')


# Transformations.


@_law(kinds=False)
def two_calls_give_the_same(case: Case) -> None:
  """`apply` is a function: called again it answers the same."""
  model = case.model()
  params = case.trained(model)
  again = case.twin().attached(model).unlocked()
  for path, param in params.items():
    again[path] = param
  case.same(model(params), model(again.locked()), 'outputs of two calls')


@_law()
def transformations_give_the_eager_result(case: Case) -> None:
  """Under jit, grad, vmap, scan and checkpoint outputs are the eager ones."""
  model = case.model()
  params = case.trained(model)
  eager = model(params)
  jitted = hurry.compiled(lambda p: model(p))
  case.close(eager, jitted(params), 'outputs eager and under jit')
  # Compiled as a whole, since eagerly each of their operations would be.
  remat = hurry.compiled(jax.checkpoint(lambda p: model(p)))
  case.close(eager, remat(params), 'outputs eager and under checkpoint')
  each = hurry.compiled(jax.vmap(lambda x: model(params, x[None])[0]))(model.x)
  case.close(eager, each, 'outputs at once and under vmap')

  def step(carry: Any, x: Any) -> Any:
    return carry, model(params, x[None])[0]

  scan = hurry.compiled(lambda x: jax.lax.scan(step, 0, x)[1])
  case.close(eager, scan(model.x), 'outputs at once and under scan')
  if case.kind in ('linear', 'embed'):  # Eagerly, others take long.
    half, rest = params.split()
    loss = lambda h: (model(h.merge(rest)).astype(jnp.float32) ** 2).sum()
    eager_gradients = jax.grad(loss)(half)
    for path, gradient in _gradients(model)(params).items():
      what = f'gradient of {paths.show(path)}, eager and under jit'
      case.close(eager_gradients[path].value, gradient, what)


@_law()
def factored_gives_the_dense_result(case: Case) -> None:
  """Through `surgery.factored`, outputs and gradients are the dense ones."""
  model = case.model()
  params = case.trained(model)
  known = explaining.explain(model.net, params, model.x)
  if not any(use.factored for use in known.values()):
    return  # It gives no low-rank values: there is nothing that differs.
  # Not in training: a dense parameter has no dropout.
  net = functools.partial(factored(model.net), is_training=False)
  fast = dataclasses.replace(model, net=net)
  dense = _both(model)(params)
  with _dense_is_no_matter():
    kept = _both(fast)(params)
  case.close(dense[0], kept[0], 'outputs dense and factored')
  for path, gradient in kept[1].items():
    what = f'gradient of {paths.show(path)}, dense and factored'
    case.close(dense[1][path], gradient, what)


@contextlib.contextmanager
def _dense_is_no_matter() -> Iterator[None]:
  """Within it, no parameter that ends up dense is warned of."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', errors.DenseFallbackWarning)
    yield


# Layers so wide that nothing but a kernel is as large as one.
_WIDE = 16
# What makes a dense update, or the gradient of one.
_PRODUCTS = ('dot_general', 'low_rank', 'scatter-add', 'scatter_add')


@_law()
def low_rank_values_stay_factored(case: Case) -> None:
  """Through `surgery.factored`, no gradient as large as a kernel is made.

  That is of types whose `apply` gives low-rank values, on layers that multiply
  with a kernel or look up in it.
  """
  if case.kind not in ('linear', 'embed', 'einsum', 'stacked'):
    return  # Others are like these, or may be dense.
  if not case.declared.factored:
    return
  model = models.model(case.kind, case.dtype, _WIDE, case.declared.multiple_of)

  def attached(params: bx.Params) -> bx.Params:
    return case.attached(dataclasses.replace(model, params=params))

  # Shapes are enough: nothing is compiled.
  params = jax.eval_shape(attached, model.params)
  halves = verbs.freeze(params).split()

  def loss(net: Any) -> Callable[[bx.Params, bx.Params], Any]:
    return lambda half, rest: (net(half.merge(rest), model.x)[0] ** 2).sum()

  if not walking.makes(jax.make_jaxpr(loss(model.net))(*halves).jaxpr):
    return  # It gives none.
  net = functools.partial(factored(model.net), is_training=False)
  with _dense_is_no_matter():
    made = _made_by(jax.make_jaxpr(jax.grad(loss(net)))(*halves).jaxpr)
  records = live.records_of(params).chains.items()
  specs = [(chain[0][1].site.param(path[-1])) for path, chain in records]
  size = min(math.prod(s.in_shape + s.out_shape) for s in specs if s.in_shape)
  large = [one for one in made if one[0] in _PRODUCTS and one[1] >= size]
  if not large:
    return
  uses = explaining.explain(model.net, params, model.x)
  dense = [f'{paths.show(p)}: {use}' for p, use in uses.items() if use.dense]
  raise case.broken(
    f'a step computes {len(large)} arrays as large as a kernel '
    f'({", ".join(sorted({name for name, _ in large}))}), as without factored. '
    f'surgery.explain says: {"; ".join(dense) or "all are factored"}. If that '
    'is meant, say so: factored = False.'
  )


def _made_by(jaxpr: Any) -> list[tuple[str, int]]:
  """Returns the primitives of a jaxpr, with the sizes of what they make."""
  found = []
  for eqn in jaxpr.eqns:
    found.append(
      (
        eqn.primitive.name,
        max(
          (v.aval.size for v in eqn.outvars if hasattr(v.aval, 'size')),
          default=0,
        ),
      )
    )
    for inner in jaxcompat.inner(eqn):
      found += _made_by(inner)
  return found


@_law(kinds=False)
def shards_give_the_eager_result(case: Case) -> None:
  """Under shard_map, over all devices that there are, outputs are the same."""
  model = case.model()
  params = case.trained(model)
  count = len(jax.devices())
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  x = jnp.concatenate([model.x] * count)
  spec = jax.sharding.PartitionSpec
  sharded = hurry.compiled(
    jax.shard_map(
      lambda p, x: model(p, x),
      mesh=mesh,
      in_specs=(spec(), spec('data')),
      out_specs=spec('data'),
    )
  )
  case.close(model(params, x), sharded(params, x), 'outputs and sharded ones')


# What a caller sets in JAX to find mistakes, and what changes defaults.
SETTINGS: dict[str, Callable[[], Any]] = {
  "numpy_rank_promotion('raise')": lambda: jax.numpy_rank_promotion('raise'),
  "numpy_dtype_promotion('strict')": lambda: jax.numpy_dtype_promotion(
    'strict'
  ),
  'enable_x64(True)': lambda: jax.enable_x64(True),
  "transfer_guard('disallow')": lambda: jax.transfer_guard('disallow'),
}


@_law(kinds=False)
def settings_of_jax_change_nothing(case: Case) -> None:
  """With strict promotion, 64 bits or a guard of transfers all is the same."""
  # In the usual way first, which also makes the model in the usual way.
  usual = _made(case)
  try:
    with contextlib.ExitStack() as scopes:
      for scope in SETTINGS.values():
        scopes.enter_context(scope())
      made = _made(case.twin())
    _same_params(case, usual, made, 'all settings')
    return
  except Exception:
    pass  # Each by itself, so that it is known which one it is.
  for name, scope in SETTINGS.items():
    try:
      with scope():
        made = _made(case.twin())
    except errors.SurgeryError as error:
      raise case.broken(
        f'under jax.{name}: {type(error).__name__}: {error}'
      ) from error
    _same_params(case, usual, made, name)


def _made(case: Case) -> dict[str, bx.Params]:
  """Returns params as they are made by attaching, loading and merging."""
  attached = case.attached(case.model())
  found = {'attached': attached}
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'm.msgpack')
    saving.save(file, attached, host=case.host)
    found['loaded'] = saving.load(file, host=case.host)
  if case.declared.mergeable:
    found['merged'] = verbs.merge(attached, host=case.host)
  return found


def _same_params(
  case: Case, usual: dict[str, bx.Params], made: dict[str, bx.Params], name: str
) -> None:
  for what, params in usual.items():
    case.same_params(params, made[what], f'params {what} under jax.{name}')


# What it says that it does not do.


def refuses(case: Case) -> None:
  """What a type does not serve is refused, with a reason."""
  model = case.model()
  case.raises(
    lambda: case.attached(model, to='net/layers/query'),
    f'attaching to {case.kind} layers, which are declared unsupported',
  )


@_law(kinds=False)
def what_cannot_be_merged_is_refused(case: Case) -> None:
  """A type that cannot be merged says so when it is asked to."""
  if case.declared.mergeable:
    return
  model = case.model()
  params = case.trained(model)
  case.raises(lambda: verbs.merge(params, host=case.host), 'merging')


@_law(kinds=False)
def what_is_too_large_is_refused(case: Case) -> None:
  """A rank, or what bounds it, above all dimensions is refused by path.

  Where the library sees what a rank is, by `rank_axes`, it warns of it, and the
  type need not.
  """
  options = case.declared.too_large
  if options is None:
    has = 'rank' in config.options(type(case.adapter))
    options = {'rank': 10_000} if has else {}
  if not options:
    return
  known = config.options(type(case.adapter))
  for name in options:
    if name not in known:
      raise errors.ConfigError(
        f"too_large: adapter type '{case.adapter.name}' has no option "
        f'{name!r}.{errors.suggest(name, known)}'
      )
  shown = ', '.join(f'{k}={v!r}' for k, v in options.items())
  try:
    large: Adapter = dataclasses.replace(  # type: ignore[type-var]
      case.adapter, patterns=(), **options
    )
  except errors.ConfigError:
    return  # It is out of the option's own range.
  model, layer = case.model(), 'net/layers/query'
  try:
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always', errors.SiteWarning)
      case.attached(model, to=layer, adapter=large)
    if any(
      issubclass(one.category, errors.SiteWarning)
      and f'{layer}/' in str(one.message)
      for one in caught
    ):
      return
  except errors.SurgeryError as error:
    # An error of a plugin is one that nobody foresaw.
    if isinstance(error, errors.PluginError) or f'{layer}/' not in str(error):
      raise case.broken(
        f'attaching with {shown}: expected a SiteError that names the path, '
        f'found {type(error).__name__}: {error}',
        layer,
      ) from error
    return
  raise case.broken(
    f'attaching with {shown}: expected an error, and there was none. Raise '
    'surgery.SiteError in `init`, or declare too_large = {} if nothing bounds '
    'it.',
    layer,
  )


LAWS['refuses'] = refuses


def cases(
  adapter: Adapter,
  declared: Declared,
  *,
  laws: Iterable[str] | None = None,
  kinds: Iterable[str] | None = None,
  dtypes: Iterable[str] | None = None,
) -> list[Case]:
  """Returns what there is to look at.

  Args:
    adapter: the adapter.
    declared: what its type says of itself.
    laws: names of laws; all by default.
    kinds: kinds of layers; all that have matrices by default.
    dtypes: dtypes of the base; all by default.

  Raises:
    ConfigError: for a law or a kind that is not known.
  """
  for given, known, what in (
    (laws, LAWS, 'law'),
    (kinds, models.KINDS, 'kind of layer'),
    (declared.unsupported, models.KINDS, 'kind of layer'),
    (dtypes, models.DTYPES, 'dtype'),
  ):
    for one in given or ():
      if one not in known:
        raise errors.ConfigError(
          f'no {what} is called {one!r}.{errors.suggest(one, known)}'
        )
  found = []
  looked = models.MATRICES if kinds is None else tuple(kinds)
  served = [
    k for k in models.KINDS if k in looked and k not in declared.unsupported
  ]
  for law in LAWS:
    some = declared.unsupported if law == 'refuses' else served
    if law in ONE_KIND:
      some = some[:1]
    for kind in some:
      for dtype in models.DTYPES:
        # Other dtypes are checked on one kind of layer.
        other = dtype != 'float32'
        if other and (law not in ALL_DTYPES or kind not in served[:1]):
          continue
        if laws is not None and law not in laws:
          continue
        if kind not in looked or (dtypes is not None and dtype not in dtypes):
          continue
        found.append(Case(adapter, kind, dtype, declared, law))
  return found
