import blox as bx
import jax
import jax.numpy as jnp
import pytest
from surgery_scaling import IA3

import surgery

pytestmark = pytest.mark.peft('ia3')

FEEDFORWARD = {'**/hidden1': {'feedforward': True}}


def attached(net):
  return surgery.attach(net.params, IA3(patterns=FEEDFORWARD), to='**')


def test_it_equals_peft(net):
  assert ['hidden1'] == net.config['feedforward_modules']
  values = {
    net.path(layer, 'scale'): net.of_layer(layer)['ia3_l'].ravel()
    for layer in ('hidden0', 'hidden1', 'output')
  }
  net.assert_equals_peft(net.written(attached(net), values))


def test_it_is_the_identity_at_the_start(net):
  assert jnp.array_equal(net.output(net.params), net.output(attached(net)))


def test_it_keeps_the_laws(net):
  net.assert_lawful(attached(net))


def test_only_its_weights_train_and_all_of_them_do(net):
  gradients = net.gradients(net.randomised(attached(net)))
  assert {
    net.path(layer, 'scale') for layer in ('hidden0', 'hidden1', 'output')
  } == set(gradients)
  assert all(jnp.any(g.value != 0) for g in gradients.values())


def test_it_is_found_by_its_name():
  assert IA3 is surgery.default_host().adapter_type('ia3')


def test_attached_before_initialisation_it_scales_kernel_and_bias():
  # The bias is made after the kernel: the site grows.
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(
    graph.child('a'), 3, rng=rng, bias_init=lambda k, s, d: jnp.ones(s, d)
  )
  x = jnp.ones((2, 4))
  params = surgery.attach(rng.seed(bx.Params(), seed=0), IA3(), to='**/a')
  y, params = layer(params, x)
  params = params.locked()
  path = ('net', 'a', 'scale')
  assert (3,) == params[path].value.shape
  loose = params.unlocked()
  loose[path] = loose[path].replace(value=jnp.array([2.0, 0.0, 1.0]))
  scaled, _ = layer(loose.locked(), x)
  assert jnp.array_equal(y * jnp.array([2.0, 0.0, 1.0]), scaled)


@pytest.mark.parametrize('patterns', [{}, FEEDFORWARD])
def test_before_initialisation_each_site_has_its_options(patterns):
  graph = bx.Graph('net')
  layer = bx.Linear(
    graph.child('hidden1'), 3, rng=None, kernel_init=jax.nn.initializers.ones
  )
  start = surgery.attach(bx.Params(), IA3(patterns=patterns), to='**/hidden1')
  _, params = layer(start, jnp.ones((2, 4)))
  path = ('net', 'hidden1', 'scale')
  assert ((4,) if patterns else (3,)) == params.locked()[path].value.shape


def made(**values):
  params = bx.Params()
  for name, value in values.items():
    params[('net', 'a', name)] = bx.Param(jnp.asarray(value))
  return params.locked()


def test_an_attention_kernel_is_scaled_by_head_and_so_is_its_bias():
  params = made(kernel=jnp.ones((6, 2, 4)), bias=jnp.ones((2, 4)))
  params = surgery.attach(params, IA3(), to='**', layout='ioo').unlocked()
  scale = jnp.arange(8.0).reshape(2, 4)
  path = ('net', 'a', 'scale')
  params[path] = params[path].replace(value=scale)
  merged = surgery.merge(params.locked())
  assert jnp.array_equal(scale, merged[('net', 'a', 'bias')].value)
  assert jnp.array_equal(scale, merged[('net', 'a', 'kernel')].value[5])


def test_inputs_are_scaled_where_there_are_several_axes_of_them():
  params = made(kernel=jnp.ones((2, 4, 6)), bias=jnp.ones((6,)))
  params = surgery.attach(params, IA3(feedforward=True), to='**').unlocked()
  scale = jnp.arange(8.0).reshape(2, 4)
  path = ('net', 'a', 'scale')
  params[path] = params[path].replace(value=scale)
  merged = surgery.merge(params.locked())
  assert jnp.array_equal(scale, merged[('net', 'a', 'kernel')].value[..., 5])
  assert jnp.all(merged[('net', 'a', 'bias')].value == 1)


def test_a_layer_without_bias_is_served():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(graph.child('a'), 3, rng=rng, use_bias=False)
  x = jnp.ones((2, 4))
  y, params = layer(rng.seed(bx.Params(), seed=0), x)
  params = surgery.attach(params.locked(), IA3(), to='**/a')
  assert jnp.array_equal(y, layer(params, x)[0])
