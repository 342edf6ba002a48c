"""`surgery freeze`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@shared.selectors(required=False)
@click.option(
  '--policy',
  metavar='NAME',
  help='Freeze what this policy of a plugin or adapter type freezes, e.g. '
  'bitfit; `adapters` by default, which leaves adapters trainable.',
)
@writing.writes
def command(
  file: pathlib.Path,
  selectors: tuple[str, ...],
  policy: str | None,
  output: writing.Output,
) -> None:
  r"""Freeze parameters: those selected, or all but the weights of adapters.

  \b
  surgery freeze adapted.msgpack -o frozen.msgpack
  surgery freeze base.msgpack '**/embed' -o frozen.msgpack
  """
  if selectors and policy:
    raise click.UsageError('give SELECTOR or --policy, not both.')
  value = {'policy': policy} if policy else shared.short(selectors)
  writing.carry_out(output, [{'freeze': value}], shared.model(file))
