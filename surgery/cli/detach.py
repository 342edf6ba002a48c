"""`surgery detach`."""

from __future__ import annotations

import dataclasses
import pathlib

import click

from surgery.cli import extract, shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@shared.adapters('The adapter to take off; all by default. May be repeated.')
@click.option(
  '--save-adapter',
  'saved',
  type=shared.FILE,
  help='Write the adapter to this file, too. It is written first.',
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
  r"""Take adapters off; the base is as it was.

  \b
  surgery detach adapted.msgpack -o base.msgpack
  surgery detach adapted.msgpack --save-adapter a.msgpack -o base.msgpack
  """
  if saved is None and (select or none):
    raise click.UsageError(
      '--modules-to-save and --no-modules-to-save go with --save-adapter.'
    )
  steps: list[object] = [{'detach': shared.short(names)}]
  others = {}
  if saved is not None:
    where = dataclasses.replace(output, path=saved, shard_size=None)
    where.check()
    if saved.resolve() == output.path.resolve():
      raise click.UsageError('--save-adapter and -o name the same file.')
    steps.insert(0, extract.step(names, select, none))
    others['saved'] = {'path': saved, 'of': 'adapter'}
  writing.carry_out(output, steps, shared.model(file), saved=others)
