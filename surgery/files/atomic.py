"""Files that appear whole or not at all.

A file is written under a temporary name in the same folder and renamed when it
is complete and on the disk. Any failure before leaves the old file as it was. A
writer that was killed leaves its temporary file behind; the next one finds it
unlocked, since a lock ends with its process, and removes it.
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
# Suffix of a writer's further files, which are dead when its first one is.
_PART = '.part'
# Leaves room for the rest of a temporary name within 255 bytes.
_LONGEST = 180


@contextlib.contextmanager
def writing(
  path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[int]:
  """Yields a descriptor; what is written to it becomes the file at the end.

  A new file has the permissions that the umask leaves; a file that replaces
  another keeps the permissions of the old one. A symbolic link is replaced and
  its target left alone, since in the cache of a hub other links share it.

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
  # The folder is resolved, so that a link to it that changes meanwhile does not
  # divide the two names; the last part is not, since a link there is replaced.
  target = pathlib.Path(os.path.realpath(whole.parent)) / whole.name
  # Asked before anything is computed, and again when the file gets its name.
  mode = _mode(target, shown, overwrite)
  with folder(target.parent) as parent:
    clean(target)
    fd, temporary = create(target, mode)
    try:
      try:
        yield fd
        # The content has to be on the disk before the name is: after a power
        # cut a renamed file whose blocks were not written would be empty.
        os.fsync(fd)
        if system.RENAMES_OPEN:
          # While it is still locked; once closed, the next writer would take
          # it for a dead writer's and remove it.
          publish(temporary, target, shown, overwrite)
      finally:
        os.close(fd)
      if not system.RENAMES_OPEN:
        publish(temporary, target, shown, overwrite)
    except BaseException:
      # KeyboardInterrupt and SystemExit as well: nothing may be left behind.
      temporary.unlink(missing_ok=True)
      raise
    # The rename is an entry of the folder, which has to reach the disk, too.
    sync_folder(parent)


def exists(shown: str) -> FileExistsError:
  """Returns the error for a file that must not be replaced."""
  return FileExistsError(
    errno.EEXIST,
    'file exists and is not replaced unless overwrite=True (--force) is given',
    shown,
  )


def _mode(target: pathlib.Path, shown: str, overwrite: bool) -> int | None:
  """Returns the permissions of the file that will be replaced, if any."""
  try:
    status = target.stat()
  except FileNotFoundError:
    # A link to nothing: the name is taken all the same.
    if target.is_symlink() and not overwrite:
      raise exists(shown) from None
    return None
  if stat.S_ISDIR(status.st_mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), shown)
  if not stat.S_ISREG(status.st_mode):
    # Renaming would replace the device itself, e.g. /dev/null.
    raise errors.FormatError(
      f'{shown}: expected a file, found a pipe or a device. Write to a file.'
    )
  if not overwrite:
    raise exists(shown)
  return stat.S_IMODE(status.st_mode)


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[int]:
  """Yields a descriptor of the folder.

  It is -1 on systems that cannot open folders, which synchronise nothing.

  Raises:
    NotADirectoryError: if it is not a folder.
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
        # Explicitly, since `os.open` applies the umask to what it is given.
        system.set_mode(fd, temporary, mode)
      system.lock(fd)
      # Between creation and lock another writer may have taken it for a dead
      # writer's and removed it: then it has no name any more, and is made anew.
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
    temporary: its first one, which is locked while the writer lives.
    number: number of the further file.
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
    # A file that is locked, gone or of another owner is left alone.
    with contextlib.suppress(OSError):
      _remove_dead(pathlib.Path(path))


def _remove_dead(path: pathlib.Path) -> None:
  """Removes a temporary file, or raises OSError if its writer lives."""
  fd = os.open(path, system.READ | system.NO_LINK | system.NO_WAIT)
  try:
    if stat.S_ISREG(os.fstat(fd).st_mode):
      system.lock_dead(fd)
      # The first file goes last: should this process be killed here, the first
      # one still shows the next writer that the others are dead.
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
    # Renaming would replace a file that appeared meanwhile; linking fails then.
    os.link(temporary, target)
  except FileExistsError:
    raise exists(shown) from None
  except OSError:
    # The file system has no links, so the check and the rename are two steps.
    if os.path.lexists(target):
      raise exists(shown) from None
    temporary.replace(target)
  else:
    temporary.unlink()


def sync_folder(fd: int) -> None:
  """Makes the new name durable; never raises, since the file is there."""
  if fd < 0:
    return  # Folders cannot be opened here.
  with contextlib.suppress(OSError):
    os.fsync(fd)
