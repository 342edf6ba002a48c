"""What a step costs is what LoRA by hand costs, in every framework."""

from __future__ import annotations

import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import surgery

SIZES = (256, 256, 256, 256)
RANK = 4
X = jnp.ones((32, SIZES[0]))


def flops(loss, half, rest) -> float:
  def step(half, rest):
    return jax.tree.map(lambda p, g: p - g, half, jax.grad(loss)(half, rest))

  program = eqx.filter_jit(step).lower(half, rest).compile()
  return program.compiled.cost_analysis()['flops']


def by_hand() -> float:
  pairs = list(itertools.pairwise(SIZES))
  base = [(jnp.ones((i, o)), jnp.ones(o)) for i, o in pairs]
  lora = [(jnp.ones((i, RANK)), jnp.ones((RANK, o))) for i, o in pairs]

  def loss(lora, base):
    x = X
    for (a, b), (kernel, bias) in zip(lora, base, strict=True):
      x = jax.nn.relu(x @ kernel + (x @ a) @ b + bias)
    return (x**2).mean()

  return flops(loss, lora, base)


def plain():
  params = [
    {'kernel': jnp.ones((i, o)), 'bias': jnp.ones(o)}
    for i, o in itertools.pairwise(SIZES)
  ]

  def call(params, x):
    for layer in params:
      x = jax.nn.relu(x @ layer['kernel'] + layer['bias'])
    return x

  return params, call, '**/kernel'


def haiku():
  net = lambda x: hk.nets.MLP(SIZES[1:], activate_final=True)(x)
  net = hk.without_apply_rng(hk.transform(net))
  return net.init(jax.random.key(0), X), net.apply, '**/w'


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    for size in SIZES[1:]:
      x = nn.relu(nn.Dense(size)(x))
    return x


def linen():
  variables = Linen().init(jax.random.key(0), X)
  return variables, Linen().apply, '**/kernel'


class Nnx(nnx.Module):
  def __init__(self, rngs):
    pairs = itertools.pairwise(SIZES)
    self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in pairs])

  def __call__(self, x):
    for layer in self.layers:
      x = nnx.relu(layer(x))
    return x


def net():
  return Nnx(nnx.Rngs(0)), lambda model, x: model(x), 'type:Linear'


def equinox():
  model = eqx.nn.MLP(
    256, 256, 256, 2, jax.nn.relu, jax.nn.relu, key=jax.random.key(0)
  )
  return model, lambda model, x: jax.vmap(model)(x), 'type:Linear'


@pytest.mark.parametrize('make', [plain, haiku, linen, net, equinox])
def test_flops_are_those_of_lora_by_hand(make):
  model, call, to = make()
  tree = surgery.attach(model, surgery.LoRA(rank=RANK), to=to)
  half, rest = surgery.freeze(tree).split()
  fast = surgery.factored(call, strict=True)
  loss = lambda half, rest: (fast(half.merge(rest), X) ** 2).mean()
  dense = lambda half, rest: (call(half.merge(rest).resolve(), X) ** 2).mean()
  expected = by_hand()
  assert flops(loss, half, rest) <= 1.02 * expected
  assert flops(dense, half, rest) > 1.5 * expected
