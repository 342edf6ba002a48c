"""Calls that `factored` cannot rewrite are dense, and never wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import surgery
from tests.live import models
from tests.live.models import close, normal
from tests.live.test_factored import X, both, layer, states

# How a gradient is taken: compiled, or each operation by itself.
COMPILED = pytest.mark.parametrize('compiled', [True, False])


@pytest.fixture(scope='module')
def net():
  return layer(lambda k, x: x @ k, (6, 5))


def gradients(model, params, compiled=True, out=lambda result: result[0]):
  """Returns the loss and the gradients of a model."""
  half, rest = surgery.freeze(params).split()
  loss = lambda half: (out(model(half.merge(rest), X)) ** 2).sum()
  grad = jax.value_and_grad(loss)
  return (jax.jit(grad) if compiled else grad)(half)


def same(model, params, compiled=True, **options):
  """Asserts that a model is the same through `factored`."""
  expected = gradients(model, params, compiled, **options)
  fast = surgery.factored(model)
  close(expected, gradients(fast, params, compiled, **options))


# Effects.


@COMPILED
def test_effects_happen_once(net, compiled):
  model, params = net
  happened = []

  def noisy(params, x):
    y, params = model(params, x)
    jax.debug.callback(lambda: happened.append('debug'))
    io_callback(lambda: happened.append('ordered'), None, ordered=True)

    def body(carry, row):
      jax.debug.callback(lambda _: happened.append('scan'), row)
      return carry, model(params, row[None])[0]

    return y + jax.lax.scan(body, 0, x)[1].sum(1), params

  gradients(surgery.factored(noisy), params, compiled)
  jax.effects_barrier()
  assert ['debug', 'ordered', *['scan'] * 3] == sorted(happened)


# What is done to a kernel before it is used. Each of these was wrong once.


def squared_across_a_scan(k, x):
  s = k * k
  ys = jax.lax.scan(lambda c, v: (c, v @ jnp.tanh(s)), 0, x)[1]
  return ys + x @ jnp.tanh(k)


def begins_before_the_array(k, x):
  start = (x[0, 0] * 0).astype('int32') - 4
  return x @ jax.lax.dynamic_index_in_dim(k, start, keepdims=False)


# name: how the kernel is used, its shape, options of attach, what it becomes.
USES = {
  'a square made dense in a scan': (
    squared_across_a_scan, (6, 5), {}, 'dense (scan, tanh)',
  ),
  'a square into checkpoint': (
    lambda k, x: x @ jax.checkpoint(lambda s: s / s.sum(0))(k**2),
    (6, 5), {}, 'dense (remat2)',
  ),
  'a square into cond': (
    lambda k, x: x @ jax.lax.cond(
      x[0, 0] > 0, lambda s: s, lambda s: 2 * s, k**2
    ),
    (6, 5), {}, 'dense (cond)',
  ),
  'a slice that begins before the array': (
    begins_before_the_array, (3, 6, 5), {'stacked': 1}, 'factored',
  ),
  'one of a stack, by take': (
    lambda k, x: x @ jnp.take(k, jnp.argmax(x) % 3, axis=0),
    (3, 6, 5), {'stacked': 1}, 'factored',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', USES)
def test_uses_that_are_easily_mistaken(name):
  use, shape, options, becomes = USES[name]
  model, params = layer(use, shape, **options)
  both(model, params, X)
  assert [becomes] == states(model, params, X)


class Squares(surgery.Adapter):
  """A low-rank update of the square of what lies below."""

  name = 'squares'

  def init(self, site, key):
    del key
    return {
      'a': jnp.ones((*site.in_shape, 2)),
      'b': jnp.ones((2, *site.out_shape)),
    }

  def apply(self, site, name, base, weights):
    del site, name
    return surgery.LowRank(base**2, weights['a'], weights['b'])


def test_a_low_rank_value_on_the_square_of_another(net):
  model, params = net
  host = models.host(Squares)
  params = surgery.attach(
    params, Squares(), to='**/layer', name='outer', host=host
  )
  both(model, models.stirred(params), X)


# The low-rank value by itself.


def test_the_tangent_of_a_narrow_base_is_wide():
  base, a, b = (
    normal(0, (6, 5), 'bfloat16'), normal(1, (6, 2)), normal(2, (2, 5)),
  )  # fmt: skip
  dense = lambda base: surgery.LowRank(base, a, b).dense()
  value, tangent = jax.jvp(dense, (base,), (base,))
  assert jnp.float32 == value.dtype == tangent.dtype
  close(base.astype('float32'), tangent)
  assert jnp.bfloat16 == jax.grad(lambda w: dense(w).sum())(base).dtype


def test_a_key_for_each_of_a_batch_and_one_value():
  base, a, b = normal(0, (6, 5)), normal(1, (6, 2)), normal(2, (2, 5))
  keys = jax.random.split(jax.random.key(0), 3)
  value = lambda key: surgery.LowRank(base, a, b, 1.0, 0.5, key).dense()
  expected = np.asarray(base) + np.asarray(a) @ np.asarray(b)
  close([expected] * 3, list(jax.vmap(value)(keys)))
