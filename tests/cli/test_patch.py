import json

import numpy as np
import pytest

from surgery.model.checkpoint import Checkpoint, Leaf


def save(file, **values):
  leaves: dict[tuple[str, ...], Leaf] = {
    ('net', name): Leaf(lambda v=v: v, v.shape, v.dtype.name)
    for name, v in values.items()
  }
  Checkpoint(leaves).write(file)
  return file


@pytest.fixture
def two(tmp_path):
  x, y = np.arange(5.0), np.arange(7)
  base = save(tmp_path / 'base.safetensors', x=x, y=y)
  return base, save(tmp_path / 'tuned.safetensors', x=x + 1, y=y)


def test_there_and_back(two, tmp_path, surgery_cli):
  base, tuned = two
  patch, out = tmp_path / 'p.safetensors', tmp_path / 'out.safetensors'
  result = surgery_cli('diff', base, tuned, '--save', patch, '--no-compress')
  assert (0, '') == (result.code, result.out)
  said = f'wrote {patch}: 1 as in the base, 1 changed as a whole; '
  assert result.err.startswith(said)
  result = surgery_cli('patch', base, patch, '-o', out, '--dry-run')
  assert result.out.startswith(f'would write {out}: 1 as in the base, 1 chang')
  assert not out.exists()
  result = surgery_cli('patch', base, patch, '-o', out, '--json')
  report = json.loads(result.out)
  assert (str(out), 1, 1) == (report['output'], report['same'], report['whole'])
  assert tuned.read_bytes() == out.read_bytes()
  result = surgery_cli('patch', base, patch, '-o', out)
  assert 3 == result.code
  assert '--force' in result.err
  result = surgery_cli('patch', base, patch, '-o', out, '--force', '-q')
  assert (0, '', '') == (result.code, result.out, result.err)
  # It says itself what it is.
  assert 'patch: ' in surgery_cli('inspect', patch).out
  for verb in (('merge',), ('scale', '**', '--by', 2), ('freeze',)):
    result = surgery_cli(
      verb[0], patch, *verb[1:], '-o', tmp_path / 'o.msgpack'
    )
    assert 3 == result.code
    assert 'a patch, not a model' in result.err


def test_json_of_a_patch(two, tmp_path, surgery_cli):
  patch = tmp_path / 'p.msgpack'
  result = surgery_cli('diff', *two, '--save', patch, '--json', '-q')
  report = json.loads(result.out)
  assert (str(patch), 1, patch.stat().st_size) == (
    report['output'], report['same'], report['patch'],
  )  # fmt: skip


def test_a_wrong_base_is_refused(two, tmp_path, surgery_cli):
  base, tuned = two
  patch, out = tmp_path / 'p.safetensors', tmp_path / 'out.safetensors'
  surgery_cli('diff', base, tuned, '--save', patch)
  result = surgery_cli('patch', tuned, patch, '-o', out)
  assert 3 == result.code
  assert 'net/x: expected the digest' in result.err
  assert not out.exists()


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (('--save', 'p.safetensors', '--top', '3'), '--save does not go with'),
    (('**/x', '--save', 'p.safetensors'), '--save does not go with'),
    (('--force',), 'need --save'),
    (('--no-compress',), 'need --save'),
  ],
)
def test_options_that_do_not_go_together(two, surgery_cli, options, said):
  result = surgery_cli('diff', *two, *options)
  assert 2 == result.code
  assert said in result.err
