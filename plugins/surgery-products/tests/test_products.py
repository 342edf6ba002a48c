import jax.numpy as jnp
import numpy as np
import pytest
from surgery_products import LoHa, LoKr

import surgery

LAYERS = ('hidden0', 'hidden1', 'output')


@pytest.mark.peft('loha')
def test_loha_equals_peft(net):
  adapter = LoHa(rank=net.config['r'], alpha=net.config['alpha'])
  params = surgery.attach(net.params, adapter, to='**')
  values = {}
  for layer in LAYERS:
    theirs = net.of_layer(layer)
    for k in '12':
      # Theirs is (out, in), so the factors change places.
      values[net.path(layer, f'w{k}_a')] = theirs[f'hada_w{k}_b'].T
      values[net.path(layer, f'w{k}_b')] = theirs[f'hada_w{k}_a'].T
  net.assert_equals_peft(net.written(params, values))


@pytest.mark.peft('lokr')
def test_lokr_equals_peft(net):
  adapter = LoKr(rank=net.config['r'], alpha=net.config['alpha'])
  params = surgery.attach(net.params, adapter, to='**')
  values = {}
  for layer in LAYERS:
    theirs = net.of_layer(layer)
    values[net.path(layer, 'w1')] = theirs['lokr_w1'].T
    values[net.path(layer, 'w2')] = theirs['lokr_w2'].T
  net.assert_equals_peft(net.written(params, values))


@pytest.mark.peft('loha')
def test_updates_have_the_rank_that_they_say(net):
  params = net.randomised(surgery.attach(net.params, LoHa(rank=2), to='**'))
  path = net.path('hidden1', 'kernel')
  update = surgery.merge(params)[path].value - net.params[path].value
  assert 4 == np.linalg.matrix_rank(np.asarray(update), tol=1e-4)


@pytest.mark.parametrize(
  ('size', 'factor', 'expected'),
  [
    (64, -1, (8, 8)),
    (10, -1, (2, 5)),
    (7, -1, (1, 7)),
    (64, 4, (4, 16)),
    (64, 32, (2, 32)),
    (30, 4, (3, 10)),
    (1, -1, (1, 1)),
  ],
)
def test_how_a_side_is_cut(size, factor, expected):
  from surgery_products import _divided

  assert expected == _divided(size, factor)


@pytest.mark.peft('lokr')
def test_a_low_rank_factor_is_a_product(net):
  params = surgery.attach(net.params, LoKr(rank=1, alpha=3.0), to='**')
  params = net.randomised(params)
  path = net.path('hidden1', 'kernel')
  get = lambda name: np.asarray(params[net.path('hidden1', name)].value)
  assert ((8, 1), (1, 8)) == (get('w2_a').shape, get('w2_b').shape)
  expected = np.asarray(net.params[path].value) + 3 * np.kron(
    get('w1'), get('w2_a') @ get('w2_b')
  )
  np.testing.assert_allclose(
    expected, surgery.merge(params)[path].value, rtol=1e-5, atol=1e-5
  )
  assert jnp.isfinite(net.output(params)).all()
