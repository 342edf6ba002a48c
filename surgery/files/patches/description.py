"""The description in a patch: the files, tensors and bytes of a model.

It is JSON in the patch's metadata, under `surgery_patch`. Bytes lie in tensors
of the patch: `frames/NAME` has what lies between the tensors of a file, such as
headers, `tensors/PATH` what a tensor has that the base's has not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.files import strict_json
from surgery.files.digest import Digester
from surgery.model import manifest as manifests
from surgery.model.checkpoint import Checkpoint
from surgery.naming import paths
from surgery.naming.paths import Path

VERSION = 1
KEY = 'surgery_patch'
FRAMES, TENSORS = 'frames', 'tensors'
PLAIN, ZSTD = 'plain', 'zstd'

# Bytes that are compared, replaced and coded together.
BLOCK = 1 << 16


@dataclasses.dataclass(frozen=True)
class Tensor:
  """How the bytes of a tensor come about.

  Attributes:
    path: its path, also that of the base's tensor.
    nbytes: number of its bytes.
    itemsize: bytes an element.
    base: digest of the base's tensor; None if nothing is taken from there.
    blocks: which blocks, from and to, are not the base's.
    code: how these are coded, `plain` or `zstd`.
  """

  path: Path
  nbytes: int
  itemsize: int
  base: str | None
  blocks: tuple[tuple[int, int], ...]
  code: str = PLAIN

  @property
  def literal(self) -> int:
    """Number of bytes that are not the base's."""
    return sum(
      min(stop * BLOCK, self.nbytes) - start * BLOCK
      for start, stop in self.blocks
    )

  @property
  def how(self) -> str:
    """`same`, `blocks`, `whole` (another than the base's) or `new`."""
    if self.base is None:
      return 'new'
    if not self.blocks:
      return 'same'
    return 'whole' if self.literal == self.nbytes else 'blocks'


@dataclasses.dataclass(frozen=True)
class File:
  """One file of a model.

  Attributes:
    name: its name; in a folder that is what it is called there.
    size: number of its bytes.
    digest: digest of all of them.
    spans: for each piece of a tensor its start, its end, and the tensor's
      number, in order.
    code: how what lies between is coded; None if the base's folder has the
      very file.
  """

  name: str
  size: int
  digest: str
  spans: tuple[tuple[int, int, int], ...] = ()
  code: str | None = PLAIN


@dataclasses.dataclass(frozen=True)
class Description:
  """All that a patch says.

  Attributes:
    structure: digest of names, shapes and dtypes of the base's tensors.
    format: name of the model's format.
    folder: whether the model is a folder.
    files: its files.
    tensors: its tensors.
    removed: tensors of the base that the model has not.
  """

  structure: str
  format: str
  folder: bool
  files: tuple[File, ...]
  tensors: tuple[Tensor, ...]
  removed: tuple[Path, ...] = ()

  def report(self) -> dict[str, Any]:
    """Returns in numbers what became of the tensors."""
    hows = [one.how for one in self.tensors]
    return {
      **{how: hows.count(how) for how in ('same', 'blocks', 'whole', 'new')},
      'removed': len(self.removed),
      'bytes': sum(one.size for one in self.files),
    }

  def encoded(self) -> str:
    """Returns it as text."""
    tensors = []
    for one in self.tensors:
      entry = dataclasses.asdict(one)
      entry['path'] = paths.show(one.path)
      tensors.append(entry)
    data = {
      'version': VERSION,
      'structure': self.structure,
      'format': self.format,
      'folder': self.folder,
      'files': [dataclasses.asdict(one) for one in self.files],
      'tensors': tensors,
      'removed': [paths.show(path) for path in self.removed],
    }
    return json.dumps(data, separators=(',', ':'))


def structure(checkpoint: Checkpoint) -> str:
  """Returns a digest of names, shapes and dtypes of the tensors."""
  digester = Digester()
  for path in sorted(checkpoint):
    leaf = checkpoint[path]
    if leaf.shape is not None:
      digester.update(repr((path, leaf.shape, leaf.dtype)).encode())
  return digester.digest()


def read(checkpoint: Checkpoint) -> Description:
  """Returns what a patch says.

  Args:
    checkpoint: the patch, opened.

  Raises:
    FormatError: if it is none, or of another version.
  """
  where = checkpoint.origin
  text = checkpoint.manifest.metadata.get(KEY)
  if checkpoint.manifest.kind != manifests.PATCH or text is None:
    raise errors.FormatError(
      f'{where}: expected a patch, found '
      f'{"an" if checkpoint.manifest.kind == manifests.ADAPTER else "a"} '
      f'{checkpoint.manifest.kind}. Write one with surgery diff BASE TUNED '
      '--save PATCH.'
    )
  try:
    data = strict_json.loads(text.encode(), where, 0)
    if data.get('version') != VERSION:
      raise errors.FormatError(
        f'{where}: expected a patch of version {VERSION}, found version '
        f'{data.get("version")!r}. Install the surgery that wrote it.'
      )
    return _read(data)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    if isinstance(error, errors.FormatError):
      raise
    raise errors.FormatError(
      f'{where}: the patch is malformed: {type(error).__name__}: {error}. '
      'Fetch or make it again.'
    ) from None


def _read(data: Mapping[str, Any]) -> Description:
  tensors = tuple(_tensor(one) for one in data['tensors'])
  files = tuple(_file(one, tensors) for one in data['files'])
  if not files or (len(files) > 1 and not data['folder']):
    raise ValueError(f'expected files, found {len(files)}')
  return Description(
    _text(data['structure']),
    _text(data['format']),
    bool(data['folder']),
    files,
    tensors,
    tuple(paths.parse(one) for one in data['removed']),
  )


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f'expected text, found {value!r:.80}')
  return value


def _count(value: Any) -> int:
  if type(value) is not int or value < 0:
    raise ValueError(f'expected a number of bytes, found {value!r:.80}')
  return value


def _code(value: Any) -> str:
  if value not in (PLAIN, ZSTD):
    raise ValueError(f'unknown code {value!r:.80}')
  return str(value)


def _tensor(data: Mapping[str, Any]) -> Tensor:
  base = data['base']
  one = Tensor(
    paths.parse(_text(data['path'])),
    _count(data['nbytes']),
    _count(data['itemsize']) or 1,
    None if base is None else _text(base),
    tuple((_count(a), _count(b)) for a, b in data['blocks']),
    _code(data['code']),
  )
  at, end = 0, -(-one.nbytes // BLOCK)
  for start, stop in one.blocks:
    if not at <= start < stop <= end:
      raise ValueError(f'{paths.show(one.path)}: blocks {start} to {stop}')
    at = stop
  if base is None and one.literal != one.nbytes:
    raise ValueError(f'{paths.show(one.path)}: has no base')
  return one


def _file(data: Mapping[str, Any], tensors: tuple[Tensor, ...]) -> File:
  name, size = _text(data['name']), _count(data['size'])
  if '/' in name or '\\' in name or name in ('', '.', '..') or '\0' in name:
    # It is written under that name.
    raise ValueError(f'expected the name of a file, found {name!r:.80}')
  spans = tuple(map(tuple, data['spans']))
  _check_spans(name, size, spans, tensors)
  code = data['code']
  code = None if code is None else _code(code)
  return File(name, size, _text(data['digest']), spans, code)


def _check_spans(
  name: str,
  size: int,
  spans: tuple[tuple[int, int, int], ...],
  tensors: tuple[Tensor, ...],
) -> None:
  """Raises unless the spans of a file hold whole tensors, in order.

  Args:
    name: name of the file.
    size: its number of bytes.
    spans: first and last byte, and the number of the tensor.
    tensors: all tensors of the patch.
  """
  # An applied patch writes to these places, so a damaged one must not be used.
  at, found = 0, dict[int, int]()
  for start, stop, number in spans:
    if not at <= _count(start) < _count(stop) <= size:
      raise ValueError(f'{name}: bytes {start} to {stop}')
    if _count(number) >= len(tensors):
      raise ValueError(f'{name}: tensor {number}')
    found[number] = found.get(number, 0) + stop - start
    at = stop
  for number, nbytes in found.items():
    if nbytes != tensors[number].nbytes:
      raise ValueError(f'{name}: {nbytes} bytes of tensor {number}')
