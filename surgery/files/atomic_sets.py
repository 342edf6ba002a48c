"""Sets of files that appear whole or not at all.

A set exists as soon as its index does. So all other files are written under
temporary names, are renamed when all are complete and on the disk, and only
then is the index renamed. A writer that is killed before leaves at most files
without an index, and temporary files, which the next writer removes.

A set that replaces another has files of other names (`out.2-00001-of-00003`
beside `out-00001-of-00003`), since no order of renames replaces several files
at once. So the old set is complete until the index is replaced; from then on
the new one is, and the old files are removed.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pathlib
from collections.abc import Iterator

from surgery.files import atomic, system
from surgery.host import location


class Writing:
  """A set that is being written.

  Args:
    target: what the set is called, e.g. `out.msgpack`.
    shown: the same, for messages.
    count: number of its files beside the index.
    overwrite: whether a set and left-over files may be replaced.

  Attributes:
    names: names of its files beside the index.
    index: the index.
    fd: descriptor of what becomes the index.
  """

  def __init__(
    self, target: pathlib.Path, shown: str, count: int, overwrite: bool
  ) -> None:
    system.needs_folders('a set of files', shown)
    self._target = target
    self._shown = shown
    self._overwrite = overwrite
    self._begun = 0
    self._inodes: list[tuple[int, int]] = []
    self.index = target.with_name(target.name + location.INDEX)
    self._check()
    # The files that the old index names; `publish` compares them, to notice a
    # set that another process has written meanwhile.
    self._old = _named_by(self.index) if overwrite else set()
    self.names = _free(target, count, self._old)
    atomic.clean(target)
    self.fd, self._temporary = atomic.create(target, None)

  @contextlib.contextmanager
  def next(self) -> Iterator[int]:
    """Yields a descriptor; what is written to it becomes the next file."""
    self._begun += 1
    path = atomic.part(self._temporary, self._begun)
    fd = os.open(path, system.CREATE, 0o666)
    try:
      yield fd
      os.fsync(fd)
      self._inodes.append(_inode(os.fstat(fd)))
    finally:
      os.close(fd)

  def publish(self, folder: int) -> None:
    """Gives all files their names.

    Args:
      folder: descriptor of their folder.

    Raises:
      FileExistsError: if one is there that must not be replaced.
    """
    # The other files were synchronised when they ended. All content is on the
    # disk before the first of the names is.
    os.fsync(self.fd)
    # The lock of the folder makes the check and all renames one step: of two
    # processes that write the same set the second fails, and nothing is mixed.
    system.lock(folder)
    self._check()
    if self._overwrite and _named_by(self.index) != self._old:
      # The other set may use the names that were free when this one began.
      raise FileExistsError(
        errno.EEXIST,
        'another set was written there meanwhile, and is not replaced',
        f'{self._shown}{location.INDEX}',
      )
    for number, name in enumerate(self.names, 1):
      atomic.publish(
        atomic.part(self._temporary, number), name, str(name), self._overwrite
      )
    # The names of the files have to be durable before that of the index, which
    # would name missing files after a power cut otherwise.
    atomic.sync_folder(folder)
    atomic.publish(
      self._temporary, self.index, str(self.index), self._overwrite
    )
    atomic.sync_folder(folder)

  def tidy(self) -> None:
    """Removes the files that the set replaces."""
    for path in [*self._left_over(), *sorted(self._old), self._target]:
      if path not in self.names:
        with contextlib.suppress(OSError):
          path.unlink()

  def abandon(self) -> None:
    """Removes what was written, unless the set is complete."""
    # Where the index has its name, an error came too late: the set stays. The
    # inode tells our files from another process's of the same name.
    if not self._is(self.index, _inode(os.fstat(self.fd))):
      for name, inode in zip(self.names, self._inodes, strict=False):
        if self._is(name, inode):
          name.unlink(missing_ok=True)
    for number in range(1, self._begun + 1):
      atomic.part(self._temporary, number).unlink(missing_ok=True)
    self._temporary.unlink(missing_ok=True)

  def close(self) -> None:
    """Closes the index, which is locked until then."""
    os.close(self.fd)

  @staticmethod
  def _is(path: pathlib.Path, inode: tuple[int, int]) -> bool:
    """Whether a file is that one, and not another one of its name."""
    try:
      return inode == _inode(path.lstat())
    except FileNotFoundError:
      return False

  def _left_over(self) -> list[pathlib.Path]:
    """Returns files whose names are those of a set of that name."""
    return sorted(
      path
      for path in self._target.parent.iterdir()
      if location.shard_of(path) == self._target.name
    )

  def _check(self) -> None:
    """Raises if something is there that must not be replaced."""
    if self._overwrite:
      return
    if os.path.lexists(self.index):
      raise atomic.exists(f'{self._shown}{location.INDEX}')
    if os.path.lexists(self._target):
      raise atomic.exists(self._shown)
    left = self._left_over()
    if left:
      raise FileExistsError(
        errno.EEXIST,
        f'{len(left)} file{"s" if len(left) > 1 else ""} of a set without an '
        'index, not replaced unless overwrite=True (--force) is given',
        str(pathlib.Path(self._shown).with_name(left[0].name)),
      )


def _named_by(index: pathlib.Path) -> set[pathlib.Path]:
  """Returns the shards that an index names, as far as it can be read.

  Files in other folders, or without the name of a shard, are left out: they may
  belong to something else, and are not removed.
  """
  try:
    data = json.loads(index.read_bytes())
    names = set(data['weight_map'].values())
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    # No set, or a damaged one: none of its files is removed.
    return set()
  paths = [index.with_name(n) for n in names if n == pathlib.Path(n).name]
  return {path for path in paths if location.shard_of(path) is not None}


def _free(
  target: pathlib.Path, count: int, taken: set[pathlib.Path]
) -> list[pathlib.Path]:
  """Returns names for the files of a set that are not taken."""
  for generation in itertools.count(1):
    stem = target.stem if generation == 1 else f'{target.stem}.{generation}'
    called = target.with_name(stem + target.suffix)
    names = [location.shard(called, k, count) for k in range(1, count + 1)]
    # Left-over files may be replaced under the set's own name; under another
    # one they may belong to another set.
    theirs = generation > 1 and any(map(os.path.lexists, names))
    if taken.isdisjoint(names) and not theirs:
      return names
  raise AssertionError('there is always another name')


def _inode(status: os.stat_result) -> tuple[int, int]:
  return status.st_dev, status.st_ino


@contextlib.contextmanager
def writing(
  path: str | os.PathLike[str], count: int, *, overwrite: bool = False
) -> Iterator[Writing]:
  """Yields a set; what is written to it has its names at the end.

  Args:
    path: what the set is called, e.g. `out.msgpack`.
    count: number of its files beside the index, `out.msgpack.index.json`.
    overwrite: whether a file or a set of that name, and files of a set without
      an index, may be replaced.

  Raises:
    FileExistsError: if there is a file that must not be replaced.
    OSError: if it cannot be written: no such folder, a full disk, …

  Example:
    with atomic_sets.writing('out.bin', 2) as files:
      for data in (b'…', b'…'):
        with files.next() as fd:
          os.write(fd, data)
      os.write(files.fd, b'{…}')
  """
  shown = pathlib.Path(os.fsdecode(path))
  target = pathlib.Path(os.path.realpath(shown.parent)) / shown.name
  with atomic.folder(target.parent) as folder:
    files = Writing(target, str(shown), count, overwrite)
    try:
      yield files
      files.publish(folder)
    except BaseException:
      files.abandon()
      raise
    finally:
      files.close()
    files.tidy()
