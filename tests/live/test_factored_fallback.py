"""Calls that `factored` cannot rewrite are dense, and never wrong."""

import jax
import pytest
from jax.experimental import io_callback

import surgery
from tests.live.models import close
from tests.live.test_factored import X, layer

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
