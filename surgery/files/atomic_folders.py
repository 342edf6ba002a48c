"""Folders that appear whole or not at all.

The files are written into a folder inside of a hidden folder beside the target,
which is renamed when all of them are complete and on the disk. An empty folder
of that name is replaced; a folder that holds something never is. A writer that
was killed leaves its hidden folder behind; the next one finds it unlocked,
since a lock ends with its process, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from surgery import errors
from surgery.files import atomic, system

_SUFFIX = '.folder'


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a hidden folder; what is put into it is in the folder at the end.

  Args:
    path: the folder: a new name, or an empty folder.

  Raises:
    FileExistsError: if there is something in it, or it is no folder.
    FormatError: if it is a symbolic link, or cannot be replaced.
    OSError: if it cannot be written: no such folder, a full disk, …

  Example:
    with atomic_folders.writing('out') as folder:
      (folder / 'config.json').write_text('{}')
  """
  shown = pathlib.Path(os.fsdecode(path))
  system.needs_folders('a folder', str(shown))
  check(shown)
  # Made absolute first, since `.` has no name of its own.
  whole = shown.absolute()
  target = pathlib.Path(os.path.realpath(whole.parent)) / whole.name
  with atomic.folder(target.parent) as parent:
    _clean(target)
    fd, hidden = _create(target)
    try:
      # A folder inside of the locked one, because writing a set of files locks
      # the folder that it is written to.
      made = hidden / target.name
      made.mkdir()
      yield made
      # All content and all names in it are on the disk before its own name is.
      _settle(made)
      # Again: another process may have written there meanwhile.
      check(shown)
      _publish(made, target, shown)
    finally:
      # The hidden folder stays in any case, and is locked until it is gone.
      shutil.rmtree(hidden, ignore_errors=True)
      os.close(fd)
    atomic.sync_folder(parent)


def check(path: pathlib.Path) -> None:
  """Raises unless a folder of that name may be written.

  Raises:
    FileExistsError: if there is something in it, or it is no folder.
    FormatError: if it is a symbolic link.
  """
  if path.is_symlink():
    raise errors.FormatError(
      f'{path}: expected a new name or an empty folder, found a symbolic link '
      f'to {path.readlink()}. Nothing is written through a link: give the '
      'folder that it points to, or another one.'
    )
  if not os.path.lexists(path):
    return
  if '..' in path.parts or path.resolve() == pathlib.Path.cwd():
    # Processes in that folder would be left in one without a name.
    raise errors.FormatError(
      f'{path}: the current folder, or one above, cannot be replaced. Give a '
      'new folder in it.'
    )
  if not path.is_dir():
    raise FileExistsError(
      errno.EEXIST, 'expected a new name or an empty folder, found a file',
      str(path),
    )  # fmt: skip
  first = next(path.iterdir(), None)
  if first is not None:
    raise FileExistsError(
      errno.EEXIST,
      'expected a new name or an empty folder, found a folder with '
      f'{first.name!r} in it. A folder is never replaced, not by --force '
      '(overwrite=True) either: give another name',
      str(path),
    )


def _create(target: pathlib.Path) -> tuple[int, pathlib.Path]:
  """Makes and locks a hidden folder; returns its descriptor and path."""
  while True:
    name = f'{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}'
    hidden = target.with_name(name)
    try:
      hidden.mkdir()
    except FileExistsError:
      continue
    fd = os.open(hidden, system.READ | system.FOLDER)
    system.lock(fd)
    # Between creation and lock another writer may have taken it for a dead
    # writer's and removed it.
    if os.fstat(fd).st_nlink:
      return fd, hidden
    os.close(fd)


def _prefix(target: pathlib.Path) -> str:
  return atomic.prefix(target)


def _clean(target: pathlib.Path) -> None:
  """Removes hidden folders of writers that died."""
  start = _prefix(target)
  with os.scandir(target.parent) as entries:
    found = [
      pathlib.Path(entry.path)
      for entry in entries
      if entry.name.startswith(start) and entry.name.endswith(_SUFFIX)
    ]
  for path in found:
    # A folder that is locked, gone or of another owner is left alone.
    with contextlib.suppress(OSError), atomic.folder(path) as fd:
      system.lock_dead(fd)
      shutil.rmtree(path, ignore_errors=True)


def _settle(folder: pathlib.Path) -> None:
  """Puts all that a folder holds on the disk."""
  for path in sorted(folder.rglob('*')):
    if path.is_file() and not path.is_symlink():
      fd = os.open(path, system.READ)
      try:
        os.fsync(fd)
      finally:
        os.close(fd)
    elif path.is_dir():
      with atomic.folder(path) as fd:
        atomic.sync_folder(fd)
  with atomic.folder(folder) as fd:
    atomic.sync_folder(fd)


def _publish(
  made: pathlib.Path, target: pathlib.Path, shown: pathlib.Path
) -> None:
  """Gives a folder its name; an empty folder of that name is replaced."""
  try:
    # Renaming replaces an empty folder at once, and fails for any other.
    made.rename(target)
  except OSError as error:
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
      raise FileExistsError(
        errno.EEXIST, 'another process wrote there meanwhile', str(shown)
      ) from None
    if error.errno == errno.EBUSY:
      raise errors.FormatError(
        f'{shown}: a folder on which a file system is mounted cannot be '
        f'written as a whole. Give a new folder inside of it: {shown}/model/.'
      ) from None
    raise
