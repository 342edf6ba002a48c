"""Applies patches: writes the very file that one was made of."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from surgery import errors
from surgery.files import atomic, atomic_folders
from surgery.files.digest import Digester
from surgery.files.output import Output
from surgery.files.patches import coding, description
from surgery.files.patches.description import (
  BLOCK,
  PLAIN,
  Description,
  File,
  Tensor,
)
from surgery.files.progress import Told
from surgery.host.manager import Host, default_host
from surgery.model.checkpoint import Checkpoint, open_checkpoint
from surgery.naming import paths
from surgery.naming.paths import Path

_Name = str | os.PathLike[str]
_AGAIN = 'Fetch or make the patch again.'


def apply_patch(
  base: _Name,
  patch: _Name,
  path: _Name,
  *,
  overwrite: bool = False,
  dry_run: bool = False,
  progress: Told | None = None,
  host: Host | None = None,
) -> dict[str, Any]:
  """Writes the very file, or folder, that a patch was made of.

  All bytes that are taken from the base, and all that are written, are checked
  against digests; the output appears complete and correct, or not at all.

  Args:
    base: the base, in any format, with the values that it had.
    patch: what `make_patch` wrote.
    path: the file; or the folder, if the patch is one of a folder.
    overwrite: whether an existing file may be replaced; a folder never is.
    dry_run: whether only what needs no reading is checked, and nothing written.
    progress: called with the numbers of tensors and bytes that were written.
    host: whose formats are known.

  Returns:
    What became of the tensors, as `make_patch` returns it.

  Raises:
    BaseMismatchError: if the base is another one.
    FormatError: if the patch is none, or damaged, or the file's suffix is that
      of another format.
    FileExistsError: if the file exists and `overwrite` is False.

  Example:
    surgery.apply_patch('base.safetensors', 'p.safetensors', 'out.safetensors')
  """
  host = host or default_host()
  opened = open_checkpoint(base, host=host)
  kept = open_checkpoint(patch, host=host)
  said = description.read(kept)
  target = pathlib.Path(os.fsdecode(path))
  _check_name(target, said, host)
  _check_base(opened, said)
  work = _Applying(opened, kept, pathlib.Path(os.fsdecode(base)), said)
  work.check()
  if said.folder:
    atomic_folders.check(target)
  elif target.exists() and not overwrite:
    raise atomic.exists(str(target))
  if dry_run:
    return said.report()
  if said.folder:
    with atomic_folders.writing(target) as hidden:
      for one in said.files:
        with atomic.writing(hidden / one.name) as fd:
          work.write(one, Output(fd, progress))
  else:
    with atomic.writing(target, overwrite=overwrite) as fd:
      work.write(said.files[0], Output(fd, progress))
  return said.report()


def _check_name(target: pathlib.Path, said: Description, host: Host) -> None:
  """Raises if others would take the file for one of another format."""
  if said.folder:
    return
  for name, form in host.formats.items():
    if target.suffix in form.suffixes and name != said.format:
      raise errors.FormatError(
        f'{target}: the suffix {target.suffix} is that of {name}, and the '
        f'patch gives a file of {said.format}, as {said.files[0].name} was. '
        'Give it another suffix, and convert it afterwards.'
      )


def _check_base(base: Checkpoint, said: Description) -> None:
  """Raises if the base is another one, as far as its headers show.

  Raises:
    BaseMismatchError: naming what differs.
  """
  for one in said.tensors:
    if one.base is None:
      continue
    leaf = base.get(one.path)
    if leaf is None or leaf.nbytes != one.nbytes:
      found = 'nothing' if leaf is None else str(leaf)
      raise _other(base, one.path, f'{one.nbytes} bytes', found)
    kind = one.base.partition(':')[0]
    if leaf.digest not in (None, one.base) and leaf.digest.startswith(kind):
      raise _other(base, one.path, f'the digest {one.base}', leaf.digest)
  if description.structure(base) != said.structure:
    raise errors.BaseMismatchError(
      f'{base.origin}: the base has other tensors, or other shapes or dtypes, '
      'than the one that the patch was made against. Give that one.'
    )


def _other(
  base: Checkpoint, path: Path, expected: str, found: str
) -> errors.BaseMismatchError:
  return errors.BaseMismatchError(
    f'{base.origin}: {paths.show(path)}: expected {expected}, found {found}. '
    'The patch was made against another base, or this one is damaged. Give '
    'the base that it was made against.'
  )


class _Applying:
  """Writes files.

  Args:
    base: the base.
    patch: the patch.
    folder: where the base lies.
    said: the description in the patch.
  """

  def __init__(
    self,
    base: Checkpoint,
    patch: Checkpoint,
    folder: pathlib.Path,
    said: Description,
  ) -> None:
    self._base = base
    self._patch = patch
    self._folder = folder
    self._said = said

  def check(self) -> None:
    """Raises if something is missing that is needed.

    Raises:
      FormatError: if the patch lacks bytes.
      BaseMismatchError: if the base's folder lacks a file.
    """
    for tensor in self._said.tensors:
      if tensor.blocks:
        where = (description.TENSORS, *tensor.path)
        self._check_kept(where, tensor.code, tensor.literal)
    for file in self._said.files:
      if file.code is None:
        self._check_copied(file)
      elif frame := file.size - sum(b - a for a, b, _ in file.spans):
        self._check_kept((description.FRAMES, file.name), file.code, frame)

  def _check_kept(self, path: Path, code: str, count: int) -> None:
    leaf = self._patch.get(path)
    if leaf is None or leaf.dtype != 'uint8' or leaf.shape is None:
      raise errors.FormatError(
        f'{self._patch.origin}: expected {paths.show(path)}, found '
        f'{leaf or "nothing"}. {_AGAIN}'
      )
    if code == PLAIN and leaf.size != count:
      raise errors.FormatError(
        f'{self._patch.origin}: {paths.show(path)}: expected {count} bytes, '
        f'found {leaf.size}. {_AGAIN}'
      )
    if code != PLAIN:
      coding.Decoder(b'', self._patch.origin)  # It may not be installed.

  def _check_copied(self, file: File) -> None:
    other = self._folder / file.name
    if not other.is_file() or other.stat().st_size != file.size:
      raise errors.BaseMismatchError(
        f'{other}: expected the file of {file.size:,} bytes that the folder '
        'of the base had when the patch was made. Give that folder.'
      )

  def write(self, file: File, output: Output) -> None:
    """Writes a file.

    Raises:
      BaseMismatchError: if the base has other values.
      FormatError: if the patch is damaged.
    """
    digester = Digester()
    for piece in self._pieces(file, output):
      digester.update(piece)
      output.write(piece)
    output.flush()
    if digester.digest() == file.digest:
      return
    if file.code is None:
      raise errors.BaseMismatchError(
        f'{self._folder / file.name}: has changed since the patch was made. '
        'Give the folder that it was made against.'
      )
    raise errors.FormatError(
      f'{self._patch.origin}: {file.name}: expected the digest {file.digest}, '
      f'found {digester.digest()}. Nothing was written. {_AGAIN}'
    )

  def _pieces(self, file: File, output: Output) -> Iterator[memoryview]:
    """Yields the bytes of a file, in order."""
    if file.code is None:
      with (self._folder / file.name).open('rb') as other:
        while data := other.read(BLOCK):
          yield memoryview(data)
      return
    count = file.size - sum(b - a for a, b, _ in file.spans)
    frame = _Stream(self._frame(file), count)
    # Of a tensor that lies in pieces, as msgpack has large ones, what is left.
    streams: dict[int, _Stream] = {}
    at = 0
    for start, stop, number in file.spans:
      yield from frame.take(start - at)
      tensor = self._said.tensors[number]
      if number not in streams:
        streams[number] = _Stream(self._tensor(tensor), tensor.nbytes)
        output.expect(tensor.nbytes)
      yield from streams[number].take(stop - start)
      at = stop
    yield from frame.take(file.size - at)

  def _frame(self, file: File) -> Iterator[np.ndarray]:
    """Yields the bytes of a file that belong to no tensor."""
    count = file.size - sum(b - a for a, b, _ in file.spans)
    if not count:
      return
    read = self._literal((description.FRAMES, file.name), file.code or PLAIN, 1)
    # The pieces of each gap were compressed separately.
    at = 0
    for start, stop in [
      *((a, b) for a, b, _ in file.spans),
      (file.size, file.size),
    ]:
      for first in range(at, start, BLOCK):
        yield read(min(first + BLOCK, start) - first, None)
      at = stop

  def _literal(self, path: Path, code: str, itemsize: int) -> Any:
    """Returns what gives the next bytes that the patch has of something."""
    leaf = self._patch[path]
    if code == PLAIN:
      flat = leaf.load()
      at = 0

      def read(count: int, base: np.ndarray | None) -> np.ndarray:
        nonlocal at
        del base
        at += count
        part: np.ndarray = flat[at - count : at]
        return part

      return read
    decoder = coding.Decoder(
      memoryview(leaf.load()), f'{self._patch.origin}: {paths.show(path)}'
    )
    return lambda count, base: decoder.read(count, itemsize, base)

  def _tensor(self, tensor: Tensor) -> Iterator[np.ndarray]:
    """Yields the bytes of a tensor.

    Raises:
      BaseMismatchError: after the last, if the base's are others.
    """
    read = None
    if tensor.blocks:
      where = (description.TENSORS, *tensor.path)
      read = self._literal(where, tensor.code, tensor.itemsize)
    if tensor.base is None:
      for start in range(0, tensor.nbytes, BLOCK):
        yield read(min(BLOCK, tensor.nbytes - start), None)  # type: ignore[misc]
      return
    wanted = {k for a, b in tensor.blocks for k in range(a, b)}
    digester = Digester()
    pieces = coding.pieces(self._base[tensor.path], BLOCK)
    for number, piece in enumerate(pieces):
      digester.update(piece.data)
      if number in wanted:
        assert read is not None
        piece = read(len(piece), piece)
      yield piece
    if digester.digest() != tensor.base:
      raise _other(
        self._base,
        tensor.path,
        f'the digest {tensor.base}',
        digester.digest(),
      )


class _Stream:
  """Takes bytes out of pieces, whatever the length of these.

  Args:
    pieces: the pieces.
    count: number of bytes in all.
  """

  def __init__(self, pieces: Iterator[np.ndarray], count: int) -> None:
    self._pieces = pieces
    self._left = count
    self._rest = memoryview(b'')

  def take(self, count: int) -> Iterator[memoryview]:
    """Yields the next bytes, that many in all."""
    self._left -= count
    while count:
      if not self._rest:
        self._rest = np.ascontiguousarray(next(self._pieces)).data
      part, self._rest = self._rest[:count], self._rest[count:]
      count -= len(part)
      yield part
    if not self._left:
      # Lets them compare a digest, which they do at their end.
      next(self._pieces, None)
