"""`surgery extract`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import TypeVar

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command
from surgery.recipes.spec import Step

Decorated = TypeVar('Decorated', bound=Callable[..., object])


def modules(command: Decorated) -> Decorated:
  """Adds the options `--modules-to-save`, as `select`, and its negation."""
  for option in (
    click.option(
      '--no-modules-to-save',
      'none',
      is_flag=True,
      help='Save nothing but the adapter itself.',
    ),
    click.option(
      '--modules-to-save',
      'select',
      multiple=True,
      metavar='SELECTOR',
      shell_complete=completion.selectors,
      help='Layers or parameters to save with the adapter, e.g. a head; by '
      'default those that were trained with it. May be repeated.',
    ),
  ):
    command = option(command)
  return command


def step(names: tuple[str, ...], select: tuple[str, ...], none: bool) -> Step:
  """Returns the step that extracts an adapter, under the alias `adapter`.

  Args:
    names: the adapter; empty for the only one.
    select: parameters that are saved with it; by default those that were
      trained with it.
    none: whether no parameters are saved with it.

  Raises:
    UsageError: if several adapters were named, or for options that do not go
      together.
  """
  if select and none:
    raise click.UsageError(
      '--modules-to-save does not go with --no-modules-to-save.'
    )
  if len(names) > 1:
    raise click.UsageError(
      f'a file holds one adapter, found {len(names)}. Name one with --adapter.'
    )
  name = names[0] if names else None
  if not select and not none:
    return Step('extract', name, result='adapter')
  value: dict[str, object] = {'modules-to-save': shared.short(select) or []}
  if name is not None:
    value['name'] = name
  return Step('extract', value, result='adapter')


@click.command(cls=Command)
@shared.file
@shared.adapters('The adapter; the only one by default.')
@modules
@click.option(
  '--to',
  'form',
  metavar='FORMAT',
  shell_complete=completion.formats,
  help='msgpack, safetensors, peft (a folder), …; by default the suffix '
  'decides.',
)
@writing.writes
def command(
  file: pathlib.Path,
  names: tuple[str, ...],
  select: tuple[str, ...],
  none: bool,
  form: str | None,
  output: writing.Output,
) -> None:
  r"""Write an adapter to a file of its own, bound to its base by digests.

  \b
  surgery extract adapted.msgpack --adapter default -o a.msgpack
  surgery extract adapted.msgpack --modules-to-save '**/head' -o a.msgpack
  surgery extract adapted.msgpack --to peft -o folder/
  """
  before = shared.model(file)
  writing.carry_out(
    output.to(of='adapter', format=form), [step(names, select, none)], before
  )
