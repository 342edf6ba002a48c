"""Writers that are killed at any moment leave an old model or a new one.

Real processes are killed. By default a few dozen times; a few hundred with
`SURGERY_CRASHES=400`.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

import surgery
from surgery import errors
from tests import signals
from tests.files.trees import checkpoint_of

COUNT = int(os.environ.get('SURGERY_CRASHES', '48'))
SHARD_SIZE = 400_000

# Writes models of which all numbers are 1, 2, … until it is killed. What it
# prints tells which one is whole.
PROGRAM = """
import sys
import numpy as np
from surgery.model.checkpoint import Checkpoint, Leaf
path, size = sys.argv[1], int(sys.argv[2]) or None
def model(number):
  array = np.full(100_000, number, 'float32')
  return Checkpoint(
    {('net', str(i)): Leaf(lambda: array, array.shape, 'float32')
     for i in range(8)}
  )
for number in range(1, 1_000_000):
  if size is None:
    model(number).write(path, overwrite=True)
  else:
    # A set is never replaced, so each has a name of its own.
    model(number).write(path.format(number), shard_size=size)
  print(number, flush=True)
"""


def killed(path: pathlib.Path, size: int, after: float) -> int:
  """Kills a writer; returns the number of the last model it wrote for sure."""
  child = subprocess.Popen(
    [sys.executable, '-c', PROGRAM, str(path), str(size)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout is not None
  assert '1\n' == child.stdout.readline()
  time.sleep(after)
  child.send_signal(signal.SIGKILL)
  rest = child.stdout.read()
  child.stdout.close()
  child.wait()
  return int(('1\n' + rest).split()[-1])


def numbers(path: pathlib.Path) -> set[float]:
  """All numbers in a model, which is read whole."""
  opened = surgery.open(path)
  assert 8 == len(opened)
  found = set()
  for leaf in opened.values():
    found |= set(np.unique(leaf.load()).tolist())
  return found


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
def test_a_file_is_always_whole(tmp_path, suffix):
  rng = random.Random(0)
  path = tmp_path / f'm{suffix}'
  unfinished = 0
  for _ in range(COUNT // 4):
    last = killed(path, 0, rng.uniform(0, 0.05))
    # The next one may have been there before it could be said.
    assert numbers(path) in ({last}, {last + 1})
    left = [p for p in tmp_path.iterdir() if p != path]
    assert len(left) <= 1
    unfinished += len(left)
  assert unfinished  # Else nothing was tested.
  checkpoint_of({'a': np.ones(3)}).write(path, overwrite=True)
  assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
def test_a_set_is_whole_or_not_there(tmp_path, suffix):
  rng = random.Random(1)
  unfinished = 0
  for count in range(COUNT // 4):
    folder = tmp_path / str(count)
    folder.mkdir()
    last = killed(folder / f'm{{}}{suffix}', SHARD_SIZE, rng.uniform(0, 0.05))
    for number in range(1, last + 3):
      index = folder / f'm{number}{suffix}.index.json'
      if index.exists():
        assert {number} == numbers(index)
      else:
        assert number > last
    # Whoever writes that set again finds nothing in the way but files that may
    # be replaced, and leaves nothing behind.
    number = last + 1
    while (folder / f'm{number}{suffix}.index.json').exists():
      number += 1
    before = {p for p in folder.iterdir() if not _belongs(p, number)}
    unfinished += len(set(folder.iterdir()) - before)
    target = folder / f'm{number}{suffix}'
    checkpoint_of({'a': np.ones(3)}).write(
      target, shard_size=10**6, overwrite=True
    )
    assert {
      folder / f'm{number}-00001-of-00001{suffix}',
      target.with_name(f'{target.name}.index.json'),
    } == set(folder.iterdir()) - before
  assert unfinished


def _belongs(path: pathlib.Path, number: int) -> bool:
  return path.name.startswith((f'm{number}-', f'm{number}.', f'.m{number}.'))


def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / 'm.msgpack'
  checkpoint_of({'a': np.ones(3)}).write(path)
  before = path.read_bytes()
  program = """
import sys, time
from surgery.model.checkpoint import Checkpoint, Leaf
def slow():
  print('computing', flush=True)
  time.sleep(60)
leaf = Leaf(slow, (3,), 'float32')
size = int(sys.argv[2]) or None
try:
  Checkpoint({('a',): leaf}).write(sys.argv[1], overwrite=True, shard_size=size)
except KeyboardInterrupt:
  sys.exit(130)
"""
  for size in (0, 100):
    child = subprocess.Popen(
      signals.hearing(sys.executable, '-c', program, path, size),
      stdout=subprocess.PIPE,
      text=True,
    )
    assert child.stdout is not None
    assert 'computing\n' == child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert 130 == child.wait(timeout=30)
    child.stdout.close()
    assert before == path.read_bytes()
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
@pytest.mark.parametrize('size', [None, 300_000])
def test_a_full_disk_leaves_nothing_behind(tmp_path, suffix, size):
  path = tmp_path / f'm{suffix}'
  checkpoint_of({'a': np.ones(3)}).write(path)
  before = path.read_bytes()
  program = """
import errno, resource, signal, sys
import numpy as np
from surgery.model.checkpoint import Checkpoint, Leaf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
array = np.ones(30_000, 'float32')
leaves = {(str(i),): Leaf(lambda: array, array.shape, 'float32')
          for i in range(8)}
try:
  Checkpoint(leaves).write(
    sys.argv[1], overwrite=True, shard_size=int(sys.argv[2]) or None
  )
except OSError as error:
  sys.exit(errno.errorcode[error.errno])
"""
  done = subprocess.run(
    [sys.executable, '-c', program, str(path), str(size or 0)],
    capture_output=True,
    text=True,
  )
  assert 'EFBIG' == done.stderr.strip()
  assert before == path.read_bytes()
  assert [path] == list(tmp_path.iterdir())


def test_an_error_while_computing_leaves_nothing_behind(tmp_path):
  def fails():
    raise errors.FormatError('cannot be read')

  leaf = checkpoint_of({'a': np.ones(300)})['a',]
  bad = leaf.replace(load=fails)
  for size in (None, 2000):
    with pytest.raises(errors.FormatError, match='cannot be read'):
      surgery.model.checkpoint.Checkpoint({('a',): leaf, ('b',): bad}).write(
        tmp_path / 'm.msgpack', shard_size=size
      )
    assert [] == list(tmp_path.iterdir())


@pytest.fixture
def locked():
  """A folder in which this process may not write."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
      os.seteuid(65534)  # Root may write everywhere.
    try:
      yield folder
    finally:
      if root:
        os.seteuid(0)
      folder.chmod(0o755)


@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
def test_a_folder_that_is_not_writable_is_named(tmp_path, request, suffix):
  model = checkpoint_of({'a': np.ones(3)})
  for size in (None, 1000):  # What is imported lazily must be readable.
    model.write(tmp_path / f'm{suffix}', shard_size=size, overwrite=True)
  locked = request.getfixturevalue('locked')
  for size in (None, 1000):
    with pytest.raises(PermissionError, match=str(locked)):
      model.write(locked / f'm{suffix}', shard_size=size)
  assert [] == list(locked.iterdir())
