"""Relatives of LoRA in folders that PEFT wrote."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from surgery_lora_family import BiasLoRA, DoRA, OLoRA, PiSSA

import surgery


@pytest.mark.parametrize(
  'name',
  [
    'dora',
    'lora_bias',
    'net/large_rank_dora',
    'variants/dora',
    'variants/dora_rslora',
    'variants/lora_bias',
    'variants/lora_bias_conv',
    'variants/pissa',
  ],
)
def test_a_folder_is_merged_and_written_as_peft_does(folder, name):
  folder(name).check()


def test_the_part_that_olora_took_out_is_computed_again(folder):
  # Its scale, 6 / 4, goes into B and out again, which rounds the last bit.
  folder('variants/olora').check(exact=False)


@pytest.mark.peft('dora')
@pytest.mark.parametrize(
  ('adapter', 'changes'),
  [
    (DoRA(rank=2, alpha=5), {'use_dora': True, 'lora_bias': False}),
    (BiasLoRA(rank=2, alpha=5), {'use_dora': False, 'lora_bias': True}),
    (PiSSA(rank=2), {'init_lora_weights': True, 'r': 4}),
    (OLoRA(rank=2), {'init_lora_weights': True, 'r': 4}),
  ],
)
def test_an_adapter_of_ours_is_written_and_read_again(
  net, adapter, changes, tmp_path
):
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  moved = {
    path: param.replace(value=param.value + 0.1)
    for path, param in params.items()
    if path[-1].startswith(('lora_a', 'lora_b')) and param.trainable
  }
  for path, param in moved.items():
    params = params.unlocked()
    params[path] = param
    params = params.locked()
  out = tmp_path / 'out'
  surgery.save_adapter(out, params, format='peft')
  config = json.loads((out / 'adapter_config.json').read_text())
  assert changes.items() <= config.items()
  again = surgery.load_adapter(out, net.params)
  np.testing.assert_allclose(
    net.output(again), net.output(params), rtol=1e-5, atol=1e-5
  )


@pytest.mark.peft('dora')
def test_a_subclass_does_not_inherit_how_peft_stores_its_base(net, tmp_path):
  class Halved(DoRA):
    """Another computation under another name."""

    name = 'halved'

    def apply(self, site, name, base, weights):
      return super().apply(site, name, base, weights) / 2

  host = surgery.Host(plugins=[Halved])
  params = surgery.attach(
    net.params, Halved(rank=2), to='**/hidden0', host=host
  )
  with pytest.raises(surgery.FormatError, match="no adapter type 'halved'"):
    surgery.save_adapter(tmp_path / 'out', params, format='peft', host=host)


def test_a_magnitude_of_another_size_is_an_error(folder, tmp_path):
  from safetensors.numpy import save_file

  one = folder('dora')
  found = load_file(one.path / 'adapter_model.safetensors')
  name = 'base_model.model.mlp.hidden0.lora_magnitude_vector'
  found[name] = found[name][:-1]
  save_file(found, tmp_path / 'adapter_model.safetensors')
  (tmp_path / 'adapter_config.json').write_text(
    (one.path / 'adapter_config.json').read_text()
  )
  one.path = tmp_path
  with pytest.raises(
    surgery.SurgeryError, match=r'expected shape \(64,\), found \(63,\)'
  ):
    one.merged_file()


def test_dora_of_a_single_file_is_merged_as_peft_does(folder):
  roles = {
    'lora_A.weight': 'lora_down.weight',
    'lora_B.weight': 'lora_up.weight',
    'lora_magnitude_vector': 'dora_scale',
  }
  alphas = dict.fromkeys(('mlp.hidden0', 'mlp.hidden1', 'mlp.output'), 8)
  folder('dora').as_single_file(roles, alphas)
