"""`surgery select`."""

from __future__ import annotations

import json
import pathlib

import click

from surgery.cli import shared
from surgery.cli.command import Command
from surgery.naming import paths


@click.command(cls=Command)
@shared.file
@shared.selectors(required=True)
@click.option('--count', is_flag=True, help='Print their number only.')
@shared.json_option
def command(
  file: pathlib.Path, selectors: tuple[str, ...], count: bool, as_json: bool
) -> None:
  r"""Print the tensors that selectors mean, one a line.

  \b
  surgery select base.msgpack '**/norm*' '!**/bias'
  """
  from surgery.editing import choosing

  found = [
    paths.show(p) for p in choosing.select(shared.opened(file), *selectors)
  ]
  if as_json:
    click.echo(json.dumps(len(found) if count else found))
  elif count:
    click.echo(len(found))
  else:
    click.echo(''.join(f'{path}\n' for path in found), nl=False)
