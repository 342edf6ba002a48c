"""`surgery disable`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@shared.adapters('The adapter to switch off; all by default. May be repeated.')
@writing.writes
def command(
  file: pathlib.Path, names: tuple[str, ...], output: writing.Output
) -> None:
  r"""Switch adapters off: layers get the base as it is stored.

  \b
  surgery disable adapted.msgpack --adapter default -o out.msgpack
  """
  steps = [{'disable': shared.short(names)}]
  writing.carry_out(output, steps, shared.model(file))
