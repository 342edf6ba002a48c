"""Folders that are damaged, hostile, or not what they say."""

import json
import os
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery.host.manager import default_host
from surgery.passes import extract


def load(lora):
  return surgery.load_adapter(lora.folder, lora.params)


def test_inspect_shows_what_a_folder_says(lora, surgery_cli):
  result = surgery_cli('inspect', lora.folder)
  assert result.code == 0, result.err
  assert 'PEFT LORA:' in result.out
  assert 'r=4' in result.out
  assert 'adapter: 6 tensors' in result.out
  data = json.loads(surgery_cli('inspect', lora.folder, '--json').out)
  assert data['peft']['lora_alpha'] == 8


def test_the_tensors_file_stands_for_its_folder(lora):
  path = lora.folder / 'adapter_model.safetensors'
  assert surgery.open(path).manifest.kind == 'adapter'


def test_opening_reads_no_tensor(lora):
  path = lora.folder / 'adapter_model.safetensors'
  size = path.stat().st_size
  opened = surgery.open(lora.folder)
  os.truncate(path, size)  # Still whole; only named here.
  assert len(opened) == 6


def test_a_folder_that_was_converted_is_still_one(lora, surgery_cli, tmp_path):
  out = tmp_path / 'x.safetensors'
  assert surgery_cli('convert', lora.folder, out).code == 0
  params = surgery.load_adapter(out, lora.params)
  y, _ = lora.model(params, *lora.inputs)
  np.testing.assert_allclose(y, lora.y, atol=1e-5, rtol=1e-5)
  again = tmp_path / 'again'
  assert surgery_cli('convert', out, again, '--to', 'peft').code == 0
  found = load_file(again / 'adapter_model.safetensors')
  assert set(lora.tensors) == set(found)


# Configurations.


@pytest.mark.parametrize('value', [3, 0, 'x', {'a': 1}, True])
def test_an_unknown_key_with_a_value_is_refused(lora, config, value):
  config(new_scaling=value)
  with pytest.raises(surgery.ConfigError, match='unknown keys may change'):
    load(lora)


@pytest.mark.parametrize('value', [None, False, '', [], {}])
def test_an_unknown_key_that_asks_for_nothing_is_kept(
  lora, config, value, tmp_path
):
  config(new_scaling=value)
  surgery.save_adapter(tmp_path / 'out', load(lora), format='peft')
  said = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert said['new_scaling'] == value


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'use_qalora': True}, 'use_qalora is True, and cannot be done'),
    ({'layer_replication': [[0, 2]]}, 'layers of the base are repeated'),
    ({'alora_invocation_tokens': [1]}, 'for some tokens of a text only'),
    ({'init_lora_weights': 'corda'}, 'changed the base when training began'),
    ({'init_lora_weights': 'pissa_niter_16'}, 'path_initial_model_for_weight'),
    ({'rank_pattern': {'(': 2}}, 'no regular expression'),
    ({'rank_pattern': [2]}, 'expected values by pattern'),
    ({'target_modules': 'all-linear'}, "'all-linear' is a word for PEFT"),
    ({'target_modules': {'a': 1}}, 'target_modules: expected a list of names'),
    ({'r': 'four'}, 'its configuration: .*rank'),
    ({'lora_alpha': -1}, 'its configuration: .*alpha'),
  ],
)
def test_a_configuration_that_cannot_be_done_is_refused(
  lora, config, changes, message
):
  config(**changes)
  with pytest.raises(surgery.ConfigError, match=message):
    load(lora)


@pytest.mark.parametrize(
  ('kind', 'reason'),
  [
    ('PREFIX_TUNING', 'keys and values, not those of layers'),
    ('XLORA', 'a router chooses'),
    ('ADAMSS', 'no adapter type reads it'),
    (None, 'expected the name of a method'),
    (7, 'expected the name of a method'),
  ],
)
def test_a_method_that_nothing_reads_is_refused_by_name(
  lora, config, kind, reason
):
  config(peft_type=kind)
  with pytest.raises(surgery.FormatError, match=reason):
    load(lora)


def test_a_lie_about_the_rank_is_an_error(lora, config):
  config(r=8)
  with pytest.raises(
    surgery.FormatError,
    match=r'lora_A.weight: expected shape \(8, 16\), found \(4, 16\)',
  ):
    load(lora)


def test_a_lie_about_a_rank_larger_than_the_layer_is_an_error(lora, config):
  config(r=100_000)
  with pytest.raises(surgery.FormatError, match=r'shape \(100000, 16\), found'):
    load(lora)


def test_a_lie_about_the_rank_costs_no_memory(lora, config):
  config(r=10**12)
  with pytest.raises(
    surgery.FormatError, match=r'makes \d\d,000,000,000,000 numbers, and its'
  ):
    load(lora)


# Tensors and modules.


def test_a_tensor_without_a_place_is_listed(lora, tensors):
  def add(found):
    found['base_model.model.mlp.other.lora_A.weight'] = np.ones((4, 16), 'f4')
    found['base_model.model.mlp.output.weight'] = np.ones((10, 32), 'f4')
    found['stray'] = np.ones(3, 'f4')

  tensors(add)
  with pytest.raises(surgery.FormatError) as caught:
    load(lora)
  said = str(caught.value)
  assert 'no place in the base for: mlp.other, mlp.output.weight, stray' in said


def test_a_place_without_tensors_is_listed(lora, tensors):
  def take(found):
    for m in 'AB':
      del found[f'base_model.model.mlp.hidden1.lora_{m}.weight']

  tensors(take)
  base = surgery.open(lora.base_file)
  with pytest.raises(surgery.FormatError, match=r'no tensors for: mlp.hidden1'):
    extract.insert(base, surgery.open(lora.folder), host=default_host())


def test_half_of_a_module_is_an_error(lora, tensors):
  tensors(lambda t: t.pop('base_model.model.mlp.hidden1.lora_B.weight'))
  with pytest.raises(
    surgery.FormatError, match=r'mlp.hidden1.lora_B.weight is missing'
  ):
    load(lora)


def test_modules_that_the_configuration_does_not_mean_are_listed(lora, config):
  config(target_modules=['hidden0', 'output'])
  with pytest.raises(
    surgery.FormatError, match='not meant by target_modules: mlp.hidden1'
  ):
    load(lora)


def test_an_adapter_of_another_base_is_refused(lora, tmp_path):
  base = load_file(lora.base_file)
  base['mlp.hidden0.weight'] = np.ones((64, 17), 'float32')
  save_file(base, tmp_path / 'other.safetensors')
  with pytest.raises(surgery.FormatError, match='is for another base') as error:
    extract.insert(
      surgery.open(tmp_path / 'other.safetensors'),
      surgery.open(lora.folder),
      host=default_host(),
    )
  assert '16 inputs and 64 outputs' in str(error.value)


# Files.


def test_a_pickle_is_never_opened(lora):
  path = lora.folder / 'adapter_model.safetensors'
  path.rename(lora.folder / 'adapter_model.bin')
  with pytest.raises(surgery.FormatError, match='safe_serialization=True'):
    surgery.open(lora.folder)


def test_a_folder_without_tensors_says_so(lora):
  (lora.folder / 'adapter_model.safetensors').unlink()
  with pytest.raises(surgery.FormatError, match='expected adapter_model.safe'):
    surgery.open(lora.folder)


def test_a_large_configuration_is_not_read(lora):
  with (lora.folder / 'adapter_config.json').open('wb') as file:
    file.truncate(100_000_000)
  with pytest.raises(surgery.FormatError, match='found 100,000,000 bytes'):
    surgery.open(lora.folder)


@pytest.mark.parametrize('text', ['[]', '{', '{"r": NaN}', '{"r":1,"r":2}'])
def test_a_configuration_that_is_no_object_is_refused(lora, text):
  (lora.folder / 'adapter_config.json').write_text(text)
  with pytest.raises(surgery.FormatError, match=r'adapter_config\.json'):
    surgery.open(lora.folder)


@pytest.mark.parametrize(
  'name', ['adapter_config.json', 'adapter_model.safetensors']
)
def test_a_link_out_of_the_folder_is_refused(lora, name, tmp_path):
  (lora.folder / name).rename(tmp_path / name)
  (lora.folder / name).symlink_to(tmp_path / name)
  with pytest.raises(surgery.FormatError, match='outside of the folder'):
    surgery.open(lora.folder)


def test_a_link_to_nothing_and_a_device_are_refused(lora):
  path = lora.folder / 'adapter_config.json'
  path.unlink()
  path.symlink_to('/dev/zero')
  with pytest.raises(surgery.FormatError, match='expected a regular file'):
    surgery.open(lora.folder)
  path.unlink()
  path.symlink_to(lora.folder / 'none')
  with pytest.raises(surgery.FormatError, match='where there is nothing'):
    surgery.open(lora.folder)


def test_a_cache_of_a_hub_is_opened(lora, tmp_path):
  blobs = tmp_path / 'cache' / 'blobs'
  snapshot = tmp_path / 'cache' / 'snapshots' / 'abc'
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for number, path in enumerate(sorted(lora.folder.iterdir())):
    path.rename(blobs / str(number))
    (snapshot / path.name).symlink_to(
      pathlib.Path('..', '..', 'blobs', str(number))
    )
  assert len(surgery.load_adapter(snapshot, lora.params)) > 6


def test_a_folder_that_has_something_in_it_is_not_written_over(lora, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  params = load(lora)
  surgery.save_adapter(out, params, format='peft')
  (out / 'README.md').write_text('mine')
  with pytest.raises(FileExistsError, match='A folder is never replaced'):
    surgery.save_adapter(out, params, format='peft')
  assert (out / 'README.md').read_text() == 'mine'
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'base.safetensors',
    'out',
    'peft',
  ]


def test_the_shell_refuses_a_full_folder_before_it_reads(
  lora, surgery_cli, tmp_path
):
  adapted = tmp_path / 'adapted.msgpack'
  surgery.save(adapted, load(lora))
  result = surgery_cli('extract', adapted, '--to', 'peft', '-o', lora.folder)
  assert result.code != 0
  assert 'A folder is never replaced' in result.err
  result = surgery_cli(
    'convert', lora.base_file, tmp_path / 'p', '--to', 'peft'
  )
  assert 'PEFT has folders of one adapter without its base' in result.err


def test_names_are_for_adapters_of_other_programs(lora, tmp_path):
  surgery.save_adapter(tmp_path / 'a.msgpack', load(lora))
  with pytest.raises(surgery.ConfigError, match='names are for adapters of'):
    surgery.load_adapter(tmp_path / 'a.msgpack', lora.params, names={'a': 'b'})
