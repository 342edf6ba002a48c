"""Bits that must not depend on how a program was compiled."""

from __future__ import annotations

import blox as bx
import jax
import numpy as np
import pytest

import surgery
from tests.live import models

# Compiled as users do: bits are compared (see conftest.py).
OPTIMIZED = True

# 1/√3 is no power of two: a fused division would show.
LORA = surgery.LoRA(rank=3)


@pytest.fixture(scope='module')
def net():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = models.MLP(graph.child('mlp'), [32, 32, 8], rng)
  return model, rng.seed(bx.Params(), seed=42), models.normal(0, (7, 32))


@pytest.fixture(scope='module')
def attached(net):
  model, seeded, x = net
  base = model(seeded, x)[1].locked()
  return surgery.attach(base, LORA, to='**/hidden*')


def _same_weights(expected, actual):
  weights = models.weights_of(expected, 'default')
  assert weights
  for path, value in weights.items():
    assert models.bits(value) == models.bits(actual[path].value), path


def test_jitted_initialisation_draws_what_attaching_draws(net, attached):
  model, seeded, x = net
  pending = surgery.attach(seeded, LORA, to='**/hidden*')
  _same_weights(attached, jax.jit(model)(pending, x)[1].locked())


def test_eager_initialisation_draws_what_attaching_draws(net, attached):
  model, seeded, x = net
  pending = surgery.attach(seeded, LORA, to='**/hidden*')
  _same_weights(attached, model(pending, x)[1].locked())


def test_attaching_under_jit_draws_the_same(net, attached):
  base = surgery.detach(attached)
  adapt = lambda p: surgery.attach(p, LORA, to='**/hidden*')
  _same_weights(attached, jax.jit(adapt)(base))


def test_attaching_one_by_one_draws_the_same(attached):
  base = surgery.detach(attached)
  for layer in ('hidden0', 'hidden1'):
    alone = surgery.attach(base, LORA, to=f'**/{layer}')
    _same_weights(alone, attached)


def test_jitted_base_and_counter_are_those_without_adapter(net):
  model, seeded, x = net
  pending = surgery.attach(seeded, LORA, to='**/hidden*')
  expected = jax.jit(model)(seeded, x)[1]
  actual = jax.jit(model)(pending, x)[1]
  models.assert_equal_params(expected, actual.split(models.is_weight)[1])


@pytest.mark.parametrize('seed', [0, 123])
def test_designed_in_weights_are_drawn_alike_under_jit(seed):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = surgery.LoraLinear(graph.child('layer'), 64, rng, rank=3)
  seeded = rng.seed(bx.Params(), seed=seed)
  x = models.normal(0, (2, 64))
  _same_weights(layer(seeded, x)[1], jax.jit(layer)(seeded, x)[1])


def test_a_stack_is_drawn_member_by_member(net):
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(models.normal(0, (3, 8, 8)))
  params = surgery.attach(params.locked(), LORA, to='**/layer', stacked=1)
  a = np.asarray(params['net', 'layer', 'lora_a'].value)
  assert 3 == len({member.tobytes() for member in a})
