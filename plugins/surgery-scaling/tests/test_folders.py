"""IA3 in folders that PEFT wrote."""

import json

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_scaling import IA3, LNTuning

import surgery


@pytest.mark.parametrize(
  'name',
  [
    'ia3',
    'variants/ia3_conv',
    'variants/ia3_conv_ff',
    'variants/ln',
    'conv/ia3_groups',
    'net/tokens',
    'tied/tokens_tied',
  ],
)
def test_a_folder_is_merged_and_written_as_peft_does(folder, name):
  folder(name).check()


@pytest.mark.peft('ia3')
def test_an_adapter_of_ours_is_written_and_read_again(net, tmp_path):
  adapter = IA3(patterns={'**/hidden1': {'feedforward': True}})
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  weights = surgery.weights(params)
  weights = {
    s: {n: w * 1.5 for n, w in some.items()} for s, some in weights.items()
  }
  params = surgery.with_weights(params, 'default', weights)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  config = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert ['net.mlp.hidden1'] == config['feedforward_modules']
  again = surgery.load_adapter(tmp_path / 'out', net.params)
  np.testing.assert_array_equal(net.output(again), net.output(params))


def test_scales_that_differ_from_tap_to_tap_have_no_folder(tmp_path):
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((3, 3, 2, 4)))
  params = surgery.attach(params.locked(), IA3(feedforward=True), to='net')
  scale = jnp.arange(18.0).reshape(3, 3, 2)
  params = surgery.with_weights(
    params, 'default', {('net', 'kernel'): {'scale': scale}}
  )
  with pytest.raises(surgery.SiteError, match='differ from tap to tap'):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
  assert not (tmp_path / 'out').exists()


def test_differences_of_norms_have_no_folder(tmp_path):
  params = bx.Params()
  params['net', 'scale'] = bx.Param(jnp.ones(4))
  params = surgery.attach(params.locked(), LNTuning(), to='net')
  with pytest.raises(surgery.ConfigError, match='no parameters of PEFT'):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
