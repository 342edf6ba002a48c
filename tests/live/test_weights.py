"""An adapter's weights by site: read, set and regularised, also under jit."""

import re

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models

PATH = ('net', 'mlp', 'hidden0', 'kernel')


class Ridge(surgery.Adapter):
  """A matrix with its own penalty."""

  name = 'ridge'
  adds = True
  rate: float = surgery.field(default=0.5, doc='Of the penalty.')

  def init(self, site, key):
    return {'m': jax.random.normal(key, (*site.in_shape, *site.out_shape))}

  def apply(self, site, name, base, weights):
    return base + weights['m']

  def regulariser(self, site, weights):
    return self.rate * (weights['m'] ** 2).sum()


class Shared(surgery.Adapter):
  """Has a weight that all sites share, and one of each."""

  name = 'shared'
  frozen = ('common',)

  def init(self, site, key):
    return {'own': jnp.ones(site.out_shape)}

  def init_shared(self, sites, key):
    return {'common': jnp.full((), 2.0)}

  def apply(self, site, name, base, weights):
    return base * weights['own'] * weights['common']

  def regulariser(self, site, weights):
    return weights['common'] * weights['own'].sum()


def adapted(adapter=None, to='**/hidden*', **kwargs):
  model, params, x = models.mlp()
  adapter = adapter or surgery.LoRA(rank=2)
  return model, surgery.attach(params, adapter, to=to, **kwargs), x


def test_weights_are_the_stored_ones_by_site_and_name():
  _, params, _ = adapted()
  found = surgery.weights(params)
  assert {PATH, (*PATH[:2], 'hidden1', 'kernel')} == set(found)
  assert ['lora_a', 'lora_b'] == list(found[PATH])
  stored = {id(p.value) for path, p in params.items() if 'lora' in path[-1]}
  assert stored == set(map(id, jax.tree.leaves(found)))


def test_what_was_set_is_what_layers_get_and_nothing_else_changes():
  model, params, x = adapted()
  moved = jax.tree.map(lambda w: w + 1, surgery.weights(params))
  after = surgery.with_weights(params, 'default', moved)
  a, b = moved[PATH]['lora_a'], moved[PATH]['lora_b']
  base = np.asarray(params[PATH].value)
  expected = base + 2 * np.asarray(a) @ np.asarray(b)
  np.testing.assert_allclose(
    surgery.merge(after)[PATH].value, expected, rtol=1e-5
  )
  for path, param in after.items():
    if 'lora' not in path[-1]:
      assert param is params[path]
    assert param.trainable == params[path].trainable
    assert param.metadata == params[path].metadata
  assert jax.tree.structure(params) == jax.tree.structure(after)


def test_reading_and_setting_back_is_the_identity_under_jit():
  _, params, _ = adapted()

  @jax.jit
  def back(params):
    return surgery.with_weights(params, 'default', surgery.weights(params))

  after = back(params)
  for path, param in params.items():
    assert (param.value == after[path].value).all()


def test_gradients_flow_through_what_was_set():
  model, params, x = adapted()
  fast = surgery.factored(model)

  def loss(found):
    return fast(surgery.with_weights(params, 'default', found), x)[0].sum()

  gradients = jax.jit(jax.grad(loss))(surgery.weights(params))
  assert float(jnp.abs(gradients[PATH]['lora_b']).sum()) > 0


def test_a_part_can_be_set_by_text_and_the_rest_stays():
  _, params, _ = adapted()
  a = surgery.weights(params)[PATH]['lora_a']
  after = surgery.with_weights(
    params, 'default', {'/'.join(PATH): {'lora_a': a * 0}}
  )
  found = surgery.weights(after)
  assert not found[PATH]['lora_a'].any()
  assert found[PATH]['lora_b'] is surgery.weights(params)[PATH]['lora_b']


def test_halves_have_what_is_in_them():
  _, params, _ = adapted(Shared())
  half, rest = surgery.freeze(params).split()
  assert [['own'], ['own']] == [[*w] for w in surgery.weights(half).values()]
  assert {(): ['common']} == {p: [*w] for p, w in surgery.weights(rest).items()}
  after = surgery.with_weights(rest, 'default', {(): {'common': jnp.ones(())}})
  assert 1 == surgery.weights(half.merge(after))[()]['common']
  with pytest.raises(surgery.AdapterError, match='is not in these params'):
    surgery.with_weights(half, 'default', {(): {'common': jnp.ones(())}})


def test_the_index_of_rows_is_no_weight_of_the_type():
  _, params, _ = adapted()
  routed = surgery.route(
    surgery.stack_adapters([params, params]), jnp.array([0, 1])
  )
  found = surgery.weights(routed)
  assert () not in found
  assert (2, 4, 2) == found[PATH]['lora_a'].shape


def test_weights_of_designed_layers_are_found():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = surgery.LoraLinear(graph.child('one'), 3, rng, rank=2)
  params = layer(rng.seed(bx.Params(), seed=0), jnp.ones((1, 4)))[1].locked()
  [[path, found]] = surgery.weights(params).items()
  assert path[-1] == 'kernel'
  assert (4, 2) == found['lora_a'].shape


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'net/mlp/hiden0/kernel': {}}, "Did you mean 'net/mlp/hidden0/kernel'"),
    ({('net', 'mlp'): {}}, "has no site ('net', 'mlp')"),
    ({3: {}}, 'has no site 3'),
    ({(): {}}, 'has no site ()'),
    ({'': {}}, 'has no site '),
    ({PATH: {'lora_c': 0}}, "has no weight 'lora_c' there."),
    ({PATH: {'lora_a': jnp.ones(3)}}, 'expected float32 of shape (4, 2)'),
    ({PATH: {'lora_a': jnp.ones((4, 2), 'int32')}}, 'found int32 of shape'),
    ({PATH: {'lora_a': 3.0}}, 'expected an array, found float'),
    ({PATH: 3}, 'expected weights by name, found int'),
    (3, 'expected weights by site'),
    (
      {p: {'lora_a': jnp.ones((4, 2))} for p in (PATH, '/'.join(PATH))},
      'is given twice',
    ),
  ],
)
def test_what_cannot_be_set_is_refused(given, message):
  _, params, _ = adapted()
  with pytest.raises(surgery.AdapterError, match=re.escape(message)):
    surgery.with_weights(params, 'default', given)


def test_unknown_adapters_are_refused():
  _, params, _ = adapted()
  for call in (
    lambda: surgery.weights(params, 'defualt'),
    lambda: surgery.with_weights(params, 'defualt', {}),
    lambda: surgery.regulariser(params, 'defualt'),
  ):
    with pytest.raises(surgery.AdapterError, match="Did you mean 'default'"):
      call()


def test_regularisers_are_summed_over_sites_and_adapters():
  _, params, _ = adapted(Ridge(patterns={'**/hidden1': {'rate': 0.25}}))
  params = surgery.attach(params, Shared(), to='**/output', name='more')
  params = surgery.attach(
    params, surgery.LoRA(rank=1), to='**/output', name='none'
  )
  found = surgery.weights(params)
  first, second = (float((w['m'] ** 2).sum()) for w in found.values())
  ridge = 0.5 * first + 0.25 * second
  np.testing.assert_allclose(surgery.regulariser(params), ridge + 6, rtol=1e-6)
  assert 6 == surgery.regulariser(params, 'more')
  assert 0 == surgery.regulariser(params, ['none'])


def test_disabled_adapters_add_nothing():
  _, params, _ = adapted(Ridge())
  assert 0 < surgery.regulariser(params)
  assert 0 == surgery.regulariser(surgery.disable(params))


def test_stacked_layers_count_each():
  params = bx.Params()
  params['net', 'h', 'kernel'] = bx.Param(jnp.ones((3, 4, 2)))
  for adapter in (Ridge(), Shared()):
    whole = surgery.attach(params.locked(), adapter, to='**', stacked=1)
    own = surgery.weights(whole)['net', 'h', 'kernel']
    expected = 0.5 * (own['m'] ** 2).sum() if 'm' in own else 12
    np.testing.assert_allclose(surgery.regulariser(whole), expected, rtol=1e-6)


@pytest.mark.parametrize('through', [lambda m: m, surgery.factored])
def test_the_gradient_of_a_regulariser_is_its_own(through):
  model, params, x = adapted(Ridge())
  half, rest = surgery.freeze(params).split()

  def loss(half, factor):
    params = half.merge(rest)
    y, _ = through(model)(params, x)
    return 0 * y.sum() + factor * surgery.regulariser(params)

  gradients = jax.jit(jax.grad(loss))(half, 3.0)
  for path, param in gradients.items():
    np.testing.assert_allclose(param.value, 3 * half[path].value, rtol=1e-6)


def test_half_of_what_a_regulariser_needs_is_refused():
  _, params, _ = adapted(Shared())
  half, _ = surgery.freeze(params).split()
  with pytest.raises(surgery.AdapterError, match='Merge the halves'):
    surgery.regulariser(half)


@pytest.mark.parametrize(
  ('answer', 'message'),
  [
    (lambda w: w['m'], 'returned float32 of shape (4, 6), expected a real'),
    (lambda w: (w['m'] > 0).sum(), 'returned int32 of shape ()'),
    (lambda w: 'much', 'returned str'),
    (lambda w: w['lost'], "regulariser of 'wrong' failed: KeyError: 'lost'"),
  ],
)
def test_a_wrong_regulariser_is_named(answer, message):
  class Wrong(Ridge):
    name = 'wrong'

    def regulariser(self, site, weights):
      return answer(weights)

  _, params, _ = adapted(Wrong(), to='**/hidden0')
  with pytest.raises(surgery.PluginError, match=re.escape(message)) as caught:
    surgery.regulariser(params)
  assert 'net/mlp/hidden0/kernel: ' in str(caught.value)
