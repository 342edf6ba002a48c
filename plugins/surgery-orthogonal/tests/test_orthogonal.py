import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_orthogonal import BOFT, HRA, OFT

import surgery

LAYERS = ('hidden0', 'hidden1', 'output')


@pytest.mark.peft('oft_block')
def test_oft_equals_peft(net):
  adapter = OFT(block_size=net.config['oft_block_size'])
  params = surgery.attach(net.params, adapter, to='**')
  values = {
    net.path(layer, 'oft_q'): net.of_layer(layer)['oft_R.weight']
    for layer in LAYERS
  }
  net.assert_equals_peft(net.written(params, values))


@pytest.mark.peft('hra')
def test_hra_equals_peft(net):
  params = surgery.attach(net.params, HRA(rank=net.config['r']), to='**')
  values = {
    net.path(layer, 'hra_u'): net.of_layer(layer)['hra_u'] for layer in LAYERS
  }
  net.assert_equals_peft(net.written(params, values))


# PEFT has one factor wherever its CUDA kernel is missing. `boft_factors` was
# made with PEFT 0.21.2 on its path for CUDA, torch's block_diag standing in for
# the kernel.
@pytest.mark.parametrize(
  'factors',
  [
    pytest.param(1, marks=pytest.mark.peft('boft')),
    pytest.param(3, marks=pytest.mark.peft('boft_factors')),
  ],
)
def test_boft_equals_peft(net, factors):
  assert factors == net.config['boft_n_butterfly_factor']
  adapter = BOFT(block_size=net.config['boft_block_size'], factors=factors)
  params = surgery.attach(net.params, adapter, to='**')
  values = {}
  upper = np.triu_indices(4, 1)
  for layer in LAYERS:
    theirs = net.of_layer(layer)
    r = theirs['boft_R']
    # It stores whole matrices, and takes of them what is skew-symmetric.
    skew = (r - r.swapaxes(-1, -2)) / 2
    values[net.path(layer, 'boft_q')] = skew[:, :, upper[0], upper[1]]
    values[net.path(layer, 'boft_s')] = theirs['boft_s'][:, 0]
  params = net.written(params, values)
  net.assert_equals_peft(params)


def test_a_butterfly_lets_each_input_reach_each_other_one():
  params = bx.Params()
  params[('a', 'kernel')] = bx.Param(jnp.eye(16))
  ways = {}
  for factors in (1, 2, 3):
    adapter = BOFT(blocks=4, factors=factors)
    adapted = surgery.attach(params.locked(), adapter, to='a').unlocked()
    path = ('a', 'boft_q')
    adapted[path] = adapted[path].replace(
      value=jnp.full(adapted[path].value.shape, 0.3)
    )
    kernel = surgery.merge(adapted.locked())[('a', 'kernel')].value
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(16), atol=1e-5)
    ways[factors] = int((np.abs(kernel) > 1e-6).sum(0).min())
  assert {1: 4, 2: 8, 3: 16} == ways


@pytest.mark.peft('hra')
@pytest.mark.parametrize('adapter', [OFT(block_size=4), HRA(rank=4)])
def test_lengths_and_angles_of_inputs_stay(net, adapter):
  params = net.randomised(surgery.attach(net.params, adapter, to='**'))
  merged = surgery.merge(params)
  for layer in LAYERS:
    before, after = (
      np.asarray(p[net.path(layer, 'kernel')].value)
      for p in (net.params, merged)
    )
    assert not np.allclose(before, after)
    np.testing.assert_allclose(before.T @ before, after.T @ after, atol=1e-4)


@pytest.mark.peft('hra')
def test_what_does_not_fit_is_refused(net):
  with pytest.raises(
    surgery.SiteError, match=r'16 inputs cannot be cut into blocks of 5.*\[2, 4'
  ):
    surgery.attach(net.params, OFT(block_size=5), to='**/hidden0')
  with pytest.raises(surgery.ConfigError, match='expected an even number'):
    HRA(rank=3)


@pytest.mark.peft('hra')
@pytest.mark.parametrize(
  ('options', 'found'),
  [
    ({'block_size': 5}, 'net/mlp/hidden0/kernel: 16 inputs .* blocks of 5'),
    ({'blocks': 3}, '16 inputs cannot be cut into 3 blocks'),
    ({'factors': 4}, r'needs .* multiple of 8 blocks.*block_size of \[2\]'),
    ({'factors': 5}, 'Take fewer factors'),
    ({'blocks': 16}, 'blocks of two rows or more'),
  ],
)
def test_a_butterfly_that_does_not_fit_is_refused(net, options, found):
  with pytest.raises(surgery.SiteError, match=found):
    surgery.attach(net.params, BOFT(**options), to='**/hidden0')


def test_a_butterfly_has_a_size_of_blocks_or_a_number_of_them():
  with pytest.raises(surgery.ConfigError, match='one of the options block_si'):
    BOFT(block_size=4, blocks=4)
