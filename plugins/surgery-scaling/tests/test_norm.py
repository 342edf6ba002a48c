import pathlib

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from surgery_scaling import LNTuning

import surgery

# Made with PEFT 0.21.2 on torch 2.13.0: a norm between two linear layers.
PEFT = pathlib.Path(__file__).parent / 'data' / 'ln_tuning'
DRAW = np.random.default_rng(0)


def normal(*shape):
  return DRAW.normal(size=shape).astype(np.float32)


def network(values):
  params = bx.Params()
  for path, value in values.items():
    params[path] = bx.Param(jnp.asarray(value))
  return params.locked()


def written(params, values):
  params = params.unlocked()
  for path, value in values.items():
    assert params[path].value.shape == value.shape
    params[path] = params[path].replace(value=jnp.asarray(value))
  return params.locked()


def shift_of(layer, name, primary='scale'):
  return ('net', layer, f'{name}_shift.default.{primary}')


def test_it_equals_peft():
  graph = bx.Graph('net')
  inp = bx.Linear(graph.child('inp'), 8, rng=None)
  norm = bx.LayerNorm(graph.child('norm'))
  out = bx.Linear(graph.child('out'), 4, rng=None)
  base, theirs, data, y = (
    load_file(PEFT / f'{name}.safetensors')
    for name in ('base_norm_net', 'adapter_model', 'inputs_norm_net', 'y')
  )
  names = {
    'inp.weight': 'kernel',
    'norm.weight': 'scale',
    'out.weight': 'kernel',
  }
  params = network(
    {
      ('net', key.split('.')[0], names.get(key, 'bias')): value.T
      for key, value in base.items()
    }
  )

  def output(params):
    x = jnp.asarray(data['x0'])
    for layer in (inp, norm):
      x, params = layer(params, x)
    return out(params, jnp.maximum(x, 0))[0]

  np.testing.assert_allclose(output(params), data['y_base'], atol=1e-5)
  params = surgery.attach(params, LNTuning(), to='**/norm')
  # PEFT stores what trains as a whole, here it is the difference.
  whole = 'base_model.model.norm.ln_tuning_layers.'
  values = {
    shift_of('norm', name): theirs[whole + kind] - base[f'norm.{kind}']
    for name, kind in (('scale', 'weight'), ('bias', 'bias'))
  }
  params = written(params, values)
  np.testing.assert_allclose(output(params), y['y'], rtol=1e-5, atol=1e-5)


def test_a_layer_norm_gets_its_own_scale_and_bias():
  layer = bx.LayerNorm(bx.Graph('net').child('norm'))
  scale, bias, d, e = (normal(6) for _ in range(4))
  start = network(
    {('net', 'norm', 'scale'): scale, ('net', 'norm', 'bias'): bias}
  )
  params = surgery.attach(start, LNTuning(), to='**')
  x = normal(5, 6)
  assert jnp.array_equal(layer(start, x)[0], layer(params, x)[0])
  params = written(
    params,
    {shift_of('norm', 'scale'): d, shift_of('norm', 'bias'): e},
  )
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  expected = (x - mean) / np.sqrt(var + 1e-5) * (scale + d) + bias + e
  np.testing.assert_allclose(
    expected, layer(params, x)[0], rtol=1e-5, atol=1e-5
  )
  merged = surgery.merge(params)
  np.testing.assert_array_equal(scale + d, merged['net', 'norm', 'scale'].value)
  np.testing.assert_array_equal(bias + e, merged['net', 'norm', 'bias'].value)
  for off in (surgery.disable(params), surgery.detach(params)):
    assert jnp.array_equal(layer(start, x)[0], layer(off, x)[0])


def test_a_root_mean_square_norm_gets_its_own_scale():
  layer = bx.RMSNorm(bx.Graph('net').child('norm'))
  scale, d, x = normal(6), normal(6), normal(5, 6)
  params = network({('net', 'norm', 'scale'): scale})
  params = surgery.attach(params, LNTuning(), to='**/norm')
  params = written(params, {shift_of('norm', 'scale'): d})
  length = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(
    x / length * (scale + d), layer(params, x)[0], rtol=1e-5, atol=1e-5
  )


MIXED = {
  ('net', 'h', 'kernel'): normal(4, 3),
  ('net', 'h', 'bias'): normal(3),
  ('net', 'batch', 'scale'): normal(3),
  ('net', 'batch', 'bias'): normal(3),
  ('net', 'batch', 'running_mean'): normal(3),
  ('net', 'torch', 'weight'): normal(3),
  ('net', 'torch', 'bias'): normal(3),
  ('net', 'linear', 'weight'): normal(4, 3),
}


def test_layers_that_are_no_norms_are_left_alone():
  params = surgery.attach(network(MIXED), LNTuning(), to='**')
  assert (('net', 'batch', 'scale'),) == surgery.adapters(params)[0].sites
  everything = surgery.attach(network(MIXED), LNTuning(), to='all')
  assert {('net', 'batch', 'scale'), ('net', 'torch', 'weight')} == set(
    surgery.adapters(everything)[0].sites
  )
  with pytest.raises(
    surgery.SiteError, match=r"'weight' of shape \(4, 3\) is no scale of a norm"
  ):
    surgery.attach(network(MIXED), LNTuning(), to='net/linear/weight')
  with pytest.raises(surgery.SelectorError, match=r'default site .*\(scale\)'):
    surgery.attach(network(MIXED), LNTuning(), to='net/h')


def test_a_scale_that_is_called_weight_can_be_named():
  params = surgery.attach(network(MIXED), LNTuning(), to='net/torch/weight')
  d = normal(3)
  merged = surgery.merge(
    written(params, {shift_of('torch', 'weight', 'weight'): d})
  )
  np.testing.assert_array_equal(
    MIXED['net', 'torch', 'weight'] + d, merged['net', 'torch', 'weight'].value
  )


def test_attached_before_initialisation_it_meets_the_bias_too():
  # A norm makes its scale first: the site grows.
  layer = bx.LayerNorm(bx.Graph('net').child('norm'))
  params = surgery.attach(bx.Params(), LNTuning(), to='**/norm')
  _, params = layer(params, normal(5, 6))
  added = {shift_of('norm', 'scale'), shift_of('norm', 'bias')}
  assert added < set(params.locked().keys())


def test_it_is_found_by_its_name():
  assert LNTuning is surgery.default_host().adapter_type('ln-tuning')
