"""`surgery disable`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.core.host import default_host


@click.command()
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
  before = shared.model(file)
  disable = shared.passed('disable')
  after = disable(before, list(names) or None, host=default_host())
  writing.finish(before, after, output, 'disable', {'adapter': list(names)})
