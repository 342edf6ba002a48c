"""`surgery keep`."""

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
  r"""Leave out all other tensors; a layer means everything beneath it.

  \b
  surgery keep base.msgpack '**/encoder' -o out.msgpack
  """
  steps = [{'keep': shared.short(selectors)}]
  writing.carry_out(output, steps, shared.model(file))
