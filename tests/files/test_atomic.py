import errno
import fcntl
import os
import pathlib
import signal
import stat
import subprocess
import sys

import pytest

from surgery import errors
from surgery.files import atomic


@pytest.fixture
def target(tmp_path):
  return tmp_path / 'out.bin'


def write(path, data=b'new', **how):
  with atomic.writing(path, **how) as fd:
    os.write(fd, data)


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def python(code, *arguments, **how):
  return subprocess.Popen(
    [sys.executable, '-c', code, *map(str, arguments)], text=True, **how
  )


def killed(target):
  """Lets a writer be killed in the middle of its work."""
  code = """
import os, sys
from surgery.files import atomic
with atomic.writing(sys.argv[1], overwrite=True) as fd:
  os.write(fd, b'half')
  print('ready', flush=True)
  sys.stdin.read()
"""
  child = python(code, target, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  with child:
    assert child.stdout is not None
    assert child.stdout.readline() == 'ready\n'
    child.send_signal(signal.SIGKILL)
  assert child.returncode == -signal.SIGKILL


def test_a_new_file_has_the_bytes_and_nothing_else_is_left(target):
  write(target)
  assert target.read_bytes() == b'new'
  assert names(target.parent) == ['out.bin']


def test_a_new_file_has_the_permissions_that_the_umask_leaves(target):
  old = os.umask(0o027)
  try:
    write(target)
  finally:
    os.umask(old)
  assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize('mode', [0o600, 0o664, 0o755])
def test_permissions_of_a_replaced_file_are_kept(target, mode):
  target.write_bytes(b'old')
  target.chmod(mode)
  write(target, overwrite=True)
  assert mode == stat.S_IMODE(target.stat().st_mode)


def test_a_private_file_is_private_while_it_is_written(target):
  target.write_bytes(b'old')
  target.chmod(0o600)
  with atomic.writing(target, overwrite=True) as fd:
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600


def test_the_old_file_is_whole_until_the_end(target):
  target.write_bytes(b'old')
  with atomic.writing(target, overwrite=True) as fd:
    os.write(fd, b'new')
    assert target.read_bytes() == b'old'
  assert target.read_bytes() == b'new'


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('old', [None, b'old'])
def test_whatever_is_raised_leaves_things_as_they_were(target, error, old):
  if old is not None:
    target.write_bytes(old)
  before = names(target.parent)
  with pytest.raises(error), atomic.writing(target, overwrite=True) as fd:
    os.write(fd, b'half')
    raise error
  assert before == names(target.parent)
  assert old is None or old == target.read_bytes()


def test_an_existing_file_is_refused_before_anything_is_written(target):
  target.write_bytes(b'old')
  with (
    pytest.raises(FileExistsError, match=r'overwrite=True.*out\.bin'),
    atomic.writing(target),
  ):
    pytest.fail('began to write')
  assert target.read_bytes() == b'old'


@pytest.mark.parametrize('links', [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
  target, monkeypatch, links
):
  if not links:
    monkeypatch.setattr(os, 'link', no_links)
  with pytest.raises(FileExistsError), atomic.writing(target) as fd:
    os.write(fd, b'new')
    target.write_bytes(b'faster')
  assert target.read_bytes() == b'faster'
  assert names(target.parent) == ['out.bin']


def no_links(*paths):
  raise OSError(errno.EOPNOTSUPP, 'no links here')


def test_a_file_system_without_links_will_do(target, monkeypatch):
  monkeypatch.setattr(os, 'link', no_links)
  write(target)
  assert target.read_bytes() == b'new'
  assert names(target.parent) == ['out.bin']


def test_the_bytes_are_on_the_disk_before_the_name_is(target, monkeypatch):
  seen = []
  sync = os.fsync

  def spy(fd):
    kind = 'folder' if stat.S_ISDIR(os.fstat(fd).st_mode) else 'file'
    seen.append((kind, target.exists()))
    sync(fd)

  monkeypatch.setattr(os, 'fsync', spy)
  write(target)
  assert seen == [('file', False), ('folder', True)]


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none'"):
    write(tmp_path / 'none' / 'out.bin')


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(NotADirectoryError):
    write(tmp_path / 'file' / 'out.bin')


def test_a_folder_is_not_replaced(tmp_path):
  with pytest.raises(IsADirectoryError):
    write(tmp_path, overwrite=True)


def test_a_pipe_is_not_replaced(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(errors.FormatError, match='pipe or a device'):
    write(tmp_path / 'pipe', overwrite=True)
  assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)


def test_a_link_is_replaced_and_the_file_behind_it_stays(tmp_path, target):
  target.write_bytes(b'old')
  link = tmp_path / 'link.bin'
  link.symlink_to(target)
  with pytest.raises(FileExistsError):
    write(link)
  write(link, overwrite=True)
  assert not link.is_symlink()
  assert link.read_bytes() == b'new'
  assert target.read_bytes() == b'old'


def test_a_link_that_leads_nowhere_is_not_replaced_unasked(tmp_path):
  link = tmp_path / 'link.bin'
  link.symlink_to(tmp_path / 'gone')
  with pytest.raises(FileExistsError):
    write(link)
  write(link, overwrite=True)
  assert link.read_bytes() == b'new'
  assert not (tmp_path / 'gone').exists()


def test_a_name_of_255_bytes_will_do(tmp_path):
  target = tmp_path / ('ü' * 127)
  write(target)
  assert target.read_bytes() == b'new'


def test_a_relative_path_will_do(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('out.bin')
  assert names(tmp_path) == ['out.bin']


def test_what_a_killed_writer_left_is_removed_by_the_next(target):
  target.write_bytes(b'old')
  killed(target)
  assert len(names(target.parent)) == 2
  assert target.read_bytes() == b'old'
  write(target, overwrite=True)
  assert names(target.parent) == ['out.bin']


def test_what_a_writer_left_for_another_file_is_not_touched(tmp_path, target):
  killed(target)
  left = names(tmp_path)
  write(tmp_path / 'other.bin')
  assert sorted([*left, 'other.bin']) == names(tmp_path)


def test_a_living_writer_is_left_alone(target):
  with atomic.writing(target, overwrite=True) as one:
    os.write(one, b'one')
    write(target, b'two', overwrite=True)
    assert target.read_bytes() == b'two'
  assert target.read_bytes() == b'one'
  assert names(target.parent) == ['out.bin']


def test_a_temporary_file_that_was_taken_away_is_made_again(
  target, monkeypatch
):
  lock = fcntl.flock
  taken: list[pathlib.Path] = []

  def flock(fd, how):
    if not taken:
      # Another writer thought it dead before it was locked.
      taken.append(pathlib.Path(f'/proc/self/fd/{fd}').readlink())
      taken[0].unlink()
    lock(fd, how)

  monkeypatch.setattr(fcntl, 'flock', flock)
  write(target)
  assert target.read_bytes() == b'new'


def test_a_file_system_without_locks_will_do(target, monkeypatch):
  def flock(fd, how):
    raise OSError(errno.ENOLCK, 'no locks')

  killed(target)
  monkeypatch.setattr(fcntl, 'flock', flock)
  write(target)
  assert target.read_bytes() == b'new'
  assert len(names(target.parent)) == 2  # It may still be alive.


def test_a_full_disk_leaves_the_old_file_and_nothing_else(target):
  target.write_bytes(b'old')
  code = """
import os, resource, sys
from surgery.files import atomic
from surgery.files.output import Output
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
  with atomic.writing(sys.argv[1], overwrite=True) as fd:
    out = Output(fd)
    for _ in range(20):
      out.write(bytes(1 << 17))
    out.flush()
except OSError as error:
  print(error.errno)
"""
  with python(code, target, stdout=subprocess.PIPE) as child:
    printed, _ = child.communicate()
  assert [str(errno.EFBIG)] == printed.split()
  assert target.read_bytes() == b'old'
  assert names(target.parent) == ['out.bin']
