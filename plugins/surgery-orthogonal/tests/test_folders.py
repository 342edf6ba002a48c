"""OFT, BOFT and HRA in folders that PEFT wrote."""

import json

import numpy as np
import pytest
from surgery_orthogonal import BOFT, HRA, OFT

import surgery


@pytest.mark.parametrize(
  'name',
  [
    'boft',
    'hra',
    'oft_block',
    'variants/boft_num',
    'variants/hra',
    'variants/oft_neumann',
    'variants/oft_neumann3',
    'variants/oft_r',
    'conv/hra_conv',
    'conv/oft_conv',
  ],
)
def test_a_folder_is_merged_and_written_as_peft_does(folder, name):
  folder(name).check()


def test_a_butterfly_of_a_convolution_has_the_order_of_torch(folder):
  one = folder('conv/boft_conv')
  one.check(live=False)
  with pytest.raises(surgery.SiteError, match=r'conv: .*cut into other blocks'):
    one.live()


def test_patches_that_overlap_are_refused(folder):
  with pytest.raises(surgery.SurgeryError, match='which no kernel computes'):
    folder('conv/oft_conv_taps').merged_file()


@pytest.mark.parametrize('version', ['0.17.1', None])
def test_a_series_of_an_older_release_is_refused(folder, version, tmp_path):
  one = folder('variants/oft_neumann')
  tensors = (one.path / 'adapter_model.safetensors').read_bytes()
  (tmp_path / 'adapter_model.safetensors').write_bytes(tensors)
  said = json.loads((one.path / 'adapter_config.json').read_text())
  said['peft_version'] = version
  (tmp_path / 'adapter_config.json').write_text(json.dumps(said))
  one.path = tmp_path
  with pytest.raises(surgery.SurgeryError, match=r'releases before 0\.18'):
    one.merged_file()


def test_blocks_that_are_shared_are_refused(folder):
  with pytest.raises(surgery.SurgeryError, match='block_share is True'):
    folder('variants/oft_share').merged_file()


@pytest.mark.peft('hra')
@pytest.mark.parametrize(
  ('adapter', 'said'),
  [
    (OFT(block_size=4), {'use_cayley_neumann': False, 'oft_block_size': 4}),
    (OFT(block_size=4, terms=4), {'num_cayley_neumann_terms': 4}),
    (BOFT(), {'boft_block_size': 4, 'boft_block_num': 0}),
    (BOFT(blocks=4), {'boft_block_size': 0, 'boft_block_num': 4}),
    (HRA(rank=4), {'r': 4}),
  ],
)
def test_an_adapter_of_ours_is_written_and_read_again(
  net, adapter, said, tmp_path
):
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  rng = np.random.default_rng(0)
  weights = {
    site: {n: w + 0.1 * rng.standard_normal(w.shape) for n, w in some.items()}
    for site, some in surgery.weights(params).items()
  }
  params = surgery.with_weights(params, 'default', weights)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  config = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert said.items() <= config.items()
  again = surgery.load_adapter(tmp_path / 'out', net.params)
  np.testing.assert_allclose(
    net.output(again), net.output(params), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize('adapter', [OFT(block_size=4), BOFT(block_size=4)])
def test_blocks_of_a_convolution_have_no_folder(adapter, tmp_path):
  import blox as bx
  import jax.numpy as jnp

  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((3, 3, 4, 4)))
  params = surgery.attach(params.locked(), adapter, to='net')
  with pytest.raises(surgery.SiteError, match='a convolution'):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
