"""VeRA, VB-LoRA, MiSS and BAT in folders that PEFT wrote."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from surgery_shared import BAT, MiSS, VBLoRA, VeRA

import surgery


@pytest.mark.parametrize(
  'name',
  [
    'vera',
    'vb_lora',
    'variants/vera',
    'variants/vblora',
    'sq/miss',
    'net/miss',
    'net/miss_rest',
    'net/miss_mini',
    'net/miss_bat',
  ],
)
def test_a_folder_is_merged_and_written_as_peft_does(folder, name):
  folder(name).check()


def test_projections_that_were_not_saved_are_refused(folder):
  with pytest.raises(surgery.SurgeryError, match='save_projection=True'):
    folder('variants/vera_unsaved').merged_file()


def test_a_shared_tensor_that_is_missing_is_named(folder, tmp_path):
  one = folder('vera')
  found = load_file(one.path / 'adapter_model.safetensors')
  del found['base_model.vera_B']
  save_file(found, tmp_path / 'adapter_model.safetensors')
  config = (one.path / 'adapter_config.json').read_text()
  (tmp_path / 'adapter_config.json').write_text(config)
  one.path = tmp_path
  with pytest.raises(
    surgery.SurgeryError, match=r'base_model\.vera_B is missing'
  ):
    one.merged_file()


@pytest.mark.peft('vera')
@pytest.mark.parametrize(
  'adapter',
  [
    VeRA(rank=4),
    VBLoRA(rank=2, num_vectors=6, vector_length=16, topk=2),
    MiSS(rank=6),
    MiSS(rank=4, columns=8),
    BAT(rank=8),
  ],
)
def test_an_adapter_of_ours_is_written_and_read_again(net, adapter, tmp_path):
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  weights = surgery.weights(params)
  weights = {
    s: {n: w + 0.1 for n, w in some.items()} for s, some in weights.items()
  }
  params = surgery.with_weights(params, 'default', weights)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  again = surgery.load_adapter(tmp_path / 'out', net.params)
  np.testing.assert_array_equal(net.output(again), net.output(params))


@pytest.mark.peft('vera')
@pytest.mark.parametrize(
  ('adapter', 'message'),
  [
    (MiSS(rank=33), r'output/kernel: rank 33 exceeds the 32 inputs'),
    (
      MiSS(rank=2, columns=4),
      r'10 outputs cannot be cut into blocks of 4 .*\[1, 2, 5\]',
    ),
    (BAT(rank=4), r'blocks of 4 do not divide 32 inputs and 10 outputs'),
  ],
)
def test_blocks_that_do_not_fit_are_refused(net, adapter, message):
  with pytest.raises(surgery.SiteError, match=message):
    surgery.attach(net.params, adapter, to='**/output')


@pytest.mark.peft('vera')
def test_columns_that_differ_have_no_folder(net, tmp_path):
  adapter = MiSS(rank=2, patterns={'**/hidden1': {'columns': 4}})
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  with pytest.raises(surgery.ConfigError, match="one value of 'mini_r'"):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
