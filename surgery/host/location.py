"""Where a saved model lies: in a file, in a set of files, in a folder."""

from __future__ import annotations

import glob
import json
import pathlib
import re
from collections.abc import Collection, Iterable

from surgery import errors

# A set of files has an index, `out.msgpack.index.json`, that names its shards,
# `out-00001-of-00003.msgpack`.
INDEX = '.index.json'
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
_SHARD = re.compile(r'(.+)-(\d{5,})-of-(\d{5,})')


def is_index(path: pathlib.Path) -> bool:
  """Whether a name is that of the index of a set."""
  return path.name.endswith(INDEX) and len(path.name) > len(INDEX)


def suffix(path: pathlib.Path) -> str:
  """Returns what tells the format; of an index the suffix of its shards."""
  if is_index(path):
    path = path.with_name(path.name[: -len(INDEX)])
  return path.suffix


def shard(path: pathlib.Path, number: int, count: int) -> pathlib.Path:
  """Returns the name of a shard of a set.

  Args:
    path: what the set is called.
    number: of the shard, from 1.
    count: number of shards.
  """
  return path.with_name(f'{path.stem}-{number:05}-of-{count:05}{path.suffix}')


def shard_of(path: pathlib.Path) -> str | None:
  """Returns the name of the set that a file looks like a shard of."""
  match = _SHARD.fullmatch(path.stem)
  return match and f'{match[1]}{path.suffix}'


def numbered(path: pathlib.Path) -> tuple[str, int, int] | None:
  """Returns the set that a file looks like a shard of, its number and count."""
  match = _SHARD.fullmatch(path.stem)
  if match is None:
    return None
  return f'{match[1]}{path.suffix}', int(match[2]), int(match[3])


def part_of(path: pathlib.Path) -> str | None:
  """Describes the set that a file is a part of, if it is part of one.

  Args:
    path: a file that is not an index.

  Returns:
    The end of a sentence, for messages; None for a complete model.
  """
  if is_index(path) or not path.is_file():
    return None
  for index in sorted(path.parent.glob(f'*{glob.escape(path.suffix)}{INDEX}')):
    if path.name in _named(index):
      return f'{index} names it as a part of its model. Open that instead'
  found = numbered(path)
  if found is None or found[2] < 2:
    return None
  of, number, count = found
  return (
    f'its name says that it is number {number} of {count} files. Fetch them '
    f'all, and open their index ({of}{INDEX}) instead'
  )


def _named(index: pathlib.Path) -> Collection[str]:
  """Returns the files that an index names; none if it is not an index."""
  try:
    return set(json.loads(index.read_bytes())['weight_map'].values())
  except (OSError, ValueError, LookupError, TypeError):
    return ()
  except (AttributeError, RecursionError):  # A list, or lists in lists.
    return ()


def in_folder(folder: pathlib.Path, suffixes: Iterable[str]) -> pathlib.Path:
  """Returns the one saved model in a folder: a file, or an index.

  Args:
    folder: the folder.
    suffixes: of files that can be read.

  Raises:
    FormatError: if there is none, or more than one.
  """
  suffixes = set(suffixes)
  models = _models(folder, suffixes)
  if len(models) == 1 and not shard_of(models[0]):
    return models[0]
  if not models:
    raise errors.FormatError(
      f'{folder}: expected one saved model in the folder, found none. Known '
      f'suffixes: {", ".join(sorted(suffixes)) or "none"}.{_pickled(folder)}'
    )
  if all(shard_of(path) for path in models):
    raise errors.FormatError(
      f'{folder}: found {_some(models)}, but not their index '
      f'({shard_of(models[0])}{INDEX}). Fetch it, or write them again.'
    )
  raise errors.FormatError(
    f'{folder}: expected one saved model in the folder, found '
    f'{_some(models)}. Name one of them.'
  )


def _models(
  folder: pathlib.Path, suffixes: Collection[str]
) -> list[pathlib.Path]:
  """Returns the files of a folder that could be its model, shards of none."""
  names = sorted(
    path
    for path in folder.iterdir()
    if suffix(path) in suffixes and not path.name.startswith('.')
  )
  # Beside an index, a name like that of a shard is taken for one, even if the
  # index does not list it: models that are whole are not named that way.
  indexed = any(is_index(path) for path in names)
  return [path for path in names if not (indexed and shard_of(path))]


def _pickled(folder: pathlib.Path) -> str:
  """Returns advice for a model that is pickled, if there is one."""
  found = sorted(p for p in folder.iterdir() if p.suffix in _PICKLES)
  if not found:
    return ''
  return (
    f' {found[0].name} is a pickle, which may run any code when it is read and '
    'is never opened. Where its origin is trusted, convert it with PyTorch: '
    f"model.from_pretrained({str(folder)!r}).save_pretrained('out')."
  )


def _some(found: list[pathlib.Path]) -> str:
  return errors.listed(path.name for path in found)
