"""`surgery run`."""

from __future__ import annotations

import pathlib
import sys
from typing import TYPE_CHECKING, Any

import click

from surgery import errors
from surgery.cli import shared, writing
from surgery.cli.command import Command

if TYPE_CHECKING:
  from surgery.recipes.recipe import Recipe


@click.command(cls=Command)
@click.argument('file', metavar='RECIPE', type=shared.FILE)
@click.argument('values', nargs=-1, metavar='[KEY=VALUE]…')
@click.option('--force', is_flag=True, help='Replace existing files.')
@click.option('--dry-run', is_flag=True, help='Show the plan, write nothing.')
@click.option('--json', 'as_json', is_flag=True, help='Print the plan as JSON.')
@shared.quiet_option
def command(
  file: pathlib.Path,
  values: tuple[str, ...],
  force: bool,
  dry_run: bool,
  as_json: bool,
  quiet: bool,
) -> None:
  r"""Do the steps of RECIPE, a file of YAML, in one pass; - is stdin.

  KEY is the name of an input, an output or a variable of the recipe, which is
  checked as a whole before a tensor is read. A recipe of assertions alone needs
  no output.

  \b
  surgery run recipe.yaml model=base.msgpack out=out.msgpack
  surgery run recipe.yaml model=base.msgpack out=out.msgpack --dry-run
  """
  from surgery.recipes import text
  from surgery.recipes.recipe import Recipe

  recipe = _stdin() if str(file) == '-' else Recipe.load(file)
  given: dict[str, Any] = {}
  for item in values:
    key, sign, value = item.partition('=')
    if not sign or not key:
      raise click.UsageError(f'{item!r}: expected KEY=VALUE.')
    if key in given:
      raise click.UsageError(f'{key}: given twice.')
    given[key] = value if key not in recipe.vars else text.scalar(value)
  recipe = recipe.bound(**given)
  manner = writing.Manner(
    force=force, dry_run=dry_run, as_json=as_json, quiet=quiet
  )
  writing.run(recipe.spec, manner)


def _stdin() -> Recipe:
  """Returns the recipe on stdin.

  Raises:
    RecipeError: if it cannot be read.
  """
  from surgery.recipes.recipe import Recipe

  try:
    written = sys.stdin.buffer.read().decode()
  except UnicodeDecodeError as error:
    raise errors.RecipeError(f'stdin: not UTF-8 text: {error}.') from None
  return Recipe.loads(written, 'stdin')
