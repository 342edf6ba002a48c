import json

import flax.serialization
import numpy as np
import pytest

import surgery
from tests.cli.saved import history, values


@pytest.fixture
def plain(tmp_path):
  """A file from flax, without digests."""
  file = tmp_path / 'flax.msgpack'
  tree = {'net': {'a': np.ones((2, 3), 'float32'), 'b': np.arange(5)}, 'n': 3}
  file.write_bytes(flax.serialization.to_bytes(tree))
  return file


def damage(file, path):
  """Flips a bit of a tensor."""
  leaf = surgery.open(file)[tuple(path.split('/'))]
  [(start, _)] = leaf.source.spans
  data = bytearray(file.read_bytes())
  data[start] ^= 1
  file.write_bytes(data)


def test_a_file_that_is_whole(model, surgery_cli):
  result = surgery_cli('verify', model.file)
  assert (0, '') == (result.code, result.out)
  assert f'{model.file}: 6 ok\n' == result.err


def test_each_tensor_that_differs_is_named(model, surgery_cli):
  for name in ('query', 'value'):
    damage(model.file, f'model/net/{name}/bias')
  result = surgery_cli('verify', model.file)
  assert 1 == result.code
  lines = result.out.splitlines()
  assert ['model/net/query/bias', 'model/net/value/bias'] == [
    line.split(': ')[0] for line in lines
  ]
  assert 'expected xxh3:' in lines[0]
  assert '4 ok, 2 differ' in result.err


def test_json_says_all(model, surgery_cli):
  damage(model.file, 'model/net/query/bias')
  result = surgery_cli('verify', model.file, '--json')
  assert 1 == result.code
  data = json.loads(result.out)
  assert (5, 1, 0) == (data['ok'], data['differs'], data['missing'])
  [bad] = [t for t in data['tensors'] if t['state'] == 'differs']
  assert bad['expected'] != bad['found']


def test_a_file_without_digests_says_nothing(plain, surgery_cli):
  result = surgery_cli('verify', plain)
  assert 3 == result.code
  assert 'no tensor has a digest' in result.err
  assert 'Give --write' in result.err


def test_digests_are_added_and_nothing_else_changes(plain, surgery_cli):
  before = values(plain)
  result = surgery_cli('verify', plain, '--write')
  assert 0 == result.code
  assert '0 ok, 2 added' in result.err
  after = surgery.open(plain)
  assert list(before) == ['/'.join(p) for p in after]
  for path, leaf in after.items():
    assert (leaf.shape is None) == (leaf.digest is None)
    assert np.array_equal(before['/'.join(path)], leaf.load())
  assert [] == history(plain)[-1]['recipe']['steps']
  assert 0 == surgery_cli('verify', plain).code


def test_nothing_is_written_where_nothing_is_missing(model, surgery_cli):
  before = model.file.stat().st_ino, model.file.read_bytes()
  assert 0 == surgery_cli('verify', model.file, '--write').code
  assert before == (model.file.stat().st_ino, model.file.read_bytes())


@pytest.fixture
def some(model, tmp_path):
  """A file of which one tensor has a digest and five have none."""
  file = tmp_path / 'some.msgpack'
  ckpt = surgery.open(model.file)
  _, *rest = ckpt
  leaves = {**ckpt, **{p: ckpt[p].replace(digest=None) for p in rest}}
  ckpt.replace(leaves=leaves).write(file)
  return file


def test_what_was_not_checked_is_an_error(some, surgery_cli):
  for quiet in ((), ('-q',)):
    result = surgery_cli('verify', some, *quiet)
    assert (3, '') == (result.code, result.out)
    unknown = list(surgery.open(some))[1:]
    listed = ', '.join('/'.join(path) for path in unknown)
    assert (
      f'error: {some}: 5 of 6 tensors have no digest and were not checked: '
      f'{listed}. Give --write to add digests of the present values, or '
      '--allow-missing to skip them.'
    ) == result.err.splitlines()[-1]
  result = surgery_cli('verify', some, '--json')
  assert 3 == result.code
  data = json.loads(result.out)
  assert (1, 0, 5) == (data['ok'], data['differs'], data['missing'])


def test_tensors_without_a_digest_are_passed_over_on_request(some, surgery_cli):
  result = surgery_cli('verify', some, '--allow-missing')
  assert (0, '') == (result.code, result.out)
  assert f'{some}: 1 ok, 5 without a digest\n' == result.err
  assert 0 == surgery_cli('verify', some, '--write').code
  assert 0 == surgery_cli('verify', some).code


def test_no_file_of_several_may_go_unchecked(model, some, surgery_cli):
  result = surgery_cli('verify', some, model.file)
  assert 3 == result.code
  assert f'{model.file}: 6 ok' in result.err
  assert 0 == surgery_cli('verify', some, model.file, '--allow-missing').code


def test_a_difference_weighs_more_than_what_is_unknown(some, surgery_cli):
  first = next(iter(surgery.open(some)))
  damage(some, '/'.join(first))
  result = surgery_cli('verify', some)
  assert 1 == result.code
  assert '5 of 6 tensors have no digest' in result.err


def test_nothing_to_compare_with_is_never_fine(plain, surgery_cli):
  result = surgery_cli('verify', plain, '--allow-missing')
  assert 3 == result.code
  assert 'no tensor has a digest' in result.err


def test_nothing_is_added_where_something_differs(model, tmp_path, surgery_cli):
  file = tmp_path / 'some.msgpack'
  ckpt = surgery.open(model.file)
  first, *_, last = ckpt
  leaves = {**ckpt, last: ckpt[last].replace(digest=None)}
  ckpt.replace(leaves=leaves).write(file)
  damage(file, '/'.join(first))
  before = file.read_bytes()
  result = surgery_cli('verify', file, '--write')
  assert 1 == result.code
  assert 'no digest was added, since tensors differ' in result.err
  assert before == file.read_bytes()


def test_what_differs_is_named_in_an_adapter_too(
  adapted, tmp_path, surgery_cli
):
  alone = tmp_path / 'a.msgpack'
  surgery_cli('extract', adapted, '-o', alone)
  assert 0 == surgery_cli('verify', alone).code
  damage(alone, 'model/net/query/lora_a')
  result = surgery_cli('verify', alone)
  assert 1 == result.code
  assert result.out.startswith('model/net/query/lora_a: ')


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
@pytest.mark.parametrize('by', ['index', 'folder'])
def test_digests_of_a_set_are_added_to_its_index(
  model, tmp_path, surgery_cli, suffix, by
):
  folder = tmp_path / 'set'
  folder.mkdir()
  target = folder / f'm{suffix}'
  whole = surgery.open(model.file)
  arrays = {p: leaf for p, leaf in whole.items() if leaf.shape is not None}
  surgery.Checkpoint(arrays).write(target, manifest=False, shard_size=500)
  index = folder / f'm{suffix}.index.json'
  said = json.loads(index.read_text())
  said['metadata'] = {'format': 'flax'}  # As others write it.
  index.write_text(json.dumps(said))
  parts = {p: p.read_bytes() for p in folder.iterdir() if p != index}
  assert len(parts) > 1
  file = index if by == 'index' else folder
  result = surgery_cli('verify', file, '--write')
  assert 0 == result.code, result.err
  assert f'0 ok, {len(arrays)} added' in result.err
  assert {**parts, index: index.read_bytes()} == {
    p: p.read_bytes() for p in folder.iterdir()
  }
  assert said['weight_map'] == json.loads(index.read_text())['weight_map']
  opened = surgery.open(index)
  assert {'format': 'flax'} == opened.manifest.metadata
  assert all(leaf.digest for leaf in opened.values())
  result = surgery_cli('verify', file)
  assert (0, f'{len(arrays)} ok') == (
    result.code,
    result.err.split(': ')[1][:-1],
  )
