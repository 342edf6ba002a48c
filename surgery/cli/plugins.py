"""`surgery plugins`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import click

from surgery.cli import completion
from surgery.core import config, errors
from surgery.core.host import default_host


@click.group(invoke_without_command=True)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
  """List adapter types and plugins that are installed, with their states."""
  if ctx.invoked_subcommand is not None:
    return
  infos = default_host().plugins()
  if as_json:
    click.echo(json.dumps([dataclasses.asdict(i) for i in infos]))
    return
  width = max((len(i.name) for i in infos), default=0)
  for info in infos:
    extra = info.reason or ', '.join(info.hooks)
    line = f'{info.kind:<8} {info.name:<{width}}  {info.state:<9} {info.origin}'
    click.echo(f'{line}  {extra}'.rstrip())


@command.command()
@click.argument('name', shell_complete=completion.plugins)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
def show(name: str, as_json: bool) -> None:
  """Show an adapter type and its options, or a plugin and its hooks."""
  host = default_host()
  known = [i for i in host.plugins() if i.name == name]
  others = [i for i in known if i.kind == 'plugin' or i.state == 'blocked']
  if others and name not in host.adapter_names():
    data = dataclasses.asdict(others[0])
  else:
    data = _type(name)
  if as_json:
    click.echo(json.dumps(data))
    return
  for key in ('name', 'kind', 'distribution', 'version', 'state', 'reason'):
    if data.get(key):
      click.echo(f'{key}: {data[key]}')
  if data.get('hooks'):
    click.echo(f'hooks: {", ".join(data["hooks"])}')
  if data.get('traceback'):
    click.echo(f'\n{data["traceback"].rstrip()}')
  if data.get('about'):
    click.echo(f'\n{data["about"]}')
  for option in data.get('options', ()):
    default = 'required' if option['required'] else f'= {option["default"]}'
    bounds = f' ({option["range"]})' if option['range'] else ''
    click.echo(
      f'\n--set {option["name"]}=…  {option["type"]}{bounds}, {default}'
    )
    if option['doc']:
      click.echo(f'    {option["doc"]}')


def _type(name: str) -> dict[str, Any]:
  """Returns what there is to know of an adapter type.

  Raises:
    UnknownAdapterType: if nothing offers it.
    PluginError: if what offers it is broken.
  """
  host = default_host()
  try:
    cls = host.adapter_type(name)
  except errors.UnknownAdapterType as error:
    names = [i.name for i in host.plugins()]
    if hint := errors.suggest(name, names):
      raise errors.UnknownAdapterType(f"no plugin '{name}'.{hint}") from error
    raise
  except errors.PluginError:
    # What is broken is shown with its reason.
    broken = [i for i in host.plugins() if i.name == name and i.reason]
    if not broken:
      raise
    return dataclasses.asdict(broken[0])
  info = next(i for i in host.plugins() if i.name == name)
  return {
    **dataclasses.asdict(info),
    'about': inspect.getdoc(cls) or '',
    'rewrites': list(cls.rewrites),
    'frozen': list(cls.frozen),
    'options': config.declared(cls),
  }
