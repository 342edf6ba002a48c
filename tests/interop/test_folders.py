"""Model folders, in and out, through the shell and recipes."""

import errno
import json

import numpy as np
import pytest

import surgery
from surgery.files import output
from surgery.interop import folders
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.recipes import running
from tests.cli.saved import assert_same, values


def names(folder):
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def config(folder):
  return json.loads((folder / 'config.json').read_text())


ALONG = ['LICENSE.txt', 'generation_config.json', 'tokenizer.json']


def test_a_copy_of_a_folder_is_the_folder(hf, tmp_path, surgery_cli):
  source = hf('llama')
  (source / 'README.md').write_text('about the base')
  (source / 'optimizer.pt').write_bytes(b'0')
  out = tmp_path / 'out'
  done = surgery_cli('convert', source, f'{out}/', '--no-manifest')
  assert 0 == done.code, done.err
  assert sorted([*ALONG, 'config.json', 'model.safetensors']) == names(out)
  for name in names(out):
    assert (source / name).read_bytes() == (out / name).read_bytes(), name


def test_an_empty_folder_needs_no_slash(hf, tmp_path, surgery_cli):
  out = tmp_path / 'out'
  out.mkdir()
  done = surgery_cli('cast', hf('bert'), '--to', 'bf16', '-o', out)
  assert 0 == done.code, done.err
  assert 'bfloat16' == config(out)['dtype']
  assert surgery.open(out)['pooler', 'dense', 'bias'].dtype == 'bfloat16'


def test_the_plan_says_what_it_does_to_the_configuration(
  hf, tmp_path, surgery_cli
):
  source = hf('qwen2')
  recipe = tmp_path / 'r.yaml'
  recipe.write_text(
    "- drop: 'model/layers/1'\n- renumber: 'model/layers/<i>'\n- cast: bf16\n"
  )
  out = tmp_path / 'out'
  plan = surgery_cli(
    'run', recipe, f'model={source}', f'out={out}/', '--dry-run'
  )
  assert 0 == plan.code, plan.err
  assert not out.exists()
  lines = plan.out.splitlines()
  assert (
    'config    num_hidden_layers: 3 -> 2  (layers of layers/<i>/**)' in lines
  )
  assert (
    'config    dtype: "float32" -> "bfloat16"  (the dtype of most numbers)'
    in lines
  )
  assert 'along     tokenizer.json' in lines
  assert 'along     config.json' not in lines
  done = surgery_cli('run', recipe, f'model={source}', f'out={out}/', '--json')
  said = json.loads(done.out)['folder']
  assert ALONG == said['along']
  assert [] == said['warnings']
  expected = {
    **config(source),
    'num_hidden_layers': 2,
    'dtype': 'bfloat16',
    'layer_types': ['full_attention'] * 2,
  }
  assert expected == config(out)
  assert list(config(source)) == list(config(out))
  assert (source / 'tokenizer.json').read_bytes() == (
    out / 'tokenizer.json'
  ).read_bytes()


def test_repeated_layers_take_their_items_along(hf, tmp_path):
  source = hf('gemma2')
  kinds = config(source)['layer_types']
  out = tmp_path / 'out'
  recipe = surgery.Recipe(
    [{'repeat': {'layers': 'model/layers/<i>', 'numbers': '1:2'}}]
  )
  recipe.run(model=source, out=f'{out}/')
  assert [kinds[k] for k in (0, 1, 1, 2)] == config(out)['layer_types']
  assert 4 == config(out)['num_hidden_layers']


def test_a_tied_head_is_stated(hf, tmp_path):
  source = hf('llama')
  out = tmp_path / 'out'
  recipe = surgery.Recipe(
    [
      {
        'tie': {
          'rules': 'model/embed_tokens/weight -> lm_head/weight',
          'check': False,
        }
      }
    ]
  )
  plan = recipe.run(model=source, out=f'{out}/')
  assert config(out)['tie_word_embeddings'] is True
  assert [] == plan.report()['folder']['warnings']


def test_a_large_vocabulary_is_stated(hf, tmp_path, surgery_cli):
  out = tmp_path / 'out'
  recipe = surgery.Recipe(
    [{'resize-vocab': {'select': '**/embed_tokens/weight', 'size': 48}}]
  )
  recipe.run(model=hf('gemma'), out=f'{out}/')
  assert 48 == config(out)['vocab_size']


def test_options_state_more(hf, tmp_path, surgery_cli):
  source = hf('llama')
  out = tmp_path / 'out'
  done = surgery_cli(
    'convert', source, f'{out}/',
    '--config', 'num_hidden_layers=9', '--config', 'note=mine',
    '--config', 'rope_parameters.rope_theta=2.5',
  )  # fmt: skip
  assert 0 == done.code, done.err
  said = config(out)
  assert (9, 'mine') == (said['num_hidden_layers'], said['note'])
  assert {'rope_theta': 2.5, 'rope_type': 'default'} == said['rope_parameters']
  # It is part of what makes the folder again.
  shown = surgery_cli('inspect', out, '--history').out
  assert 'path: out/' in shown
  assert 'num_hidden_layers: 9' in shown


def test_files_come_from_another_folder_where_that_is_meant(
  hf, tmp_path, surgery_cli
):
  source = hf('llama')
  alone = tmp_path / 'alone.msgpack'
  recipe = surgery.Recipe(
    [{'drop': 'model/layers/2'}], outputs={'out': str(alone)}
  )
  recipe.run(model=source)
  out = tmp_path / 'out'
  done = surgery_cli('convert', alone, f'{out}/', '--like', source)
  assert 0 == done.code, done.err
  assert 2 == config(out)['num_hidden_layers']
  assert sorted([*ALONG, 'config.json', 'model.safetensors']) == names(out)
  assert_same(values(alone), values(out / 'model.safetensors'))


def test_a_model_without_a_configuration_is_alone(tmp_path, surgery_cli):
  file = tmp_path / 'base.safetensors'
  array = np.ones((2, 2), np.float32)
  Checkpoint(
    {('a', 'kernel'): Leaf(lambda: array, array.shape, 'float32')}
  ).write(file)
  (tmp_path / 'LICENSE').write_text("somebody else's")
  (tmp_path / 'config.json').write_text('{"editor": 1}')
  out = tmp_path / 'out'
  done = surgery_cli('convert', file, f'{out}/')
  assert 0 == done.code, done.err
  assert ['model.safetensors'] == names(out)
  done = surgery_cli(
    'convert', file, f'{tmp_path / "more"}/', '--config', 'a=1'
  )
  assert 3 == done.code
  assert 'there is no config.json beside' in done.err
  assert '--like FOLDER' in done.err


def test_sets_have_the_names_that_transformers_has(hf, tmp_path, surgery_cli):
  source = hf('llama')
  out = tmp_path / 'out'
  done = surgery_cli('convert', source, f'{out}/', '--shard-size', '10KB')
  assert 0 == done.code, done.err
  assert 'model.safetensors.index.json' in names(out)
  assert 'model-00001-of-00004.safetensors' in names(out)
  assert_same(values(source / 'model.safetensors'), values(out))
  # And back: a set is one file again.
  again = tmp_path / 'again'
  done = surgery_cli('convert', out, f'{again}/', '--no-manifest')
  assert 0 == done.code, done.err
  assert 'model.safetensors' in names(again)
  assert (source / 'model.safetensors').read_bytes() == (
    again / 'model.safetensors'
  ).read_bytes()


def test_more_than_five_gigabytes_are_a_set(hf, tmp_path, monkeypatch):
  monkeypatch.setattr(folders, 'SHARD_SIZE', 10_000)
  out = tmp_path / 'out'
  surgery.Recipe([]).run(model=hf('llama'), out=f'{out}/')
  assert 'model.safetensors.index.json' in names(out)


def test_a_folder_of_flax_is_called_as_flax_calls_it(hf, tmp_path, surgery_cli):
  out = tmp_path / 'out'
  done = surgery_cli('convert', hf('bert'), f'{out}/', '--to', 'msgpack')
  assert 0 == done.code, done.err
  assert 'flax_model.msgpack' in names(out)


def test_sentence_transformers_take_their_modules_along(
  hf, tmp_path, surgery_cli
):
  source = hf('bert')
  (source / 'modules.json').write_text(
    json.dumps([{'path': ''}, {'path': '1_Pooling'}, {'path': '../other'}])
  )
  (source / '1_Pooling').mkdir()
  (source / '1_Pooling' / 'config.json').write_text('{"pooling": "mean"}')
  (source / '1_Pooling' / 'pytorch_model.bin').write_bytes(b'0')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'secret.json').write_text('{}')
  out = tmp_path / 'out'
  done = surgery_cli('convert', source, f'{out}/')
  assert 0 == done.code, done.err
  assert '1_Pooling/config.json' in names(out)
  assert '1_Pooling/pytorch_model.bin' not in names(out)
  assert not any('secret' in name for name in names(out))


# Links and other hostile things.


def test_a_cache_of_links_opens_and_is_left_as_it_is(hf, tmp_path, surgery_cli):
  source = hf('llama')
  blobs = tmp_path / 'cache' / 'blobs'
  snapshot = tmp_path / 'cache' / 'snapshots' / 'abc'
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  for number, path in enumerate(sorted(source.iterdir())):
    blob = blobs / f'{number:040}'
    path.rename(blob)
    (snapshot / path.name).symlink_to(f'../../blobs/{blob.name}')
  before = {p.name: p.read_bytes() for p in blobs.iterdir()}
  out = tmp_path / 'out'
  done = surgery_cli('cast', snapshot, '--to', 'bf16', '-o', f'{out}/')
  assert 0 == done.code, done.err
  assert sorted([*ALONG, 'config.json', 'model.safetensors']) == names(out)
  assert not any((out / name).is_symlink() for name in names(out))
  assert before == {p.name: p.read_bytes() for p in blobs.iterdir()}
  assert 'bfloat16' == config(out)['dtype']


def test_a_link_out_of_the_folder_is_refused(hf, tmp_path, surgery_cli):
  source = hf('llama')
  secret = tmp_path / 'secret'
  secret.write_text('mine')
  (source / 'NOTICE').symlink_to(secret)
  out = tmp_path / 'out'
  done = surgery_cli('convert', source, f'{out}/')
  assert 3 == done.code
  assert f'{source / "NOTICE"}: a symbolic link out of the folder' in done.err
  assert not out.exists()


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json'])
@pytest.mark.parametrize('to', ['gone', None], ids=['nothing', 'itself'])
def test_a_link_to_nothing_is_not_left_out(hf, tmp_path, surgery_cli, name, to):
  source = hf('llama')
  (source / name).unlink()
  (source / name).symlink_to(to or name)
  out = tmp_path / 'out'
  done = surgery_cli('convert', source, f'{out}/')
  assert 3 == done.code
  assert f'{source / name}: a symbolic link to {to or name}, which' in done.err
  assert not out.exists()


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('{', 'not JSON'),
    ('[1]', 'expected a JSON object, found list'),
    ('[' * 100_000, 'not JSON'),
    ('{"a": "' + 'x' * 16_000_000 + '"}', 'expected at most 16,000,000 bytes'),
  ],
  ids=['cut', 'list', 'deep', 'long'],
)
def test_a_configuration_that_cannot_be_read_is_named(
  hf, tmp_path, surgery_cli, text, expected
):
  source = hf('llama')
  (source / 'config.json').write_text(text)
  out = tmp_path / 'out'
  done = surgery_cli('convert', source, f'{out}/')
  assert 3 == done.code
  assert f'{source / "config.json"}: {expected}' in done.err
  assert not out.exists()


def test_infinity_in_a_configuration_stays(hf, tmp_path, surgery_cli):
  source = hf('llama')
  said = {**config(source), 'time_step_limit': [0.0, float('inf')]}
  (source / 'config.json').write_text(json.dumps(said))
  out = tmp_path / 'out'
  done = surgery_cli('cast', source, '--to', 'bf16', '-o', f'{out}/')
  assert 0 == done.code, done.err
  assert [0.0, float('inf')] == config(out)['time_step_limit']


def test_options_of_folders_are_for_folders(hf, tmp_path, surgery_cli):
  out = tmp_path / 'out.safetensors'
  for more in (('--config', 'a=1'), ('--like', tmp_path)):
    done = surgery_cli('convert', hf('llama'), out, *more)
    assert 3 == done.code
    assert f'{more[0]} is for folders' in done.err
    (tmp_path / 'llama').rename(tmp_path / f'llama{more[0]}')
  done = surgery_cli('convert', hf('llama'), f'{tmp_path}/o/', '--config', 'a')
  assert 2 == done.code
  assert 'expected --config KEY=VALUE' in done.err


def test_like_has_to_be_a_model_folder(hf, tmp_path, surgery_cli):
  empty = tmp_path / 'empty'
  empty.mkdir()
  done = surgery_cli('convert', hf('llama'), f'{tmp_path}/o/', '--like', empty)
  assert 3 == done.code
  assert f'{empty}: expected a model folder, found no config.json' in done.err


def test_a_folder_that_holds_something_is_not_replaced(
  hf, tmp_path, surgery_cli
):
  source = hf('llama')
  done = surgery_cli('convert', source, source, '--force')
  assert 3 == done.code
  assert 'a folder with' in done.err
  assert 'never replaced, not by --force' in done.err


def test_an_adapter_that_is_not_merged_is_said(hf, tmp_path, surgery_cli):
  out = tmp_path / 'out'
  done = surgery_cli(
    'attach', hf('llama'), '--adapter', 'lora', '--to', '**/q_proj',
    '--set', 'rank=2', '-o', f'{out}/',
  )  # fmt: skip
  assert 0 == done.code, done.err
  assert 'warning: an adapter is attached' in done.err


def test_a_full_disk_leaves_nothing_and_names_the_folder(
  hf, tmp_path, surgery_cli, monkeypatch
):
  def full(fd, data):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(output, '_write', full)
  out = tmp_path / 'out'
  source = hf('llama')
  done = surgery_cli('cast', source, '--to', 'bf16', '-o', f'{out}/')
  assert 3 == done.code
  assert f'{out}/model.safetensors' in done.err
  assert '.surgery-' not in done.err
  assert ['llama'] == [p.name for p in tmp_path.iterdir()]


def test_of_several_outputs_all_appear_or_none(hf, tmp_path, monkeypatch):
  source = hf('llama')
  recipe = surgery.Recipe(
    [{'cast': 'bf16'}],
    inputs={'model': source},
    outputs={
      'main': f'{tmp_path / "main"}/',
      'other': f'{tmp_path / "other"}/',
    },
  )
  plan = recipe.plan()
  (tmp_path / 'main').mkdir()
  (tmp_path / 'main' / 'late').write_text('1')
  # Somebody comes after the check.
  monkeypatch.setattr(running, 'check_target', lambda *_: None)
  with pytest.raises(FileExistsError):
    plan.write()
  assert not (tmp_path / 'other').exists()


def test_what_a_file_cannot_hold_names_the_folder(hf, tmp_path, surgery_cli):
  source = hf('llama')
  out = tmp_path / 'out'
  opened = surgery.open(source)
  leaves = {
    (('a.b', *p[1:]) if p[0] == 'lm_head' else p): leaf
    for p, leaf in opened.items()
  }
  opened.replace(leaves=leaves).write(tmp_path / 'dots.msgpack')
  done = surgery_cli(
    'convert', tmp_path / 'dots.msgpack', f'{out}/', '--like', source,
    '--no-manifest',
  )  # fmt: skip
  assert 3 == done.code
  assert f'{out}/model.safetensors: without a manifest' in done.err
  assert '.surgery-' not in done.err
  assert not out.exists()


def test_an_adapter_alone_has_no_configuration_of_its_base(
  hf, tmp_path, surgery_cli
):
  adapted, out = tmp_path / 'adapted', tmp_path / 'out'
  done = surgery_cli(
    'attach', hf('llama'), '--adapter', 'lora', '--to', '**/q_proj',
    '--set', 'rank=2', '-o', f'{adapted}/',
  )  # fmt: skip
  assert 0 == done.code, done.err
  done = surgery_cli('extract', adapted, '-o', f'{out}/')
  assert 0 == done.code, done.err
  assert ['adapter.safetensors'] == names(out)
  again = tmp_path / 'again'
  done = surgery_cli(
    'merge', tmp_path / 'llama', '--with', out, '-o', f'{again}/'
  )
  assert 0 == done.code, done.err
  assert 'model.safetensors' in names(again)


def test_pickles_are_not_opened_and_the_message_says_what_to_do(
  hf, tmp_path, surgery_cli
):
  source = hf('llama')
  (source / 'model.safetensors').rename(source / 'pytorch_model.bin')
  done = surgery_cli('inspect', source)
  assert 3 == done.code
  assert 'pytorch_model.bin is a pickle' in done.err
  assert "save_pretrained('out')" in done.err


def test_tokens_of_generation_beyond_the_vocabulary_are_said(hf, tmp_path):
  source = hf('gemma')
  said = {'eos_token_id': [1, 39], 'bos_token_id': 2}
  (source / 'generation_config.json').write_text(json.dumps(said))
  recipe = surgery.Recipe(
    [{'resize-vocab': {'select': '**/embed_tokens/weight', 'size': 30}}]
  )
  plan = recipe.plan(model=source, out=f'{tmp_path}/out/')
  [line] = plan.report()['folder']['warnings']
  assert 'eos_token_id is [1, 39] in generation_config.json' in line


def test_a_name_without_a_suffix_says_how_a_folder_is_written(
  hf, tmp_path, surgery_cli
):
  out = tmp_path / 'out'
  done = surgery_cli('convert', hf('llama'), out)
  assert 3 == done.code
  assert f'or write a new folder: {out}/.' in done.err


def test_a_folder_above_has_to_be_there(hf, tmp_path, surgery_cli):
  done = surgery_cli('convert', hf('llama'), f'{tmp_path}/no/out/')
  assert 3 == done.code
  assert f'{tmp_path}/no: there is no such folder' in done.err


def test_of_several_outputs_a_link_is_put_back(hf, tmp_path, monkeypatch):
  behind, link = tmp_path / 'blob', tmp_path / 'link.safetensors'
  behind.write_bytes(b'old')
  link.symlink_to('blob')
  recipe = surgery.Recipe(
    [{'cast': 'bf16'}],
    inputs={'model': hf('llama')},
    outputs={'main': f'{tmp_path / "main"}/', 'other': link},
  )
  plan = recipe.plan()
  (tmp_path / 'main').mkdir()
  (tmp_path / 'main' / 'late').write_text('1')
  # Somebody comes after the check.
  monkeypatch.setattr(running, 'check_target', lambda *_: None)
  with pytest.raises(FileExistsError):
    plan.write(overwrite=True)
  assert link.is_symlink()
  assert b'old' == behind.read_bytes() == link.read_bytes()
