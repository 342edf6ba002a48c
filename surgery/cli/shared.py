"""What verbs have in common: arguments, and opening what they name."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery import errors
from surgery.cli import codes, completion, wording
from surgery.host.manager import default_host
from surgery.model import manifest
from surgery.recipes import spec

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint

# Whose what the library offers is.
_OURS = 'surgery'

# Whether it can be read or written the system says best.
FILE = click.Path(path_type=pathlib.Path, readable=False)


def nbytes(
  ctx: click.Context, param: click.Parameter, value: str | None
) -> int | None:
  """Reads a number of bytes: `5GB`, `500MB`, `2GiB`, or a plain number.

  Raises:
    BadParameter: if it is none, or 0.
  """
  if value is None:
    return None
  try:
    return spec.nbytes(value)
  except errors.RecipeError as error:
    raise click.BadParameter(str(error), ctx, param) from None


file = click.argument('file', type=FILE)


def selectors(required: bool) -> Callable[..., Any]:
  """Adds the argument SELECTOR…."""
  return click.argument(
    'selectors',
    nargs=-1,
    required=required,
    metavar='SELECTOR…' if required else '[SELECTOR]…',
    shell_complete=completion.selectors,
  )


def adapters(text: str, argument: str = 'names') -> Callable[..., Any]:
  """Adds the option `--adapter NAME`, which may be repeated."""
  return click.option(
    '--adapter',
    argument,
    multiple=True,
    metavar='NAME',
    shell_complete=completion.adapters,
    help=text,
  )


quiet_option = click.option(
  '-q', '--quiet', is_flag=True, help='Say nothing of progress and results.'
)

json_option = click.option(
  '--json', 'as_json', is_flag=True, help='Print JSON.'
)


def short(items: Sequence[str]) -> Any:
  """Returns items as a recipe says them: none, one alone, or a list."""
  if len(items) > 1:
    return list(items)
  return items[0] if items else None


def opened(path: pathlib.Path) -> Checkpoint:
  """Opens a model or an adapter, without reading its tensors.

  Raises:
    FormatError: if it is not what it should be.
  """
  from surgery.model.checkpoint import open_checkpoint

  return open_checkpoint(path)


def model(path: pathlib.Path) -> Checkpoint:
  """Opens a model.

  Raises:
    FormatError: if it is an adapter without its base, or a patch.
  """
  found = opened(path)
  manifest.check_no_patch(found.manifest, str(path))
  if found.manifest.kind == manifest.ADAPTER:
    raise errors.FormatError(
      f'{path}: an adapter without its base, not a model. Give the base, and '
      'this file by --from or --with.'
    )
  return found


def each(
  files: Sequence[pathlib.Path], function: Callable[[pathlib.Path], int]
) -> int:
  """Does something with each of several files; returns the worst exit code.

  An error of one of several is told of, and the others are gone on with.
  """
  if len(files) == 1:
    return function(files[0])
  worst = 0
  for one in files:
    try:
      code = function(one)
    except (errors.SurgeryError, OSError) as error:
      click.echo(f'error: {wording.line(error)}', err=True)
      code = codes.FAILED
    worst = max(worst, code)
  return worst


def reported(
  files: Sequence[pathlib.Path],
  function: Callable[[pathlib.Path], int],
  reports: Sequence[Any] | None,
) -> int:
  """Does something with each of several files, and prints reports as JSON.

  Args:
    files: the files.
    function: what is done; it adds a file's report to `reports`.
    reports: what is printed at the end: one alone of a single file, otherwise a
      list; None where nothing is.

  Returns:
    The worst exit code.
  """
  try:
    return each(files, function)
  finally:
    # What was found before an error is a result, too.
    if reports:
      click.echo(json.dumps(reports[0] if len(files) == 1 else reports))


def owner(hook: str, name: str) -> str:
  """Returns whose offer something is: the library's, or a plugin's."""
  return default_host().offered_by(hook, name) or _OURS


def whose(row: Mapping[str, Any]) -> str:
  """Returns what stands behind a row that a plugin offers."""
  return '' if row['of'] == _OURS else f' ({row["of"]})'


def show_offers(
  rows: Sequence[Mapping[str, Any]], about: str, as_json: bool
) -> None:
  """Prints what plugins offer, a line each, or as JSON.

  Args:
    rows: each with `name`, `of` (whose it is) and what is told of it.
    about: the key of that.
    as_json: whether they are printed as JSON.
  """
  if as_json:
    click.echo(json.dumps(rows))
    return
  width = max((len(row['name']) for row in rows), default=0)
  for row in rows:
    click.echo(f'{row["name"]:<{width}}  {row[about]}{whose(row)}')


def size(count: int) -> str:
  """Returns a number of bytes as people read it."""
  number, units = float(count), ['B', 'KB', 'MB', 'GB', 'TB']
  while number >= 1000 and len(units) > 1:
    number /= 1000
    units.pop(0)
  return f'{number:.3g} {units[0]}'


def pairs(items: tuple[str, ...], what: str) -> list[tuple[str, str]]:
  """Splits `key=value` at the last `=` that has an option's value behind.

  Raises:
    UsageError: for an item without `=`, or a key that is given twice.
  """
  split: dict[str, str] = {}
  for item in items:
    key, sign, value = item.rpartition('=')
    if not sign or not key:
      raise click.UsageError(f'{what} {item!r}: expected {what} KEY=VALUE.')
    if key in split:
      raise click.UsageError(f'{what} {key}: given twice.')
    split[key] = value
  return list(split.items())
