import subprocess
import sys
import types

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_scaling import BitFit

import surgery

DRAW = np.random.default_rng(0)


def normal(*shape):
  return DRAW.normal(size=shape).astype(np.float32)


VALUES = {
  ('net', 'h', 'kernel'): normal(4, 3),
  ('net', 'h', 'bias'): normal(3),
  ('net', 'norm', 'scale'): normal(3),
  ('net', 'norm', 'bias'): normal(3),
  ('net', 'out', 'kernel'): normal(3, 2),
}


def network(values=VALUES):
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


def shift_of(layer):
  return ('net', layer, 'bias_shift.default.bias')


def values(params):
  return {path: np.asarray(one.value) for path, one in params.items()}


def test_biases_are_shifted_and_nothing_else_is():
  params = surgery.attach(network(), BitFit(), to='**')
  assert {
    ('net', 'h', 'bias'),
    ('net', 'norm', 'bias'),
  } == set(surgery.adapters(params)[0].sites)
  shifts = {shift_of(layer): normal(3) for layer in ('h', 'norm')}
  for path in shifts:
    assert not np.any(params[path].value)
  merged = values(surgery.merge(written(params, shifts)))
  for path, value in VALUES.items():
    if path[-1] == 'bias':
      value = value + shifts[shift_of(path[1])]
    np.testing.assert_array_equal(value, merged[path])


def test_a_model_gets_the_shifted_bias_and_the_stored_one_stays():
  graph = bx.Graph('net')
  layer = bx.Linear(graph.child('h'), 3, rng=None)
  start = network({p: VALUES[p] for p in VALUES if p[1] == 'h'})
  params = surgery.attach(start, BitFit(), to='**/h')
  shift, x = normal(3), normal(5, 4)
  params = written(params, {shift_of('h'): shift})
  plain = x @ VALUES['net', 'h', 'kernel'] + VALUES['net', 'h', 'bias']
  np.testing.assert_allclose(
    plain + shift, layer(params, x)[0], rtol=1e-5, atol=1e-5
  )
  for off in (surgery.disable(params), surgery.detach(params)):
    assert jnp.array_equal(layer(start, x)[0], layer(off, x)[0])
    np.testing.assert_array_equal(
      VALUES['net', 'h', 'bias'], off['net', 'h', 'bias'].value
    )


def test_only_biases_can_be_meant():
  with pytest.raises(
    surgery.SiteError, match=r"net/h/kernel.*'kernel' is no b"
  ):
    surgery.attach(network(), BitFit(), to='net/h/kernel')
  with pytest.raises(surgery.SelectorError, match=r'default site .*\(bias\)'):
    surgery.attach(network(), BitFit(), to='net/out')
  whole = {('net', 'h', 'bias'): np.arange(3)}
  with pytest.raises(surgery.SiteError, match='its dtype is int'):
    surgery.attach(network(whole), BitFit(), to='net/h/bias')
  # Nor does everything that can be served contain more.
  everything = surgery.attach(network(), BitFit(), to='all')
  assert 2 == len(surgery.adapters(everything)[0].sites)


def test_biases_of_several_axes_and_stacked_ones_are_met():
  start = {('net', 'heads', 'bias'): normal(2, 3)}
  params = surgery.attach(network(start), BitFit(), to='**', layout='oo')
  path = shift_of('heads')
  merged = surgery.merge(written(params, {path: np.ones((2, 3), 'float32')}))
  np.testing.assert_array_equal(
    start['net', 'heads', 'bias'] + 1, merged['net', 'heads', 'bias'].value
  )
  stacked = surgery.attach(network(start), BitFit(), to='**', stacked=1)
  assert (2, 3) == stacked[path].value.shape


def test_a_shift_is_split_as_its_bias_is():
  spec = surgery.ParamSpec('bias', (2, 3), 'float32', 'io', ('x', None))
  site = surgery.Site(('net', 'h'), (spec,))
  assert ('x', None) == BitFit().sharding(site, 'bias_shift')


def trains(params):
  return {path for path, one in params.items() if one.trainable}


def test_the_policy_trains_stored_biases():
  params = surgery.attach(network(), surgery.LoRA(rank=2), to='**/h')
  frozen = surgery.freeze(params, policy='bitfit')
  assert {('net', 'h', 'bias'), ('net', 'norm', 'bias')} == trains(frozen)
  assert trains(params) == trains(surgery.unfreeze(frozen))


def test_another_plugin_may_answer_the_same_policy():
  # The last that was registered has the word.
  mine = types.SimpleNamespace(
    surgery_freeze_param=surgery.hookimpl(
      lambda site, policy: (
        site.layer[-1] == 'out' if policy == 'bitfit' else None
      )
    )
  )
  host = surgery.Host(plugins=[mine])
  frozen = surgery.freeze(network(), policy='bitfit', host=host)
  assert {('net', 'out', 'kernel')} == trains(frozen)
  with pytest.raises(surgery.PluginError, match="knows the policy 'x'"):
    surgery.freeze(network(), policy='x', host=host)


def test_the_policy_is_loaded_without_jax():
  code = 'import surgery_scaling.policy, sys; print("jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert 'False' == done.stdout.strip()


def test_they_are_found_by_their_names():
  host = surgery.default_host()
  assert BitFit is host.adapter_type('bitfit')
  [info] = [i for i in host.plugins() if i.name == 'bitfit-policy']
  assert ('surgery_freeze_param',) == info.hooks
