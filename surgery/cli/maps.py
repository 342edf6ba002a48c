"""`surgery maps`."""

from __future__ import annotations

import json

import click

from surgery.cli import completion, shared
from surgery.cli.command import Command
from surgery.host.manager import default_host


@click.command(cls=Command)
@click.argument('name', required=False, shell_complete=completion.maps)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
def command(name: str | None, as_json: bool) -> None:
  r"""List maps of names between frameworks, or show one, a file of YAML.

  \b
  surgery maps
  surgery maps llama-flax > my.yaml
  """
  from surgery.interop import maps
  from surgery.recipes import text

  host = default_host()
  if name is not None:
    maps.find(name, host)  # Its error suggests other names.
    data = maps.data(name, host)
    click.echo(json.dumps(data) if as_json else text.write(data).rstrip())
    return
  rows = [
    {
      'name': one,
      'of': shared.owner('surgery_maps', one),
      'about': str(said.get('about', '')),
    }
    for one, said in host.maps.items()
  ]
  shared.show_offers(rows, 'about', as_json)
