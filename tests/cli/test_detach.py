import json

import pytest

import surgery
from surgery.model.checkpoint import Checkpoint
from tests.cli.saved import assert_same, planned, steps, values


def test_the_base_is_as_it_was(model, adapted, out, surgery_cli):
  plan = planned(surgery_cli, 'detach', adapted, '-o', out)
  assert_same(values(model.file), values(out))
  assert {'copied': 6, 'gone': 4} == {
    what: sum(r['what'] == what for r in plan['tensors'])
    for what in ('copied', 'gone')
  }
  assert 0 == surgery_cli('diff', model.file, out).code


def test_the_adapter_is_saved_and_can_be_attached_again(
  adapted, tmp_path, out, surgery_cli
):
  alone, again = tmp_path / 'a.msgpack', tmp_path / 'again.msgpack'
  result = surgery_cli('detach', adapted, '--save-adapter', alone, '-o', out)
  assert 0 == result.code, result.err
  assert f'wrote {alone}' in result.err
  assert 0 == surgery_cli('attach', out, '--from', alone, '-o', again).code
  assert 0 == surgery_cli('diff', adapted, again).code
  assert ['extract', 'detach'] == [verb for verb, _ in steps(alone)]
  assert steps(alone) == steps(out)


def test_the_plan_has_both_files(adapted, tmp_path, out, surgery_cli):
  alone = tmp_path / 'a.msgpack'
  args = ('detach', adapted, '--save-adapter', alone, '-o', out, '--json')
  plan = json.loads(surgery_cli(*args, '--dry-run').out)
  assert not alone.exists()
  assert not out.exists()
  assert str(out) == plan['output']
  [saved] = plan['saved']
  assert str(alone) == saved['output']
  assert list(values(adapted)) != [r['path'] for r in saved['tensors']]
  assert {'copied'} == {r['what'] for r in saved['tensors']}
  assert plan == json.loads(surgery_cli(*args).out)
  assert [r['path'] for r in saved['tensors']] == list(values(alone))


@pytest.mark.parametrize('old', [None, b'precious'])
def test_both_are_written_or_none(
  adapted, tmp_path, out, surgery_cli, monkeypatch, old
):
  alone = tmp_path / 'a.msgpack'
  if old:
    alone.write_bytes(old)
  write, written = Checkpoint.write, []

  def fail_second(self, path, **options):
    if written:
      raise OSError(28, 'No space left on device', str(path))
    written.append(path)
    write(self, path, **options)

  monkeypatch.setattr(Checkpoint, 'write', fail_second)
  args = ('detach', adapted, '--save-adapter', alone, '-o', out, '--force')
  result = surgery_cli(*args)
  assert 3 == result.code
  assert 'No space left on device' in result.err
  assert [alone] == written
  assert not out.exists()
  assert old == (alone.read_bytes() if alone.exists() else None)
  assert [] == [p.name for p in tmp_path.iterdir() if p.name.endswith('.old')]


def test_an_adapter_file_is_replaced_on_request(
  adapted, tmp_path, out, surgery_cli
):
  alone = tmp_path / 'a.msgpack'
  alone.write_bytes(b'old')
  args = ('detach', adapted, '--save-adapter', alone, '-o', out)
  result = surgery_cli(*args)
  assert 3 == result.code
  assert 'a.msgpack: exists already. Give --force' in result.err
  assert not out.exists()
  assert 0 == surgery_cli(*args, '--force').code
  assert 4 == len(surgery.open(alone))


def test_one_of_two_has_to_be_named_to_be_saved(
  adapted, tmp_path, out, surgery_cli
):
  two, alone = tmp_path / 'two.msgpack', tmp_path / 'a.msgpack'
  args = ('attach', adapted, '--adapter', 'lora', '--to', '**/query')
  surgery_cli(*args, '--set', 'rank=1', '--name', 'b', '-o', two)
  save = ('detach', two, '--save-adapter', alone, '-o', out)
  result = surgery_cli(*save)
  assert 3 == result.code
  assert 'Name it with --adapter: default, b.' in result.err
  assert not alone.exists()
  result = surgery_cli(*save, '--adapter', 'default', '--adapter', 'b')
  assert 2 == result.code
  assert 'a file holds one adapter, found 2' in result.err
  assert 0 == surgery_cli(*save, '--adapter', 'b').code
  assert ['default'] == [i.name for i in surgery.adapters(surgery.load(out))]
  assert 2 == len(surgery.open(alone))


def test_two_names_for_one_file_are_refused(adapted, out, surgery_cli):
  result = surgery_cli('detach', adapted, '--save-adapter', out, '-o', out)
  assert 2 == result.code
  assert 'name the same file' in result.err


def test_an_unknown_adapter_is_refused(adapted, out, surgery_cli):
  result = surgery_cli('detach', adapted, '--adapter', 'x', '-o', out)
  assert 3 == result.code
  assert "there is no adapter 'x'" in result.err


def test_what_was_trained_along_is_saved_with_the_adapter(
  model, adapted, tmp_path, out, surgery_cli
):
  params = surgery.load(adapted).unlocked()
  path = ('model', 'net', 'value', 'bias')
  params[path] = params[path].replace(value=params[path].value + 1)
  trained, alone = tmp_path / 'trained.msgpack', tmp_path / 'a.msgpack'
  surgery.save(trained, params.locked())
  args = ('detach', trained, '--save-adapter', alone, '-o', out, '--force')
  assert 0 == surgery_cli(*args).code
  assert (*path[:-1], 'saved.default.bias') in surgery.open(alone)
  again = tmp_path / 'again.msgpack'
  surgery_cli('attach', model.file, '--from', alone, '-o', again)
  assert 0 == surgery_cli('detach', again, '-o', out, '--force').code
  assert_same(values(model.file), values(out))
  assert 0 == surgery_cli(*args, '--no-modules-to-save').code
  assert 4 == len(surgery.open(alone))


def test_what_is_saved_is_said_of_a_file_only(adapted, out, surgery_cli):
  result = surgery_cli(
    'detach', adapted, '--modules-to-save', '**/value', '-o', out
  )
  assert 2 == result.code
  assert 'go with --save-adapter' in result.err
