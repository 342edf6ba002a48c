"""What becomes of the command's process: streams, signals, exit codes."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

import surgery
from tests import signals
from tests.files.trees import checkpoint_of

BIN = pathlib.Path(sys.executable).with_name('surgery')


@pytest.fixture
def pair(tmp_path):
  """Two files of so many tensors that their differences fill a pipe."""
  names = [f'layer_{i:04}' for i in range(3000)]
  for file, value in (('a', 0), ('b', 1)):
    tree = {name: np.full(2, value, 'float32') for name in names}
    checkpoint_of(tree).write(tmp_path / f'{file}.msgpack')
  return tmp_path


def shell(command, folder):
  return subprocess.run(
    ['bash', '-c', command], cwd=folder, capture_output=True, text=True
  )


def test_a_reader_that_goes_away_does_not_change_the_exit_code(pair):
  done = shell(
    f'{BIN} diff a.msgpack b.msgpack | head -1; exit ${{PIPESTATUS[0]}}', pair
  )
  assert (1, '') == (done.returncode, done.stderr)
  assert done.stdout.startswith('layer_0000')
  done = shell(
    f'{BIN} diff a.msgpack a.msgpack | true; exit ${{PIPESTATUS[0]}}', pair
  )
  assert (0, '') == (done.returncode, done.stderr)


def test_closed_streams_go_nowhere(pair):
  before = {p.name: p.read_bytes() for p in pair.iterdir()}
  for streams in ('>&-', '<&- >&-', '<&- >&- 2>&-'):
    done = shell(f'{BIN} diff a.msgpack b.msgpack {streams}', pair)
    assert (1, '', '') == (done.returncode, done.stdout, done.stderr)
  done = shell(f'{BIN} cast a.msgpack --to bf16 -o c.msgpack <&- >&-', pair)
  assert 0 == done.returncode, done.stderr
  assert len(surgery.open(pair / 'c.msgpack')) == 3000
  assert before == {
    p.name: p.read_bytes() for p in pair.iterdir() if p.name != 'c.msgpack'
  }


# Sends a signal to itself when the first bytes of an output are there.
PROGRAM = """
import os, signal, sys
from surgery.cli import main
from surgery.files import output

write = output.Output.write
def stopped(self, *given):
  write(self, *given)
  os.kill(os.getpid(), getattr(signal, {name!r}))
output.Output.write = stopped
sys.argv = ['surgery', 'cast', 'a.msgpack', '--to', 'bf16', '-o', 'out.msgpack']
main.main()
"""


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGHUP', 'SIGINT'])
def test_a_signal_leaves_no_temporary_file(pair, name):
  done = subprocess.run(
    signals.hearing(sys.executable, '-c', PROGRAM.format(name=name)),
    cwd=pair,
    capture_output=True,
    text=True,
  )
  assert (signals.ended_by(name), '', '') == (
    done.returncode,
    done.stdout,
    done.stderr,
  )
  assert ['a.msgpack', 'b.msgpack'] == sorted(p.name for p in pair.iterdir())


def test_ctrl_c_stops_the_loop_of_a_script(pair):
  # A terminal sends the signal to all of the foreground, so to both.
  program = pair / 'program.py'
  program.write_text(
    PROGRAM.format(name='SIGINT').replace('os.kill(os.getpid()', 'os.killpg(0')
  )
  loop = (
    'for one in 1 2 3; do echo $one; '
    f'{sys.executable} program.py; done; echo after'
  )
  done = subprocess.run(
    signals.hearing('bash', '-c', loop),
    cwd=pair,
    capture_output=True,
    text=True,
    start_new_session=True,
  )
  assert (signals.ended_by('SIGINT'), '1\n', '') == (
    done.returncode,
    done.stdout,
    done.stderr,
  )
  assert {'a.msgpack', 'b.msgpack', 'program.py'} == {
    p.name for p in pair.iterdir()
  }


def test_a_second_signal_does_not_stop_the_cleaning(pair):
  program = PROGRAM.format(name='SIGINT').replace(
    'write = output',
    'from surgery.files import atomic\n'
    'unlink = atomic.pathlib.Path.unlink\n'
    'def slow(*a, **k):\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
    '  os.kill(os.getpid(), signal.SIGTERM)\n'
    '  unlink(*a, **k)\n'
    'atomic.pathlib.Path.unlink = slow\n'
    'write = output',
  )
  done = subprocess.run(
    signals.hearing(sys.executable, '-c', program),
    cwd=pair,
    capture_output=True,
    text=True,
  )
  assert (signals.ended_by('SIGINT'), '') == (done.returncode, done.stderr)
  assert ['a.msgpack', 'b.msgpack'] == sorted(p.name for p in pair.iterdir())


def test_what_nohup_ignores_stays_ignored(pair):
  program = PROGRAM.format(name='SIGHUP')
  done = subprocess.run(
    signals.hearing('nohup', sys.executable, '-c', program),
    cwd=pair,
    capture_output=True,
    text=True,
  )
  assert 0 == done.returncode, done.stderr
  assert len(surgery.open(pair / 'out.msgpack')) == 3000
