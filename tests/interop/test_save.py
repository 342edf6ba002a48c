"""Model folders by `surgery.save` and `surgery.load`."""

import errno
import json
import warnings

import numpy as np
import pytest

import surgery
from surgery.files import output
from tests.cli.saved import assert_same, values


def names(folder):
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


@pytest.fixture
def alone():
  """Makes warnings errors."""
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    yield


def test_a_folder_that_is_loaded_and_saved_is_the_folder(hf, tmp_path, alone):
  source, out = hf('llama'), tmp_path / 'out'
  params = surgery.load(source)
  surgery.save(f'{out}/', params, like=source)
  assert names(source) == names(out)
  for name in names(out):
    if name != 'model.safetensors':
      assert (source / name).read_bytes() == (out / name).read_bytes(), name
  assert_same(values(source / 'model.safetensors'), values(out))
  again = surgery.load(out)
  assert params.keys() == again.keys()
  # An empty folder that is there needs no slash.
  (tmp_path / 'empty').mkdir()
  surgery.save(tmp_path / 'empty', params, like=source)
  assert names(source) == names(tmp_path / 'empty')


def test_the_configuration_follows_and_states_what_is_asked(
  hf, tmp_path, alone
):
  source, out = hf('llama'), tmp_path / 'out'
  params = surgery.cast(surgery.load(source), 'bf16')
  params = surgery.drop(params, 'model/layers/2')
  config = {'note': 'mine', 'rope_parameters.rope_theta': 2.5}
  surgery.save(f'{out}/', params, like=source, config=config)
  expected = json.loads((source / 'config.json').read_text())
  expected.update(num_hidden_layers=2, dtype='bfloat16', note='mine')
  expected['rope_parameters']['rope_theta'] = 2.5
  assert expected == json.loads((out / 'config.json').read_text())
  # As the shell has it of the same file.
  assert 'bfloat16' == surgery.open(out)['lm_head', 'weight'].dtype


def test_what_looks_stale_is_a_warning(hf, tmp_path):
  source, out = hf('llama'), tmp_path / 'out'
  params = surgery.drop(surgery.load(source), 'lm_head')
  with pytest.warns(UserWarning, match='transformers would draw a new head'):
    surgery.save(f'{out}/', params, like=source)
  adapted = surgery.attach(
    surgery.load(source), surgery.LoRA(rank=2), to='**/q_proj'
  )
  with pytest.warns(UserWarning, match='an adapter is attached'):
    surgery.save(f'{tmp_path}/adapted/', adapted, like=source)
  found = surgery.load(tmp_path / 'adapted')
  assert [one.name for one in surgery.adapters(found)] == ['default']


def test_a_folder_without_one_like_it_is_the_model_alone(hf, tmp_path, alone):
  params = surgery.load(hf('bert'))
  surgery.save(f'{tmp_path}/out/', params)
  assert ['model.safetensors'] == names(tmp_path / 'out')
  with pytest.raises(surgery.SurgeryError, match=r'there is no config\.json'):
    surgery.save(f'{tmp_path}/more/', params, config={'a': 1})
  assert not (tmp_path / 'more').exists()


def test_what_is_for_folders_is_refused_for_files(hf, tmp_path):
  source = hf('bert')
  params = surgery.load(source)
  for more in ({'like': source}, {'config': {'a': 1}}):
    with pytest.raises(surgery.ConfigError, match='is for folders'):
      surgery.save(tmp_path / 'a.safetensors', params, **more)
  assert not (tmp_path / 'a.safetensors').exists()


def test_a_folder_that_holds_something_is_not_replaced(hf, tmp_path):
  source = hf('bert')
  params = surgery.load(source)
  before = names(source)
  with pytest.raises(FileExistsError, match='never replaced'):
    surgery.save(f'{source}/', params, like=source)
  link = tmp_path / 'link'
  link.symlink_to(source)
  for name in (link, f'{link}/'):
    with pytest.raises((surgery.FormatError, FileExistsError)):
      surgery.save(name, params, like=source)
  assert before == names(source)


def test_a_full_disk_leaves_nothing(hf, tmp_path, monkeypatch):
  source = hf('llama')
  params = surgery.load(source)

  def full(fd, data):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(output, '_write', full)
  with pytest.raises(OSError, match='No space') as caught:
    surgery.save(f'{tmp_path}/out/', params, like=source)
  assert '.surgery-' not in str(caught.value)
  assert ['llama'] == [p.name for p in tmp_path.iterdir()]


def test_a_model_of_another_tree_is_saved_with_a_word(hf, tmp_path):
  source = hf('llama')
  tree = surgery.Recipe([{'map': 'llama-flax'}]).apply(surgery.open(source))
  tree.write(tmp_path / 'tree.msgpack')
  params = surgery.load(tmp_path / 'tree.msgpack')
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    surgery.save(f'{tmp_path}/out/', params, like=source)
  said = ' '.join(str(one.message) for one in caught)
  assert 'hidden_size is 16 in config.json, and no tensor tells it' in said
  np.testing.assert_array_equal(
    params['lm_head', 'kernel'].value,
    surgery.load(tmp_path / 'out')['lm_head', 'kernel'].value,
  )
