import os
import pty
import re
import subprocess
import sys

import pytest

import surgery
from surgery.cli import progress
from surgery.model.checkpoint import Leaf

PROGRAM = """
import sys
from surgery.cli import main, progress
progress.DELAY = {delay}
progress._INTERVAL = 0
sys.exit(main.run(sys.argv[1:]))
"""


def on_a_terminal(delay, *arguments):
  """Runs the command with stderr on a terminal; returns what that shows."""
  ours, theirs = pty.openpty()
  done = subprocess.Popen(
    [sys.executable, '-c', PROGRAM.format(delay=delay), *map(str, arguments)],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=theirs,
  )
  os.close(theirs)
  shown = b''
  while True:
    try:
      data = os.read(ours, 4096)
    except OSError:  # Linux says so when the other side is closed.
      break
    if not data:
      break
    shown += data
  os.close(ours)
  assert done.stdout is not None
  done.stdout.close()
  assert 0 == done.wait()
  return shown.decode()


def test_what_takes_long_is_told_on_a_terminal(adapted, out):
  shown = on_a_terminal(0, 'freeze', adapted, '-o', out)
  nbytes = sum(leaf.nbytes for leaf in surgery.open(adapted).values())
  assert re.search(rf'10/10 tensors, {nbytes}/{nbytes} B', shown), shown
  # Nothing of it is left on the line.
  *_, last = shown.rstrip().split('\r')
  assert last.startswith('wrote')


@pytest.mark.parametrize('verb', ['diff', 'verify'])
def test_reading_is_told_too(adapted, verb):
  files = [adapted] * (2 if verb == 'diff' else 1)
  assert '10/10 tensors' in on_a_terminal(0, verb, *files)


def test_what_is_done_soon_says_nothing(adapted, out):
  shown = on_a_terminal(100, 'freeze', adapted, '-o', out)
  assert shown.startswith('wrote')


def test_nothing_is_shown_elsewhere(adapted, out, surgery_cli, monkeypatch):
  monkeypatch.setattr(progress, 'DELAY', 0)
  result = surgery_cli('freeze', adapted, '-o', out)
  assert result.err.startswith('wrote')


@pytest.mark.parametrize(
  ('done', 'total', 'text'),
  [
    (0, 0, '0/0 B'),
    (1, 999, '1/999 B'),
    (1_200_000_000, 2_500_000_000, '1.2/2.5 GB'),
    (1, 5_000, '0.0/5.0 KB'),
    (10**16, 10**16, '10000.0/10000.0 TB'),
  ],
)
def test_both_numbers_have_the_unit_of_the_total(done, total, text):
  assert text == progress._of(done, total)


def test_no_terminal_no_function():
  with progress.shown([Leaf(lambda: 0)]) as told:
    assert told is None
