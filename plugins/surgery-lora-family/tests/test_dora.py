import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_lora_family import DoRA

import surgery

pytestmark = pytest.mark.peft('dora')

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


def test_a_rank_above_the_dimensions_is_warned_of_by_path(net):
  with pytest.warns(surgery.SiteWarning, match=r'rank 17 .*16×64.*: net/mlp/h'):
    params = surgery.attach(net.params, DoRA(rank=17), to='**')
  net.assert_lawful(params)


@pytest.mark.parametrize(
  ('name', 'shape', 'how', 'inputs'),
  [
    ('embedding', (7, 4), {}, (0,)),
    ('kernel', (3, 2, 4, 5), {}, (0, 1, 2)),
    ('kernel', (4, 2, 3), {'layout': 'ioo'}, (0,)),
    ('weight', (5, 4), {'layout': 'oi'}, (1,)),
    ('kernel', (2, 4, 5), {'stacked': 1}, (1,)),
  ],
)
def test_the_norm_is_taken_over_the_inputs_of_any_layer(
  name, shape, how, inputs
):
  value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  path = ('net', 'a', name)
  params = bx.Params()
  params[path] = bx.Param(jnp.asarray(value))
  params = surgery.attach(params.locked(), DoRA(rank=2), to='**', **how)
  stored = {p[-1].split('.')[0]: p for p in params.keys()}
  norm = np.sqrt((value**2).sum(inputs))
  np.testing.assert_allclose(params[stored['magnitude']].value, norm, rtol=1e-6)
  # Twice the magnitude is twice the parameter.
  params = params.unlocked()
  params[stored['magnitude']] = params[stored['magnitude']].replace(
    value=2 * norm
  )
  np.testing.assert_allclose(
    surgery.merge(params.locked())[path].value, 2 * value, rtol=1e-5
  )


@pytest.mark.parametrize(('rslora', 'scale'), [(False, 4.0), (True, 8.0)])
def test_the_update_is_scaled_by_alpha_and_rank(rslora, scale):
  assert scale == DoRA(rank=4, alpha=16, rslora=rslora).scale


def test_the_norm_is_a_constant_in_the_backward_pass():
  # Section 4.3 of the paper: for V = W + s·A·B and G the gradient of W',
  # that of V is G·m/‖V‖.
  draw = np.random.default_rng(0)
  normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
  w, g, m = normal(6, 5), normal(6, 5), normal(5)
  a, b = normal(6, 2), normal(2, 5)
  path = ('net', 'a', 'kernel')
  params = bx.Params()
  params[path] = bx.Param(jnp.asarray(w))
  params = surgery.freeze(
    surgery.attach(params.locked(), DoRA(rank=2, alpha=3.0), to='**')
  ).unlocked()
  for name, value in (('lora_a', a), ('lora_b', b), ('magnitude', m)):
    place = ('net', 'a', name)
    params[place] = params[place].replace(value=jnp.asarray(value))
  trainable, rest = params.locked().split()

  def loss(trainable):
    return jnp.sum(g * surgery.merge(trainable.merge(rest))[path].value)

  found = jax.grad(loss)(trainable)
  v = w + 1.5 * a @ b
  norm = np.linalg.norm(v, axis=0)
  gv = g * m / norm
  expected = {
    'lora_a': 1.5 * gv @ b.T,
    'lora_b': 1.5 * a.T @ gv,
    'magnitude': (g * v / norm).sum(0),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(
      found[('net', 'a', name)].value, value, rtol=1e-4, atol=1e-4
    )


def test_it_is_found_by_its_name():
  assert DoRA is surgery.default_host().adapter_type('dora')
