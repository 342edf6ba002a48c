"""Attaching before initialisation, and what `locked()` makes of it."""

from __future__ import annotations

from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)


@pytest.fixture(scope='module')
def net():
  """A model that is not initialised, its seeded params, and inputs."""
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = models.MLP(graph.child('mlp'), [6, 5, 3], rng)
  model.root = graph
  return model, rng.seed(bx.Params(), seed=42), models.normal(0, (7, 4))


@pytest.fixture(scope='module')
def base(net):
  model, seeded, x = net
  return model(seeded, x)[1].locked()


def _pending(net, **kwargs):
  model, seeded, x = net
  params = surgery.attach(seeded, LORA, to='**/hidden*', **kwargs)
  return model, params, x


def _base_of(params):
  return params.split(models.is_weight)[1]


def test_gives_the_bits_of_attaching_afterwards(net, base):
  model, params, x = _pending(net)
  expected = surgery.attach(base, LORA, to='**/hidden*')
  actual = model(params, x)[1].locked()
  assert jax.tree.structure(expected) == jax.tree.structure(actual)
  models.assert_equal_params(model(expected, x)[1], model(actual, x)[1])


def test_base_and_counter_are_those_without_adapter(net, base):
  model, params, x = _pending(net)
  actual = model(params, x)[1].locked()
  models.assert_equal_params(base, _base_of(actual))


def test_vmapped_initialisation_leaves_the_base_as_it_is(net):
  model, params, x = _pending(net)
  seeds = jnp.arange(3)

  def init(params, seed):
    params = bx.Rng.seed(model.layers[0].rng, params, seed=jax.random.key(seed))
    return model(params, x)[1]

  expected = jax.vmap(init, (None, 0))(net[1], seeds).locked()
  actual = jax.vmap(init, (None, 0))(params, seeds).locked()
  models.assert_equal_params(expected, _base_of(actual))
  assert (3, 4, 2) == actual['net', 'mlp', 'hidden0', 'lora_a'].value.shape


def test_vmapped_initialisation_can_be_merged(net):
  model, params, x = _pending(net)

  def init(seed):
    seeded = model.layers[0].rng.seed(params, seed=jax.random.key(seed))
    return model(seeded, x)[1]

  adapted = models.stirred(jax.vmap(init)(jnp.arange(3)).locked())
  call = jax.vmap(lambda p: model(p, x)[0])
  models.close(call(adapted), call(surgery.merge(adapted)), 1e-6)
  models.close(call(models.dense(adapted)), call(adapted))


def test_eval_shape_of_initialisation_has_the_final_structure(net, base):
  model, params, x = _pending(net)
  expected = surgery.attach(base, LORA, to='**/hidden*')
  actual = jax.eval_shape(model, params, x)[1].locked()
  assert jax.tree.structure(expected) == jax.tree.structure(actual)


def test_seeds_give_different_weights_in_one_jitted_initialisation(net):
  model, _, x = net
  init = jax.jit(lambda params: model(params, x)[1].locked())
  weights = [
    models.weights_of(init(_pending(net, seed=seed)[1]), 'default')
    for seed in (0, 123)
  ]
  path = ('net', 'mlp', 'hidden0', 'lora_a')
  assert models.bits(weights[0][path]) != models.bits(weights[1][path])


def test_names_give_different_weights(net):
  model, seeded, x = net
  params = seeded
  for name in ('one', 'two'):
    params = surgery.attach(params, LORA, to='**/hidden0', name=name)
  params = model(params, x)[1].locked()
  layer = ('net', 'mlp', 'hidden0')
  one, two = (params[(*layer, f'lora_a.{n}')].value for n in ('one', 'two'))
  assert models.bits(one) != models.bits(two)
  assert ('one', 'two') == params.records.names


def test_lazily_made_layer_is_adapted():
  class Lazy(bx.Module):
    def __init__(self, graph, rng):
      super().__init__(graph)
      self.rng, self.layer = rng, None

    def __call__(self, params, x):
      if self.layer is None:
        self.layer = bx.Linear(self.graph.child('layer'), 3, self.rng)
      return self.layer(params, x)

  def build():
    graph = bx.Graph('net')
    rng = bx.Rng(graph.child('rng'))
    return graph, Lazy(graph.child('lazy'), rng), rng.seed(bx.Params(), seed=0)

  x = models.normal(0, (2, 4))
  _, model, seeded = build()
  expected = model(seeded, x)[1]
  graph, model, seeded = build()
  params = surgery.attach(seeded, LORA, to='type:Linear', graph=graph)
  actual = model(params, x)[1].locked()
  assert (('net', 'lazy', 'layer', 'kernel'),) == (
    surgery.adapters(actual)[0].sites
  )
  models.assert_equal_params(expected, _base_of(actual))


def test_lock_raises_if_a_selector_matched_nothing(net):
  model, seeded, x = net
  params = surgery.attach(seeded, LORA, to='**/hiden*')
  params = model(params, x)[1]
  with pytest.raises(surgery.SelectorError, match=r'hiden.*hidden0'):
    params.locked()


def test_lock_raises_if_one_item_of_a_list_matched_nothing(net):
  model, seeded, x = net
  params = surgery.attach(seeded, LORA, to=['**/hidden*', '**/outptu'])
  params = model(params, x)[1]
  with pytest.raises(surgery.SelectorError, match='outptu'):
    params.locked()


def test_lock_raises_if_an_exclusion_matched_nothing(net):
  model, seeded, x = net
  params = surgery.attach(seeded, LORA, to=['**/hidden*', '!**/hiden1'])
  params = model(params, x)[1]
  with pytest.raises(surgery.SelectorError, match='hiden1'):
    params.locked()


@pytest.mark.parametrize(
  ('to', 'word'),
  [
    ('**/{hidden0,outptu}', 'outptu'),
    ('re:.*/(hidden0|outptu)', 'outptu'),
    (['**', '!**/{hidden0,outptu}'], 'outptu'),
    # There is one, and it cannot be served.
    ('net/{mlp,rng}', 'rng'),
  ],
)
def test_lock_raises_if_an_alternative_matched_nothing(net, base, to, word):
  model, seeded, x = net
  params = model(surgery.attach(seeded, LORA, to=to), x)[1]
  for attach in (params.locked, lambda: surgery.attach(base, LORA, to=to)):
    with pytest.raises(surgery.SurgeryError, match=f"alternative '{word}'"):
      attach()


@pytest.mark.parametrize('option', ['layout', 'stacked'])
def test_lock_raises_if_axes_of_nothing_were_given(net, option):
  model, seeded, x = net
  axes = {'**/hiden0': 'io' if option == 'layout' else 0}
  given: Any = {option: axes}
  params = surgery.attach(seeded, LORA, to='**/hidden*', **given)
  params = model(params, x)[1]
  with pytest.raises(surgery.SelectorError, match=f'{option}: .*hiden0'):
    params.locked()


def test_lock_raises_if_a_pattern_is_shadowed(net, base):
  model, seeded, x = net
  patterns = {'**/hidden*': {'rank': 1}, '**/hidden0': {'alpha': 100.0}}
  adapter = surgery.LoRA(rank=2, patterns=patterns)
  params = model(surgery.attach(seeded, adapter, to='**/hidden*'), x)[1]
  attach = lambda: surgery.attach(base, adapter, to='**/hidden*')
  for raises in (params.locked, attach):
    with pytest.raises(
      surgery.SelectorError,
      match=r"patterns: selector '\*\*/hidden0' has no effect: the earlier "
      r"selector '\*\*/hidden\*' decides all that it matches, e.g. "
      r'net/mlp/hidden0/kernel. Put it first.',
    ):
      raises()


def test_patterns_in_the_right_order_decide_each(net, base):
  patterns = {'**/hidden0': {'rank': 1}, '**/hidden{0,1}': {'rank': 3}}
  adapter = surgery.LoRA(rank=2, patterns=patterns)
  params = surgery.attach(base, adapter, to=['**/hidden*', '**/output'])
  ranks = [
    params['net', 'mlp', layer, 'lora_a'].value.shape[-1]
    for layer in ('hidden0', 'hidden1', 'output')
  ]
  assert [1, 3, 2] == ranks


def test_lock_raises_if_a_type_matched_nothing(net):
  model, seeded, x = net
  params = surgery.attach(seeded, LORA, to='type:Conv', graph=model.root)
  params = model(params, x)[1]
  with pytest.raises(surgery.SelectorError, match='Conv'):
    params.locked()


def test_lock_raises_if_a_pattern_matched_nothing(net):
  model, seeded, x = net
  adapter = surgery.LoRA(rank=2, patterns={'**/nothing': {'rank': 1}})
  params = surgery.attach(seeded, adapter, to='**/hidden*')
  params = model(params, x)[1]
  with pytest.raises(surgery.SelectorError, match='patterns'):
    params.locked()


def test_lock_ends_the_search(net):
  model, params, x = _pending(net)
  assert surgery.adapters(params)[0].pending
  params = model(params, x)[1].locked()
  assert not surgery.adapters(params)[0].pending


def test_exclusions_are_respected(net):
  model, seeded, x = net
  params = surgery.attach(seeded, LORA, to=['**/hidden*', '!**/hidden1'])
  params = model(params, x)[1].locked()
  assert (('net', 'mlp', 'hidden0', 'kernel'),) == (
    surgery.adapters(params)[0].sites
  )


def test_type_without_a_graph_is_refused(net):
  with pytest.raises(surgery.SelectorError, match='graph='):
    surgery.attach(net[1], LORA, to='type:Linear')


def test_shared_weights_are_refused(net):
  host = models.host(models.Shared)
  with pytest.raises(surgery.SurgeryError, match='Initialise the model first'):
    surgery.attach(net[1], models.Shared(), to='**/hidden*', host=host)


def test_layer_that_makes_a_parameter_of_that_name_is_refused():
  class Layer(bx.Linear):
    def __call__(self, params, x):
      y, params = super().__call__(params, x)
      own, params = self.get_param(
        params, 'lora_a', (3,), jax.nn.initializers.ones
      )
      return y * own, params

  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = Layer(graph.child('layer'), 3, rng)
  seeded = rng.seed(bx.Params(), seed=0)
  x = models.normal(0, (2, 4))
  params = surgery.attach(seeded, LORA, to='**/layer')
  with pytest.raises(surgery.AdapterError, match='another name='):
    layer(params, x)
  params = surgery.attach(seeded, LORA, to='**/layer', name='mine')
  params = layer(params, x)[1].locked()
  assert ('net', 'layer', 'lora_a.mine') in params


def test_site_grows_when_its_second_parameter_appears(net, base):
  model, seeded, x = net
  host = models.host(models.Scale)
  adapt = lambda p: surgery.attach(
    p, models.Scale(), to='**/hidden*', host=host
  )
  expected, actual = adapt(base), model(adapt(seeded), x)[1].locked()
  assert jax.tree.structure(expected) == jax.tree.structure(actual)
  scaled = models.stirred(actual)
  scale = scaled['net', 'mlp', 'hidden0', 'scale'].value
  bias, _ = model.layers[0].get_param(scaled, 'bias')
  models.close(base['net', 'mlp', 'hidden0', 'bias'].value * scale, bias)


def test_mistake_in_apply_shows_when_the_layer_is_made(net):
  class Wrong(models.Scale):
    name = 'wrong'

    def apply(self, site, name, base, weights):
      return base[..., :1]

  model, seeded, x = net
  params = surgery.attach(
    seeded, Wrong(), to='**/hidden*', host=models.host(Wrong)
  )
  with pytest.raises(
    surgery.PluginError, match=r"hidden0/kernel: apply of 'wrong' .*\(4, 1\)"
  ):
    model(params, x)


def test_lock_raises_if_a_frozen_name_is_no_weight(net):
  class Typo(models.Scale):
    name = 'typo'
    frozen = ('scales',)

  model, seeded, x = net
  params = surgery.attach(
    seeded, Typo(), to='**/hidden*', host=models.host(Typo)
  )
  params = model(params, x)[1]
  with pytest.raises(surgery.PluginError, match="'scales' .* mean 'scale'"):
    params.locked()


def test_adapter_computed_from_the_base_starts_as_the_identity(net, base):
  model, seeded, x = net
  host = models.host(models.Magnitude)
  params = surgery.attach(
    seeded, models.Magnitude(), to='**/hidden*', host=host
  )
  params = model(params, x)[1].locked()
  models.close(model(base, x)[0], model(params, x)[0], 1e-6)


def test_second_adapter_is_computed_from_what_the_first_answers(net, base):
  model, seeded, x = net
  host = models.host(models.Magnitude)

  def adapt(params):
    params = surgery.attach(
      params, models.Magnitude(), to='**/hidden*', name='a', host=host
    )
    return surgery.attach(
      params, models.Magnitude(), to='**/hidden*', name='b', host=host
    )

  expected, actual = adapt(base), model(adapt(seeded), x)[1].locked()
  assert jax.tree.structure(expected) == jax.tree.structure(actual)
  for path, value in models.weights_of(expected, 'b').items():
    models.close(value, actual[path].value, 1e-6)


def test_pretrained_weights_may_be_set_before_the_first_call(net, base):
  model, params, x = _pending(net)
  for path, param in base.items():
    if 'rng' not in path:
      params[path] = param
  actual = params.locked()
  expected = surgery.attach(base, LORA, to='**/hidden*')
  for path, value in models.weights_of(expected, 'default').items():
    assert models.bits(value) == models.bits(actual[path].value)
  models.close(
    model(models.dense(models.stirred(actual)), x)[0],
    model(models.stirred(actual), x)[0],
  )


def test_pretrained_weights_may_be_set_and_then_called(net, base):
  model, params, x = _pending(net)
  for path, param in base.items():
    params[path] = param
  expected = surgery.attach(base, LORA, to='**/hidden*')
  actual = model(params, x)[1].locked()
  models.assert_equal_params(expected, actual)


def test_adapter_weights_without_record_are_not_left_unused(net, base):
  model, params, x = _pending(net)
  trained = models.stirred(surgery.attach(base, LORA, to='**/hidden*'))
  for path, param in trained.items():
    params[path] = param
  with pytest.raises(
    surgery.AdapterError, match=r'hidden0/lora_a.*load_adapter'
  ):
    params.locked()
  with pytest.raises(surgery.AdapterError, match='load_adapter'):
    model(params, x)


def test_a_recurrent_layer_initialises_as_without():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  lstm = bx.LSTM(graph.child('lstm'), 4, rng)
  x = models.normal(0, (2, 3, 3))
  seeded = rng.seed(bx.Params(), seed=0)
  _, expected = lstm.apply(seeded, x)
  params = surgery.attach(seeded, LORA, to='**/gates')
  _, actual = lstm.apply(params, x)
  models.assert_equal_params(expected, _base_of(actual))
  params = models.stirred(actual.locked())
  models.close(lstm.apply(models.dense(params), x)[0], lstm.apply(params, x)[0])


def test_parts_that_were_initialised_apart_are_refused_together(net):
  model, params, x = _pending(net)
  x, one = model.layers[0](params, x)
  _, two = model.layers[1](params, x)
  with pytest.raises(surgery.AdapterError, match='both have'):
    one.merge(two)


def test_setting_weights_leaves_other_params_alone(net, base):
  _, params, _ = _pending(net)
  before = len(params)
  other = params.unlocked()
  other['net', 'new', 'kernel'] = bx.Param(jnp.ones((4, 4)))
  assert before == len(params)


def test_attaching_to_unlocked_initialised_params_adapts_at_once(net, base):
  model, _, x = net
  params = surgery.attach(base.unlocked(), LORA, to='**/hidden*')
  locked = surgery.attach(base, LORA, to='**/hidden*')
  models.assert_equal_params(locked, params)
  stirred = models.stirred(params)
  models.close(model(models.dense(stirred), x)[0], model(stirred, x)[0])
  merged = surgery.merge(stirred)
  assert not merged.is_locked
  models.close(model(stirred, x)[0], model(merged, x)[0], 1e-6)


def test_freezing_before_initialisation_is_refused(net):
  _, params, _ = _pending(net)
  with pytest.raises(surgery.AdapterError, match='Initialise the model'):
    surgery.freeze(params)


def test_merging_before_initialisation_is_refused(net):
  _, params, _ = _pending(net)
  with pytest.raises(surgery.AdapterError, match='Initialise the model'):
    surgery.merge(params)


def test_detaching_before_initialisation_leaves_the_base(net):
  model, params, x = _pending(net)
  detached = surgery.detach(params)
  assert bx.Params is type(detached)
  models.assert_equal_params(model(net[1], x)[1], model(detached, x)[1])


def test_disabled_adapter_still_finds_its_sites(net, base):
  model, params, x = _pending(net)
  params = model(surgery.disable(params), x)[1].locked()
  expected = surgery.attach(base, LORA, to='**/hidden*')
  models.assert_equal_params(expected, surgery.enable(params))
  assert jax.tree.structure(expected) == jax.tree.structure(
    surgery.enable(params)
  )


def test_initialisation_in_two_parts_finds_both(net):
  model, params, x = _pending(net)
  x, params = model.layers[0](params, x)
  _, params = model.layers[1](params, x)
  assert 2 == len(surgery.adapters(params.locked())[0].sites)


def test_options_of_a_site_hold_for_layers_to_come(net):
  model, seeded, x = net
  adapter = surgery.LoRA(rank=2, patterns={'**/hidden1': {'rank': 3}})
  params = surgery.attach(seeded, adapter, to='**/hidden*')
  params = model(params, x)[1].locked()
  shapes = [
    params['net', 'mlp', layer, 'lora_a'].value.shape
    for layer in ('hidden0', 'hidden1')
  ]
  assert [(4, 2), (6, 3)] == shapes


def test_a_rank_above_all_ranks_is_warned_of_when_params_are_locked(net):
  model, seeded, x = net
  params = surgery.attach(seeded, surgery.LoRA(rank=9), to='**/hidden*')
  params = model(params, x)[1]
  with pytest.warns(surgery.SiteWarning, match=r'rank 9 of .*hidden0/kernel'):
    params.locked()
