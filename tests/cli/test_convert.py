import json
from typing import Any

import flax.serialization
import numpy as np
import pytest

import surgery
from tests.cli.saved import assert_same, history, planned, values


@pytest.fixture
def safe(tmp_path):
  return tmp_path / 'out.safetensors'


def test_there_and_back_nothing_is_lost(adapted, safe, out, surgery_cli):
  assert 0 == surgery_cli('convert', adapted, safe).code
  assert_same(
    dict(sorted(values(adapted).items())), dict(sorted(values(safe).items()))
  )
  assert 0 == surgery_cli('diff', adapted, safe).code
  assert 0 == surgery_cli('convert', safe, out).code
  assert 0 == surgery_cli('diff', adapted, out).code


def test_others_read_it(adapted, safe, surgery_cli):
  from safetensors.numpy import load_file

  surgery_cli('convert', adapted, safe)
  read = load_file(safe)
  for path, value in values(adapted).items():
    assert np.array_equal(value, read[path.replace('/', '.')])


def test_the_plan_copies_all(adapted, safe, surgery_cli):
  plan = planned(surgery_cli, 'convert', adapted, safe)
  assert {'copied'} == {r['what'] for r in plan['tensors']}
  assert 0 == plan['memory']


def test_the_format_may_be_named(adapted, tmp_path, surgery_cli):
  odd = tmp_path / 'out.bin'
  result = surgery_cli('convert', adapted, odd)
  assert 3 == result.code
  assert "no format is known for the suffix '.bin'" in result.err
  assert 0 == surgery_cli('convert', adapted, odd, '--to', 'msgpack').code
  assert len(surgery.open(adapted)) == len(
    surgery.model.checkpoint.open_checkpoint(odd, format='msgpack')
  )
  result = surgery_cli('convert', adapted, tmp_path / 'x', '--to', 'safetensor')
  assert 3 == result.code
  assert "Did you mean 'safetensors'?" in result.err


def test_files_of_a_size_and_back(adapted, tmp_path, out, surgery_cli):
  parts = tmp_path / 'parts.msgpack'
  args = ('convert', adapted, parts, '--shard-size', '300B')
  result = surgery_cli(*args)
  assert 0 == result.code, result.err
  index = tmp_path / 'parts.msgpack.index.json'
  assert index.exists()
  assert not parts.exists()
  assert f'wrote {index}' in result.err
  assert 0 == surgery_cli('diff', adapted, index).code
  assert 0 == surgery_cli('convert', index, out).code
  assert 0 == surgery_cli('diff', adapted, out).code
  for more in ((), ('--dry-run',)):
    result = surgery_cli(*args, *more)
    assert 3 == result.code
    assert 'parts.msgpack.index.json: exists already' in result.err
  assert 0 == surgery_cli(*args, '--force').code
  assert 0 == surgery_cli('diff', adapted, index).code


@pytest.mark.parametrize(
  'size', ['x', '5XB', '-1', '0', '', '1.2.3GB', '5 GB GB', 'GB']
)
def test_a_size_that_is_none_is_a_usage_error(adapted, out, surgery_cli, size):
  result = surgery_cli('convert', adapted, out, '--shard-size', size)
  assert 2 == result.code
  assert 'expected a number of bytes such as 5GB' in result.err


def test_strict_flax_is_what_flax_writes(model, out, surgery_cli):
  result = surgery_cli('convert', model.file, out, '--strict-flax')
  assert 0 == result.code, result.err
  tree: dict[str, Any] = {}
  for path, leaf in surgery.open(model.file).items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf.load()
  assert flax.serialization.to_bytes(tree) == out.read_bytes()
  assert (
    '--strict-flax leaves out: 2 flags (not trainable), 2 metadata of tensors, '
    '1 kinds of PRNG keys, 6 digests, '
  ) in result.err


def test_strict_flax_is_refused_where_it_would_lose_an_adapter(
  adapted, out, surgery_cli
):
  for more in ((), ('--dry-run',)):
    result = surgery_cli('convert', adapted, out, '--strict-flax', *more)
    assert 3 == result.code
    assert "weights of 'default' could not be used" in result.err
    assert not out.exists()


def test_strict_flax_is_msgpack_in_one_file(model, safe, out, surgery_cli):
  result = surgery_cli('convert', model.file, safe, '--strict-flax')
  assert 3 == result.code
  assert '--strict-flax is for flax msgpack' in result.err
  args = ('--strict-flax', '--shard-size', '1GB')
  result = surgery_cli('convert', model.file, out, *args)
  assert 2 == result.code
  assert '--strict-flax does not go with --shard-size' in result.err


def test_it_is_recorded(adapted, safe, surgery_cli):
  surgery_cli('convert', adapted, safe)
  [said] = history(safe)
  assert [] == said['recipe']['steps']
  assert 'adapted.msgpack' == said['inputs'][0]['file']


def test_a_target_is_needed_and_no_option(adapted, out, surgery_cli):
  assert 2 == surgery_cli('convert', adapted).code
  assert 2 == surgery_cli('convert', adapted, '-o', out).code
  assert json.loads(surgery_cli('convert', adapted, out, '--json').out)
