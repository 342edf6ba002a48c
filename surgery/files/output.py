"""Writes bytes, and ranges of other files that it need not read."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable

from surgery import errors
from surgery.files import system
from surgery.files.progress import Progress, Told
from surgery.files.source import MappedFile

# Shorter ranges are cheaper to read than to copy by a call of the system.
_SMALL = 1 << 16
_BUFFER = 1 << 20
# After so many bytes the system starts writing to the disk, in the background.
_BEGIN = 1 << 25

# Errors of systems that cannot copy between these two files.
_CANNOT = {
  errno.EXDEV,
  errno.ENOSYS,
  errno.EINVAL,
  errno.EOPNOTSUPP,
  errno.EPERM,
  errno.ETXTBSY,
  # macOS sends files only to sockets.
  errno.ENOTSOCK,
  # The file was cut, so its mapped pages are gone.
  errno.EFAULT,
}

# From a file to a descriptor: first byte, number of bytes; returns how many.
_Way = Callable[[MappedFile, int, int, int], int]


class Output:
  """Bytes and copied ranges, in order, to one file.

  Two ranges of a file become one if the bytes written between them are those
  that lie between them in that file. So an unchanged part of a saved model,
  with its names and headers, is copied at once.

  Args:
    fd: descriptor of the file.
    told: called with the numbers of tensors and bytes that were written.

  Raises:
    OSError: if it cannot be written, e.g. because the disk is full.
  """

  def __init__(self, fd: int, told: Told | None = None) -> None:
    self._fd = fd
    self._progress = None if told is None else Progress(told)
    self._begun = self._done = os.lseek(fd, 0, os.SEEK_CUR)
    # Bytes that were given to this object; some may not be written yet.
    self._taken = self._done
    self._ready = bytearray()
    # The range that waits to be copied, and the bytes that follow it.
    self._range: tuple[MappedFile, int, int] | None = None
    self._after = bytearray()

  def expect(self, nbytes: int, tensors: int = 1) -> None:
    """Announces the bytes of a tensor, for progress.

    Args:
      nbytes: their number.
      tensors: number of tensors that are complete with them.
    """
    if self._progress is not None:
      self._progress.expect(self._taken, self._taken + nbytes, tensors)

  def write(self, data: bytes | memoryview) -> None:
    """Writes bytes."""
    self._taken += len(data)
    if len(data) >= _SMALL:
      self.flush()
      self._put(data)
      return
    # Headers and names are small: they are collected, and behind a range they
    # may turn out to be what lies between it and the next one.
    part = self._ready if self._range is None else self._after
    part += data
    if len(part) >= _BUFFER:
      self.flush()

  def copy(self, file: MappedFile, start: int, stop: int) -> None:
    """Writes bytes `start` to `stop` of another file."""
    self._taken += stop - start
    if self._range is not None:
      last, begin, end = self._range
      if (
        file is last
        and start - end == len(self._after)
        and file.data[end:start] == self._after
      ):
        self._range = file, begin, stop
        self._after.clear()
        return
      self._settle()
    # Not copied yet, since the next range may continue it.
    self._range = file, start, stop

  def replace(self, start: int, data: bytes) -> None:
    """Writes bytes in the place of some that were written before.

    Args:
      start: where they start in the file.
      data: the bytes.
    """
    self.flush()
    while data:
      done = os.pwrite(self._fd, data, start)
      start, data = start + done, data[done:]

  def flush(self) -> None:
    """Hands everything to the system."""
    self._settle()
    self._drain()

  def _settle(self) -> None:
    """Copies the range that waits, and queues the bytes that follow it."""
    if self._range is not None:
      file, start, stop = self._range
      if stop - start < _SMALL:
        self._ready += file.data[start:stop]
      else:
        self._drain()
        # In pieces, so that the disk begins and progress is seen meanwhile.
        for first in range(start, stop, _BEGIN):
          last = min(first + _BEGIN, stop)
          _copy(file, self._fd, first, last)
          self._count(last - first)
      self._range = None
      self._ready += self._after
      self._after.clear()
    if len(self._ready) >= _BUFFER:
      self._drain()

  def _drain(self) -> None:
    self._put(self._ready)
    self._ready = bytearray()

  def _put(self, data: bytes | bytearray | memoryview) -> None:
    _write(self._fd, data)
    self._count(len(data))

  def _count(self, written: int) -> None:
    """Counts bytes; makes the disk begin, so that the last `fsync` is short."""
    self._done += written
    if self._progress is not None:
      self._progress.reached(self._done)
    if self._done - self._begun >= _BEGIN:
      begin(self._fd, self._begun, self._done - self._begun)
      self._begun = self._done


def begin(fd: int, start: int, length: int) -> None:
  """Starts to write a range of a file to the disk, without waiting for it.

  It is only advice: on systems without it, `fsync` writes all at the end.
  """
  if hasattr(os, 'posix_fadvise'):
    with contextlib.suppress(OSError):
      # Linux starts to write the dirty pages of a range that is not needed.
      os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def _write(fd: int, data: bytes | bytearray | memoryview) -> None:
  view = memoryview(data)
  while view:
    view = view[os.write(fd, view) :]


def _copy(file: MappedFile, fd: int, start: int, stop: int) -> None:
  """Copies a range to the descriptor's position, in the cheapest way possible.

  Raises:
    FormatError: if the file was cut while it was read.
  """
  ways: tuple[_Way, ...] = (_by_range, _by_sendfile, _by_reading)
  if (os.lseek(fd, 0, os.SEEK_CUR) - start) % mmap.PAGESIZE:
    # Pages of the source straddle pages of the target, so that the system
    # would copy each in two pieces, which takes twice as long as writing.
    ways = (_by_mapping, *ways)
  for way in ways:
    start = _all(way, file, fd, start, stop)
    if start == stop:
      return
  raise errors.FormatError(
    f'{file.name}: expected {stop - start} more bytes, found the end. Another '
    'program truncated the file while it was read.',
    start,
  )


def _all(
  way: _Way, source: MappedFile, target: int, start: int, stop: int
) -> int:
  """Copies as much as one way can; returns where it ended."""
  try:
    while start < stop:
      done = way(source, target, start, stop - start)
      if not done:
        break
      start += done
  except OSError as error:
    if error.errno not in _CANNOT:
      raise
  return start


def _by_range(source: MappedFile, target: int, start: int, length: int) -> int:
  if not hasattr(os, 'copy_file_range'):
    return 0
  return os.copy_file_range(source.fd, target, length, start)


def _by_sendfile(
  source: MappedFile, target: int, start: int, length: int
) -> int:
  if not hasattr(os, 'sendfile'):
    return 0
  return os.sendfile(target, source.fd, start, length)


def _by_reading(
  source: MappedFile, target: int, start: int, length: int
) -> int:
  data = system.read_at(source.fd, min(length, _BUFFER), start)
  _write(target, data)
  return len(data)


def _by_mapping(
  source: MappedFile, target: int, start: int, length: int
) -> int:
  # The size is asked for anew: in a file that was truncated, the last mapped
  # page seems to go on with zeros.
  size = os.fstat(source.fd).st_size
  length = min(length, _BUFFER, max(0, size - start))
  source.fetch(start, start + length)
  with memoryview(source.data) as view, view[start : start + length] as part:
    done = os.write(target, part)
  source.forget(start, start + done)
  return done
