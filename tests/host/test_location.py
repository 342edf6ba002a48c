"""Where a saved model lies: a file that is only a part of one is told of."""

import json
import pathlib
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

import surgery
from tests.files.trees import checkpoint_of

BIN = pathlib.Path(sys.executable).with_name('surgery')


@pytest.fixture(params=['.msgpack', '.safetensors'])
def shards(request, tmp_path):
  """The files of a set of three, whose index is called model.…index.json."""
  tree = {'net': {str(k): np.full(100, k, 'float32') for k in range(3)}}
  target = tmp_path / f'model{request.param}'
  checkpoint_of(tree).write(target, shard_size=400)
  return sorted(tmp_path.glob(f'model-*{request.param}'))


def index_of(shard):
  return shard.with_name(f'model{shard.suffix}.index.json')


def test_a_shard_that_is_opened_alone_names_its_index(shards):
  assert 3 == len(shards)
  for shard in shards:
    with pytest.warns(surgery.ShardWarning) as caught:
      assert 1 == len(surgery.open(shard))
    assert __file__ == caught[0].filename
    assert (
      f'{shard}: opened alone, and {index_of(shard)} names it as a part'
    ) in str(caught[0].message)


def test_an_index_names_files_of_any_name(shards):
  index = index_of(shards[0])
  said = json.loads(index.read_text())
  plain = shards[0].with_name(f'ü"{shards[0].suffix}')
  shards[0].rename(plain)
  for tensor, file in said['weight_map'].items():
    said['weight_map'][tensor] = plain.name if file == shards[0].name else file
  for escaped in (True, False):
    index.write_text(json.dumps(said, ensure_ascii=escaped))
    with pytest.warns(surgery.ShardWarning, match='names it as a part'):
      surgery.open(plain)


def test_a_name_that_counts_is_enough(shards):
  index_of(shards[0]).unlink()
  with pytest.warns(surgery.ShardWarning, match='number 2 of 3 files'):
    surgery.open(shards[1])


def test_what_is_whole_is_opened_without_a_word(shards, tmp_path):
  suffix = shards[0].suffix
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert 3 == len(surgery.open(index_of(shards[0])))
    assert 3 == len(surgery.open(tmp_path))
    # Another file beside an index, and the only one of its set.
    whole = tmp_path / f'other{suffix}'
    checkpoint_of({'a': np.ones(3)}).write(whole)
    assert 1 == len(surgery.open(whole))
    one = tmp_path / 'one'
    one.mkdir()
    only = one / f'model-00001-of-00001{suffix}'
    shutil.copy(whole, only)
    assert 1 == len(surgery.open(only))
    # What cannot be read names nothing, and the history names what was read.
    index = one / f'model{suffix}.index.json'
    for text in ('', '[]', '{"weight_map": 3}', '{"weight_map": {"a": []}}'):
      index.write_text(text)
      assert 1 == len(surgery.open(only))
    index.write_text(
      json.dumps({'history': only.name, 'weight_map': {'a': 'b'}})
    )
    assert 1 == len(surgery.open(only))
    index.unlink()
    index.mkdir()
    assert 1 == len(surgery.open(only))


def test_the_shell_warns_of_a_shard(shards):
  done = subprocess.run(
    [BIN, 'inspect', shards[0]], capture_output=True, text=True
  )
  assert 0 == done.returncode
  [line] = done.stderr.splitlines()
  assert line.startswith(f'warning: {shards[0]}: opened alone, and ')
  assert str(index_of(shards[0])) in line
