"""What all verbs that write have in common."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf
from tests.cli.saved import history, steps
from tests.cli.test_main import BIN

LORA = ('--adapter', 'lora', '--to', '**/{query,value}', '--set', 'rank=2')

# Each verb that writes, with arguments that suit the file `adapted`.
VERBS = {
  'attach': ('attach', '{file}', *LORA, '--name', 'b', '--seed', '7'),
  'cast': ('cast', '{file}', '--to', 'bf16'),
  'combine': (
    *('combine', '{file}', '--weight', 'default=0.5'),
    *('--method', 'dare_ties', '--density', '0.9', '--seed', '3'),
  ),
  'detach': ('detach', '{file}'),
  'disable': ('disable', '{file}'),
  'drop': ('drop', '{file}', '**/seed'),
  'enable': ('enable', '{file}'),
  'extract': ('extract', '{file}'),
  'freeze': ('freeze', '{file}'),
  'keep': ('keep', '{file}', '**/net'),
  'merge': ('merge', '{file}'),
  'rename': ('rename', '{file}', 'model/net -> model/other'),
}


def arguments(verb, file):
  return [a.format(file=file) if '{file}' in a else a for a in VERBS[verb]]


# Runs many commands in one process, as importing JAX takes longer than most.
RUN = """
import json, sys
from surgery.cli.main import run

for arguments in json.loads(sys.argv[1]):
  code = run(arguments)
  if code:
    sys.exit(f'{arguments}: exit code {code}')
"""


def test_the_same_command_gives_the_same_bytes(adapted, tmp_path):
  written = []
  for seed, threads in [('0', '1'), ('random', '2')]:
    folder = tmp_path / seed
    folder.mkdir()
    outs = {verb: folder / f'{verb}.msgpack' for verb in VERBS}
    commands = [
      [*map(str, arguments(verb, adapted)), '-o', str(out)]
      for verb, out in outs.items()
    ]
    done = subprocess.run(
      [sys.executable, '-c', RUN, json.dumps(commands)],
      capture_output=True,
      text=True,
      env={
        **os.environ,
        'PYTHONHASHSEED': seed,
        'OMP_NUM_THREADS': threads,
        'NPROC': threads,
        'XLA_FLAGS': '--xla_cpu_multi_thread_eigen='
        + ('false' if threads == '1' else 'true'),
      },
    )
    assert 0 == done.returncode, done.stderr
    written.append({verb: out.read_bytes() for verb, out in outs.items()})
  one, other = written
  assert [] == [verb for verb in VERBS if one[verb] != other[verb]]


@pytest.mark.parametrize('verb', VERBS)
def test_each_output_says_how_it_was_made(adapted, out, surgery_cli, verb):
  result = surgery_cli(*arguments(verb, adapted), '-o', out)
  assert 0 == result.code, result.err
  said = history(out)[-1]
  assert surgery.__version__ == said['version']
  step = {'combine': 'combine-adapters'}.get(verb, verb)
  assert [step] == [name for name, _ in steps(out)]
  [read] = said['inputs']
  assert 'adapted.msgpack' == read['file']
  assert read['digest'].startswith('xxh3:')


def test_both_inputs_are_recorded(model, adapted, tmp_path, out, surgery_cli):
  alone = tmp_path / 'a.msgpack'
  surgery_cli('extract', adapted, '-o', alone)
  surgery_cli('merge', model.file, '--with', alone, '-o', out)
  assert ['base.msgpack', 'a.msgpack'] == [
    read['file'] for read in history(out)[-1]['inputs']
  ]


def test_the_digest_of_an_input_is_that_of_what_is_known_of_it(
  model, out, surgery_cli
):
  import json

  import xxhash

  surgery_cli('freeze', model.file, '-o', out)
  rows = [
    ['/'.join(p), leaf.dtype, list(leaf.shape or ()), leaf.digest]
    for p, leaf in surgery.open(model.file).items()
  ]
  text = json.dumps(rows, separators=(',', ':')).encode()
  [read] = history(out)[-1]['inputs']
  assert f'xxh3:{xxhash.xxh3_128(text).hexdigest()}' == read['digest']


def test_a_missing_folder_is_named(adapted, tmp_path, surgery_cli):
  out = tmp_path / 'no' / 'out.msgpack'
  for more in ((), ('--dry-run',)):
    result = surgery_cli('detach', adapted, '-o', out, *more)
    assert 3 == result.code
    assert f'{out.parent}: there is no such folder' in result.err


def test_a_folder_that_holds_something_is_no_target(
  adapted, tmp_path, surgery_cli
):
  result = surgery_cli('detach', adapted, '-o', tmp_path, '--force')
  assert 3 == result.code
  assert 'expected a new name or an empty folder, found a folder' in result.err


def test_a_folder_that_is_not_writable_is_named(
  adapted, tmp_path, surgery_cli, monkeypatch
):
  # Whoever runs the tests may write everywhere.
  monkeypatch.setattr(os, 'access', lambda path, mode: not mode & os.W_OK)
  result = surgery_cli('detach', adapted, '-o', tmp_path / 'o.msgpack')
  assert 3 == result.code
  assert f'{tmp_path}: the folder is not writable' in result.err


@pytest.fixture
def large(tmp_path):
  value = np.ones(1 << 20, 'float32')
  file = tmp_path / 'large.msgpack'
  Checkpoint({('x',): Leaf(lambda: value, value.shape, 'float32')}).write(file)
  return file


def test_a_full_disk_is_told_and_leaves_nothing(large, tmp_path):
  folder = tmp_path / 'out'
  folder.mkdir()
  out = folder / 'o.msgpack'
  # As a full disk, but with another number.
  limited = 'ulimit -f 1024; exec "$@"'
  done = subprocess.run(
    ['bash', '-c', limited, '-', BIN, 'freeze', large, '**', '-o', out],
    capture_output=True,
    text=True,
  )
  assert 3 == done.returncode
  assert f'error: {out}: File too large; nothing was written.\n' == done.stderr
  assert [] == list(folder.iterdir())


def test_an_unknown_suffix_is_told_even_by_a_dry_run(
  adapted, tmp_path, surgery_cli
):
  args = ('detach', adapted, '-o', tmp_path / 'o.pt')
  for more in ((), ('--dry-run',)):
    result = surgery_cli(*args, *more)
    assert 3 == result.code
    assert "no format is known for the suffix '.pt'" in result.err


def test_a_file_may_be_written_over_itself(adapted, surgery_cli):
  before = len(surgery.open(adapted))
  result = surgery_cli('detach', adapted, '-o', adapted)
  assert 3 == result.code
  assert 'exists already' in result.err
  assert 0 == surgery_cli('detach', adapted, '-o', adapted, '--force').code
  assert before - 4 == len(surgery.open(adapted))


NO_JAX = {
  'select': ('select', '{file}', '**/bias'),
  'inspect': ('inspect', '{file}'),
  'history': ('inspect', '{file}', '--history'),
  'diff': ('diff', '{file}', '{file}'),
  'verify': ('verify', '{file}'),
  'convert': ('convert', '{file}', 'out.safetensors'),
  'freeze': ('freeze', '{file}', '-o', 'out.msgpack'),
  'cast': ('cast', '{file}', '--to', 'bf16', '-o', 'out.msgpack'),
  'drop': ('drop', '{file}', '**/bias', '-o', 'out.msgpack'),
  'keep': ('keep', '{file}', '**/bias', '-o', 'out.msgpack'),
  'rename': ('rename', '{file}', 'model -> m', '-o', 'out.msgpack'),
}


@pytest.mark.parametrize('name', NO_JAX)
def test_what_needs_no_jax_imports_none(model, tmp_path, name):
  args = [a.format(file=model.file) for a in NO_JAX[name]]
  program = (
    f'import sys\n'
    'from surgery.cli.main import run\n'
    f'code = run({args!r})\n'
    'heavy = {"jax", "blox", "flax", "rich"} & set(sys.modules)\n'
    'assert not heavy, heavy\n'
    'sys.exit(code)'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=tmp_path,
  )
  assert 0 == done.returncode, done.stderr


def test_every_verb_that_writes_is_tested_here():
  from surgery.cli import main

  reads = {
    *('demo', 'diff', 'explain', 'inspect', 'maps', 'plugins', 'select'),
    *('stats', 'verify'),
  }
  # They have tests of their own.
  others = {
    *('convert', 'extract-lora', 'new-plugin', 'patch', 'recipe-schema', 'run'),
    'unfreeze',
  }
  assert set(main.VERBS) == VERBS.keys() | reads | others


def test_stdout_that_is_full_is_an_error(model):
  with pathlib.Path('/dev/full').open('w') as full:
    done = subprocess.run(
      [BIN, 'inspect', model.file],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
    )
  assert 3 == done.returncode
  assert 'error: No space left on device.\n' == done.stderr
