"""`surgery run`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command
from surgery.core import errors


@click.command(cls=Command)
@click.argument('file', metavar='RECIPE', type=shared.FILE)
@click.argument('values', nargs=-1, metavar='[KEY=VALUE]…')
@click.option('--force', is_flag=True, help='Replace existing files.')
@click.option('--dry-run', is_flag=True, help='Show the plan, write nothing.')
@click.option('--json', 'as_json', is_flag=True, help='Print the plan as JSON.')
def command(
  file: pathlib.Path,
  values: tuple[str, ...],
  force: bool,
  dry_run: bool,
  as_json: bool,
) -> None:
  r"""Do the steps of RECIPE, a file of YAML, in one pass.

  KEY is the name of an input, an output or a variable of the recipe. All of it
  is checked before the first tensor is read.

  \b
  surgery run recipe.yaml model=base.msgpack out=out.msgpack
  surgery run recipe.yaml model=base.msgpack out=out.msgpack --dry-run
  """
  from surgery.recipes import text
  from surgery.recipes.recipe import Recipe

  recipe = Recipe.load(file)
  given: dict[str, Any] = {}
  for item in values:
    key, sign, value = item.partition('=')
    if not sign or not key:
      raise click.UsageError(f'{item!r}: expected KEY=VALUE.')
    if key in given:
      raise click.UsageError(f'{key}: given twice.')
    given[key] = value if key not in recipe.vars else text.scalar(value)
  recipe = recipe.bound(**given)
  first = next(iter(recipe.outputs.values()), None)
  if first is None or first.path is None:
    name = next(iter(recipe.outputs), None)
    raise errors.RecipeError(
      f'{file}: expected an output.'
      if name is None
      else f'{file}: output {name!r} has no file. Give {name}=FILE.'
    )
  output = writing.Output(
    first.path, force=force, dry_run=dry_run, as_json=as_json
  )
  writing.run(recipe, output)
