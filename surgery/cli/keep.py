"""`surgery keep`."""

from __future__ import annotations

import pathlib

import click

from surgery.cli import shared, writing
from surgery.core.host import default_host


@click.command()
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
  before = shared.model(file)
  keep = shared.passed('keep')
  after = keep(before, list(selectors), host=default_host())
  arguments = {'selectors': list(selectors)}
  writing.finish(before, after, output, 'keep', arguments)
