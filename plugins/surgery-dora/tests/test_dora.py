import jax.numpy as jnp
import numpy as np
import pytest
from surgery_dora import DoRA

import surgery

LAYERS = ('hidden0', 'hidden1', 'output')


def attached(net, **options):
  return surgery.attach(net.params, DoRA(rank=4, **options), to='**')


def test_it_equals_peft(net):
  adapter = DoRA(rank=net.config['r'], alpha=net.config['lora_alpha'])
  params = surgery.attach(net.params, adapter, to='**')
  values = {}
  for layer in LAYERS:
    theirs = net.of_layer(layer)
    values[net.path(layer, 'lora_a')] = theirs['lora_A.weight'].T
    values[net.path(layer, 'lora_b')] = theirs['lora_B.weight'].T
    values[net.path(layer, 'magnitude')] = theirs['lora_magnitude_vector']
  net.assert_equals_peft(net.written(params, values))


def test_it_is_the_identity_at_the_start(net):
  np.testing.assert_allclose(
    net.output(attached(net)), net.output(net.params), rtol=1e-5, atol=1e-6
  )


def test_its_magnitude_is_the_norm_of_each_output(net):
  params = attached(net)
  for layer in LAYERS:
    kernel = np.asarray(net.params[net.path(layer, 'kernel')].value)
    np.testing.assert_allclose(
      params[net.path(layer, 'magnitude')].value,
      np.linalg.norm(kernel, axis=0),
      rtol=1e-6,
    )


def test_it_keeps_the_laws(net):
  net.assert_lawful(attached(net))


def test_only_its_weights_train_and_all_of_them_do(net):
  gradients = net.gradients(net.randomised(attached(net)))
  assert {
    net.path(layer, name)
    for layer in LAYERS
    for name in ('lora_a', 'lora_b', 'magnitude')
  } == set(gradients)
  assert all(jnp.any(g.value != 0) for g in gradients.values())


def test_over_a_trained_lora_it_starts_as_the_identity(net):
  # Its base is what the inner adapter answers, not what is stored.
  inner = surgery.attach(
    net.params, surgery.LoRA(rank=2), to='**', name='inner'
  )
  inner = net.randomised(inner)
  outer = surgery.attach(inner, DoRA(rank=4), to='**', name='outer')
  np.testing.assert_allclose(
    net.output(outer), net.output(inner), rtol=1e-4, atol=1e-5
  )


def test_it_is_not_merged_from_over_another(net):
  params = surgery.attach(net.params, surgery.LoRA(rank=2), to='**')
  params = surgery.attach(params, DoRA(rank=2), to='**', name='outer')
  with pytest.raises(surgery.OrderError, match=r"'outer' .* over 'default'"):
    surgery.merge(params, 'outer')


def test_a_column_of_zeros_stays_zero(net):
  params = net.params.unlocked()
  path = net.path('output', 'kernel')
  kernel = params[path].value.at[:, 0].set(0)
  params[path] = params[path].replace(value=kernel)
  params = surgery.attach(params.locked(), DoRA(rank=2), to='**/output')
  merged = surgery.merge(params)[path].value
  assert jnp.all(merged[:, 0] == 0)


def test_a_rank_above_the_dimensions_is_refused_by_path(net):
  with pytest.raises(surgery.SiteError, match=r'hidden0.*rank 17 exceeds'):
    surgery.attach(net.params, DoRA(rank=17), to='**')


def test_it_is_found_by_its_name():
  assert DoRA is surgery.default_host().adapter_type('dora')
