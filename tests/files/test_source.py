import os
import subprocess
import sys

import numpy as np
import pytest

from surgery import errors
from surgery.files.source import MappedFile, Source


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'f.bin'
  path.write_bytes(bytes(range(100)))
  return MappedFile(path)


def source(file, shape, dtype, *spans, scalar=False):
  return Source(file, ('a', 'b'), shape, dtype, spans, scalar)


def test_a_missing_file_is_the_usual_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    MappedFile(tmp_path / 'none')


def test_a_folder_is_the_usual_error(tmp_path):
  with pytest.raises(IsADirectoryError, match=str(tmp_path)):
    MappedFile(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
  path = tmp_path / 'empty'
  path.touch()
  with pytest.raises(errors.FormatError, match='empty: at byte 0') as info:
    MappedFile(path)
  assert info.value.offset == 0


def test_a_pipe_is_refused_and_does_not_block(tmp_path):
  path = tmp_path / 'pipe'
  os.mkfifo(path)
  with pytest.raises(errors.FormatError, match='pipe'):
    MappedFile(path)


def test_its_descriptor_is_closed_with_the_last_array(tmp_path):
  path = tmp_path / 'f.bin'
  path.write_bytes(b'abc')
  file = MappedFile(path)
  fd = file.fd
  one = source(file, (3,), 'uint8', (0, 3))
  array = one()
  del file, one
  assert array.tobytes() == b'abc'
  with pytest.raises(OSError, match='Bad file descriptor'):
    os.fstat(fd)


def test_one_span_is_a_read_only_view(file):
  one = source(file, (2, 2), 'uint8', (3, 7))
  array = one()
  assert array.tolist() == [[3, 4], [5, 6]]
  assert not array.flags.writeable
  assert not array.flags.owndata


def test_spans_are_joined_in_order(file):
  array = source(file, (4,), 'uint8', (50, 52), (3, 5))()
  assert array.tolist() == [50, 51, 3, 4]
  assert not array.flags.writeable


def test_unaligned_elements_are_right(file):
  array = source(file, (2,), 'uint32', (1, 9))()
  expected = np.frombuffer(bytes(range(1, 9)), np.uint32)
  assert expected.tolist() == (array + np.uint32(0)).tolist()


def test_a_scalar_is_a_numpy_scalar(file):
  value = source(file, (), 'uint8', (7, 8), scalar=True)()
  assert isinstance(value, np.uint8)
  assert value == 7


def test_no_elements_need_no_bytes(file):
  assert source(file, (0, 3), 'float32', (100, 100))().shape == (0, 3)


def test_bytes_that_are_no_booleans_are_refused(file):
  with pytest.raises(errors.FormatError, match=r'a/b.*the byte 2') as info:
    source(file, (3,), 'bool', (0, 3))()
  assert info.value.offset == 0


@pytest.mark.parametrize(
  ('start', 'stop', 'expected'),
  [
    (0, 5, [(10, 13), (20, 22)]),
    (1, 4, [(11, 13), (20, 21)]),
    (3, 5, [(20, 22)]),
    (0, 3, [(10, 13)]),
    (2, 2, []),
  ],
)
def test_ranges_lie_where_the_spans_are(file, start, stop, expected):
  one = source(file, (5,), 'uint8', (10, 13), (20, 22))
  assert expected == list(one.ranges(start, stop))


def test_large_arrays_survive_that_their_pages_are_dropped(tmp_path):
  path = tmp_path / 'large.bin'
  data = os.urandom(3 << 20)
  path.write_bytes(data)
  file = MappedFile(path)
  one = source(file, (len(data) - 2,), 'uint8', (1, len(data) - 1))
  kept = one()
  other = one()
  del other  # Its pages are dropped, and so are those of `kept`.
  assert data[1:-1] == kept.tobytes()


def test_headers_of_a_large_file_are_read_without_reading_ahead(
  tmp_path, checkpoint
):
  values = {(str(i),): np.zeros(1 << 21, 'uint8') for i in range(64)}
  path = tmp_path / 'm.msgpack'
  checkpoint(values).write(path)
  with path.open('rb') as file:
    os.fdatasync(file.fileno())  # For `fsync` tests do not wait.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
  counted = subprocess.run(
    [sys.executable, '-c', READ, str(path)],
    capture_output=True,
    text=True,
    check=True,
  )
  # Some pages a header; of a file system in memory nothing at all.
  assert int(counted.stdout) < path.stat().st_size // 8


READ = """
import pathlib, sys
from surgery.files.msgpack import open_file
def read():
  lines = pathlib.Path('/proc/self/io').read_text().splitlines()
  return int(dict(line.split(': ') for line in lines)['read_bytes'])
before = read()
assert 64 == len(open_file(sys.argv[1]))
print(read() - before)
"""
