"""Systems that lack what Linux has: simulated, since tests run on Linux."""

import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import surgery
from surgery.files import atomic, output, system

# What Windows has not, taken away before anything is imported.
BARE = """
import os, sys
sys.modules['fcntl'] = None
for name in (
  *('pread', 'sendfile', 'copy_file_range', 'fchmod', 'posix_fadvise'),
  *('O_CLOEXEC', 'O_DIRECTORY', 'O_NOFOLLOW', 'O_NONBLOCK'),
):
  delattr(os, name)
from surgery.files import system
system.RENAMES_OPEN = False
assert not system.locks() and 0 == system.FOLDER
"""


def bare(program, *arguments):
  """Runs a program where these are missing; returns what it printed."""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', BARE + textwrap.dedent(program)]
    + [str(a) for a in arguments],
    capture_output=True,
    text=True,
  )
  assert 0 == done.returncode, done.stderr
  return done.stdout


def saved(path):
  leaves = {
    ('a', 'kernel'): np.arange(12, dtype='float32').reshape(3, 4),
    ('b', 'kernel'): np.ones((300, 400), 'float32'),
  }
  surgery.Checkpoint(
    {
      p: surgery.Leaf(lambda v=v: v, v.shape, str(v.dtype))
      for p, v in leaves.items()
    }
  ).write(path)
  return path


@pytest.mark.parametrize('suffix', ['msgpack', 'safetensors'])
def test_a_pass_in_the_shell_writes_the_same_bytes(tmp_path, suffix):
  file = saved(tmp_path / f'm.{suffix}')
  here, there = tmp_path / f'here.{suffix}', tmp_path / f'there.{suffix}'
  surgery.Recipe([{'drop': 'a'}]).run(model=file, out=here)
  bare(
    """
    from surgery.cli import main
    file, out = sys.argv[1:]
    assert 0 == main.run(['drop', file, 'a', '-o', out])
    assert 3 == main.run(['drop', file, 'a', '-o', out])
    assert 0 == main.run(['drop', file, 'a', '-o', out, '--force'])
    """,
    file,
    there,
  )
  assert here.read_bytes() == there.read_bytes()
  assert {file.name, here.name, there.name} == {
    p.name for p in tmp_path.iterdir()
  }


def test_a_set_is_refused_with_what_to_do(tmp_path):
  file, out = saved(tmp_path / 'm.msgpack'), tmp_path / 'o.msgpack'
  said = bare(
    """
    import surgery
    file, out = sys.argv[1:]
    try:
      surgery.open(file).write(out, shard_size=1000)
    except surgery.SurgeryError as error:
      print(error)
    """,
    file,
    out,
  )
  assert 'a set of files cannot be written whole or not at all' in said
  assert 'Write one file' in said
  assert ['m.msgpack'] == [p.name for p in tmp_path.iterdir()]


def test_a_dead_writers_file_stays_where_nobody_can_tell(tmp_path):
  """Removing that of a living writer would be worse."""
  left = tmp_path / f'{atomic.prefix(tmp_path / "o.bin")}1-aa.tmp'
  left.write_bytes(b'x')
  bare(
    """
    from surgery.files import atomic
    with atomic.writing(sys.argv[1]) as fd:
      os.write(fd, b'new')
    """,
    tmp_path / 'o.bin',
  )
  assert left.exists()
  with atomic.writing(tmp_path / 'o.bin', overwrite=True) as fd:
    os.write(fd, b'newer')
  assert not left.exists()


def test_sendfile_that_wants_a_socket_is_gone_round(tmp_path, monkeypatch):
  """As macOS answers."""

  def refuse(*args):
    raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))

  monkeypatch.delattr(os, 'copy_file_range')
  monkeypatch.setattr(os, 'sendfile', refuse)
  file = saved(tmp_path / 'm.msgpack')
  surgery.Recipe([{'drop': 'a'}]).run(model=file, out=tmp_path / 'o.msgpack')
  found = surgery.open(tmp_path / 'o.msgpack')['b', 'kernel'].load()
  np.testing.assert_array_equal(np.ones((300, 400), 'float32'), found)
  assert errno.ENOTSOCK in output._CANNOT


def test_places_are_read_without_pread(tmp_path, monkeypatch):
  file = tmp_path / 'x'
  file.write_bytes(bytes(range(100)))
  monkeypatch.delattr(os, 'pread')
  fd = os.open(file, os.O_RDONLY)
  try:
    assert bytes(range(10, 30)) == system.read_at(fd, 20, 10)
    assert b'' == system.read_at(fd, 20, 200)
  finally:
    os.close(fd)
