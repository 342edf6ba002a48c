"""What operating systems differ in: locks, flags, and renaming what is open.

Linux and macOS have all of it. Windows has no `fcntl`, cannot open a folder,
and does not rename a file that somebody has open; so a file is published there
after it was closed, and what a killed writer leaves behind stays.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

from surgery import errors

fcntl: Any
try:
  import fcntl
except ImportError:
  fcntl = None

READ = os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0) | getattr(os, 'O_BINARY', 0)
# A file that must not be there yet.
CREATE = (
  os.O_RDWR
  | os.O_CREAT
  | os.O_EXCL
  | getattr(os, 'O_CLOEXEC', 0)
  | getattr(os, 'O_BINARY', 0)
)
NO_LINK = getattr(os, 'O_NOFOLLOW', 0)
# To open a pipe would otherwise wait for its writer.
NO_WAIT = getattr(os, 'O_NONBLOCK', 0)
# 0 where a folder cannot be opened.
FOLDER = getattr(os, 'O_DIRECTORY', 0)

# Whether a file that is open can get its name.
RENAMES_OPEN = os.name != 'nt'

_seeking = threading.Lock()


def locks() -> bool:
  """Whether there are locks that end with their owner."""
  return fcntl is not None


def lock(fd: int) -> None:
  """Locks a file for its writer, where the system has locks.

  Without them a dead temporary file cannot be recognised, so it is kept.
  """
  if fcntl is not None:
    # Some network file systems have none.
    with contextlib.suppress(OSError):
      fcntl.flock(fd, fcntl.LOCK_EX)


def lock_dead(fd: int) -> None:
  """Locks what a writer left behind.

  Raises:
    OSError: if its writer lives, or that cannot be known.
  """
  if fcntl is None:
    raise OSError('this system has no locks')
  fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def set_mode(fd: int, path: str | os.PathLike[str], mode: int) -> None:
  """Sets the permissions of an open file."""
  if hasattr(os, 'fchmod'):
    os.fchmod(fd, mode)
  else:
    os.chmod(path, mode)  # noqa: PTH101 - it may be text.


def read_at(fd: int, length: int, start: int) -> bytes:
  """Reads from a place of a file, which several threads may do."""
  if hasattr(os, 'pread'):
    return os.pread(fd, length, start)
  with _seeking:
    os.lseek(fd, start, os.SEEK_SET)
    return os.read(fd, length)


def needs_folders(what: str, path: str) -> None:
  """Raises where the system cannot publish several files as one.

  Raises:
    SurgeryError: saying what to do.
  """
  if not (FOLDER and RENAMES_OPEN):
    raise errors.SurgeryError(
      f'{path}: {what} cannot be written whole or not at all on this system. '
      'Write one file, or write it on Linux or macOS.'
    )
