"""`surgery unfreeze`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@shared.selectors(required=False)
@writing.writes
def command(
  file: pathlib.Path, selectors: tuple[str, ...], output: writing.Output
) -> None:
  r"""Let parameters train again that `freeze` froze, and only those.

  \b
  surgery unfreeze frozen.msgpack '**/output' -o out.msgpack
  """
  steps = [{'unfreeze': shared.short(selectors)}]
  writing.carry_out(output, steps, shared.model(file))
