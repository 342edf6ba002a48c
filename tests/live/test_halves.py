"""Params that lack some of what an adapter needs: halves, and lost records."""

import operator
import warnings

import blox as bx
import jax
import jax.numpy as jnp
import optax
import pytest

import surgery
from tests.live.models import close, is_weight, mlp, stirred

LORA = surgery.LoRA(rank=2)


def adapted(locked=True, **options):
  model, params, x = mlp(locked=locked)
  params = surgery.attach(
    params.locked(), surgery.LoRA(rank=2, **options), to='**/hidden*'
  )
  params = stirred(params)
  return model, (params if locked else params.unlocked()), x


@pytest.mark.parametrize('locked', [True, False])
@pytest.mark.parametrize(
  'call',
  [
    lambda model, params, x: model(params, x),
    lambda model, params, x: surgery.factored(model)(params, x),
    lambda model, params, x: jax.jit(model)(params, x),
    lambda model, params, x: jax.jit(surgery.factored(model))(params, x),
    surgery.check,
    surgery.explain,
  ],
)
@pytest.mark.parametrize('which', [0, 1])
def test_a_model_refuses_a_half(locked, call, which):
  model, params, x = adapted(locked)
  # Of the first half bases are missing, of the second one weights.
  half = params.split(is_weight)[which]
  missing = ('kernel: the model asks', 'lora_a: this weight')[which]
  with pytest.raises(surgery.AdapterError, match=f'hidden0/{missing}.* halves'):
    call(model, half, x)


def test_what_no_adapter_rewrites_is_not_made_anew_in_a_half():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  first = bx.Linear(graph.child('first'), 3, rng)
  params = first(rng.seed(bx.Params(), seed=0), jnp.ones((2, 4)))[1]
  params['net', 'other', 'kernel'] = bx.Param(jnp.ones((3, 3)))
  params = surgery.attach(params.locked(), LORA, to='**/other').unlocked()
  half, _ = params.split(lambda path, param: 'first' not in path)
  assert half.split(is_weight)[1].merge(half)  # Nothing of adapters is missing.
  weights, _ = params.split(is_weight)
  with pytest.raises(surgery.AdapterError, match=r'first/kernel: the model'):
    first(weights, jnp.ones((2, 4)))


def test_whole_params_lack_what_they_always_lacked():
  model, params, x = adapted()
  lacking, _ = params.split(lambda path, param: 'output' not in path)
  with pytest.raises(KeyError, match=r'output.*missing \(params locked\)'):
    model(lacking, x)


@pytest.mark.parametrize('which', [0, 1])
def test_saving_and_loading_a_half_says_so(tmp_path, which):
  _, params, _ = adapted()
  halves = params.split(is_weight)
  file = tmp_path / 'half.msgpack'
  missing = ('kernel and 1 more', 'lora_a and 3 more')[which]
  with pytest.warns(
    UserWarning,
    match=rf'save: the params for .*half.msgpack are a half .*{missing} .*'
    r'half\.merge\(rest\).*save_adapter',
  ):
    surgery.save(file, halves[which])
  with pytest.warns(UserWarning, match=r'load: the params in .* are a half'):
    again = surgery.load(file)
  whole = again.merge(halves[1 - which])
  file = tmp_path / 'whole.msgpack'
  surgery.save(file, whole)
  assert sorted(params.keys()) == sorted(surgery.load(file).keys())


# Adapters whose records are lost.


@pytest.mark.parametrize('wrap', [lambda f: f, jax.jit])
def test_factored_refuses_weights_whose_record_is_lost(wrap):
  model, params, x = adapted()
  lost = mlp()[1].merge(params)
  fast = wrap(surgery.factored(model))
  with pytest.raises(
    surgery.AdapterError,
    match=r"factored: net/mlp/hidden0/lora_a: .* 'default' whose record is not "
    r'.*adapted\.merge\(plain\)',
  ):
    fast(lost, x)


def test_a_record_may_lie_in_another_argument():
  model, params, x = adapted()
  weights, rest = params.split(is_weight)
  plain = bx.Params()
  for path, param in weights.items():
    plain[path] = param
  call = surgery.factored(lambda one, two: model(two.merge(one), x)[0])
  close(model(params, x)[0], call(plain.locked(), rest))


@pytest.mark.parametrize(
  'verb',
  [
    lambda params: surgery.optimizer(optax.sgd(1.0), params),
    surgery.trainable_mask,
  ],
)
def test_training_refuses_weights_whose_record_is_lost(verb):
  lost = mlp()[1].merge(adapted()[1])
  with pytest.raises(surgery.AdapterError, match='whose record is not in'):
    verb(lost)


def test_a_layers_own_lora_is_not_lost():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = surgery.LoraLinear(graph.child('layer'), 3, rng, rank=2)
  x = jnp.ones((2, 4))
  params = layer(rng.seed(bx.Params(), seed=0), x)[1].locked()
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    y, _ = surgery.factored(layer)(params, x)
  close(layer(params, x)[0], y)
  assert operator.contains(
    surgery.trainable_mask(params), ('net', 'layer', 'lora_a')
  )
