"""The command's own process: its streams, and signals that end it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

# A shell says that a program was ended by a signal with a code above this.
_BY_SIGNAL = 128
# Windows has no SIGHUP.
_SIGNALS = tuple(
  getattr(signal, name)
  for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
  if hasattr(signal, name)
)
# What a signal does as Python starts, where it is not ignored.
_UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)


class Ended(BaseException):
  """The process was told to end by a signal.

  Raised where the program is, so that what cleans up does: temporary files
  are removed and the old output stays.

  Attributes:
    number: the signal.
    code: exit code by which shells tell of it.
  """

  def __init__(self, number: int) -> None:
    super().__init__(number)
    self.number = number
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


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
  """Lets signals that end the process raise `Ended`, which then ends it so.

  Whoever waits for the process must be told that a signal ended it: a shell
  leaves a loop for a program that SIGINT killed, and not for one that exits
  with 130. So what was interrupted is cleaned up first, and then the process
  sends itself the same signal, to which nothing listens any more.
  """
  # What `nohup` or a shell's `&` made the process ignore stays ignored.
  heard = [n for n in _SIGNALS if signal.getsignal(n) in _UNTOUCHED]
  try:
    for number in heard:
      signal.signal(number, _end)
    yield
  except Ended as ended:
    _die(ended.number)
    raise SystemExit(ended.code) from None  # Windows has no such signals.
  finally:
    # Python's own end prints a traceback for what is raised in it.
    for number in heard:
      signal.signal(number, signal.SIG_DFL)


def _die(number: int) -> None:
  """Ends the process by a signal, as if nobody had listened to it.

  What was printed and not handed out yet is lost, as it is where nobody
  listens: its reader may have stopped reading.
  """
  if os.name == 'posix':
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _end(number: int, frame: Any) -> None:
  del frame
  # A second signal must not keep the first from cleaning up.
  for other in _SIGNALS:
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
