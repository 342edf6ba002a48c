"""The command's own process: its streams, and signals that end it."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any

# A shell says that a program was ended by a signal with a code above this.
_BY_SIGNAL = 128
_SIGNALS = ('SIGTERM', 'SIGHUP')


class Ended(BaseException):
  """The process was told to end by a signal.

  Raised where the program is, so that what cleans up does: temporary files
  are removed and the old output stays.

  Attributes:
    code: exit code that it becomes.
  """

  def __init__(self, number: int) -> None:
    super().__init__(number)
    self.code = _BY_SIGNAL + number


class _Patient(io.RawIOBase):
  """Standard output that nobody may read to its end.

  Whoever closes the other end has seen enough of what is printed. The verb
  goes on, because its exit code (of `diff`, of `verify`) is a result as well.
  """

  def __init__(self, fd: int) -> None:
    super().__init__()
    self._fd = fd

  def writable(self) -> bool:
    return True

  def fileno(self) -> int:
    return self._fd

  def isatty(self) -> bool:
    return os.isatty(self._fd)

  def write(self, data: Any) -> int:
    try:
      return os.write(self._fd, data)
    except BrokenPipeError:
      # Nobody reads any more: from now on it goes nowhere.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._fd)
      os.close(nowhere)
      return len(data)


def prepare() -> None:
  """Makes the process one that ends tidily; called once, at its start."""
  _open_streams()
  stdout = sys.stdout
  stdout.flush()
  sys.stdout = io.TextIOWrapper(
    io.BufferedWriter(_Patient(stdout.fileno())),
    encoding=stdout.encoding,
    errors=stdout.errors,
    line_buffering=bool(stdout.line_buffering),
  )
  for name in _SIGNALS:
    number = getattr(signal, name, None)  # Windows has no SIGHUP.
    # What `nohup` made the process ignore stays ignored.
    if number is not None and signal.getsignal(number) is signal.SIG_DFL:
      signal.signal(number, _end)


def _end(number: int, frame: Any) -> None:
  del frame
  # A second signal must not keep the first from cleaning up.
  for name in _SIGNALS:
    if (other := getattr(signal, name, None)) is not None:
      signal.signal(other, signal.SIG_IGN)
  raise Ended(number)


def _open_streams() -> None:
  """Opens what was closed (`>&-`), to nowhere.

  Otherwise the next file that is opened would get its number, and what is
  printed would be written into it.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # Gets the lowest number that is free.
  for name, number, mode in (
    ('stdin', 0, 'r'),
    ('stdout', 1, 'w'),
    ('stderr', 2, 'w'),
  ):
    if getattr(sys, name) is None:
      # It lives as long as the process.
      raw = io.FileIO(number, mode, closefd=False)
      buffered: Any = (
        io.BufferedReader(raw) if mode == 'r' else io.BufferedWriter(raw)
      )
      setattr(sys, name, io.TextIOWrapper(buffered, encoding='utf-8'))
