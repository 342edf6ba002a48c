"""`surgery convert`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command


@click.command(cls=Command)
@click.argument('file', metavar='IN', type=shared.FILE)
@click.option(
  '--to',
  'form',
  metavar='FORMAT',
  shell_complete=completion.formats,
  help='msgpack, safetensors, …; what the suffix of OUT says by default.',
)
@writing.converts
def command(
  file: pathlib.Path, form: str | None, output: writing.Output
) -> None:
  r"""Write IN in another format, or in files of another size; same bits.

  \b
  surgery convert base.msgpack base.safetensors
  surgery convert base.msgpack parts.msgpack --shard-size 5GB
  """
  writing.carry_out(output.to(format=form), [], shared.opened(file))
