"""Heads, norms and biases that PEFT saved with an adapter."""

import json
import pathlib
import shutil

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'peft_variants'
CASES = ('saved', 'bias_all', 'bias_only', 'dropout')


@pytest.fixture
def base(tmp_path):
  shutil.copy(DATA / 'base.safetensors', tmp_path)
  return tmp_path / 'base.safetensors'


def copied(name, tmp_path):
  shutil.copytree(DATA / name, tmp_path / name)
  return tmp_path / name


@pytest.mark.parametrize('name', CASES)
def test_a_merge_is_that_of_peft(name, base, surgery_cli, tmp_path):
  out = tmp_path / 'out.safetensors'
  result = surgery_cli('merge', base, '--with', DATA / name, '-o', out)
  assert result.code == 0, result.err
  expected = load_file(base)
  expected |= load_file(DATA / name / 'merged_changed.safetensors')
  found = load_file(out)
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, atol=2e-5, err_msg=key)


@pytest.mark.parametrize('name', CASES)
def test_what_was_read_is_written_as_it_was(name, base, surgery_cli, tmp_path):
  adapted, out = tmp_path / 'adapted.msgpack', tmp_path / 'out'
  result = surgery_cli('attach', base, '--from', DATA / name, '-o', adapted)
  assert result.code == 0, result.err
  result = surgery_cli('extract', adapted, '--to', 'peft', '-o', out)
  assert result.code == 0, result.err
  expected = load_file(DATA / name / 'adapter_model.safetensors')
  found = load_file(out / 'adapter_model.safetensors')
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)
  said = json.loads((DATA / name / 'adapter_config.json').read_text())
  assert said == json.loads((out / 'adapter_config.json').read_text())


def torch_tree(base):
  params = bx.Params()
  for name, value in load_file(base).items():
    *layer, last = name.split('.')
    if last == 'weight' and value.ndim > 1 and layer != ['emb']:
      last = 'kernel'
      value = value.transpose((*range(2, value.ndim), 1, 0))
    elif last == 'weight':
      last = 'embedding' if layer == ['emb'] else 'scale'
    params['net', *layer, last] = bx.Param(jnp.asarray(value))
  return params.locked()


def test_a_saved_head_is_turned_for_a_jax_model_and_back(base, tmp_path):
  params = torch_tree(base)
  adapted = surgery.load_adapter(DATA / 'saved', params)
  saved = surgery.adapters(adapted)[0].saved
  assert {('net', 'head', 'kernel'), ('net', 'norm', 'scale')} <= set(saved)
  merged = surgery.merge(adapted)
  expected = load_file(DATA / 'saved' / 'merged_changed.safetensors')
  kernel = merged['net', 'head', 'kernel'].value
  np.testing.assert_array_equal(kernel, expected['head.weight'].T)
  detached = surgery.detach(adapted)
  before = params['net', 'head', 'kernel'].value
  np.testing.assert_array_equal(detached['net', 'head', 'kernel'].value, before)
  surgery.save_adapter(tmp_path / 'out', adapted, format='peft')
  found = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  expected = load_file(DATA / 'saved' / 'adapter_model.safetensors')
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_a_head_that_is_said_to_be_saved_and_is_not_is_listed(
  base, surgery_cli, tmp_path
):
  folder = copied('saved', tmp_path)
  found = load_file(folder / 'adapter_model.safetensors')
  del found['base_model.model.head.bias']
  save_file(found, folder / 'adapter_model.safetensors')
  out = tmp_path / 'out.safetensors'
  result = surgery_cli('merge', base, '--with', folder, '-o', out)
  assert result.code != 0
  assert 'no tensors for: head.bias' in result.err


def test_a_tensor_that_nobody_said_is_saved_is_listed(
  base, surgery_cli, tmp_path
):
  folder = copied('saved', tmp_path)
  path = folder / 'adapter_config.json'
  said = json.loads(path.read_text())
  path.write_text(json.dumps({**said, 'modules_to_save': ['norm']}))
  out = tmp_path / 'out.safetensors'
  result = surgery_cli('merge', base, '--with', folder, '-o', out)
  assert 'no place in the base for: head.bias, head.weight' in result.err


def test_a_head_of_other_classes_says_what_to_do(base, surgery_cli, tmp_path):
  tensors = load_file(base)
  tensors['head.weight'] = np.ones((9, 16), 'float32')
  save_file(tensors, base)
  out = tmp_path / 'out.safetensors'
  result = surgery_cli('merge', base, '--with', DATA / 'saved', '-o', out)
  assert 'expected shape (9, 16), which the base has' in result.err


def test_a_head_trained_here_becomes_modules_to_save(base, tmp_path):
  params = torch_tree(base)
  params = surgery.attach(params, surgery.LoRA(rank=2), to='**/fc0')
  params = surgery.freeze(params, '!**/head')
  changed = params.unlocked()
  for name in ('kernel', 'bias'):
    param = params['net', 'head', name]
    changed['net', 'head', name] = param.replace(value=param.value + 1)
  params = changed.locked()
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  said = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert ['net.head'] == said['modules_to_save']
  found = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  head = load_file(base)['head.weight']
  np.testing.assert_array_equal(
    found['base_model.model.net.head.weight'], head + 1
  )
  again = surgery.load_adapter(tmp_path / 'out', torch_tree(base))
  merged = surgery.merge(again)['net', 'head', 'kernel'].value
  np.testing.assert_array_equal(merged, head.T + 1)
