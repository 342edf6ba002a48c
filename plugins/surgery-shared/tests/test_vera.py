import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_shared import VeRA

import surgery

pytestmark = pytest.mark.peft('vera')

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
  gradients = net.gradients(params)
  assert {
    net.path(layer, name)
    for layer in LAYERS
    for name in ('lambda_b', 'lambda_d')
  } == set(gradients)
  assert all(jnp.any(g.value != 0) for g in gradients.values())
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


def test_its_first_vector_starts_at_an_option(net):
  params = attached(net, d_initial=0.5)
  vector = params[net.path('output', 'lambda_d')].value
  assert jnp.array_equal(jnp.full(8, 0.5), vector)
  assert not jnp.any(params[net.path('output', 'lambda_b')].value)


def test_its_matrices_depend_on_the_seed_and_nothing_else(net):
  one, same, other = (
    surgery.attach(net.params, VeRA(rank=8), to='**', seed=seed)[
      SHARED[0]
    ].value
    for seed in (0, 0, 1)
  )
  assert jnp.array_equal(one, same)
  assert not jnp.any(one == other)


def test_each_site_takes_its_part_of_the_matrices():
  params = bx.Params()
  shapes = {'wide': (2, 6, 3), 'small': (4, 2)}
  for name, shape in shapes.items():
    params[('net', name, 'kernel')] = bx.Param(jnp.zeros(shape))
  params = surgery.attach(params.locked(), VeRA(rank=2), to='**').unlocked()
  a, b = (np.asarray(params[p].value) for p in SHARED)
  assert ((12, 2), (2, 3)) == (a.shape, b.shape)
  for name in shapes:
    path = ('net', name, 'lambda_b')
    size = params[path].value.shape
    params[path] = params[path].replace(value=jnp.ones(size))
  merged = surgery.merge(params.locked())
  for name, shape in shapes.items():
    size = int(np.prod(shape[:-1]))
    np.testing.assert_allclose(
      merged[('net', name, 'kernel')].value,
      (0.1 * a[:size] @ b[:, : shape[-1]]).reshape(shape),
      rtol=1e-5,
      atol=1e-6,
    )


def test_under_a_scan_the_vectors_are_stacked_and_the_matrices_are_not():
  layer = bx.Linear(bx.Graph('net').child('a'), 4, rng=None)
  params = bx.Params()
  draw = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(draw.normal(size=s).astype(np.float32))
  params[('net', 'a', 'kernel')] = bx.Param(normal(3, 4, 4))
  params[('net', 'a', 'bias')] = bx.Param(normal(3, 4))
  params = surgery.attach(
    params.locked(), VeRA(rank=2), to='**', stacked=1
  ).unlocked()
  path = ('net', 'a', 'lambda_b')
  params[path] = params[path].replace(value=normal(3, 4))
  params = params.locked()
  shared, stacked = params.split(lambda path, _: path in SHARED)

  def body(x, one):
    return jnp.tanh(layer(one.merge(shared), x)[0]), None

  def plain(x, one):
    return jnp.tanh(layer(one, x)[0]), None

  x = normal(2, 4)
  adapted, _ = jax.lax.scan(body, x, stacked)
  merged, _ = jax.lax.scan(plain, x, surgery.merge(params))
  np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-6)


def test_it_is_found_by_its_name():
  assert VeRA is surgery.default_host().adapter_type('vera')


def test_a_rank_for_some_sites_is_refused():
  with pytest.raises(
    surgery.ConfigError, match="'rank', which decides weights"
  ):
    VeRA(rank=8, patterns={'**/output': {'rank': 4}})
