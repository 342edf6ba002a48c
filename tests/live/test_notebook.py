"""The blox LoRA notebook, done with this library."""

from __future__ import annotations

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery
from tests.live import models

# Compiled as users do: bits are compared (see conftest.py).
OPTIMIZED = True

X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jax.random.normal(jax.random.key(1), (32, 10))


def _build(layer=bx.Linear, name='net', **kwargs):
  graph = bx.Graph(name)
  rng = bx.Rng(graph.child('rng'))
  model = models.MLP(graph.child('mlp'), [64, 32, 10], rng, layer, **kwargs)
  params = rng.seed(bx.Params(), seed=42)
  _, params = model(params, jnp.ones((4, 16)))
  return model, params.locked()


def _loss(model, params):
  return float(jnp.mean((model(params, X)[0] - Y) ** 2))


def _trained(model, params, steps=100):
  """The notebook's training loop, word for word."""

  def train_step(params, x, y):
    trainable, non_trainable = params.split()

    def loss_fn(t, nt):
      pred, new_params = model(t.merge(nt), x)
      _, new_nt = new_params.split()
      return jnp.mean((pred - y) ** 2), new_nt

    grads, new_non_trainable = jax.grad(loss_fn, has_aux=True)(
      trainable, non_trainable
    )
    new_trainable = jax.tree.map(lambda w, g: w - 0.01 * g, trainable, grads)
    return new_trainable.merge(new_non_trainable)

  train_step = jax.jit(train_step, donate_argnames='params')
  for _ in range(steps):
    params = train_step(params, X, Y)
  return params


@pytest.fixture(scope='module')
def attached():
  model, base = _build()
  params = surgery.attach(base, surgery.LoRA(rank=4), to='**/hidden*')
  params = surgery.freeze(params)
  # Training donates: the base is kept by a copy, as in the notebook.
  before = jax.tree.map(jnp.copy, params)
  return model, base, before, _trained(model, jax.tree.map(jnp.copy, params))


@pytest.fixture(scope='module')
def designed():
  model, params = _build(surgery.LoraLinear, rank=4)
  params = surgery.freeze(params)
  before = jax.tree.map(jnp.copy, params)
  return model, before, _trained(model, jax.tree.map(jnp.copy, params))


LORA = {
  ('net', 'mlp', 'hidden0', 'lora_a'): (16, 4),
  ('net', 'mlp', 'hidden0', 'lora_b'): (4, 64),
  ('net', 'mlp', 'hidden1', 'lora_a'): (64, 4),
  ('net', 'mlp', 'hidden1', 'lora_b'): (4, 32),
}


def test_eight_parameters_become_twelve(attached):
  _, base, before, _ = attached
  assert 8 == len(base)
  assert 12 == len(before)


def test_only_the_four_lora_tensors_train(attached):
  _, _, before, _ = attached
  trains = {p: q.value.shape for p, q in before.items() if q.trainable}
  assert LORA == trains


def test_loss_at_the_start_is_that_of_the_base(attached):
  model, base, before, _ = attached
  assert _loss(model, base) == _loss(model, before)
  assert round(_loss(model, before), 4) in (1.2382, 1.2383)


def test_loss_falls_by_a_fifth(attached):
  model, _, before, trained = attached
  assert _loss(model, trained) <= 0.8 * _loss(model, before)


def test_training_leaves_the_bits_of_the_base(attached):
  _, base, _, trained = attached
  for path, param in base.items():
    assert models.bits(param.value) == models.bits(trained[path].value)


def test_all_that_trains_has_changed(attached):
  _, _, before, trained = attached
  for path in LORA:
    old, new = before[path].value, trained[path].value
    assert models.bits(old) != models.bits(new)


def test_merged_is_the_adapted_model_bit_for_bit(attached):
  model, _, _, trained = attached
  merged = surgery.merge(trained)
  assert 8 == len(merged)
  expected, _ = model(trained, X)
  assert models.bits(expected) == models.bits(model(merged, X)[0])


def test_the_base_can_be_had_back(attached):
  model, base, _, trained = attached
  expected, _ = model(base, X)
  for params in (surgery.disable(trained), surgery.detach(trained)):
    assert models.bits(expected) == models.bits(model(params, X)[0])


def test_designed_in_only_the_four_lora_tensors_train(designed):
  _, before, _ = designed
  assert 12 == len(before)
  assert LORA == {p: q.value.shape for p, q in before.items() if q.trainable}


def test_designed_in_the_base_is_the_plain_models(designed):
  _, before, trained = designed
  _, base = _build()
  for path, param in base.items():
    assert models.bits(param.value) == models.bits(before[path].value)
    assert models.bits(param.value) == models.bits(trained[path].value)


def test_designed_in_loss_falls_by_a_fifth(designed):
  model, before, trained = designed
  assert round(_loss(model, before), 4) in (1.2382, 1.2383)
  assert _loss(model, trained) <= 0.8 * _loss(model, before)


def test_designed_in_merged_is_the_adapted_model_bit_for_bit(designed):
  model, _, trained = designed
  merged = surgery.merge(trained)
  assert 8 == len(merged)
  expected, _ = model(trained, X)
  assert models.bits(expected) == models.bits(model(merged, X)[0])


def test_designed_in_lora_is_toggled_by_the_flag(designed):
  model, _, trained = designed
  _, base = _build()
  adapted, _ = model(trained, X)
  for layer in model.layers[:-1]:
    layer.use_lora = False
  without, _ = model(trained, X)
  for layer in model.layers[:-1]:
    layer.use_lora = True
  assert models.bits(model(base, X)[0]) == models.bits(without)
  assert models.bits(adapted) == models.bits(model(trained, X)[0])
