"""Bases that reach results without their adapters."""

import functools

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models
from tests.live.models import mlp, normal, stirred

LORA = surgery.LoRA(rank=2)
TABLE = ('net', 'tied', 'embed', 'embedding')
TOKENS = jnp.array([1, 3, 0, 1])


class Tied(bx.Module):
  """Embeds tokens, and multiplies with the same table at the end."""

  def __init__(self, graph, head):
    super().__init__(graph)
    self.embed = bx.Embed(graph.child('embed'), 5, 4, rng=None)
    self.head = head

  def __call__(self, params, tokens):
    x, params = self.embed(params, tokens)
    return self.head(params, x), params


def tied(head):
  """Returns a model and params with an adapter on the table."""
  model = Tied(bx.Graph('net').child('tied'), head)
  params = bx.Params()
  params[TABLE] = bx.Param(normal(0, (5, 4)))
  params = surgery.attach(params.locked(), LORA, to='**/embed')
  return model, stirred(params)


def raw(params):
  return params[TABLE].value


def asked(params):
  return params._get(TABLE, (5, 4), None)[0]


@jax.custom_jvp
def custom(table, x):
  return x @ table.T


custom.defjvps(lambda t, y, w, x: x @ t.T, lambda t, y, w, x: t @ w.T)


@jax.custom_vjp
def customer(table, x):
  return x @ table.T


customer.defvjp(
  lambda w, x: (x @ w.T, (w, x)), lambda k, c: (c.T @ k[1], c @ k[0])
)

# Ways to use a table, however it was got hold of.
USES = {
  'plain': lambda w, x: x @ w.T,
  'jit': jax.jit(lambda w, x: x @ w.T),
  'deep': jax.jit(lambda w, x: jax.jit(jax.checkpoint(jnp.dot))(x, w.T)),
  'remat': jax.checkpoint(lambda w, x: x @ w.T),
  'custom_jvp': custom,
  'custom_vjp': customer,
  'scan': lambda w, x: jax.lax.scan(lambda c, r: (c, w @ r), 0, x)[1],
  'rows': lambda w, x: jax.lax.scan(lambda c, r: (c, x @ r), 0, w)[1].T,
  'carry': lambda w, x: jax.lax.scan(
    lambda c, r: (c, c[0] @ r), (w, 0.0), x
  )[1],
  'late': lambda w, x: jax.lax.fori_loop(
    # The result depends on the table from the second round on.
    0, 3, lambda i, c: (c[1], c[2], c[2]), (jnp.zeros(()), x[0, 0], w.sum())
  )[0] * x,
  'cond': lambda w, x: jax.lax.cond(
    x[0, 0] > 0, lambda w: x @ w.T, lambda w: x @ -w.T, w
  ),
  'switched': lambda w, x: jax.lax.cond(
    w[0, 0] > 0, lambda: x, lambda: -x
  ),
  'while': lambda w, x: jax.lax.while_loop(
    lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + w.sum()), (0, x)
  )[1],
  'often': lambda w, x: jax.lax.while_loop(
    lambda c: c[0] < w[0, 0], lambda c: (c[0] + 1, c[1] * 2), (0.0, x)
  )[1],
  'vmap': lambda w, x: jax.vmap(lambda r: w @ r)(x),
  'moved': lambda w, x: x @ jnp.flip(w.T.reshape(4, 5)[:, ::-1], 1).astype('f2'),
  'gathered': lambda w, x: w[jnp.arange(4)] + x,
  'itself': lambda w, x: w,
  'gradient': lambda w, x: jax.grad(lambda y: (y @ w.T).sum())(x),
}  # fmt: skip


@pytest.mark.parametrize('use', USES)
def test_a_raw_read_beside_a_proper_one_is_found(use):
  model, params = tied(lambda p, x: USES[use](raw(p), x))
  with pytest.raises(
    surgery.UnreachedError,
    match='net/tied/embed/embedding.*without their adapter'
    '|without their adapter.*net/tied/embed/embedding',
  ) as info:
    surgery.check(model, params, TOKENS)
  assert (TABLE,) == info.value.paths
  # It is one: with the adapter folded in, the model gives something else.
  merged = surgery.merge(params)
  pairs = zip(
    jax.tree.leaves(model(params, TOKENS)[0]),
    jax.tree.leaves(model(merged, TOKENS)[0]),
    strict=True,
  )
  differ = [not np.allclose(a, b, atol=1e-3) for a, b in pairs]
  assert any(differ) or use in ('switched', 'often')


@pytest.mark.parametrize('use', USES)
def test_the_same_with_get_param_is_no_alarm(use):
  model, params = tied(lambda p, x: USES[use](asked(p), x))
  assert (TABLE,) == surgery.check(model, params, TOKENS)


def test_the_message_names_the_primitive():
  model, params = tied(lambda p, x: x @ raw(p).T)
  message = (
    r'1 of 1 adapted parameters are read without their adapter: '
    r'net/tied/embed/embedding \(transpose\)'
  )
  with pytest.raises(surgery.UnreachedError, match=message):
    surgery.check(model, params, TOKENS)


def test_explain_says_so_too():
  model, params = tied(lambda p, x: x @ raw(p).T)
  use = surgery.explain(model, params, TOKENS)[TABLE]
  assert use.asked
  assert 'transpose' == use.raw
  assert 'factored, read without its adapter by transpose' in str(use)
  shape = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
  other = surgery.explain(model, params, shape)
  assert use.raw == other.to_json()['net/tied/embed/embedding']['raw']
  model, params = tied(lambda p, x: x @ asked(p).T)
  assert not surgery.explain(model, params, TOKENS)[TABLE].raw


def test_a_disabled_adapter_is_looked_at_too():
  for read, found in ((raw, True), (asked, False)):
    model, params = tied(lambda p, x, read=read: x @ read(p).T)
    off = surgery.disable(params)
    if found:
      with pytest.raises(surgery.UnreachedError, match='without their adapter'):
        surgery.check(model, off, TOKENS)
    else:
      surgery.check(model, off, TOKENS)


def test_a_base_that_was_taken_before_the_call_is_found():
  held = []
  model, params = tied(lambda _, x: x @ held[0].T)
  held.append(raw(params))
  with pytest.raises(surgery.UnreachedError, match='without their adapter'):
    surgery.check(model, params, TOKENS)


# What is no read of a layer.


def linear():
  graph = bx.Graph('net')
  layer = bx.Linear(graph.child('layer'), 4, rng=None)
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(normal(0, (4, 4)))
  params['net', 'layer', 'bias'] = bx.Param(jnp.zeros(4))
  params['net', 'mean'] = bx.Param(jnp.zeros(4), False)
  return layer, stirred(surgery.attach(params.locked(), LORA, to='**/layer'))


X = normal(1, (3, 4))


def stacked(params, count=2):
  return jax.tree.map(lambda v: jnp.stack([v] * count), params)


def test_params_that_are_passed_through_are_no_alarm():
  layer, params = linear()
  call = lambda p, x: layer(p, x)

  def carried(params, x):
    step = lambda c, _: (layer(c[1], c[0])[::1], None)
    return jax.lax.scan(step, (x, params), None, length=3)[0]

  def looped(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, c: layer(c[1], c[0]), (x, params))

  def branched(params, x):
    return jax.lax.cond(x.sum() > 0, layer, call, params, x)

  for model in (
    call,
    jax.jit(call),
    jax.jit(call, donate_argnums=0),
    jax.checkpoint(call),
    carried,
    looped,
    branched,
    lambda p, x: jax.vmap(call, (None, 0))(p, x),
    lambda p, x: jax.vmap(call, (None, 0), (0, None))(p, x)[0],
  ):
    surgery.check(model, params, X)
    surgery.explain(model, params, X)


def test_params_that_are_changed_before_they_are_asked_for_are_no_alarm():
  layer, params = linear()
  half = lambda p: jax.tree.map(lambda v: v.astype('bfloat16'), p)
  noisy = lambda p: jax.tree.map(lambda v: v * 0.9 + 0.1 * v.mean(), p)
  for change in (half, noisy, jax.lax.optimization_barrier):
    surgery.check(lambda p, x, c=change: layer(c(p), x)[0], params, X)


def test_layers_of_a_stack_are_no_alarm():
  layer, one = linear()
  params = stacked(one)
  row = lambda p, i: jax.tree.map(lambda v: v[i], p)
  scanned = lambda p, x: jax.lax.scan(lambda x, p: layer(p, x), x, p)
  looped = lambda p, x: layer(row(p, 1), layer(row(p, 0), x)[0])[0]
  dynamic = lambda p, x: jax.lax.fori_loop(
    0, 2, lambda i, x: layer(row(p, i), x)[0], x
  )
  members = lambda p, x: jax.vmap(layer, (0, None))(p, x)
  for model in (scanned, looped, dynamic, members):
    surgery.check(model, params, X)


def test_statistics_and_training_steps_are_no_alarm():
  layer, params = linear()

  def model(params, x):
    y, params = layer(params, x)
    mean = params['net', 'mean'].value * 0.9 + 0.1 * y.mean(0)
    return y, params._set(('net', 'mean'), mean)

  def step(params, x):
    loss = lambda p: (layer(p, x)[0] ** 2).sum()
    value, grads = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(
      lambda w, g: w - 0.1 * (g + 0.1 * w), params, grads
    )

  for each in (model, step, jax.jit(step)):
    surgery.check(each, params, X)


def test_statistics_of_a_raw_read_are_found():
  layer, params = linear()

  def model(params, x):
    y, params = layer(params, x)
    mean = (x @ params['net', 'layer', 'kernel'].value).mean(0)
    return y, params._set(('net', 'mean'), mean)

  with pytest.raises(surgery.UnreachedError, match='net/layer/kernel'):
    surgery.check(model, params, X)


def test_shapes_and_what_is_not_used_are_no_alarm():
  layer, params = linear()

  def model(params, x):
    kernel = params['net', 'layer', 'kernel'].value
    kernel.sum()
    return layer(params, x)[0] * len(kernel) + jnp.zeros_like(kernel).sum()

  surgery.check(model, params, X)


def test_an_adapter_that_looks_at_other_parameters_is_no_alarm():
  model, base, x = mlp()
  host = models.host(models.Scale)
  params = surgery.attach(base, models.Scale(), to='**/hidden*', host=host)
  surgery.check(model, params, x)
  both = surgery.attach(params, LORA, to='**', name='two', host=host)
  surgery.check(model, both, x)


def test_a_designed_layer_is_no_alarm():
  model, params, x = mlp(layer=surgery.LoraLinear, rank=2)
  surgery.check(model, params, x)
  surgery.check(functools.partial(model), surgery.freeze(params), x)


def test_modules_keep_no_traced_value_of_it():
  layer, params = linear()

  class Keeps(bx.Module):
    def __call__(self, params, x):
      self.seen, params = layer(params, x)
      return self.seen, params

  model = Keeps(bx.Graph('net').child('keeps'))
  surgery.check(model, params, X)
  assert not isinstance(getattr(model, 'seen', None), jax.core.Tracer)
