"""`factored` under JAX's transformations, and transformations within."""

from __future__ import annotations

import functools
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models
from tests.live.models import close
from tests.live.test_transformations import _python


class Both(bx.Module):
  """A convolution over features, then an MLP."""

  def __init__(self, graph, rng):
    super().__init__(graph)
    self.conv = bx.Conv(graph.child('conv'), 3, 4, rng)
    self.mlp = models.MLP(graph.child('mlp'), [5, 3], rng)

  def __call__(self, params, x):
    h, params = self.conv(params, x[..., None])
    return self.mlp(params, x + jnp.sin(h).mean(-1))


def both():
  """Returns a model, its params and inputs."""
  graph, x = bx.Graph('net'), models.normal(0, (7, 4))
  rng = bx.Rng(graph.child('rng'))
  model = Both(graph.child('both'), rng)
  _, params = model(rng.seed(bx.Params(), seed=42), x)
  return model, params.locked(), x


TO = '**/{conv,hidden0,output}'
MODEL, BASE, X = both()
PARAMS = models.stirred(surgery.attach(BASE, surgery.LoRA(rank=2), to=TO))
WEIGHTS, REST = PARAMS.split(models.is_weight)
FAST = surgery.factored(MODEL)


def loss(model, weights, x=X, rest=REST):
  """Returns a number that all outputs take part in."""
  y, _ = model(weights.merge(rest), x)
  return (y**2).sum() + jnp.sin(y).sum()


def direction(tree, seed=5):
  """Returns numbers like those of a tree."""
  leaves, structure = jax.tree.flatten(tree)
  return jax.tree.unflatten(
    structure, [models.normal(seed + i, v.shape) for i, v in enumerate(leaves)]
  )


def vmap_over_inputs(model):
  xs = jnp.stack([X, 2 * X, -X])
  per_example = jax.vmap(jax.grad(functools.partial(loss, model)), (None, 0))
  return per_example(WEIGHTS, xs)


def vmap_over_adapters(model):
  many = jax.tree.map(lambda w: jnp.stack([w, 2 * w, -w]), WEIGHTS)
  return jax.vmap(jax.value_and_grad(functools.partial(loss, model)))(many)


def vmap_within_grad(model):
  many = jax.tree.map(lambda w: jnp.stack([w, -w]), WEIGHTS)
  return jax.grad(
    lambda many: jax.vmap(functools.partial(loss, model))(many).sum()
  )(many)


def scan_of_steps(model):
  def step(weights, x):
    value, grads = jax.value_and_grad(functools.partial(loss, model))(
      weights, x
    )
    return jax.tree.map(lambda w, g: w - 0.01 * g, weights, grads), value

  return jax.lax.scan(step, WEIGHTS, jnp.stack([X, 2 * X]))


def checkpoint_outside(model):
  inner = jax.checkpoint(functools.partial(loss, model))
  return jax.value_and_grad(inner)(WEIGHTS)


def checkpoint_with_policy(model):
  policy = jax.checkpoint_policies.dots_saveable
  inner = jax.checkpoint(functools.partial(loss, model), policy=policy)
  return jax.grad(inner)(WEIGHTS)


def jvp_of_grad(model):
  grad = jax.grad(functools.partial(loss, model))
  return jax.jvp(grad, (WEIGHTS,), (direction(WEIGHTS),))


def grad_of_jvp(model):
  def pushed(weights):
    of = functools.partial(loss, model)
    return jax.jvp(of, (weights,), (direction(weights),))[1]

  return jax.grad(pushed)(WEIGHTS)


def jvp_of_everything(model):
  """Tangents of the base and of inputs too."""
  floats = jax.tree.map(lambda v: jnp.issubdtype(v.dtype, jnp.floating), PARAMS)
  tangents = jax.tree.map(
    lambda v, f: models.normal(3, v.shape) if f else _float0(v), PARAMS, floats
  )
  call = lambda params, x: model(params, x)[0]
  return jax.jvp(call, (PARAMS, X), (tangents, X))


def _float0(value):
  return np.zeros(value.shape, jax.dtypes.float0)


def linearized(model):
  value, push = jax.linearize(functools.partial(loss, model), WEIGHTS)
  return value, push(direction(WEIGHTS))


def gradient_of_all(model):
  """The base trains as well."""
  weights, rest = PARAMS.split(lambda path, param: 'rng' not in path)
  return jax.value_and_grad(functools.partial(loss, model), argnums=0)(
    weights, X, rest
  )


def has_aux(model):
  def of(weights):
    y, params = model(weights.merge(REST), X)
    return (y**2).sum(), (y, params.split(models.is_weight)[0])

  return jax.value_and_grad(of, has_aux=True)(WEIGHTS)


def around_the_loss(model):
  """The transform may stand around more than the model."""
  whole: Any = functools.partial(loss, MODEL)
  if model is FAST:
    whole = surgery.factored(whole)
  return jax.value_and_grad(whole)(WEIGHTS)


def twice(model):
  wrapped = surgery.factored(surgery.factored(model))
  return jax.value_and_grad(functools.partial(loss, wrapped))(WEIGHTS)


def meta_gradient(model):
  """A gradient of what a gradient step comes to."""

  def after(weights):
    grads = jax.grad(functools.partial(loss, model))(weights)
    moved = jax.tree.map(lambda w, g: w - 0.01 * g, weights, grads)
    return loss(model, moved)

  return jax.grad(after)(WEIGHTS)


def grad_within(model):
  """A model that differentiates itself."""
  inner = MODEL if model is MODEL else None

  def energy(params, x):
    y, _ = MODEL(params, x)
    return (y**2).sum()

  def force(params, x):
    return jax.grad(energy, 1)(params, x), params

  wrapped = force if inner else surgery.factored(force)
  return jax.value_and_grad(functools.partial(loss, wrapped))(WEIGHTS)


def psum_within(model):
  """A named axis of an outer vmap, which the model reduces over."""

  def normalised(params, x):
    y, params = MODEL(params, x)
    return y - jax.lax.pmean(y, 'batch'), params

  wrapped = normalised if model is MODEL else surgery.factored(normalised)
  mapped = jax.vmap(
    functools.partial(loss, wrapped), (None, 0), axis_name='batch'
  )
  return jax.value_and_grad(lambda w: mapped(w, X).sum())(WEIGHTS)


def _cached(params, x):
  return MODEL(params, x)


_cached = jax.jit(_cached)


def inner_jit_that_was_called_before(model):
  """Its trace is cached from a call without the transform."""
  _cached(PARAMS, X)
  wrapped = _cached if model is MODEL else surgery.factored(_cached)
  return jax.value_and_grad(functools.partial(loss, wrapped))(WEIGHTS)


TRANSFORMS = [
  vmap_over_inputs,
  vmap_over_adapters,
  vmap_within_grad,
  scan_of_steps,
  checkpoint_outside,
  checkpoint_with_policy,
  jvp_of_grad,
  grad_of_jvp,
  jvp_of_everything,
  linearized,
  gradient_of_all,
  has_aux,
  around_the_loss,
  twice,
  meta_gradient,
  grad_within,
  psum_within,
  inner_jit_that_was_called_before,
]


@pytest.mark.parametrize('transform', TRANSFORMS, ids=lambda t: t.__name__)
def test_a_transformation_gives_what_it_gives_of_the_dense_model(transform):
  expected, actual = jax.jit(lambda: (transform(MODEL), transform(FAST)))()
  close(expected, actual, 1e-4)


def test_without_jit_gradients_are_the_same():
  grad = lambda model: jax.value_and_grad(functools.partial(loss, model))
  close(grad(MODEL)(WEIGHTS), grad(FAST)(WEIGHTS))


def test_shapes_are_known_without_computing():
  expected = jax.eval_shape(MODEL, PARAMS, X)
  actual = jax.eval_shape(FAST, PARAMS, X)
  assert jax.tree.structure(expected) == jax.tree.structure(actual)
  assert jax.tree.leaves(expected) == jax.tree.leaves(actual)


# Compiled programs.


def test_nothing_is_traced_again_for_the_same_or_another_tenant():
  traced = []

  @jax.jit
  def step(params, x):
    traced.append(1)
    half, rest = surgery.freeze(params).split()
    return jax.grad(lambda h: (FAST(h.merge(rest), x)[0] ** 2).sum())(half)

  step(PARAMS, X)
  step(PARAMS, 2 * X)
  other = surgery.attach(BASE, surgery.LoRA(rank=2), to=TO, seed=7)
  step(models.stirred(other, seed=1), X)
  assert 1 == len(traced)
  step(surgery.disable(PARAMS), X)
  assert 2 == len(traced)
  step(PARAMS, X)
  assert 2 == len(traced)


def test_params_can_be_donated_to_a_step():
  params = models.stirred(
    surgery.attach(
      jax.tree.map(jnp.copy, BASE), surgery.LoRA(rank=2), to='**/hidden0'
    )
  )
  expected = MODEL(params, X)[0]

  @functools.partial(jax.jit, donate_argnums=0)
  def step(params):
    weights, rest = params.split(models.is_weight)
    y, _ = FAST(params, X)
    grads = jax.grad(functools.partial(loss, FAST), argnums=0)(weights, X, rest)
    new = jax.tree.map(lambda w, g: w - 0 * g, weights, grads)
    return y, new.merge(rest)

  y, after = step(params)
  close(expected, y)
  leaf = next(q.value for p, q in params.items() if models.is_weight(p, q))
  assert leaf.is_deleted()
  close(expected, step(after)[0])


# Several devices.

DEVICES = """
import functools
import blox as bx, jax, jax.numpy as jnp, numpy as np, surgery
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.live import models

assert 4 == len(jax.devices())
model, base, x = models.mlp((8, 8), inputs=4)
x = jnp.concatenate([x, x[:1]])
params = models.stirred(
  surgery.attach(base, surgery.LoRA(rank=2), to='**/{hidden0,output}'))
weights, rest = params.split(models.is_weight)
mesh = Mesh(np.array(jax.devices()), ('data',))

def grads(call):
  def loss(w, x):
    return (call(w.merge(rest), x) ** 2).sum()
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weights, x)

dense = grads(lambda p, x: model(models.dense(p), x)[0])
fast = surgery.factored(model)
for check in (True, False):
  shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=check,
                            in_specs=(P(), P('data')), out_specs=P('data'))
  # The transform inside of it, and around it.
  models.close(dense, grads(shard(lambda p, x: fast(p, x)[0])))
  whole = shard(lambda p, x: model(p, x)[0])
  models.close(dense, grads(surgery.factored(whole)))
  uses = {str(use) for use in surgery.explain(whole, params, x).values()}
  assert {'factored'} == uses, uses

# A mean over devices within the model.
def centred(p, x):
  y, p = model(p, x)
  return y - jax.lax.pmean(y, 'data')
shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P('data')),
                          out_specs=P('data'))
expected = grads(shard(centred))
models.close(expected, grads(shard(surgery.factored(centred))))
models.close(expected, grads(surgery.factored(shard(centred))))

# A layer whose kernel is split over devices: along outputs, along inputs.
class Split(bx.Module):
  def __init__(self, graph, spec, twice=False):
    super().__init__(graph)
    self.spec, self.twice = spec, twice
  def __call__(self, params, x):
    k, params = self.get_param(params, 'kernel', (8, 8), jax.nn.initializers.ones)
    if self.twice:
      k = k + 2 * k.T
    if self.spec == P(None, 'data'):
      run = jax.shard_map(lambda k, x: x @ k, mesh=mesh,
                          in_specs=(self.spec, P()), out_specs=P(None, 'data'))
    else:
      run = jax.shard_map(lambda k, x: jax.lax.psum(x @ k, 'data'), mesh=mesh,
                          in_specs=(self.spec, P(None, 'data')), out_specs=P())
    return run(k, x), params

x = models.normal(0, (3, 8))
for spec in (P(None, 'data'), P('data', None), P('data')):
  for twice in (False, True):
    layer = Split(bx.Graph('net').child('layer'), spec, twice)
    base = bx.Params()
    base['net', 'layer', 'kernel'] = bx.Param(models.normal(1, (8, 8)))
    params = models.stirred(
      surgery.attach(base.locked(), surgery.LoRA(rank=2), to='**/layer'))
    weights, rest = params.split(models.is_weight)
    dense = grads(lambda p, x: layer(models.dense(p), x)[0])
    models.close(dense, grads(lambda p, x: surgery.factored(layer)(p, x)[0]), 1e-4)
    (use,) = surgery.explain(layer, params, x).values()
    assert 'factored' == str(use), (spec, twice, use)

# A kernel that lies split in memory: the compiler divides the products.
placed = jax.device_put(rest, jax.tree.map(
  lambda v: NamedSharding(mesh, P(*[None] * (v.ndim - 1), 'data')
                          if v.ndim == 2 else P()), rest))
model, x = Split(bx.Graph('net').child('layer'), None), x
plain = lambda p, x: (x @ model.get_param(p, 'kernel')[0], p)
def placed_grads(call):
  loss = lambda w, r, x: (call(w.merge(r), x)[0] ** 2).sum()
  return jax.jit(jax.grad(loss))(weights, placed, x)
models.close(placed_grads(plain), placed_grads(surgery.factored(plain)), 1e-4)
print('fine')
"""


def test_on_four_devices():
  assert 'fine\n' == _python(DEVICES, devices=4)


def test_adapted_params_keep_their_class_and_records():
  _, after = jax.jit(FAST)(PARAMS, X)
  assert isinstance(after, surgery.AdaptedParams)
  assert PARAMS.records == after.records
  assert isinstance(BASE, bx.Params)
