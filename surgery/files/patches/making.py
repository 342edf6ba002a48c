"""Makes patches: compares the bytes of tensors, and keeps what differs."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from surgery import errors
from surgery.files import atomic
from surgery.files.digest import Digester
from surgery.files.patches import coding, description
from surgery.files.patches.description import (
  BLOCK,
  PLAIN,
  ZSTD,
  Description,
  File,
  Tensor,
)
from surgery.files.source import MappedFile, Source
from surgery.host import location
from surgery.host.manager import Host, default_host
from surgery.model import manifest as manifests
from surgery.model import sizes
from surgery.model.checkpoint import Checkpoint, Leaf, open_checkpoint
from surgery.model.manifest import Manifest
from surgery.naming.paths import Path

# A file is hashed so many bytes at a time.
_STEP = 1 << 20
# If a larger share of a tensor's blocks differs, the whole tensor is kept.
_MOST = 0.5

_Name = str | os.PathLike[str]


def make_patch(
  base: _Name,
  tuned: _Name,
  path: _Name,
  *,
  overwrite: bool = False,
  compress: bool = True,
  progress: Callable[[int, int], None] | None = None,
  host: Host | None = None,
) -> dict[str, Any]:
  """Writes what a saved model has that its base has not.

  Tensors of the base's names, shapes and dtypes are compared byte by byte;
  blocks of 64 KiB that differ are kept, or all of a tensor if most do. Of a
  folder all files are kept that the base's folder has not.

  Args:
    base: the base, in any format.
    tuned: the model: a file, or a folder.
    path: the patch; its suffix tells the format.
    overwrite: whether an existing file may be replaced.
    compress: whether what becomes smaller by it is compressed with zstd, if
      the package zstandard is installed.
    progress: called with the numbers of tensors and bytes that were compared.
    host: the formats' host.

  Returns:
    How many tensors are the `same` as the base's, differ in `blocks` or as a
    `whole`, are `new`, or were `removed`; the `bytes` of the model and of the
    `patch`.

  Raises:
    FormatError: if something is not a saved model, or a folder has folders
      inside.
    FileExistsError: if the patch exists and `overwrite` is False.

  Example:
    surgery.make_patch('base.safetensors', 'tuned.safetensors', 'p.safetensors')
  """
  host = host or default_host()
  target = pathlib.Path(os.fsdecode(path))
  _check_target(target, overwrite)
  where = pathlib.Path(os.fsdecode(tuned))
  if location.is_index(where):
    raise errors.FormatError(
      f'{where}: expected a file or a folder, found the index of several '
      f'files. Give the folder that they lie in: {where.parent}/.'
    )
  before, after = (open_checkpoint(one, host=host) for one in (base, tuned))
  for one in (before, after):
    manifests.check_no_patch(one.manifest, one.origin)
  folder = pathlib.Path(os.fsdecode(base))
  # What is kept is spooled to the disk, since a patch may be larger than memory
  # and its header, which comes first, has the size of all of it.
  with tempfile.TemporaryFile(dir=target.parent) as spool:
    compressing = compress and coding.zstd() is not None
    making = _Making(before, after, spool, compressing, progress)
    names = _files(where)
    files = [making.file(one, folder / one.name) for one in names]
    form = host.format_of(where)
    about = Description(
      description.structure(before),
      next(name for name, one in host.formats.items() if one is form),
      where.is_dir(),
      tuple(files),
      tuple(making.tensors),
      tuple(
        p
        for p, leaf in before.items()
        if leaf.shape is not None and p not in after
      ),
    )
    manifest = Manifest(
      kind=manifests.PATCH, metadata={description.KEY: about.encoded()}
    )
    spool.flush()
    Checkpoint(making.leaves(), manifest).write(
      target, overwrite=overwrite, host=host
    )
  return {**about.report(), 'patch': target.stat().st_size}


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
  """Raises unless a patch can be written, before models are compared."""
  if not target.parent.is_dir():
    raise FileNotFoundError(
      errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent)
    )
  if target.exists() and not overwrite:
    raise atomic.exists(str(target))


def _files(where: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a model.

  Raises:
    FormatError: for a folder inside of one.
  """
  if not where.is_dir():
    return [where]
  found = []
  for one in sorted(where.iterdir()):
    if one.name.startswith('.'):
      continue
    if one.is_dir():
      raise errors.FormatError(
        f'{one}: a folder inside of a model folder, which a patch cannot '
        'describe. Move it out of the model folder first.'
      )
    found.append(one)
  return found


class _Making:
  """Files and tensors, as they become known.

  Args:
    base: the base.
    tuned: the model.
    spool: a file for what is kept.
    compressing: whether it is compressed.
    progress: called with numbers of tensors and bytes.

  Attributes:
    tensors: the tensors so far.
  """

  def __init__(
    self,
    base: Checkpoint,
    tuned: Checkpoint,
    spool: BinaryIO,
    compressing: bool,
    progress: Callable[[int, int], None] | None,
  ) -> None:
    self.tensors: list[Tensor] = []
    self._base = base
    self._spool = spool
    self._compressing = compressing
    self._progress = progress
    # Where in the spool something lies; or a tensor that is kept as it is.
    self._kept: dict[Path, tuple[int, int] | Leaf] = {}
    self._sources: dict[tuple[int, int], list[tuple[Path, Leaf, Source]]] = {}
    for path, leaf in tuned.items():
      source = leaf.source
      if isinstance(source, Source) and leaf.load is source:
        status = os.fstat(source.file.fd)
        key = status.st_dev, status.st_ino
        self._sources.setdefault(key, []).append((path, leaf, source))

  def file(self, path: pathlib.Path, other: pathlib.Path) -> File:
    """Takes in a file.

    Args:
      path: the file.
      other: what it is called in the base's folder.
    """
    if not path.stat().st_size:
      return File(path.name, 0, Digester().digest(), (), PLAIN)
    mapped = MappedFile(path)
    digest = _digest(mapped)
    status = os.fstat(mapped.fd)
    tensors = self._sources.get((status.st_dev, status.st_ino), [])
    if not tensors and _same(other, mapped.size, digest):
      return File(path.name, mapped.size, digest, (), None)
    spans = []
    for where, leaf, source in tensors:
      if not source.nbytes:
        continue
      number = len(self.tensors)
      self.tensors.append(self._tensor(where, leaf, source))
      spans += [(start, stop, number) for start, stop in source.spans]
      if self._progress is not None:
        self._progress(1, leaf.nbytes)
    spans.sort()
    between = [*_between(spans, mapped.size)]
    count = sum(stop - start for start, stop in between)
    code = PLAIN
    if count:
      frame = lambda: _ranges(mapped, between)
      code = self._keep((description.FRAMES, path.name), frame, 1, count)
    return File(path.name, mapped.size, digest, tuple(spans), code)

  def _tensor(self, path: Path, leaf: Leaf, source: Source) -> Tensor:
    """Compares a tensor with the base's, and keeps what differs."""
    base = self._base.get(path)
    itemsize = (
      1 if leaf.dtype in sizes.PACKED else sizes.itemsize(leaf.dtype or '')
    )
    kept = (description.TENSORS, *path)
    count = -(-source.nbytes // BLOCK)
    if base is None or (base.shape, base.dtype) != (leaf.shape, leaf.dtype):
      pairs = lambda: ((one, None) for one in coding.pieces(leaf, BLOCK))
      code = self._keep(kept, pairs, itemsize, source.nbytes, source)
      return Tensor(path, source.nbytes, itemsize, None, ((0, count),), code)
    digest, blocks = _compared(base, leaf)
    if sum(stop - start for start, stop in blocks) > _MOST * count:
      blocks = ((0, count),)
    one = Tensor(path, source.nbytes, itemsize, digest, blocks)
    if not blocks:
      return one
    changed = lambda: _changed(base, leaf, blocks)
    whole = source if one.how == 'whole' else None
    code = self._keep(kept, changed, itemsize, one.literal, whole)
    return dataclasses.replace(one, code=code)

  def _keep(
    self,
    path: Path,
    values: Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]],
    itemsize: int,
    count: int,
    whole: Source | None = None,
  ) -> str:
    """Keeps bytes, compressed if they are fewer then; returns their code.

    Args:
      path: what they are called in the patch.
      values: yields them, and those of the base.
      itemsize: bytes an element.
      count: their number.
      whole: the tensor, if it is all of one.
    """
    start = self._spool.seek(0, os.SEEK_END)
    if self._compressing:
      coding.compress(values(), itemsize, self._spool)
      stop = self._spool.tell()
      if stop - start < count:
        self._kept[path] = start, stop
        return ZSTD
      self._spool.seek(start)
      self._spool.truncate()
    if whole is not None:
      # It is copied from its file, unread.
      raw = Source(whole.file, path, (count,), 'uint8', whole.spans)
      self._kept[path] = Leaf(raw, (count,), 'uint8', source=raw, part=raw.part)
      return PLAIN
    for piece, _ in values():
      self._spool.write(piece.tobytes())
    self._kept[path] = start, start + count
    return PLAIN

  def leaves(self) -> Mapping[Path, Leaf]:
    """Returns what is kept as tensors, after all was taken in."""
    made: dict[Path, Leaf] = {}
    for path, kept in self._kept.items():
      if isinstance(kept, Leaf):
        made[path] = kept
        continue
      start, stop = kept
      flat = np.memmap(
        self._spool, np.uint8, 'r', offset=start, shape=(stop - start,)
      )
      made[path] = _of_bytes(flat)
    return made


def _of_bytes(flat: np.ndarray) -> Leaf:
  """Returns bytes, `(n,)`, as a tensor."""
  plain = np.asarray(flat)
  return Leaf(
    lambda: plain,
    plain.shape,
    'uint8',
    part=lambda index: plain[index],
  )


def _digest(file: MappedFile) -> str:
  digester = Digester()
  for start in range(0, file.size, _STEP):
    stop = min(start + _STEP, file.size)
    digester.update(file.data[start:stop])
    file.forget(start, stop)
  return digester.digest()


def _same(path: pathlib.Path, size: int, digest: str) -> bool:
  """Whether a file is there that has these bytes."""
  return (
    path.is_file()
    and path.stat().st_size == size
    and _digest(MappedFile(path)) == digest
  )


def _between(
  spans: list[tuple[int, int, int]], size: int
) -> Iterator[tuple[int, int]]:
  """Yields the ranges of a file that belong to no tensor."""
  at = 0
  for start, stop, _ in spans:
    if at < start:
      yield at, start
    at = stop
  if at < size:
    yield at, size


def _ranges(
  file: MappedFile, ranges: list[tuple[int, int]]
) -> Iterator[tuple[np.ndarray, None]]:
  for start, stop in ranges:
    for first in range(start, stop, BLOCK):
      data = file.data[first : min(first + BLOCK, stop)]
      yield np.frombuffer(data, np.uint8), None


def _compared(
  base: Leaf, leaf: Leaf
) -> tuple[str, tuple[tuple[int, int], ...]]:
  """Returns the base's digest, and which blocks differ, from and to."""
  digester = Digester()
  blocks: list[tuple[int, int]] = []
  both = zip(
    coding.pieces(base, BLOCK), coding.pieces(leaf, BLOCK), strict=True
  )
  for number, (one, other) in enumerate(both):
    digester.update(one.data)
    if np.array_equal(one, other):
      continue
    if blocks and blocks[-1][1] == number:
      blocks[-1] = blocks[-1][0], number + 1
    else:
      blocks.append((number, number + 1))
  return digester.digest(), tuple(blocks)


def _changed(
  base: Leaf, leaf: Leaf, blocks: tuple[tuple[int, int], ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the blocks that differ, each with the base's."""
  wanted = {k for start, stop in blocks for k in range(start, stop)}
  both = zip(
    coding.pieces(base, BLOCK), coding.pieces(leaf, BLOCK), strict=True
  )
  for number, (one, other) in enumerate(both):
    if number in wanted:
      yield other, one
