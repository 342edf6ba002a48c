"""Where in a folder the tensors are: steps, items, and what says so.

A checkpoint is a folder with a file `_METADATA`, which names the tensors. Orbax
calls it an item. Items lie in a step's folder (`100/default`), steps in the
folder of a `CheckpointManager`; what was saved without one is an item itself.
"""

from __future__ import annotations

import pathlib
import re

import surgery

METADATA = '_METADATA'
CHECKPOINT = '_CHECKPOINT_METADATA'
# What Orbax calls a folder that it is still writing.
UNFINISHED = '.orbax-checkpoint-tmp'
INDEX = 'manifest.ocdbt'
_STEP = re.compile(r'(?:.*_)?\d+')


def is_orbax(path: pathlib.Path) -> bool:
  """Whether a folder is an item, or holds items or steps."""
  if not path.is_dir():
    return False
  marks = (METADATA, CHECKPOINT, INDEX)
  if any((path / mark).exists() for mark in marks) or UNFINISHED in path.name:
    return True
  return bool(_items(path) or _steps(path) or _unfinished(path))


def item(path: pathlib.Path) -> pathlib.Path:
  """Returns the one item that a folder is or holds.

  Raises:
    FormatError: if there are several or none, or the folder is unfinished.
  """
  if UNFINISHED in path.name:
    raise surgery.FormatError(
      f'{path}: the checkpoint is unfinished: its name is that of a folder '
      'which Orbax is writing, or was when it was stopped. Open another step.'
    )
  if (path / METADATA).is_file():
    return path
  found = _items(path)
  if len(found) > 1:
    raise surgery.FormatError(
      f'{path}: expected one item in the checkpoint, found {_named(found)}. '
      f'Open one of them, e.g. {found[0]}.'
    )
  if found:
    return found[0]
  steps = _steps(path)
  if len(steps) > 1:
    raise surgery.FormatError(
      f'{path}: expected one step in the folder, found {_named(steps)}. Open '
      f'one of them, e.g. {steps[-1]}.'
    )
  if steps:
    return item(steps[0])
  unfinished = _unfinished(path)
  if unfinished:
    raise surgery.FormatError(
      f'{path}: expected a finished checkpoint, found {_named(unfinished)}, '
      'which Orbax did not finish.'
    )
  raise surgery.FormatError(
    f'{path}: expected {METADATA}, which names the tensors of a checkpoint, '
    f'found {_contents(path)}. The checkpoint is incomplete, or older than '
    'Orbax 0.5: restore it with Orbax and save it again.'
  )


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in path.iterdir() if p.is_dir())


def _items(path: pathlib.Path) -> list[pathlib.Path]:
  return [
    p
    for p in _folders(path)
    if (p / METADATA).is_file() and UNFINISHED not in p.name
  ]


def _steps(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns folders of finished steps, by number."""
  found = [
    p
    for p in _folders(path)
    if _STEP.fullmatch(p.name) and ((p / CHECKPOINT).exists() or _items(p))
  ]
  return sorted(found, key=lambda p: int(re.findall(r'\d+', p.name)[-1]))


def _unfinished(path: pathlib.Path) -> list[pathlib.Path]:
  return [p for p in _folders(path) if UNFINISHED in p.name]


def _named(found: list[pathlib.Path]) -> str:
  shown = ', '.join(p.name for p in found[:8])
  return shown if len(found) <= 8 else f'{shown} and {len(found) - 8} more'


def _contents(path: pathlib.Path) -> str:
  names = sorted(p.name for p in path.iterdir())[:5]
  return ', '.join(names) or 'an empty folder'
