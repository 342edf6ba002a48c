import blox as bx
import jax.numpy as jnp
import pytest
from surgery_vera import VeRA

import surgery

LAYERS = ('hidden0', 'hidden1', 'output')
SHARED = (('surgery.default', 'vera_a'), ('surgery.default', 'vera_b'))


def attached(net, **options):
  return surgery.attach(net.params, VeRA(rank=8, **options), to='**')


def test_it_equals_peft(net):
  assert 8 == net.config['r']
  values = {
    SHARED[0]: net.weights['base_model.vera_A'].T,
    SHARED[1]: net.weights['base_model.vera_B'].T,
  }
  for layer in LAYERS:
    theirs = net.of_layer(layer)
    values[net.path(layer, 'lambda_d')] = theirs['vera_lambda_d']
    values[net.path(layer, 'lambda_b')] = theirs['vera_lambda_b']
  net.assert_equals_peft(net.written(attached(net), values))


def test_its_matrices_are_as_large_as_the_largest_site(net):
  params = attached(net)
  assert [(64, 8), (8, 64)] == [params[p].value.shape for p in SHARED]


def test_it_is_the_identity_at_the_start(net):
  assert jnp.array_equal(net.output(net.params), net.output(attached(net)))


def test_it_keeps_the_laws(net):
  net.assert_lawful(attached(net))


def test_its_vectors_train_and_its_matrices_never_do(net):
  params = net.randomised(attached(net))
  assert {
    net.path(layer, name)
    for layer in LAYERS
    for name in ('lambda_b', 'lambda_d')
  } == set(net.gradients(params))
  thawed = surgery.unfreeze(surgery.freeze(params))
  assert not any(thawed[path].trainable for path in SHARED)


def test_it_is_refused_before_initialisation():
  with pytest.raises(surgery.SurgeryError):
    surgery.attach(bx.Params(), VeRA(rank=8), to='**')


def test_two_of_them_add_and_leave_one_by_one(net):
  one = net.randomised(attached(net))
  both = surgery.attach(one, VeRA(rank=4), to='**', name='b', seed=1)
  both = net.randomised(both, seed=2)
  alone = surgery.detach(both, 'b')
  assert 2 == len([p for p in alone.keys() if p[0] == 'surgery.default'])
  assert not [p for p in alone.keys() if p[0] == 'surgery.b']
  merged = surgery.merge(both, 'b')
  assert jnp.allclose(net.output(both), net.output(merged), atol=1e-4)


def test_it_is_found_by_its_name():
  assert VeRA is surgery.default_host().adapter_type('vera')
