"""Files that appear whole or not at all.

A file is written under a temporary name beside its own and takes its name when
it is complete and on the disk. Whatever goes wrong before leaves the old file
as it was. A writer that was killed leaves its temporary file behind; the next
one recognises it by its lock, which died with its owner, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import stat
from collections.abc import Iterator

from surgery import errors
from surgery.files import system

_SUFFIX = '.tmp'
# Of further files of a writer, which live as long as its first.
_PART = '.part'
# Leaves room for the rest of a temporary name within 255 bytes.
_LONGEST = 180


@contextlib.contextmanager
def writing(
  path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[int]:
  """Yields a descriptor; what is written to it becomes the file at the end.

  A new file has the permissions that the umask leaves, one that replaces
  another has that one's. A symbolic link is replaced, and the file behind it
  stays as it is: in the cache of a hub it is that of other links, too.

  Args:
    path: the file.
    overwrite: whether an existing file may be replaced.

  Raises:
    FileExistsError: if the file exists and `overwrite` is False.
    FormatError: if it exists and is a pipe or a device.
    OSError: if it cannot be written: no such folder, a full disk, …

  Example:
    with atomic.writing('out.bin') as fd:
      os.write(fd, b'…')
  """
  shown = os.fspath(path)
  whole = pathlib.Path(os.fsdecode(path)).absolute()
  target = pathlib.Path(os.path.realpath(whole.parent)) / whole.name
  mode = _mode(target, shown, overwrite)
  with folder(target.parent) as parent:
    clean(target)
    fd, temporary = create(target, mode)
    try:
      try:
        yield fd
        os.fsync(fd)
        if system.RENAMES_OPEN:
          # Still locked, so nobody takes it for a dead writer's.
          publish(temporary, target, shown, overwrite)
      finally:
        os.close(fd)
      if not system.RENAMES_OPEN:
        publish(temporary, target, shown, overwrite)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
    sync_folder(parent)


def exists(shown: str) -> FileExistsError:
  """Returns the error for a file that must not be replaced."""
  return FileExistsError(
    errno.EEXIST,
    'file exists and is not replaced unless overwrite=True (--force) is given',
    shown,
  )


def _mode(target: pathlib.Path, shown: str, overwrite: bool) -> int | None:
  """Returns the permissions of the file that is to be replaced, if any."""
  try:
    status = target.stat()
  except FileNotFoundError:
    if target.is_symlink() and not overwrite:
      raise exists(shown) from None
    return None
  if stat.S_ISDIR(status.st_mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), shown)
  if not stat.S_ISREG(status.st_mode):
    # Renaming would put a file in the place of, say, /dev/null.
    raise errors.FormatError(
      f'{shown}: expected a file, found a pipe or a device. Write to a file.'
    )
  if not overwrite:
    raise exists(shown)
  return stat.S_IMODE(status.st_mode)


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[int]:
  """Yields a descriptor of the folder; opening it names it if it is none.

  Where folders cannot be opened it is -1, and nothing is synchronised.
  """
  if not system.FOLDER:
    if not path.is_dir():
      raise NotADirectoryError(
        errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)
      )
    yield -1
    return
  fd = os.open(path, system.READ | system.FOLDER)
  try:
    yield fd
  finally:
    os.close(fd)


def prefix(target: pathlib.Path) -> str:
  """Returns what all temporary names of a file begin with."""
  short = os.fsencode(target.name)[:_LONGEST]
  return f'.{os.fsdecode(short)}.surgery-'


def create(target: pathlib.Path, mode: int | None) -> tuple[int, pathlib.Path]:
  """Creates and locks the temporary file.

  Returns:
    Its descriptor and path.
  """
  while True:
    name = f'{prefix(target)}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}'
    temporary = target.with_name(name)
    try:
      fd = os.open(temporary, system.CREATE, 0o666 if mode is None else mode)
    except FileExistsError:
      continue
    try:
      if mode is not None:
        system.set_mode(fd, temporary, mode)
      system.lock(fd)
      # Another writer may have removed it before it was locked.
      if os.fstat(fd).st_nlink or not system.locks():
        return fd, temporary
    except BaseException:
      os.close(fd)
      temporary.unlink(missing_ok=True)
      raise
    os.close(fd)


def part(temporary: pathlib.Path, number: int) -> pathlib.Path:
  """Returns the name of a further temporary file of a writer.

  Args:
    temporary: its first one, which is locked as long as it lives.
    number: of the further file.
  """
  return temporary.with_name(f'{temporary.stem}.{number}{_PART}')


def clean(target: pathlib.Path) -> None:
  """Removes temporary files of writers that died."""
  start = prefix(target)
  with os.scandir(target.parent) as entries:
    found = [
      entry.path
      for entry in entries
      if entry.name.startswith(start) and entry.name.endswith(_SUFFIX)
    ]
  for path in found:
    # One that is locked, gone or not ours is left alone.
    with contextlib.suppress(OSError):
      _remove_dead(pathlib.Path(path))


def _remove_dead(path: pathlib.Path) -> None:
  """Removes a temporary file, or raises OSError if its writer lives."""
  fd = os.open(path, system.READ | system.NO_LINK | system.NO_WAIT)
  try:
    if stat.S_ISREG(os.fstat(fd).st_mode):
      system.lock_dead(fd)
      # The first goes last, so that who is killed here can be cleaned up, too.
      for other in path.parent.iterdir():
        if other.name.startswith(f'{path.stem}.') and other.suffix == _PART:
          other.unlink()
      path.unlink()
  finally:
    os.close(fd)


def publish(
  temporary: pathlib.Path, target: pathlib.Path, shown: str, overwrite: bool
) -> None:
  """Gives the file its name."""
  if overwrite:
    temporary.replace(target)
    return
  try:
    # Unlike renaming, linking fails if somebody else was faster.
    os.link(temporary, target)
  except FileExistsError:
    raise exists(shown) from None
  except OSError:
    # A file system without links.
    if os.path.lexists(target):
      raise exists(shown) from None
    temporary.replace(target)
  else:
    temporary.unlink()


def sync_folder(fd: int) -> None:
  """Makes the new name last; the file is there already, so never raises."""
  if fd < 0:
    return  # Folders cannot be opened here.
  with contextlib.suppress(OSError):
    os.fsync(fd)
