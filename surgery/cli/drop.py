"""`surgery drop`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@shared.file
@shared.selectors(required=True)
@writing.writes
def command(
  file: pathlib.Path, selectors: tuple[str, ...], output: writing.Output
) -> None:
  r"""Leave out tensors; a layer means everything beneath it.

  \b
  surgery drop base.msgpack '**/head' -o out.msgpack
  """
  steps = [{'drop': shared.short(selectors)}]
  writing.carry_out(output, steps, shared.model(file))
