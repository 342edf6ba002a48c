"""`surgery plugins`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator
from typing import Any

import click

from surgery import errors
from surgery.cli import completion, offers, shared
from surgery.cli.command import Group
from surgery.contract import config
from surgery.host import discovery
from surgery.host.manager import Host, default_host


@click.group(cls=Group, invoke_without_command=True)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
@click.option(
  '--steps',
  is_flag=True,
  help='List the steps of recipes, and who offers them.',
)
@click.option(
  '--methods',
  is_flag=True,
  help='List the methods that combine models, with their options.',
)
@click.pass_context
def command(
  ctx: click.Context, as_json: bool, steps: bool, methods: bool
) -> None:
  """List adapter types and plugins that are installed, with their states."""
  if ctx.invoked_subcommand is not None:
    return
  if steps:
    _list_steps(as_json)
    return
  if methods:
    _list_methods(as_json)
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


def _list_steps(as_json: bool) -> None:
  from surgery.recipes import definitions

  host = default_host()
  rows = [
    {
      'name': name,
      'of': shared.owner('surgery_passes', name),
      'summary': one.summary,
    }
    for name, one in definitions.every(host).items()
  ]
  shared.show_offers(rows, 'summary', as_json)


def _list_methods(as_json: bool) -> None:
  host = default_host()
  rows: list[dict[str, Any]] = [
    {
      'name': name,
      'of': shared.owner('surgery_methods', name),
      'summary': (inspect.getdoc(cls) or '').partition('\n')[0],
      'base': cls.base,
      'least': cls.least,
      'most': cls.most,
      'options': offers.method_options(cls),
    }
    for name, cls in host.methods.items()
  ]
  if as_json:
    click.echo(json.dumps(rows))
    return
  for row in rows:
    click.echo(f'{row["name"]}: {row["summary"]}{shared.whose(row)}')
    click.echo(f'    base: {row["base"]}')
    for option in row['options']:
      click.echo(f'    {offers.option_line(option, "--set ")}')


@command.command()
@click.argument('name', shell_complete=completion.plugins)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
def show(name: str, as_json: bool) -> None:
  """Show a type, a plugin and what it offers, or a pass, with all options."""
  data = _shown(name)
  if as_json:
    click.echo(json.dumps(data))
    return
  for line in _lines(data):
    click.echo(line)
  for other in data['others']:
    click.echo()
    for line in _lines(other):
      click.echo(line)


def _lines(data: dict[str, Any]) -> Iterator[str]:
  for key in (
    'name',
    'kind',
    'plugin',
    'distribution',
    'version',
    'state',
    'reason',
  ):
    if data.get(key):
      yield f'{key}: {data[key]}'
  for key in ('hooks', 'rewrites', 'frozen'):
    if data.get(key):
      yield f'{key}: {", ".join(data[key])}'
  if data.get('mergeable') is False:
    yield 'mergeable: no'
  if data.get('traceback'):
    yield f'\n{data["traceback"].rstrip()}'
  if data.get('about'):
    yield f'\n{data["about"]}'
  for option in data.get('options', ()):
    yield f'\n{offers.option_line(option, "--set ")}'
    if option['doc']:
      yield f'    {option["doc"]}'
  yield from offers.lines(data.get('offers', []))


def _shown(name: str) -> dict[str, Any]:
  """Returns what has a name: a working type or plugin before broken ones.

  Raises:
    UnknownAdapterType: if nothing has it.
    PluginError: if two distributions offer it.
  """
  host = default_host()
  type_: dict[str, Any] = {}
  known = [i for i in host.plugins() if i.name == name]
  nowhere = not known and name not in host.adapter_names()
  if nowhere and (offer := _offer(host, name)):
    return offer
  # Importing a type may change its state, from available to loaded or broken.
  if name in host.adapter_names() or not known:
    type_ = _type(name)
    known = [i for i in host.plugins() if i.name == name]
  order = ('loaded', 'broken', 'available', 'blocked')
  known.sort(key=lambda i: (i.kind, order.index(i.state)))
  first, *others = [_plugin(host, info) for info in known]
  return {**first, **type_, 'others': others}


def _offer(host: Host, name: str) -> dict[str, Any] | None:
  """Returns what a plugin offers under a name that no plugin has."""
  for info in host.plugins():
    if info.kind != 'plugin' or info.state != 'loaded':
      continue
    for row in offers.of_plugin(host, info.name):
      if row['name'] == name:
        said = {'name': name, 'kind': row['kind'], 'plugin': info.name}
        return {
          **_plugin(host, info),
          **said,
          'offers': [row],
          'about': '',
          'hooks': (),
          'others': [],
        }
  return None


def _plugin(host: Host, info: discovery.PluginInfo) -> dict[str, Any]:
  """Returns what is known of a plugin; of one with hooks what it offers."""
  data = dataclasses.asdict(info)
  if info.kind != 'plugin' or info.state != 'loaded':
    return data
  about = host.about(info.name)
  return {**data, 'about': about, 'offers': offers.of_plugin(host, info.name)}


def _type(name: str) -> dict[str, Any]:
  """Returns the description of an adapter type; empty if it is broken.

  Raises:
    UnknownAdapterType: if nothing offers it.
    PluginError: if two distributions do.
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
    # A broken one is shown with its reason; two of one name are an error.
    broken = [i for i in host.plugins() if i.name == name and i.traceback]
    if not broken:
      raise
    return {}
  return {
    'about': inspect.getdoc(cls) or '',
    'rewrites': list(cls.rewrites),
    'frozen': list(cls.frozen),
    'adds': cls.adds,
    'mergeable': cls.mergeable,
    'options': config.declared(cls),
  }
