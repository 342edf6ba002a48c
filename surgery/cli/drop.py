"""`surgery drop`."""

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
  r"""Leave out tensors; a layer means everything beneath it.

  \b
  surgery drop base.msgpack '**/head' -o out.msgpack
  """
  before = shared.model(file)
  drop = shared.passed('drop')
  after = drop(before, list(selectors), host=default_host())
  arguments = {'selectors': list(selectors)}
  writing.finish(before, after, output, 'drop', arguments)
