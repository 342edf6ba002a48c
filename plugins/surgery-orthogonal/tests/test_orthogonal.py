import numpy as np
import pytest
from surgery_orthogonal import HRA, OFT

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
