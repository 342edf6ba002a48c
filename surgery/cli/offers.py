"""What a plugin offers by its hooks, passes and methods, with their options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.contract import config, hookspecs, method
from surgery.host.manager import Host

# What the first line of an offer begins with, by hook.
_KINDS = {
  'surgery_passes': 'pass',
  'surgery_methods': 'method',
  'surgery_formats': 'format',
  'surgery_maps': 'map',
  'surgery_adapter_files': 'adapter files',
  'surgery_trees': 'trees',
}
# Hooks of which only the plugin's own words tell what they answer to.
_ANSWERS = {
  'surgery_match_layer': 'terms',
  'surgery_freeze_param': 'policies',
  'surgery_intercept_param': 'interceptors',
  'surgery_merge_param': 'merging',
}


def of_plugin(host: Host, name: str) -> list[dict[str, Any]]:
  """Returns what a loaded plugin offers, and which questions it answers.

  Args:
    host: the host.
    name: the plugin's name.

  Returns:
    For each a mapping with `kind`, `name`, `summary` and `options`, of which
    each has `name`, `type`, `range`, `required`, `default` and `doc`.

  Raises:
    PluginError: if the plugin fails when it is asked.
  """
  rows = []
  for hook in hookspecs.OFFERS:
    kind = _KINDS.get(hook, hook)
    for offer, value in host.offers(hook, name).items():
      rows.append({'kind': kind, 'name': offer, **_described(kind, value)})
  for hook, kind in _ANSWERS.items():
    for function in host.implementations(hook, name):
      said = _summary(function)
      rows.append({'kind': kind, 'name': '', 'summary': said, 'options': []})
  return rows


def method_options(cls: Any) -> list[dict[str, Any]]:
  """Returns the options of a merge method, as recipes write them."""
  return [
    {**one, 'name': method.option(one['name'])} for one in config.declared(cls)
  ]


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields what people read of what `of_plugin` returned."""
  for row in rows:
    what = ' '.join(filter(None, (row['kind'], row['name'])))
    yield f'\n{what}: {row["summary"]}'.rstrip(': ')
    if row['kind'] == 'pass':
      yield f'    surgery {row["name"]} --help'
    before = '--set ' if row['kind'] == 'method' else ''
    for option in row['options']:
      yield f'    {option_line(option, before)}'
      if option['doc']:
        yield f'        {option["doc"]}'


def option_line(option: Mapping[str, Any], before: str) -> str:
  """Returns an option in a line: `--set rank=…  int (>= 1), = 8`."""
  default = 'required' if option['required'] else f'= {option["default"]}'
  bounds = f' ({option["range"]})' if option['range'] else ''
  return f'{before}{option["name"]}=…  {option["type"]}{bounds}, {default}'


def _described(kind: str, value: Any) -> dict[str, Any]:
  if kind == 'pass':
    return _of_pass(value)
  if kind == 'method':
    return {'summary': _summary(value), 'options': method_options(value)}
  if kind == 'map':
    return {'summary': str(value.get('about', '')), 'options': []}
  suffixes = ', '.join(getattr(value, 'suffixes', ()))
  said = _summary(value if inspect.isclass(value) else type(value))
  summary = f'{said} Suffixes: {suffixes}.' if suffixes else said
  return {'summary': summary.strip(), 'options': []}


def _of_pass(function: Any) -> dict[str, Any]:
  from surgery.recipes import definitions

  step = definitions.define('', function)
  return {
    'summary': step.summary,
    'options': [
      {
        'name': option.name,
        'type': definitions.described(option.annotation),
        'range': '',
        'required': option.required,
        'default': None if option.required else _plain(option.default),
        'doc': option.doc,
      }
      for option in step.options.values()
    ],
  }


def _plain(value: Any) -> Any:
  """Returns a default that JSON can hold."""
  return (
    value
    if isinstance(value, (bool, int, float, str)) or value is None
    else repr(value)
  )


def _summary(value: Any) -> str:
  """Returns the first sentence or two of a docstring, in a line."""
  return ' '.join((inspect.getdoc(value) or '').partition('\n\n')[0].split())
