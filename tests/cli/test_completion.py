"""Completion, as the scripts that shells are given ask for it."""

import contextlib
import io
import os
import pty
import select
import shutil
import subprocess
import sys
import warnings
from unittest import mock

import pytest

from surgery.cli import main
from tests.cli.test_main import BIN, command

FOLDER = os.pathsep.join([str(BIN.parent), os.environ['PATH']])


def completed(line, cwd='.', shell='bash'):
  """Returns what completes a command line, as a shell asks for it."""
  asked = {
    'COMP_WORDS': line,
    'COMP_CWORD': str(len(line.split(' ')) - 1),
    '_SURGERY_COMPLETE': f'{shell}_complete',
  }
  out = io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True)
  with (
    mock.patch.dict(os.environ, asked),
    contextlib.chdir(cwd),
    warnings.catch_warnings(),  # The command silences its process.
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(io.StringIO()) as err,
  ):
    code = main.run([])
  assert (0, '') == (code, err.getvalue())
  lines = out.buffer.getvalue().decode().splitlines()
  return [li.removeprefix('plain,') for li in lines if li]


@pytest.fixture
def folder(adapted):
  return adapted.parent


def test_verbs():
  assert ['detach', 'diff', 'disable'] == [
    verb
    for verb in completed('surgery d')
    if verb in ('detach', 'diff', 'disable')
  ]
  assert ['freeze'] == completed('surgery fr')
  assert '--version' in completed('surgery --')


def test_verbs_with_what_they_do_in_shells_that_show_it():
  assert ['plain', 'freeze', 'Freeze parameters.'] == completed(
    'surgery fr', shell='zsh'
  )


def test_options_of_a_verb():
  assert ['--shard-size', '--strict-flax'] == completed('surgery freeze m --s')


def test_files():
  assert ['file,'] == completed('surgery freeze ')


def test_paths_one_segment_at_a_time(folder):
  assert ['model/'] == completed('surgery inspect adapted.msgpack ', folder)
  assert ['model/net/query/', 'model/net/value/'] == completed(
    'surgery freeze adapted.msgpack model/net/', folder
  )
  assert ['model/net/query/lora_a', 'model/net/query/lora_b'] == completed(
    'surgery select adapted.msgpack model/net/query/lo', folder
  )
  assert [] == completed('surgery select adapted.msgpack nowhere/', folder)


def test_paths_behind_what_takes_selectors(folder):
  for line in (
    'attach adapted.msgpack --to ',
    'cast adapted.msgpack --keep ',
    'diff adapted.msgpack base.msgpack ',
    'drop adapted.msgpack **/bias !',
    'keep adapted.msgpack ',
    'unfreeze adapted.msgpack ',
  ):
    assert [line.split(' ')[-1] + 'model/'] == completed(
      f'surgery {line}', folder
    )


def test_names_that_mean_something_in_selectors_are_escaped(tmp_path):
  import numpy as np

  from surgery.model.checkpoint import Checkpoint, Leaf

  leaves: dict[tuple[str, ...], Leaf] = {
    path: Leaf(lambda: np.ones(1), (1,), 'float64')
    for path in (('a/b', 'x*'), ('a/b', 'y'), ('both',), ('c', 'd', 'e'))
  }
  Checkpoint(leaves).write(tmp_path / 'm.msgpack')
  from surgery.cli import completion

  assert ['a\\/b/', 'both', 'c/'] == list(completion._places(leaves, 0))
  assert ['a\\/b/x\\*', 'a\\/b/y', 'c/d/'] == list(
    completion._places(leaves, 1)
  )
  assert 1 == completion._depth('a\\/b/')
  assert ['c/d/e'] == completed('surgery select m.msgpack c/d/', tmp_path)


def test_adapter_types_for_attach(folder):
  # Others that are installed may begin so, too.
  found = completed('surgery attach adapted.msgpack --adapter lor')
  assert 'lora' == found[0]
  assert all(name.startswith('lor') for name in found)


@pytest.mark.parametrize(
  'verb', ['merge', 'detach', 'enable', 'disable', 'extract']
)
def test_adapters_of_the_file_for_other_verbs(folder, verb):
  line = f'surgery {verb} adapted.msgpack --adapter '
  assert ['default'] == completed(line, folder)


def test_dtypes(folder):
  line = 'surgery cast adapted.msgpack --to '
  assert {'bf16', 'f16', 'f32', 'bfloat16'} <= set(completed(line, folder))
  assert ['bf16', 'bfloat16'] == sorted(completed(line + 'bf', folder))
  line = 'surgery cast adapted.msgpack --to bf16 --keep **/norm=f3'
  assert ['**/norm=f32'] == completed(line, folder)


def test_formats_and_plugins(folder):
  line = 'surgery convert adapted.msgpack out --to m'
  assert ['msgpack'] == completed(line, folder)
  assert 'lora' == completed('surgery plugins show lor')[0]


@pytest.mark.parametrize('bad', ['none.msgpack', 'bad.msgpack', 'm.pt', '.'])
def test_a_file_that_is_none_completes_nothing(tmp_path, bad):
  (tmp_path / 'bad.msgpack').write_bytes(b'\xc1nonsense')
  assert [] == completed(f'surgery inspect {bad} ', tmp_path)
  assert [] == completed(f'surgery merge {bad} --adapter ', tmp_path)


@pytest.mark.parametrize('line', ['surgery nonsense ', "surgery inspect 'a"])
def test_nonsense_is_quiet(line):
  completed(line)


def test_an_unknown_shell_is_quiet():
  done = command(env={**os.environ, '_SURGERY_COMPLETE': 'tcsh_complete'})
  assert (1, '', '') == (done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
  'line',
  [
    'surgery inspect adapted.msgpack mo',
    'surgery merge adapted.msgpack --adapter ',
    'surgery attach adapted.msgpack --adapter ',
    'surgery cast adapted.msgpack --to b',
  ],
)
def test_no_jax_is_imported(folder, line):
  program = (
    'import sys\n'
    'from surgery.cli.main import run\n'
    'code = run([])\n'
    'heavy = {"jax", "blox", "flax", "rich"} & set(sys.modules)\n'
    'assert not heavy, heavy\n'
    'sys.exit(code)'
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    capture_output=True,
    text=True,
    cwd=folder,
    env={
      **os.environ,
      'COMP_WORDS': line,
      'COMP_CWORD': str(len(line.split(' ')) - 1),
      '_SURGERY_COMPLETE': 'bash_complete',
    },
  )
  assert (0, '') == (done.returncode, done.stderr)
  assert done.stdout.strip()


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_a_script_for_each_shell(shell):
  done = command(env={**os.environ, '_SURGERY_COMPLETE': f'{shell}_source'})
  assert (0, '') == (done.returncode, done.stderr)
  assert f'{shell}_complete' in done.stdout
  if shutil.which(shell):
    checked = subprocess.run(
      [shell, '-n'], input=done.stdout, capture_output=True, text=True
    )
    assert (0, '') == (checked.returncode, checked.stderr)


@contextlib.contextmanager
def terminal(*arguments, **options):
  """A program on a terminal; yields what types, and what waits for text."""
  ours, theirs = pty.openpty()
  process = subprocess.Popen(
    arguments, stdin=theirs, stdout=theirs, stderr=theirs, **options
  )
  os.close(theirs)
  shown = bytearray()

  def wait(text):
    while text.encode() not in shown:
      ready, _, _ = select.select([ours], [], [], 60)
      assert ready, f'{text!r} is not in {bytes(shown)!r}'
      shown.extend(os.read(ours, 4096))
    del shown[: shown.index(text.encode()) + len(text)]

  try:
    yield lambda text: os.write(ours, text.encode()), wait
  finally:
    process.kill()
    process.wait()
    os.close(ours)


@pytest.mark.skipif(not shutil.which('bash'), reason='needs bash')
def test_bash_goes_on_behind_a_layer_and_ends_behind_a_tensor(folder):
  env = {**os.environ, 'PATH': FOLDER, 'PS1': '$ ', 'TERM': 'dumb'}
  with terminal(
    'bash', '--norc', '--noprofile', '-i', cwd=folder, env=env,
    start_new_session=True,
  ) as (write, wait):  # fmt: skip
    write('eval "$(_SURGERY_COMPLETE=bash_source surgery)"; echo re""ady\n')
    wait('ready')
    write('surgery select adapted.msgpack mod\t')
    wait('model/')
    write('net/q\t')
    # No space came between, else this would be another word.
    wait('net/query/')
    write('k\t')
    wait('kernel ')
    write('--count\n')
    wait('--count')
    wait('1')
