"""Arguments and options that verbs share, and opening files."""

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

# The owner of what the library itself offers.
_OURS = 'surgery'

# Click does not check access: an error of the system says more.
FILE = click.Path(path_type=pathlib.Path, readable=False)


def nbytes(
  ctx: click.Context, param: click.Parameter, value: str | None
) -> int | None:
  """Reads a number of bytes: `5GB`, `500MB`, `2GiB`, or a plain number.

  Raises:
    BadParameter: for anything else, and for 0.
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
  '-q', '--quiet', is_flag=True, help='Print no progress and no summary.'
)

json_option = click.option(
  '--json', 'as_json', is_flag=True, help='Print JSON.'
)


def short(items: Sequence[str]) -> Any:
  """Returns items as a recipe has them: None, one alone, or a list."""
  if len(items) > 1:
    return list(items)
  return items[0] if items else None


def need(option: str, **given: Any) -> None:
  """Raises for options that need another one, which is not given.

  Args:
    option: the option that they need.
    **given: their values by name.

  Raises:
    UsageError: for the first that is given.
  """
  for name, value in given.items():
    if value not in (None, (), False):
      raise click.UsageError(f'--{name.replace("_", "-")} goes with {option}.')


def unchecked(no_check_base: bool, no_check_same: bool) -> dict[str, Any]:
  """Returns the options of a step that `--no-check-…` stands for."""
  checks = {'check-base': no_check_base, 'check-same': no_check_same}
  return {name: False for name, off in checks.items() if off}


def opened(path: pathlib.Path) -> Checkpoint:
  """Opens a model or an adapter, without reading its tensors.

  Raises:
    FormatError: if it is no saved model.
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
  """Calls a function with each file; returns the largest exit code.

  With several files, an error of one is printed and the others follow.
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
  """Calls a function with each file, and prints its reports as JSON.

  Args:
    files: the files.
    function: adds a file's report to `reports`, and returns an exit code.
    reports: printed at the end, as a list if there are several files; None to
      print nothing.

  Returns:
    The largest exit code.
  """
  try:
    return each(files, function)
  finally:
    # Reports from before an error are results, too.
    if reports:
      click.echo(json.dumps(reports[0] if len(files) == 1 else reports))


def owner(hook: str, name: str) -> str:
  """Returns who offers something: a distribution, or the library."""
  return default_host().offered_by(hook, name) or _OURS


def whose(row: Mapping[str, Any]) -> str:
  """Returns the name of a plugin in brackets; empty for the library."""
  return '' if row['of'] == _OURS else f' ({row["of"]})'


def show_offers(
  rows: Sequence[Mapping[str, Any]], about: str, as_json: bool
) -> None:
  """Prints what plugins offer, a line each, or as JSON.

  Args:
    rows: each with `name`, `of` (the owner) and a description.
    about: the key of the description.
    as_json: whether they are printed as JSON.
  """
  if as_json:
    click.echo(json.dumps(rows))
    return
  width = max((len(row['name']) for row in rows), default=0)
  for row in rows:
    click.echo(f'{row["name"]:<{width}}  {row[about]}{whose(row)}')


def size(count: int) -> str:
  """Returns a number of bytes with a unit."""
  number, units = float(count), ['B', 'KB', 'MB', 'GB', 'TB']
  while number >= 1000 and len(units) > 1:
    number /= 1000
    units.pop(0)
  return f'{number:.3g} {units[0]}'


def pairs(items: tuple[str, ...], what: str) -> list[tuple[str, str]]:
  """Splits `key=value` at the last `=`, since selectors may contain some.

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
