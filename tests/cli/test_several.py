"""Several files, quietness, and what stands in the place of a file."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import surgery
from tests.cli.test_verify import damage
from tests.files.trees import checkpoint_of

BIN = pathlib.Path(sys.executable).with_name('surgery')


@pytest.fixture
def files(tmp_path):
  found = []
  for name in ('a', 'b'):
    found.append(tmp_path / f'{name}.msgpack')
    tree = {'net': {'kernel': np.ones((2, 3), 'float32')}, 'n': 3}
    checkpoint_of(tree).write(found[-1])
  return found


def test_verify_looks_at_each_file_and_names_tensors_with_it(
  files, surgery_cli
):
  damage(files[0], 'net/kernel')
  result = surgery_cli('verify', *files)
  assert 1 == result.code
  assert f'{files[0]}: net/kernel: expected xxh3:' in result.out
  assert [f'{files[0]}: 0 ok, 1 differ', f'{files[1]}: 1 ok'] == (
    result.err.splitlines()
  )
  result = surgery_cli('verify', *files, '--json')
  assert [(str(files[0]), 1), (str(files[1]), 0)] == [
    (one['file'], one['differs']) for one in json.loads(result.out)
  ]


def test_verify_goes_on_behind_a_file_that_is_not_there(files, surgery_cli):
  gone = files[0].with_name('gone')
  result = surgery_cli('verify', gone, files[1])
  assert 3 == result.code
  assert f'error: {gone}: No such file or directory.' in result.err
  assert f'{files[1]}: 1 ok' in result.err


def test_inspect_shows_each_file(files, surgery_cli):
  result = surgery_cli('inspect', *files, '**/kernel')
  assert 0 == result.code
  assert result.out.startswith(f'{files[0]}:\n')
  assert f'\n\n{files[1]}:\n' in result.out
  assert 2 == result.out.count('model: 1 tensors')
  result = surgery_cli('inspect', *files, '--json')
  assert [*map(str, files)] == [x['file'] for x in json.loads(result.out)]
  result = surgery_cli('inspect', files[0], '--json')
  assert str(files[0]) == json.loads(result.out)['file']


def test_json_has_whole_paths(files, surgery_cli, tmp_path):
  result = surgery_cli('diff', *files, '--json')
  data = json.loads(result.out)
  assert [*map(str, files)] == [data['a'], data['b']]
  out = tmp_path / 'out.msgpack'
  result = surgery_cli('cast', files[0], '--to', 'bf16', '-o', out, '--json')
  assert str(out) == json.loads(result.out)['output']


@pytest.mark.parametrize(
  'arguments',
  [
    ('cast', 'a.msgpack', '--to', 'bf16', '-o', 'out.msgpack'),
    ('verify', 'a.msgpack'),
    ('diff', 'a.msgpack', 'b.msgpack'),
    ('run', 'recipe.yaml', 'model=a.msgpack', 'out=out.msgpack'),
  ],
)
def test_quiet_says_nothing(files, surgery_cli, monkeypatch, arguments):
  monkeypatch.chdir(files[0].parent)
  files[0].with_name('recipe.yaml').write_text('- cast: bf16\n')
  assert (0, '', '') == tuple(vars(surgery_cli(*arguments, '-q')).values())


def test_diff_within_0_asks_for_equal_values(files, surgery_cli, tmp_path):
  half = tmp_path / 'half.msgpack'
  assert 0 == surgery_cli('cast', files[0], '--to', 'bf16', '-o', half).code
  result = surgery_cli('diff', files[0], half, 'net')
  assert 1 == result.code
  assert 'float32[2,3] → bfloat16[2,3]  equal values' in result.out
  result = surgery_cli('diff', files[0], half, 'net', '--tolerance', 0)
  assert (0, 'equal within 0: 1 tensors\n') == (result.code, result.out)
  other = tmp_path / 'other.msgpack'
  kernel = np.ones((2, 3), 'float32')
  kernel[0, 0] += 1e-7
  checkpoint_of({'net': {'kernel': kernel}, 'n': 3}).write(other)
  assert 1 == surgery_cli('diff', files[0], other, '--tolerance', 0).code


@pytest.mark.parametrize('name', ['model', 'model.msgpack', 'model.pt'])
def test_a_file_that_is_not_there_is_said_to_be_none(
  surgery_cli, tmp_path, name
):
  result = surgery_cli('inspect', tmp_path / name)
  assert 3 == result.code
  assert f'error: {tmp_path / name}: No such file or directory.' in result.err


def test_a_name_without_a_suffix_is_said_to_have_none(files, surgery_cli):
  bare = files[0].rename(files[0].with_suffix(''))
  result = surgery_cli('inspect', bare)
  assert 3 == result.code
  assert 'no format is known for a name without one. Known suf' in result.err


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
def test_a_pointer_of_git_lfs_is_named(surgery_cli, tmp_path, suffix):
  file = tmp_path / f'model{suffix}'
  file.write_text(
    'version https://git-lfs.github.com/spec/v1\n'
    'oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n'
    'size 12345\n'
  )
  result = surgery_cli('inspect', file)
  assert 3 == result.code
  assert f'{file}: expected a saved model, found a pointer of G' in result.err
  assert '`git lfs pull`' in result.err


def test_a_recipe_that_only_asserts_needs_no_output(
  files, surgery_cli, tmp_path
):
  recipe = tmp_path / 'check.yaml'
  recipe.write_text(
    '- assert: {finite: "**/kernel"}\n- assert: {dtype: {of: "**/kernel", is: f32}}\n'
  )
  before = sorted(tmp_path.iterdir())
  result = surgery_cli('run', recipe, f'model={files[0]}')
  assert (0, '') == (result.code, result.out), result.err
  assert 'checked 1 assertion on values' in result.err
  result = surgery_cli('run', recipe, f'model={files[0]}', '--dry-run')
  assert 'would check 1 assertion' in result.out
  assert before == sorted(tmp_path.iterdir())
  bad = tmp_path / 'bad.msgpack'
  tree = {'net': {'kernel': np.full((2, 3), np.nan, 'float32')}}
  checkpoint_of(tree).write(bad)
  result = surgery_cli('run', recipe, f'model={bad}')
  assert 3 == result.code
  assert 'net/kernel' in result.err
  recipe.write_text('- cast: bf16\n')
  result = surgery_cli('run', recipe, f'model={files[0]}')
  assert 3 == result.code
  assert "output 'out' has no file. Give out=FILE." in result.err


def test_force_replaces_a_set(files, surgery_cli, tmp_path):
  out = tmp_path / 'set' / 'out.msgpack'
  out.parent.mkdir()
  convert = ('convert', files[0], out, '--shard-size', '1KB')
  assert 0 == surgery_cli(*convert).code
  result = surgery_cli(*convert)
  assert 3 == result.code
  assert 'out.msgpack.index.json: exists already. Give --force to' in result.err
  for _ in range(2):
    assert 0 == surgery_cli(*convert, '--force').code
    assert 2 == len(list(out.parent.iterdir()))
    assert 2 == len(surgery.open(out.parent))


def test_a_file_that_is_missing_is_no_selector(files, surgery_cli, tmp_path):
  for name in ('no.msgpack', 'no.safetensors', 'no.msgpack.index.json'):
    missing = tmp_path / name
    result = surgery_cli('inspect', files[0], missing)
    assert (3, '') == (result.code, result.out)
    assert f'error: {missing}: No such file or directory.\n' == result.err


def test_a_recipe_may_come_from_stdin(files, tmp_path):
  def run(text):
    out = tmp_path / 'o.msgpack'
    return subprocess.run(
      [str(BIN), 'run', '-', f'model={files[0]}', f'out={out}'],
      input=text,
      capture_output=True,
    )

  done = run(b'steps: [drop: "**/nothing"]')
  assert 3 == done.returncode
  assert b'error: stdin:1: step 1 (drop): selector' in done.stderr
  done = run(b'steps: [cast: bf16]')
  assert 0 == done.returncode, done.stderr
  done = run(b'\xff')
  assert 3 == done.returncode
  assert b'error: stdin: not UTF-8 text' in done.stderr


def test_a_model_is_no_recipe(files, surgery_cli):
  for file in files:
    result = surgery_cli('run', file, 'out=x.msgpack')
    assert 3 == result.code
    assert (
      f'{file}: expected a recipe, which is a file of YAML, found a saved '
      f'model. A recipe gets it as an input: surgery run RECIPE model={file} '
    ) in result.err


def test_a_suffix_of_another_format_is_warned_of(files, surgery_cli, tmp_path):
  odd = tmp_path / 'odd.msgpack'
  result = surgery_cli('convert', files[0], odd, '--to', 'safetensors')
  assert 0 == result.code
  assert f'warning: {odd}: written as safetensors, but its suffix' in result.err
  for name, form in (('x.bin', 'msgpack'), ('x.msgpack', 'msgpack')):
    result = surgery_cli('convert', files[0], tmp_path / name, '--to', form)
    assert (0, False) == (result.code, 'warning' in result.err)
