"""`surgery enable`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.core.host import default_host


@click.command()
@shared.file
@shared.adapters('The adapter to switch on; all by default. May be repeated.')
@writing.writes
def command(
  file: pathlib.Path, names: tuple[str, ...], output: writing.Output
) -> None:
  r"""Switch adapters on: layers get what they answer.

  \b
  surgery enable adapted.msgpack --adapter default -o out.msgpack
  """
  before = shared.model(file)
  enable = shared.passed('enable')
  after = enable(before, list(names) or None, host=default_host())
  writing.finish(before, after, output, 'enable', {'adapter': list(names)})
