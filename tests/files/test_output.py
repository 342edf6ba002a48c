import errno
import mmap
import os
import pathlib

import pytest

from surgery import errors
from surgery.files import output
from surgery.files.output import Output
from surgery.files.source import MappedFile

LARGE = 200_000


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'in.bin'
  path.write_bytes(os.urandom(4 * LARGE))
  return MappedFile(path)


@pytest.fixture
def target(tmp_path):
  fd = os.open(tmp_path / 'out.bin', os.O_RDWR | os.O_CREAT)
  yield fd
  os.close(fd)


def content(fd):
  return os.pread(fd, 1 << 24, 0)


@pytest.fixture
def copies(monkeypatch):
  """The ranges that are copied by the system."""
  found = []
  copy = output._copy

  def spy(file, fd, start, stop):
    found.append((start, stop))
    copy(file, fd, start, stop)

  monkeypatch.setattr(output, '_copy', spy)
  return found


def fail(code):
  def call(*arguments):
    raise OSError(code, os.strerror(code))

  return call


def test_bytes_and_ranges_come_in_order(file, target):
  out = Output(target)
  out.write(b'one')
  out.copy(file, 5, 10)
  out.write(b'two')
  out.copy(file, 0, LARGE)
  out.copy(file, 7, 9)
  out.write(b'x' * LARGE)
  out.write(b'three')
  out.flush()
  expected = b''.join(
    (
      b'one',
      file.data[5:10],
      b'two',
      file.data[:LARGE],
      file.data[7:9],
      b'x' * LARGE,
      b'three',
    )
  )
  assert expected == content(target)


def test_neighbours_are_copied_as_one(file, target, copies):
  out = Output(target)
  out.copy(file, 0, LARGE)
  out.copy(file, LARGE, 2 * LARGE)
  out.flush()
  assert copies == [(0, 2 * LARGE)]
  assert file.data[: 2 * LARGE] == content(target)


def test_what_lies_between_two_ranges_is_copied_with_them(file, target, copies):
  out = Output(target)
  out.copy(file, 0, LARGE)
  out.write(file.data[LARGE : LARGE + 3])
  out.write(file.data[LARGE + 3 : LARGE + 9])
  out.copy(file, LARGE + 9, 2 * LARGE)
  out.flush()
  assert copies == [(0, 2 * LARGE)]
  assert file.data[: 2 * LARGE] == content(target)


def test_other_bytes_between_two_ranges_are_written(file, target, copies):
  other = bytes(b ^ 1 for b in file.data[LARGE : LARGE + 3])
  out = Output(target)
  out.copy(file, 0, LARGE)
  out.write(other)
  out.copy(file, LARGE + 3, 2 * LARGE)
  out.flush()
  assert len(copies) == 2
  expected = file.data[:LARGE] + other + file.data[LARGE + 3 : 2 * LARGE]
  assert expected == content(target)


def test_a_range_before_the_last_is_not_taken_for_a_neighbour(file, target):
  out = Output(target)
  out.copy(file, LARGE, LARGE + 5)
  out.copy(file, 0, 5)
  out.flush()
  assert file.data[LARGE : LARGE + 5] + file.data[:5] == content(target)


def test_short_ranges_are_not_copied_by_the_system(file, target, copies):
  out = Output(target)
  out.copy(file, 3, 30)
  out.flush()
  assert copies == []
  assert file.data[3:30] == content(target)


def test_many_short_writes_after_a_range_are_whole(file, target):
  out = Output(target)
  out.copy(file, 0, 10)
  for _ in range(40):
    out.write(b'y' * 60_000)
  out.flush()
  assert file.data[:10] + b'y' * 2_400_000 == content(target)


@pytest.mark.parametrize('missing', [1, 2])
@pytest.mark.parametrize('before', [3, 4])
def test_other_ways_of_copying_give_the_same(
  file, target, monkeypatch, missing, before
):
  for name in ('copy_file_range', 'sendfile')[:missing]:
    monkeypatch.setattr(os, name, fail(errno.EXDEV))
  out = Output(target)
  out.write(b'zzz')
  out.copy(file, before, 3 * LARGE)
  out.flush()
  assert b'zzz' + file.data[before : 3 * LARGE] == content(target)


@pytest.mark.parametrize('before', [0, 1, 4095, 4096, 5000])
@pytest.mark.parametrize('start', [0, 1, 4096])
def test_pages_that_become_pages_are_copied_by_the_system(
  file, target, monkeypatch, before, start
):
  apart = (before - start) % mmap.PAGESIZE
  if apart:
    monkeypatch.setattr(os, 'copy_file_range', fail(errno.EIO))
  else:
    monkeypatch.setattr(output, '_by_mapping', fail(errno.EIO))
  out = Output(target)
  out.write(b'z' * before)
  out.copy(file, start, 3 * LARGE)
  out.flush()
  assert b'z' * before + file.data[start : 3 * LARGE] == content(target)


def test_nothing_stays_mapped_of_what_was_copied(tmp_path, target):
  path = tmp_path / 'in.bin'
  path.write_bytes(os.urandom(1 << 25))
  file = MappedFile(path)
  before = resident()
  out = Output(target)
  out.write(b'z')
  out.copy(file, 0, 1 << 25)
  out.flush()
  assert resident() - before < 1 << 23


def resident():
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return 1024 * next(
    int(x.split()[1]) for x in lines if x.startswith('RssFile')
  )


def test_copying_goes_on_where_another_way_stopped(file, target, monkeypatch):
  copy = os.copy_file_range

  def once(source, to, length, start):
    if start:
      raise OSError(errno.EINVAL, 'no more')
    return copy(source, to, 1000, start)

  monkeypatch.setattr(os, 'copy_file_range', once)
  out = Output(target)
  out.copy(file, 0, LARGE)
  out.flush()
  assert file.data[:LARGE] == content(target)


def test_a_full_disk_is_not_tried_again(file, target, monkeypatch):
  monkeypatch.setattr(os, 'copy_file_range', fail(errno.ENOSPC))
  monkeypatch.setattr(os, 'sendfile', fail(errno.EIO))
  out = Output(target)
  out.copy(file, 0, LARGE)
  with pytest.raises(OSError, match='No space left'):
    out.flush()


@pytest.mark.parametrize('before', [b'', b'z'])
def test_a_file_that_was_cut_meanwhile_is_an_error(tmp_path, target, before):
  path = tmp_path / 'cut.bin'
  path.write_bytes(bytes(2 * LARGE))
  file = MappedFile(path)
  os.truncate(path, LARGE)
  out = Output(target)
  out.write(before)
  out.copy(file, 0, 2 * LARGE)
  with pytest.raises(errors.FormatError, match='found the end') as info:
    out.flush()
  assert info.value.offset == LARGE


def test_the_disk_is_told_early_of_what_was_written(file, target, monkeypatch):
  told = []
  monkeypatch.setattr(output, '_BEGIN', LARGE)
  monkeypatch.setattr(
    output, 'begin', lambda fd, start, length: told.append((start, length))
  )
  out = Output(target)
  out.copy(file, 0, 3 * LARGE)
  out.write(b'x' * (LARGE // 2))
  out.write(b'y' * LARGE)
  out.flush()
  assert [
    (0, LARGE),
    (LARGE, LARGE),
    (2 * LARGE, LARGE),
    (3 * LARGE, LARGE * 3 // 2),
  ] == told
  assert file.data[: 3 * LARGE] + b'x' * (LARGE // 2) + b'y' * LARGE == content(
    target
  )


def test_a_file_that_takes_no_advice_is_written_all_the_same(monkeypatch):
  monkeypatch.setattr(output, '_BEGIN', 1)
  told = []

  def refuse(*arguments):
    told.append(arguments)
    raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

  monkeypatch.setattr(os, 'posix_fadvise', refuse)
  fd = os.memfd_create('out')
  out = Output(fd)
  out.write(b'x' * LARGE)
  out.flush()
  assert b'x' * LARGE == content(fd)
  assert told
  os.close(fd)
