"""A file and a model in memory are the same to every verb, bit for bit."""

from __future__ import annotations

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest

import surgery
from tests.trees.cases import CASES, X
from tests.trees.test_verbs import arrays, same

# A published network of haiku's, as it is: convolutions, statistics, 28 layers.


@pytest.fixture(scope='module')
def mobile():
  make = lambda x, train: hk.nets.MobileNetV1((1, 2), (8, 16), num_classes=5)(
    x, train
  )
  net = hk.without_apply_rng(hk.transform_with_state(make))
  x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  params, state = net.init(jax.random.key(1), x, True)
  return net, params, state, x


@pytest.mark.parametrize('name', CASES)
def test_weights_are_those_that_the_shell_attaches(name, tmp_path, surgery_cli):
  case = CASES[name]
  model = case.make()
  surgery.save(tmp_path / 'base.msgpack', model)
  done = surgery_cli(
    'attach', tmp_path / 'base.msgpack', '--type', 'lora', '--to', case.kernels,
    '--set', 'rank=2', '--seed', '3', '-o', tmp_path / 'out.msgpack',
  )  # fmt: skip
  assert 0 == done.code, done.err
  found = surgery.load(tmp_path / 'out.msgpack', like=model)
  lora = surgery.LoRA(rank=2)
  tree = surgery.attach(model, lora, to=case.kernels, seed=3)
  assert len(arrays(tree)) == len(arrays(found))
  assert all(map(np.array_equal, arrays(tree), arrays(found)))
  assert same(surgery.merge(tree), surgery.merge(found))


def test_a_published_model_is_adapted_trained_merged_and_loaded(
  mobile, tmp_path
):
  net, params, state, x = mobile
  known = surgery.layers(net, x, True)
  assert any('ConvND' in one.names for one in known.values())
  lora = surgery.LoRA(rank=2)
  tree = surgery.attach(
    params, lora, to=['type:Linear', 'type:Conv2D'], layers=known
  )
  half, rest = surgery.freeze(tree).split()
  apply = surgery.factored(net.apply)

  @jax.jit
  def step(half, state):
    def loss(half):
      logits, after = apply(half.merge(rest), state, x, True)
      return (logits**2).mean() + (logits[:, 0] - 1).mean(), after

    (value, after), gradients = jax.value_and_grad(loss, has_aux=True)(half)
    move = lambda p, g: p - 0.05 * g
    return jax.tree.map(move, half, gradients), after, value

  losses = []
  for _ in range(5):
    half, state, value = step(half, state)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  trained = half.merge(rest)
  assert same(params, surgery.detach(trained))
  merged = surgery.merge(trained)
  surgery.save(tmp_path / 'm.safetensors', merged)
  found = surgery.load(tmp_path / 'm.safetensors', like=params)
  assert same(merged, found)
  expected, _ = apply(trained, state, x, False)
  made, _ = net.apply(found, state, x, False)
  np.testing.assert_allclose(expected, made, rtol=1e-3, atol=1e-4)


def test_functions_in_a_module_stay_where_they_are(tmp_path):
  model = CASES['equinox'].make()
  surgery.save(tmp_path / 'm.msgpack', model)
  found = surgery.load(tmp_path / 'm.msgpack', like=model)
  assert found.activation is model.activation
  np.testing.assert_array_equal(jax.vmap(model)(X), jax.vmap(found)(X))
  assert not any(map(eqx.is_array, [found.activation]))
