"""What writing will do to each tensor, and what memory it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.shared import size
from surgery.core import paths
from surgery.core.checkpoint import BLOCK, itemsize

if TYPE_CHECKING:
  from surgery.core.checkpoint import Checkpoint, Leaf
  from surgery.core.paths import Path

KINDS = ('copied', 'renamed', 'computed', 'new', 'gone')

# A tensor, its result in float32, and what lies between them.
_COPIES = 4


def _read(leaf: Leaf) -> bool:
  """Whether a leaf lies in a file as it is, so that its bytes are copied."""
  return leaf.source is not None and leaf.load is leaf.source


def memory(leaf: Leaf) -> int:
  """Returns about how many bytes of memory it takes to compute a leaf."""
  if leaf.dtype is None or _read(leaf):
    return 0
  elements = leaf.size if leaf.part is None else min(leaf.size, BLOCK)
  return _COPIES * elements * max(4, itemsize(leaf.dtype))


def plan(before: Checkpoint, after: Checkpoint) -> list[dict[str, Any]]:
  """Returns what writing will do to each tensor.

  Args:
    before: what is read.
    after: what is written.

  Returns:
    For each tensor its `path`; `what` happens (`copied`, `renamed`, `computed`,
    `new`, `gone`); where a renamed one came `from`; `shape`, `dtype` and
    `bytes`; `blocks`, whether a computed or new one is computed in blocks; and
    `trainable`, if that changes.
  """
  origins = {id(leaf.load): path for path, leaf in before.items()}
  kept = {id(leaf.load) for leaf in after.values()}
  rows = []
  for path in dict.fromkeys((*before, *after)):
    if path in after:
      origin = origins.get(id(after[path].load))
      rows.append(_row(path, after[path], origin, before))
    elif id(before[path].load) not in kept:
      rows.append({**_described(path, before[path]), 'what': 'gone'})
  return rows


def _described(path: Path, leaf: Leaf) -> dict[str, Any]:
  return {
    'path': paths.show(path),
    'what': '',
    'shape': None if leaf.shape is None else list(leaf.shape),
    'dtype': leaf.dtype,
    'bytes': leaf.nbytes,
  }


def _row(
  path: Path, leaf: Leaf, origin: Path | None, before: Checkpoint
) -> dict[str, Any]:
  """Returns the row of a tensor that is written.

  Args:
    path: its path.
    leaf: the tensor.
    origin: path of the tensor that was read and is written as it is.
    before: what is read.
  """
  row = _described(path, leaf)
  if origin is None:
    row['what'] = 'computed' if path in before else 'new'
    if not _read(leaf) and leaf.shape is not None:
      row['blocks'] = leaf.part is not None
  elif origin == path:
    row['what'] = 'copied'
  else:
    row['what'], row['from'] = 'renamed', paths.show(origin)
  was = before.get(path if origin is None else origin)
  if was is not None and was.trainable != leaf.trainable:
    row['trainable'] = leaf.trainable
  return row


def needed(after: Checkpoint) -> int:
  """Returns about how many bytes of memory writing takes, beside Python's."""
  return max(map(memory, after.values()), default=0)


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields what a plan changes, as people read it."""
  for row in rows:
    if row['what'] == 'copied' and 'trainable' not in row:
      continue
    shape = '' if row['shape'] is None else str(tuple(row['shape']))
    notes = []
    if 'from' in row:
      notes.append(f'from {row["from"]}')
    if 'blocks' in row:
      notes.append('in blocks' if row['blocks'] else 'whole')
    if 'trainable' in row:
      notes.append('trains' if row['trainable'] else 'frozen')
    tensor = f'{row["dtype"] or "value"}{shape}'
    yield '  '.join([f'{row["what"]:<8}', row['path'], tensor, *notes])


def summary(rows: list[dict[str, Any]], memory: int) -> str:
  """Returns a plan in a line, as people read it."""
  some = {what: [r for r in rows if r['what'] == what] for what in KINDS}
  parts = [
    f'{len(one)} {what} ({size(sum(r["bytes"] for r in one))})'
    for what, one in some.items()
    if one
  ]
  for flag, word in ((False, 'frozen'), (True, 'to train')):
    if count := sum(r.get('trainable') is flag for r in rows):
      parts.append(f'{count} {word}')
  if memory:
    parts.append(f'about {size(memory)} of memory')
  return ', '.join(parts)


def report(
  rows: list[dict[str, Any]], name: str, memory: int
) -> dict[str, Any]:
  """Returns a plan as JSON data."""
  return {'output': name, 'memory': memory, 'tensors': rows}


def show(
  rows: list[dict[str, Any]], where: str, memory: int, dry_run: bool
) -> None:
  """Prints a plan for people: what is to be done, or what was done."""
  if dry_run:
    for line in lines(rows):
      click.echo(line)
  verb = 'would write' if dry_run else 'wrote'
  click.echo(f'{verb} {where}: {summary(rows, memory)}', err=not dry_run)
