"""`surgery detach`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import extract, shared, writing
from surgery.cli.command import Command
from surgery.recipes.spec import Step, Target


@click.command(cls=Command)
@shared.file
@shared.adapters('The adapter to remove; all by default. May be repeated.')
@click.option(
  '--save-adapter',
  'saved',
  type=shared.FILE,
  help='Write the adapter to this file as well, before the base.',
)
@extract.modules
@writing.writes
def command(
  file: pathlib.Path,
  names: tuple[str, ...],
  saved: pathlib.Path | None,
  select: tuple[str, ...],
  none: bool,
  output: writing.Output,
) -> None:
  r"""Remove adapters; the base is as it was.

  \b
  surgery detach adapted.msgpack -o base.msgpack
  surgery detach adapted.msgpack --save-adapter a.msgpack -o base.msgpack
  """
  from surgery.recipes import running

  if saved is None and (select or none):
    raise click.UsageError(
      '--modules-to-save and --no-modules-to-save go with --save-adapter.'
    )
  steps = [Step('detach', shared.short(names))]
  others: dict[str, Target] = {}
  if saved is not None:
    others['saved'] = alone = Target(saved, of='adapter')
    running.check_target(alone, output.force)
    assert output.target.path is not None
    if saved.resolve() == output.target.path.resolve():
      raise click.UsageError('--save-adapter and -o name the same file.')
    steps.insert(0, extract.step(names, select, none))
  writing.carry_out(output, steps, shared.model(file), saved=others)
