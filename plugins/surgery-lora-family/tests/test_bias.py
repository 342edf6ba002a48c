import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_lora_family import BiasLoRA

import surgery

DRAW = np.random.default_rng(0)


def normal(*shape):
  return DRAW.normal(size=shape).astype(np.float32)


def layer(use_bias=True):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  return bx.Linear(
    graph.child('h'),
    5,
    rng=rng,
    use_bias=use_bias,
    bias_init=lambda key, shape, dtype: jnp.arange(1.0, 6.0, dtype=dtype),
  ), rng.seed(bx.Params(), seed=0)


def written(params, **values):
  params = params.unlocked()
  for name, value in values.items():
    path = ('net', 'h', name)
    assert params[path].value.shape == value.shape
    params[path] = params[path].replace(value=jnp.asarray(value))
  return params.locked()


def stored(params, name):
  return np.asarray(params['net', 'h', name].value)


# Made with PEFT 0.21.2 on torch 2.13.0: lora_bias=True.
@pytest.mark.peft('lora_bias')
def test_it_equals_peft(net):
  assert net.config['lora_bias']
  adapter = BiasLoRA(rank=net.config['r'], alpha=net.config['lora_alpha'])
  params = surgery.attach(net.params, adapter, to='**')
  values = {}
  for name in ('hidden0', 'hidden1', 'output'):
    theirs = net.of_layer(name)
    values[net.path(name, 'lora_a')] = theirs['lora_A.weight'].T
    values[net.path(name, 'lora_b')] = theirs['lora_B.weight'].T
    values[net.path(name, 'lora_bias')] = theirs['lora_B.bias']
  net.assert_equals_peft(net.written(params, values))


def test_the_branch_is_low_rank_with_a_bias():
  model, params = layer()
  x = normal(3, 4)
  before, params = model(params, x)
  params = surgery.attach(
    params.locked(), BiasLoRA(rank=2, alpha=6.0), to='**/h'
  )
  assert jnp.array_equal(before, model(params, x)[0])
  a, b, c = normal(4, 2), normal(2, 5), normal(5)
  adapted = written(params, lora_a=a, lora_b=b, lora_bias=c)
  w, bias = stored(params, 'kernel'), stored(params, 'bias')
  expected = x @ w + bias + 3.0 * (x @ a @ b + c)
  np.testing.assert_allclose(
    expected, model(adapted, x)[0], rtol=1e-5, atol=1e-5
  )
  merged = surgery.merge(adapted)
  np.testing.assert_allclose(
    w + 3.0 * a @ b, stored(merged, 'kernel'), rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(bias + 3.0 * c, stored(merged, 'bias'), rtol=1e-5)


def test_the_kernel_stays_factored_and_the_bias_is_an_array():
  kernel = surgery.ParamSpec('kernel', (4, 5), 'float32', 'io')
  bias = surgery.ParamSpec('bias', (5,), 'float32', 'o', ('model',))
  site = surgery.Site(('net', 'h'), (kernel, bias))
  weights = {'lora_a': normal(4, 2), 'lora_b': normal(2, 5)}
  weights['lora_bias'] = normal(5)
  adapter = BiasLoRA(rank=2)
  answer = adapter.apply(site, 'kernel', normal(4, 5), weights)
  assert isinstance(answer, surgery.LowRank)
  base = normal(5)
  np.testing.assert_allclose(
    base + 2.0 * weights['lora_bias'],
    adapter.apply(site, 'bias', base, weights),
    rtol=1e-6,
  )
  assert ('model',) == adapter.sharding(site, 'lora_bias')
  assert (None, None) == adapter.sharding(site, 'lora_a')


def test_a_bias_of_several_axes_is_met_as_it_is():
  params = bx.Params()
  params['net', 'h', 'kernel'] = bx.Param(jnp.zeros((6, 2, 3)))
  params['net', 'h', 'bias'] = bx.Param(jnp.ones((2, 3)))
  adapter = BiasLoRA(rank=2, alpha=4.0)
  params = surgery.attach(params.locked(), adapter, to='**', layout='ioo')
  value = normal(2, 3)
  merged = surgery.merge(written(params, lora_bias=value))
  np.testing.assert_allclose(1 + 2 * value, stored(merged, 'bias'), rtol=1e-6)


def test_a_layer_without_bias_is_refused():
  model, params = layer(use_bias=False)
  _, params = model(params, normal(3, 4))
  for to in ('net/h', 'net/h/kernel'):
    with pytest.raises(
      surgery.SiteError,
      match=r"net/h/kernel.* net/h has no parameter 'bias' .*'lora' needs none",
    ):
      surgery.attach(params.locked(), BiasLoRA(rank=2), to=to)


def test_attached_before_initialisation_it_waits_for_the_bias():
  # A layer makes its kernel first, and until then it has no bias.
  model, params = layer()
  params = surgery.attach(params, BiasLoRA(rank=2), to='**/h')
  _, params = model(params, normal(3, 4))
  params = params.locked()
  assert {'lora_a', 'lora_b', 'lora_bias'} < {p[-1] for p in params.keys()}
  assert (('net', 'h', 'kernel'),) == surgery.adapters(params)[0].sites


def test_it_is_found_by_its_name():
  assert BiasLoRA is surgery.default_host().adapter_type('lora-bias')
