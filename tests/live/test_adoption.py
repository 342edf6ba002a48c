"""`LoraLinear`: LoRA designed in."""

from __future__ import annotations

import inspect

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery
from tests.live import models

LAYER = ('net', 'mlp', 'hidden0')


@pytest.fixture(scope='module')
def net():
  model, params, x = models.mlp(layer=surgery.LoraLinear, rank=2)
  return model, models.stirred(params), x


@pytest.fixture(scope='module')
def plain():
  return models.mlp()


def _one(size=64, inputs=64, **kwargs):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = surgery.LoraLinear(graph.child('layer'), size, rng, **kwargs)
  return layer, rng.seed(bx.Params(), seed=0), models.normal(0, (2, inputs))


def test_constructor_is_the_notebooks():
  parameters = inspect.signature(surgery.LoraLinear).parameters
  assert ['graph', 'output_size', 'rng', 'rank', 'alpha', 'use_lora'] == list(
    parameters
  )[:6]
  assert 4 == parameters['rank'].default
  assert parameters['alpha'].default is None
  assert parameters['use_lora'].default is True


def test_base_and_counter_are_those_of_a_linear_layer(net, plain):
  _, params, _ = net
  _, base, _ = plain
  models.assert_equal_params(base, params.split(models.is_weight)[1])


def test_output_is_that_of_a_dense_model(net):
  model, params, x = net
  models.close(model(models.dense(params), x)[0], model(params, x)[0])


def test_starts_as_a_linear_layer(plain):
  model, params, x = models.mlp(layer=surgery.LoraLinear, rank=2)
  expected = plain[0](plain[1], x)[0]
  assert models.bits(expected) == models.bits(model(params, x)[0])


def test_seeds_give_different_weights():
  layer, _, x = _one()
  a, b = (
    layer(layer.rng.seed(bx.Params(), seed=seed), x)[1] for seed in (0, 123)
  )
  path = ('net', 'layer', 'lora_a')
  assert models.bits(a[path].value) != models.bits(b[path].value)


def test_layers_have_different_weights():
  _, params, _ = models.mlp((4, 4, 3), layer=surgery.LoraLinear, rank=2)
  a, b = (params['net', 'mlp', f'hidden{i}', 'lora_a'].value for i in range(2))
  assert models.bits(a) != models.bits(b)


def test_vmapped_initialisation_gives_each_member_its_own():
  layer, _, x = _one(4, 4, rank=2)

  def init(seed):
    seeded = layer.rng.seed(bx.Params(), seed=jax.random.key(seed))
    return layer(seeded, x)[1]

  params = jax.vmap(init)(jnp.arange(3)).locked()
  a = params['net', 'layer', 'lora_a'].value
  assert (3, 4, 2) == a.shape
  assert models.bits(a[0]) != models.bits(a[1])
  params = models.stirred(params)
  call = jax.vmap(lambda p: layer(p, x)[0])
  models.close(call(models.dense(params)), call(params))
  models.close(call(params), call(surgery.merge(params)))


def test_another_generator_will_do():
  layer, _, x = _one(rank=2)
  seeded = layer.rng.seed(bx.Params(), seed=jax.random.key(0, impl='rbg'))
  assert (64, 2) == layer(seeded, x)[1]['net', 'layer', 'lora_a'].value.shape


def test_weights_are_sharded_as_the_kernel():
  metadata = {'sharding': ('data', 'model')}
  layer, seeded, x = _one(kernel_metadata=metadata)
  _, params = layer(seeded, x)
  assert ('data', None) == params['net', 'layer', 'lora_a'].sharding
  assert (None, 'model') == params['net', 'layer', 'lora_b'].sharding


def test_without_an_rng_it_is_refused():
  layer = surgery.LoraLinear(
    bx.Graph('net').child('layer'),
    4,
    None,
    kernel_init=jax.nn.initializers.ones,
  )
  with pytest.raises(surgery.SurgeryError, match='needs an Rng'):
    layer(bx.Params(), models.normal(0, (2, 4)))


def test_wrong_options_are_refused_when_it_is_made():
  for wrong in ({'rank': 0}, {'rank': 2.5}, {'alpha': -1.0}):
    with pytest.raises(surgery.ConfigError):
      _one(**wrong)


def test_a_rank_that_is_too_large_is_warned_of():
  layer, seeded, x = _one(3, rank=4)
  with pytest.warns(surgery.SiteWarning, match='net/layer: rank 4 exceeds'):
    _, params = layer(seeded, x)
  layer(params, x)


# The verbs.


def test_freeze_leaves_only_its_weights_to_train(net):
  _, params, _ = net
  for path, param in surgery.freeze(params).items():
    assert models.is_weight(path, param) == param.trainable


def test_merged_is_a_plain_layer_of_the_same_bits(net, plain):
  model, params, x = net
  merged = surgery.merge(params)
  assert jax.tree.structure(plain[1]) == jax.tree.structure(merged)
  expected = model(params, x)[0]
  assert models.bits(expected) == models.bits(model(merged, x)[0])
  assert models.bits(expected) == models.bits(plain[0](merged, x)[0])


def test_disabled_is_the_base_bit_for_bit(net, plain):
  model, params, x = net
  expected = models.bits(plain[0](plain[1], x)[0])
  disabled = surgery.disable(params)
  assert expected == models.bits(model(disabled, x)[0])
  enabled = surgery.enable(disabled)
  assert models.bits(model(params, x)[0]) == models.bits(model(enabled, x)[0])


def test_detached_is_the_base_itself(net, plain):
  _, params, _ = net
  detached = surgery.detach(params)
  assert jax.tree.structure(plain[1]) == jax.tree.structure(detached)
  models.assert_equal_params(plain[1], detached)


def test_on_record_it_answers_the_same_bits(net):
  model, params, x = net
  recorded = surgery.freeze(params)
  assert isinstance(recorded, surgery.AdaptedParams)
  expected = model(params, x)[0]
  assert models.bits(expected) == models.bits(model(recorded, x)[0])


def test_adapters_tells_of_it(net):
  (info,) = surgery.adapters(net[1])
  assert ('default', 'lora') == (info.name, info.type)
  options = {'rank': 2, 'alpha': None, 'rslora': False, 'dropout': 0.0}
  assert options == info.config
  assert 2 == len(info.sites)


def test_saved_and_loaded_it_answers_the_same_bits(net, tmp_path):
  model, params, x = net
  surgery.save(tmp_path / 'm.msgpack', params)
  loaded = surgery.load(tmp_path / 'm.msgpack')
  expected = model(params, x)[0]
  assert models.bits(expected) == models.bits(model(loaded, x)[0])
  assert 8 == len(surgery.merge(loaded))


def test_its_weights_can_be_saved_alone_and_put_on_the_base(
  net, plain, tmp_path
):
  model, params, x = net
  surgery.save_adapter(tmp_path / 'a.msgpack', params)
  params_of = lambda base: surgery.load_adapter(tmp_path / 'a.msgpack', base)
  expected = model(params, x)[0]
  adapted = params_of(plain[1])
  assert models.bits(expected) == models.bits(plain[0](adapted, x)[0])
  assert models.bits(expected) == models.bits(model(adapted, x)[0])


def test_layers_may_differ_in_rank_and_alpha():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layers = [
    surgery.LoraLinear(graph.child('one'), 4, rng, rank=1, alpha=3.0),
    surgery.LoraLinear(graph.child('two'), 4, rng, rank=3),
    surgery.LoraLinear(graph.child('three'), 4, rng, rank=1, alpha=3.0),
  ]

  def call(params, x):
    for layer in layers:
      x, params = layer(params, x)
    return x, params

  x = models.normal(0, (2, 4))
  _, params = call(rng.seed(bx.Params(), seed=0), x)
  params = models.stirred(params.locked())
  expected = call(params, x)[0]
  (info,) = surgery.adapters(params)
  assert 3 == len(info.sites)
  for after in (surgery.freeze(params), surgery.merge(params)):
    assert models.bits(expected) == models.bits(call(after, x)[0])


def test_another_adapter_may_be_attached_over_it(net):
  model, params, x = net
  params = surgery.attach(
    params, surgery.LoRA(rank=3), to='**/hidden*', name='more'
  )
  params = models.stirred(params, 5)
  assert ('default', 'more') == params.records.names
  expected = model(params, x)[0]
  models.close(model(models.dense(params), x)[0], expected)
  assert models.bits(expected) == models.bits(
    model(surgery.merge(params), x)[0]
  )
  for name in ('default', 'more'):
    left = surgery.detach(params, name)
    models.close(model(models.dense(left), x)[0], model(left, x)[0])


def test_an_adapter_of_the_same_name_is_refused(net):
  with pytest.raises(surgery.AdapterError, match='attached already'):
    surgery.attach(net[1], surgery.LoRA(rank=2), to='**/output')


def test_an_adapter_of_the_same_name_is_refused_before_initialisation():
  layer, seeded, x = _one()
  params = surgery.attach(seeded, surgery.LoRA(rank=2), to='**/layer')
  with pytest.raises(surgery.AdapterError, match='another name='):
    layer(params, x)


def test_another_adapter_may_be_attached_before_initialisation():
  layer, seeded, x = _one(rank=2)
  params = surgery.attach(
    seeded, surgery.LoRA(rank=3), to='**/layer', name='more'
  )
  params = models.stirred(layer(params, x)[1].locked())
  expected = layer(params, x)[0]
  models.close(layer(models.dense(params), x)[0], expected, 1e-4)
  recorded = surgery.freeze(params)
  assert {'default', 'more'} == set(recorded.records.names)
  models.close(expected, layer(recorded, x)[0], 1e-6)
  merged = surgery.merge(params)
  assert models.bits(layer(recorded, x)[0]) == models.bits(layer(merged, x)[0])


def test_after_detach_another_default_may_be_attached(net, plain):
  model, params, x = net
  base = surgery.detach(params)
  params = models.stirred(
    surgery.attach(base, surgery.LoRA(rank=1), to='**/hidden*')
  )
  models.close(plain[0](models.dense(params), x)[0], model(params, x)[0])


# use_lora.


def _use(model, value):
  for layer in model.layers[:-1]:
    layer.use_lora = value


@pytest.mark.parametrize('recorded', [False, True])
def test_use_lora_toggles_eager_calls(plain, recorded):
  model, params, x = models.mlp(layer=surgery.LoraLinear, rank=2)
  params = models.stirred(params)
  params = surgery.freeze(params) if recorded else params
  on = models.bits(model(params, x)[0])
  _use(model, False)
  assert models.bits(plain[0](plain[1], x)[0]) == models.bits(
    model(params, x)[0]
  )
  _use(model, True)
  assert on == models.bits(model(params, x)[0])


def test_use_lora_leaves_another_adapter_on():
  model, params, x = models.mlp(layer=surgery.LoraLinear, rank=2)
  params = surgery.attach(
    params, surgery.LoRA(rank=2), to='**/hidden*', name='more'
  )
  params = models.stirred(params)
  _use(model, False)
  left = surgery.detach(params, 'default')
  models.close(model(models.dense(left), x)[0], model(params, x)[0])


def test_use_lora_is_read_when_a_call_is_traced(plain):
  """Documented: attributes of a module are static; `disable` is not."""
  model, params, x = models.mlp(layer=surgery.LoraLinear, rank=2)
  params = models.stirred(params)
  call = jax.jit(lambda p: model(p, x)[0])
  on = call(params)
  _use(model, False)
  assert models.bits(on) == models.bits(call(params))
  _use(model, True)
  models.close(plain[0](plain[1], x)[0], call(surgery.disable(params)))
  assert 'stale' in surgery.LoraLinear.__doc__


def test_made_without_lora_it_is_a_linear_layer(plain):
  _, params, _ = models.mlp(layer=surgery.LoraLinear, rank=2, use_lora=False)
  assert jax.tree.structure(plain[1]) == jax.tree.structure(params)
  models.assert_equal_params(plain[1], params)


# Configuration travels with the weights.


def test_weights_say_by_which_alpha_they_count(net):
  """A model of other options does not change what its params mean."""
  _, params, x = net
  other, _, _ = models.mlp(layer=surgery.LoraLinear, rank=2, alpha=50.0)
  expected = net[0](params, x)[0]
  assert models.bits(expected) == models.bits(other(params, x)[0])
  merged = surgery.merge(params)
  assert models.bits(expected) == models.bits(other(merged, x)[0])


def test_loaded_weights_are_tagged_by_the_first_call():
  layer, seeded, x = _one(4, 4, rank=2)
  seeded['net', 'layer', 'lora_a'] = bx.Param(models.normal(1, (4, 2)))
  seeded['net', 'layer', 'lora_b'] = bx.Param(models.normal(2, (2, 4)))
  _, params = layer(seeded, x)
  params = params.locked()
  models.close(layer(models.dense(params), x)[0], layer(params, x)[0])
  assert 1 == len(surgery.adapters(params))


def test_loaded_weights_that_were_never_tagged_are_refused():
  layer, seeded, x = _one(4, 4, rank=2)
  _, params = layer(seeded, x)
  params['net', 'layer', 'lora_a'] = bx.Param(models.normal(1, (4, 2)))
  with pytest.raises(surgery.AdapterError, match=r'before params\.locked'):
    layer(params.locked(), x)


def test_halves_can_be_adopted_and_put_together(net):
  model, params, x = net
  weights, rest = params.split(models.is_weight)
  expected = model(params, x)[0]
  adopted = surgery.enable(weights)
  assert isinstance(adopted, surgery.AdaptedParams)
  assert models.bits(expected) == models.bits(model(adopted.merge(rest), x)[0])
  whole = surgery.enable(params).split(models.is_weight)[0]
  assert jax.tree.structure(whole) == jax.tree.structure(adopted)
