"""`surgery attach`."""

from __future__ import annotations

import pathlib
from typing import Any

import click

from surgery.cli import completion, shared, writing
from surgery.cli.command import Command
from surgery.contract import config
from surgery.host.manager import default_host
from surgery.recipes.spec import Step


def _configured(kind: str, settings: tuple[str, ...]) -> Any:
  """Returns an adapter from `--set` options.

  Raises:
    UnknownAdapterType: if nothing offers the type.
    ConfigError: for an unknown option or a wrong value.
  """
  cls = default_host().adapter_type(kind)
  general: dict[str, str] = {}
  patterns: dict[str, dict[str, str]] = {}
  for key, value in shared.pairs(settings, '--set'):
    # Options are identifiers, so the text before the last ':' is a selector.
    selector, _, option = key.rpartition(':')
    target = patterns.setdefault(selector, {}) if selector else general
    target[option] = value
  return cls(
    **config.parse(cls, general),
    patterns={s: config.parse(cls, v) for s, v in patterns.items()},
  )


@click.command(cls=Command)
@shared.file
@click.option(
  # In other verbs --adapter is the name of one.
  '--type',
  '--adapter',
  'kind',
  metavar='TYPE',
  shell_complete=completion.adapter_types,
  help='Adapter type: lora, …',
)
@click.option(
  '--to',
  multiple=True,
  metavar='SELECTOR',
  shell_complete=completion.selectors,
  help="Layers or parameters, e.g. '**/{query,value}'; may be repeated.",
)
@click.option(
  '--set',
  'settings',
  multiple=True,
  metavar='[SELECTOR:]KEY=VALUE',
  help="An option of the adapter, e.g. rank=8, or '**/query:rank=16' for some "
  'sites only; may be repeated. `surgery plugins show TYPE` lists them.',
)
@click.option('--name', help="The adapter's name; `default` by default.")
@click.option(
  '--seed', type=int, help='Random seed of the new weights; 0 by default.'
)
@click.option(
  '--stacked',
  type=click.IntRange(0),
  help='Number of axes stacked in front of parameters.',
)
@click.option(
  '--layout',
  multiple=True,
  metavar='[SELECTOR=]LETTERS',
  help='A letter for each axis: s stacked, i input, o output; may be repeated.',
)
@click.option(
  '--from',
  'source',
  type=shared.FILE,
  help='Attach the adapter in this file instead of a new one.',
)
@click.option(
  '--names',
  'rules',
  multiple=True,
  metavar="'OLD -> NEW'|MAP",
  help='With --from, for an adapter of another program: the names of its '
  'modules in FILE, by rules or by a map of `surgery maps`. May be repeated.',
)
@click.option(
  '--no-check-base',
  is_flag=True,
  help='With --from: accept a base with other values.',
)
@click.option(
  '--no-check-same',
  is_flag=True,
  help='With --from: attach an adapter a second time.',
)
@writing.writes
def command(
  file: pathlib.Path,
  kind: str | None,
  to: tuple[str, ...],
  settings: tuple[str, ...],
  name: str | None,
  seed: int | None,
  stacked: int | None,
  layout: tuple[str, ...],
  source: pathlib.Path | None,
  rules: tuple[str, ...],
  no_check_base: bool,
  no_check_same: bool,
  output: writing.Output,
) -> None:
  r"""Attach an adapter to the model in FILE.

  \b
  surgery attach base.msgpack --type lora --to '**/{query,value}' \
    --set rank=8 --seed 0 -o adapted.msgpack
  surgery attach base.msgpack --from a.msgpack -o adapted.msgpack
  """
  if (kind is None) == (source is None):
    raise click.UsageError('give --type TYPE, or --from FILE.')
  if source is not None:
    _refuse_with_from(
      to=to, set=settings, seed=seed, stacked=stacked, layout=layout
    )
    checks = shared.unchecked(no_check_base, no_check_same)
    _insert(file, source, name, rules, checks, output)
    return
  if not to:
    raise click.UsageError("give --to SELECTOR, e.g. --to '**/query'.")
  shared.need(
    '--from',
    names=rules,
    no_check_base=no_check_base,
    no_check_same=no_check_same,
  )
  assert kind is not None
  adapter = _configured(kind, settings)
  value: dict[str, object] = {
    'adapter': kind,
    'to': shared.short(to),
    'set': adapter.config(),
    'name': name or 'default',
    'seed': seed or 0,
  }
  if stacked is not None:
    value['stacked'] = stacked
  if layout:
    value['layout'] = _layouts(layout)
  writing.carry_out(output, [Step('attach', value)], shared.model(file))


def _refuse_with_from(**given: Any) -> None:
  """Raises for options that the file of an adapter decides."""
  for name, value in given.items():
    if value not in (None, ()):
      raise click.UsageError(
        f'--{name} does not go with --from: the file has it.'
      )


def _layouts(items: tuple[str, ...]) -> Any:
  """Returns layouts: the letters for all parameters, or by selector."""
  if not items:
    return None
  general = [one for one in items if '=' not in one]
  if len(items) == 1 and general:
    return general[0]
  if len(general) > 1:
    raise click.UsageError(
      f'--layout {general[1]}: the layout of all parameters is {general[0]} '
      f'already. Give --layout SELECTOR={general[1]}.'
    )
  some = tuple(one for one in items if '=' in one)
  # The first selector that matches decides, so that of all comes last.
  return dict([*shared.pairs(some, '--layout'), *(('all', g) for g in general)])


def _insert(
  file: pathlib.Path,
  source: pathlib.Path,
  name: str | None,
  rules: tuple[str, ...],
  checks: dict[str, Any],
  output: writing.Output,
) -> None:
  """Attaches the adapter in a file."""
  value: dict[str, object] = {'from': 'adapter', **checks}
  if name is not None:
    value['name'] = name
  if rules:
    value['names'] = list(rules)
  before = shared.model(file)
  others = {'adapter': shared.opened(source)}
  writing.carry_out(output, [Step('attach', value)], before, others)
