"""What plans note of folders that vLLM does not load."""

import json
import pathlib
import re

import pytest

import surgery

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'peft_cases'


def noted(folder, surgery_cli, tmp_path):
  adapted = tmp_path / 'adapted.msgpack'
  base = folder.parent / 'base.safetensors'
  result = surgery_cli('attach', base, '--from', folder, '-o', adapted)
  assert result.code == 0, result.err
  extract = ('extract', adapted, '--to', 'peft', '-o', tmp_path / 'out')
  result = surgery_cli(*extract, '--dry-run')
  assert result.code == 0, result.err
  return [line for line in result.out.splitlines() if 'vLLM' in line]


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    (
      'tied/saved_ensured',
      'does not load this folder: modules_to_save has emb',
    ),
    ('net/rows', 'does not know the tensors .*trainable_tokens_delta'),
    ('moe/experts_patterns', '0.10 takes r and lora_alpha for all modules'),
  ],
)
def test_what_vllm_does_not_load_is_noted(name, message, surgery_cli, tmp_path):
  line, *_ = noted(DATA / name, surgery_cli, tmp_path)
  assert line.startswith('note')
  assert re.search(message, line)


@pytest.mark.parametrize('name', ['net/large_rank', 'moe/experts', 'net/mica'])
def test_nothing_is_noted_of_what_it_loads(name, surgery_cli, tmp_path):
  assert noted(DATA / name, surgery_cli, tmp_path) == []


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'use_dora': True}, 'use_dora is not supported'),
    ({'lora_bias': True}, 'lora_bias is not supported'),
    ({'init_lora_weights': 'pissa'}, "is 'pissa', which changes the base"),
    ({'peft_type': 'IA3'}, None),
    ({'modules_to_save': ['score']}, None),
  ],
)
def test_configurations_are_told_apart(change, message):
  from surgery.interop.peft import serving

  said = json.loads((DATA / 'net/mica/adapter_config.json').read_text())
  found = serving.notes({**said, **change}, {})
  if message is None:
    assert found == []
  else:
    assert message in found[0]


def test_a_convolution_is_noted():
  from surgery.interop.peft import serving

  opened = surgery.open(DATA / 'conv/lora_groups')
  tensors = {'.'.join(path): leaf for path, leaf in opened.items()}
  [found] = serving.notes({'peft_type': 'LORA'}, tensors)
  assert 'adapts no convolutions: base_model.model.conv.lora_A.weight' in found
