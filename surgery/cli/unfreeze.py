"""`surgery unfreeze`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.core.host import default_host


@click.command()
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
  before = shared.model(file)
  after = shared.passed('unfreeze')(
    before, list(selectors) or None, host=default_host()
  )
  arguments = {'selectors': list(selectors)}
  writing.finish(before, after, output, 'unfreeze', arguments)
