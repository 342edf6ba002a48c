"""What verbs that write have in common: options, the plan, writing it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from surgery.core import errors, manifest, paths
from surgery.core.host import default_host

if TYPE_CHECKING:
  from surgery.core.checkpoint import Checkpoint

FILE = click.Path(path_type=pathlib.Path)


@dataclasses.dataclass(frozen=True)
class Output:
  """Where a verb writes, and how.

  Attributes:
    path: the file.
    force: whether it may exist.
    dry_run: whether only the plan is shown.
    as_json: whether the plan is printed as JSON.
  """

  path: pathlib.Path
  force: bool
  dry_run: bool
  as_json: bool


def writes(function: Callable[..., Any]) -> Callable[..., Any]:
  """Adds the options of verbs that write; gives them as `output`."""

  @click.option(
    '-o',
    '--output',
    'target',
    type=FILE,
    required=True,
    help='The file to write.',
  )
  @click.option('--force', is_flag=True, help='Replace an existing file.')
  @click.option('--dry-run', is_flag=True, help='Show the plan, write nothing.')
  @click.option(
    '--json', 'as_json', is_flag=True, help='Print the plan as JSON.'
  )
  @functools.wraps(function)
  def wrapped(
    *args: Any,
    target: pathlib.Path,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **kwargs: Any,
  ) -> Any:
    if target.exists() and not force:
      raise errors.SurgeryError(
        f'{target}: exists already. Give --force to replace it.'
      )
    output = Output(target, force, dry_run, as_json)
    return function(*args, output=output, **kwargs)

  return wrapped


def plan(before: Checkpoint, after: Checkpoint) -> list[dict[str, Any]]:
  """Returns what writing will do to each tensor.

  Args:
    before: what is read.
    after: what is written.

  Returns:
    For each tensor its path, what happens (`copied`, `computed`, `new`,
    `gone`), shape, dtype and bytes.
  """
  rows = []
  for path, leaf in {**before, **after}.items():
    if path not in after:
      what = 'gone'
    elif path not in before:
      what = 'new'
    else:
      what = 'copied' if leaf.source is not None else 'computed'
    rows.append(
      {
        'path': paths.show(path),
        'what': what,
        'shape': None if leaf.shape is None else list(leaf.shape),
        'dtype': leaf.dtype,
        'bytes': leaf.nbytes,
      }
    )
  return rows


def finish(
  before: Checkpoint,
  after: Checkpoint,
  output: Output,
  verb: str,
  arguments: Mapping[str, Any],
) -> None:
  """Writes what a verb made, or shows what would be written.

  Args:
    before: what was read.
    after: what the verb made of it.
    output: where and how.
    verb: the verb's name, for the history.
    arguments: its arguments, for the history: no paths but names of files, no
      times, so that the same command gives the same bytes.

  Raises:
    SurgeryError: if it cannot be written.
  """
  import surgery

  entry = {
    'version': surgery.__version__,
    'pass': verb,
    'arguments': dict(arguments),
  }
  said = after.manifest
  after = after.replace(manifest=said.replace(history=(*said.history, entry)))
  rows = plan(before, after)
  if not output.dry_run:
    after.write(output.path, overwrite=output.force, host=default_host())
  _report(rows, output)


def _report(rows: list[dict[str, Any]], output: Output) -> None:
  if output.as_json:
    click.echo(json.dumps({'output': output.path.name, 'tensors': rows}))
    return
  counts = {
    what: [r for r in rows if r['what'] == what]
    for what in ('copied', 'computed', 'new', 'gone')
  }
  if output.dry_run:
    for row in rows:
      if row['what'] != 'copied':
        shape = '' if row['shape'] is None else str(tuple(row['shape']))
        click.echo(f'{row["what"]:<8}  {row["path"]}  {row["dtype"]}{shape}')
  summary = ', '.join(
    f'{len(some)} {what} ({size(sum(r["bytes"] for r in some))})'
    for what, some in counts.items()
    if some
  )
  verb = 'would write' if output.dry_run else 'wrote'
  click.echo(f'{verb} {output.path}: {summary}', err=not output.dry_run)


def size(count: int) -> str:
  """Returns a number of bytes as people read it."""
  number, units = float(count), ['B', 'KB', 'MB', 'GB', 'TB']
  while number >= 1000 and len(units) > 1:
    number /= 1000
    units.pop(0)
  return f'{number:.3g} {units[0]}'


def model(path: pathlib.Path) -> Checkpoint:
  """Opens a model.

  Raises:
    FormatError: if it is an adapter without its base.
  """
  from surgery.core.checkpoint import open_checkpoint

  opened = open_checkpoint(path)
  if opened.manifest.kind == manifest.ADAPTER:
    raise errors.FormatError(
      f'{path}: an adapter without its base, not a model. Give the base, and '
      'this file by --from or --with.'
    )
  return opened


def pairs(items: tuple[str, ...], what: str) -> list[tuple[str, str]]:
  """Splits `key=value` at the last `=` that has an option's value behind.

  Raises:
    UsageError: for an item without `=`.
  """
  split = []
  for item in items:
    key, sign, value = item.rpartition('=')
    if not sign or not key:
      raise click.UsageError(f'{what} {item!r}: expected {what} KEY=VALUE.')
    split.append((key, value))
  return split
