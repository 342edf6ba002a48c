"""`surgery recipe-schema`."""

from __future__ import annotations

import json

import click

from surgery.cli.command import Command
from surgery.host.manager import default_host


@click.command(cls=Command)
def command() -> None:
  r"""Print the JSON schema of recipes, for editors.

  It has the steps of all plugins that are installed.

  \b
  surgery recipe-schema > recipe.schema.json
  """
  from surgery.recipes import schema

  click.echo(json.dumps(schema.schema(default_host()), indent=2))
