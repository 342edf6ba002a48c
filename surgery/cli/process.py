"""The command's own process: its streams, and signals that end it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

# Shells report a program that a signal ended by this number plus the signal.
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
  """A signal asked the process to end.

  It is raised wherever the program is, so that `finally` blocks run: temporary
  files are removed, and an existing output stays.

  Attributes:
    number: the signal.
    code: the exit code that shells use for it.
  """

  def __init__(self, number: int) -> None:
    super().__init__(number)
    self.number = number
    self.code = _BY_SIGNAL + number


class _Patient(io.RawIOBase):
  """Standard output whose reader may close it early, as `head` does.

  The verb continues, because its exit code (of `diff`, of `verify`) is a result
  as well.
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
      # The reader is gone: the rest is dropped.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._fd)
      os.close(nowhere)
      return len(data)


def prepare() -> None:
  """Prepares the streams of the process; called once, at its start."""
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
  """Makes signals raise `Ended`, and ends the process by the same signal.

  The parent process must see that a signal ended it: a shell leaves a loop if
  SIGINT killed the program, but not if it exited with 130. So the interrupted
  code cleans up first, and then the process sends itself the same signal
  without a handler.
  """
  # Signals that `nohup` or a shell's `&` has ignored stay ignored.
  heard = [n for n in _SIGNALS if signal.getsignal(n) in _UNTOUCHED]
  try:
    for number in heard:
      signal.signal(number, _end)
    yield
  except Ended as ended:
    _die(ended.number)
    raise SystemExit(ended.code) from None  # Windows has no such signals.
  finally:
    # `Ended` during Python's own shutdown would print a traceback.
    for number in heard:
      signal.signal(number, signal.SIG_DFL)


def _die(number: int) -> None:
  """Ends the process by a signal, as if it had no handler.

  Output that is still in the buffer is lost, as it would be without a handler;
  to flush it could block, if its reader has stopped.
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
  """Opens streams that were closed (`>&-`), to nowhere.

  Otherwise the next file that is opened would get the number of a stream, and
  output would be written into it.
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
