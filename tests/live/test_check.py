"""`check`: does a model ask for what adapters rewrite?"""

from __future__ import annotations

import functools

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)
X = models.normal(0, (3, 4))


def _two(first, second):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layers = [
    kind(graph.child(f'layer{i}'), 4, rng)
    for i, kind in enumerate((first, second))
  ]

  def call(params, x=X):
    for layer in layers:
      x, params = layer(params, x)
    return x, params

  _, params = call(rng.seed(bx.Params(), seed=0))
  return call, params.locked(), layers


def test_returns_what_was_asked_for():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  expected = (('net', 'layer0', 'kernel'), ('net', 'layer1', 'kernel'))
  assert expected == surgery.check(call, params, X)


class Bypass(bx.Linear):
  """A layer that never asks."""

  def __call__(self, params, x):
    path = self.param_path('kernel')
    if path not in params:
      return super().__call__(params, x)
    return x @ params[path].value, params


def test_a_layer_that_reads_params_itself_is_named():
  call, base, _ = _two(bx.Linear, Bypass)
  params = surgery.attach(base, LORA, to='**/layer*')
  with pytest.raises(surgery.UnreachedError, match='net/layer1/kernel') as info:
    surgery.check(call, params)
  assert (('net', 'layer1', 'kernel'),) == info.value.paths


def test_a_layer_that_is_not_called_is_named():
  _, base, layers = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  with pytest.raises(surgery.UnreachedError, match=r'net/layer1/kernel'):
    surgery.check(layers[0], params, X)


def test_an_inner_jit_that_is_cached_is_no_false_alarm():
  _, base, layers = _two(bx.Linear, bx.Linear)
  inner = jax.jit(layers[0].__call__)

  def outer(params):
    x, params = inner(params, X)
    return layers[1](params, x)

  params = surgery.attach(base, LORA, to='**/layer*')
  outer(params)
  for _ in range(2):
    assert 2 == len(surgery.check(outer, params))


def test_a_jitted_and_checkpointed_model_is_no_false_alarm():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  model = jax.jit(jax.checkpoint(call))
  model(params, X)
  assert 2 == len(surgery.check(model, params, X))


def test_nothing_is_computed():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')

  def model(params):
    out, params = call(params)
    assert isinstance(out, jax.core.Tracer)
    return out, params

  surgery.check(model, params)


def test_the_program_of_real_calls_is_not_touched():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  count = []

  @jax.jit
  def model(params):
    count.append(1)
    return call(params)

  model(params)
  surgery.check(model, params)
  _, after = model(params)
  assert 2 == len(count)
  assert jax.tree.structure(params) == jax.tree.structure(after)


def test_disabled_adapters_are_checked_too():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.disable(surgery.attach(base, LORA, to='**/layer*'))
  assert 2 == len(surgery.check(call, params))


def test_models_may_return_what_is_no_array():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  model = lambda params: (call(params), 'done', object())
  assert 2 == len(surgery.check(model, params))


def test_arguments_are_passed_on():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')

  def model(params, x, *, scale, name):
    assert 'name' == name
    return call(params, x * scale)

  assert 2 == len(
    surgery.check(model, params, X, scale=jnp.ones(()), name='name')
  )


def test_without_adapters_it_is_refused():
  call, base, _ = _two(bx.Linear, bx.Linear)
  with pytest.raises(surgery.AdapterError, match='no adapter'):
    surgery.check(call, base)


def test_errors_of_the_model_come_through():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  with pytest.raises(TypeError):
    surgery.check(functools.partial(call, 1, 2), params)


def test_designed_in_weights_are_checked():
  model, base, x = models.mlp(layer=surgery.LoraLinear, rank=2)
  assert 2 == len(surgery.check(model, base, x))


def test_params_that_were_checked_are_as_before():
  call, base, _ = _two(bx.Linear, bx.Linear)
  params = surgery.attach(base, LORA, to='**/layer*')
  before = jax.tree.structure(params)
  surgery.check(call, params)
  assert before == jax.tree.structure(params)
  assert params.records.probe is None
