import errno
import os
import pathlib
import subprocess
import sys

import pytest

import surgery
from surgery.files import atomic_folders


def write(path, text='{}'):
  with atomic_folders.writing(path) as folder:
    (folder / 'a.json').write_text(text)
    (folder / 'inner').mkdir()
    (folder / 'inner' / 'b').write_text(text)


def names(path):
  return sorted(p.relative_to(path).as_posix() for p in path.rglob('*'))


def test_a_folder_appears_with_all_of_its_files(tmp_path):
  out = tmp_path / 'out'
  with atomic_folders.writing(out) as folder:
    (folder / 'a').write_text('1')
    assert not out.exists()
  assert ['a'] == names(out)
  assert ['out'] == [p.name for p in tmp_path.iterdir()]


def test_an_empty_folder_is_replaced(tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  write(out)
  assert ['a.json', 'inner', 'inner/b'] == names(out)


def test_whatever_goes_wrong_leaves_nothing(tmp_path):
  out = tmp_path / 'out'
  with pytest.raises(KeyboardInterrupt), atomic_folders.writing(out) as folder:
    (folder / 'a').write_text('1')
    raise KeyboardInterrupt
  assert [] == list(tmp_path.iterdir())
  out.mkdir()
  with pytest.raises(OSError), atomic_folders.writing(out) as folder:
    (folder / 'a').write_text('1')
    raise OSError(errno.ENOSPC, 'no space')
  assert ['out'] == [p.name for p in tmp_path.iterdir()]
  assert [] == names(out)


def test_a_folder_that_holds_something_is_never_replaced(tmp_path):
  (tmp_path / 'mine').write_text('1')
  with pytest.raises(FileExistsError, match="a folder with 'mine' in it"):
    write(tmp_path)
  assert ['mine'] == names(tmp_path)
  with pytest.raises(FileExistsError, match='found a file'):
    write(tmp_path / 'mine')
  assert '1' == (tmp_path / 'mine').read_text()


def test_who_comes_too_late_changes_nothing(tmp_path):
  out = tmp_path / 'out'
  with pytest.raises(FileExistsError), atomic_folders.writing(out) as folder:
    (folder / 'a').write_text('mine')
    write(out, 'theirs')
  assert 'theirs' == (out / 'a.json').read_text()
  assert ['out'] == [p.name for p in tmp_path.iterdir()]


def test_nothing_is_written_through_a_link(tmp_path):
  there = tmp_path / 'there'
  there.mkdir()
  link = tmp_path / 'link'
  link.symlink_to(there)
  with pytest.raises(surgery.FormatError, match='symbolic link to'):
    write(link)
  assert link.is_symlink() and [] == names(there)
  gone = tmp_path / 'gone'
  gone.symlink_to(tmp_path / 'nowhere')
  with pytest.raises(surgery.FormatError, match='symbolic link to'):
    write(gone)


def test_the_folder_above_may_be_a_link(tmp_path):
  there = tmp_path / 'there'
  there.mkdir()
  (tmp_path / 'link').symlink_to(there)
  write(tmp_path / 'link' / 'out')
  assert ['a.json', 'inner', 'inner/b'] == names(there / 'out')


KILLED = """
import os, signal, sys
from surgery.files import atomic_folders
with atomic_folders.writing(sys.argv[1]) as folder:
  (folder / 'a').write_text('1')
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
  out = tmp_path / 'out'
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run(
    [sys.executable, '-c', KILLED, str(out)], cwd=root, check=False
  )
  assert -9 == done.returncode
  [left] = tmp_path.iterdir()
  assert left.name.startswith('.out.surgery-')
  assert ['out', 'out/a'] == names(left)
  write(out)
  assert ['out'] == [p.name for p in tmp_path.iterdir()]


def test_what_a_living_writer_has_is_left_alone(tmp_path):
  out = tmp_path / 'out'
  with pytest.raises(FileExistsError), atomic_folders.writing(out) as folder:
    write(out)
    # The second removed nothing of the first.
    assert folder.is_dir()
    (folder / 'late').write_text('1')


def test_a_mounted_folder_is_named(tmp_path, monkeypatch):
  out = tmp_path / 'out'
  out.mkdir()

  def busy(self, target):
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

  monkeypatch.setattr(pathlib.Path, 'rename', busy)
  with pytest.raises(surgery.FormatError, match=r'inside of it: .*/out/model/'):
    write(out)
  assert [] == names(out)


def test_a_set_of_files_can_be_written_into_it(tmp_path):
  # Its writer locks the folder.
  from surgery.files import atomic_sets

  with (
    atomic_folders.writing(tmp_path / 'out') as folder,
    atomic_sets.writing(folder / 'm.bin', 1) as files,
  ):
    with files.next() as fd:
      os.write(fd, b'1')
    os.write(files.fd, b'{}')
  assert ['m-00001-of-00001.bin', 'm.bin.index.json'] == names(tmp_path / 'out')


@pytest.mark.parametrize('name', ['.', './', '..', 'inner/..'])
def test_where_one_stands_is_not_replaced(tmp_path, monkeypatch, name):
  (tmp_path / 'inner').mkdir()
  monkeypatch.chdir(tmp_path / 'inner')
  (tmp_path / 'inner' / 'inner').mkdir()
  if name == '.':
    (tmp_path / 'inner' / 'inner').rmdir()
  with pytest.raises((surgery.FormatError, FileExistsError)):
    write(name)
  assert pathlib.Path.cwd() == tmp_path / 'inner'


def test_a_name_may_be_relative(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('out')
  write('./more/')
  assert ['more', 'out'] == sorted(p.name for p in tmp_path.iterdir())
