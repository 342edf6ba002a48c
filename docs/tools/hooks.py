"""The reference of hooks and of the contract: `make docs` writes it.

All of it is read from signatures and docstrings; what has none is an error, so
that the page is whole or not made.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from surgery import once
from surgery.contract import (
  adapter,
  config,
  hookspecs,
  lowrank,
  method,
  site,
)
from surgery.host import discovery, manager

_HEAD = """\
# Hooks and the contract

Made from their own documentation by `make docs`; [plugins](README.md) says how
they are used, and `plugins/examples/` has one of each. What is called
`surgery.…` is public under that name; the others are what you are given.
"""
# A marker of pluggy has pluggy's documentation.
_HOOKIMPL = """Marks a function as the implementation of a hook.

The function has the name of the hook, and may take fewer arguments than the
hook offers. A misspelt name is reported when the plugin is loaded.

Args:
  wrapper: whether it is a generator that wraps the other implementations:
    what it yields is asked for, and what it returns is the result.
  tryfirst: whether it is asked before others.
  trylast: whether it is asked after others.

Example:
  @surgery.hookimpl
  def surgery_freeze_param(site, policy):
    return site.name == 'bias' if policy == 'bitfit' else None
"""

LABELS = ('Called', 'Order', 'Return', 'May raise', 'Since')
_LABEL = re.compile(rf'^({"|".join(LABELS)}): ', re.MULTILINE)

# What authors meet, in the order of the page.
CHAPTERS: dict[str, dict[str, Any]] = {
  'The contract': {'surgery.Adapter': adapter.Adapter},
  'What a type is given': {
    'surgery.Site': site.Site,
    'surgery.ParamSpec': site.ParamSpec,
    'surgery.named_key': adapter.named_key,
  },
  'What a type is made of': {
    'surgery.field': config.field,
    'surgery.LowRank': lowrank.LowRank,
  },
  'Merge methods': {
    'surgery.Method': method.Method,
    'surgery.contract.method.Block': method.Block,
    'surgery.contract.method.Whole': method.Whole,
    'surgery.contract.method.Cut': method.Cut,
  },
  'What hooks are made of': {
    'surgery.hookimpl': hookspecs.hookimpl,
    'surgery.Refusal': hookspecs.Refusal,
    'Event': hookspecs.Event,
    'Interceptor': adapter.Interceptor,
  },
  'The host': {
    'surgery.Host': manager.Host,
    'surgery.default_host': manager.default_host,
    'PluginInfo': discovery.PluginInfo,
    'surgery.PluginWarning': manager.PluginWarning,
  },
}


def markdown() -> str:
  """Returns a page with the contract of adapter types and all hooks.

  Raises:
    ValueError: naming what is not documented.
  """
  lines = [_HEAD]
  for title, objects in CHAPTERS.items():
    lines += [f'## {title}', '']
    for name, one in objects.items():
      lines += documented(name, one)
  lines += ['## Hooks', '']
  for name in hooks():
    lines += _hook(getattr(hookspecs, name))
  return '\n'.join(lines).rstrip() + '\n'


def hooks() -> tuple[str, ...]:
  """Returns the names of all hooks, in the order of their file."""
  return tuple(n for n in vars(hookspecs) if n.startswith('surgery_'))


def _signature(name: str, it: Any) -> str:
  """Returns a call as a heading: arguments by name, without annotations."""
  # Nobody makes these: what is a type has options that are its own.
  if it is adapter.Adapter or getattr(it, '_is_protocol', False):
    return name
  made = inspect.isclass(it) and not issubclass(it, Exception)
  if not made and not inspect.isroutine(it):
    return name
  shown: list[str] = []
  for argument in inspect.signature(it).parameters.values():
    if argument.kind is argument.KEYWORD_ONLY and '*' not in shown:
      shown.append('*')
    stars = ''
    if argument.kind is argument.VAR_POSITIONAL:
      stars = '*'
    elif argument.kind is argument.VAR_KEYWORD:
      stars = '**'
    shown.append(stars + argument.name)
  return f'{name}({", ".join(n for n in shown if n != "self")})'


def _doc(name: str, it: Any) -> tuple[str, str]:
  """Returns what is said of something: a sentence, and the rest.

  Raises:
    ValueError: if nothing is.
  """
  said = inspect.getdoc(it) or ''
  if it is hookspecs.hookimpl:
    said = _HOOKIMPL.rstrip()
  # What dataclasses write is no documentation.
  if not said or said.startswith(f'{getattr(it, "__name__", name)}('):
    raise ValueError(f'{name}: it has no docstring.')
  summary, _, rest = said.partition('\n')
  return summary, rest.strip()


def documented(name: str, one: Any) -> Iterator[str]:
  """Yields the lines about something: its docstring, and those of its members.

  Args:
    name: what it is called, as its heading.
    one: a function or a class.

  Raises:
    ValueError: naming what is not documented.
  """
  yield from _documented(name, one, '###')
  if inspect.isclass(one):
    yield from _members(name, one)


def _documented(name: str, it: Any, heading: str) -> Iterator[str]:
  summary, rest = _doc(name, it)
  yield f'{heading} {_signature(name, it)}'
  yield ''
  yield summary
  yield ''
  if rest:
    yield '```text'
    yield rest
    yield '```'
    yield ''


def _members(name: str, cls: type) -> Iterator[str]:
  """All that is public in a class: attributes are in its docstring."""
  if issubclass(cls, Exception):
    return
  own = [*inspect.get_annotations(cls), *vars(cls)]
  public = [n for n in dict.fromkeys(own) if not n.startswith('_')]
  said = inspect.getdoc(cls) or ''
  properties, methods = [], []
  for member in public:
    value = inspect.getattr_static(cls, member, None)
    kinds = (property, functools.cached_property, once.attribute)
    if isinstance(value, kinds):
      properties.append((member, value))
    elif isinstance(value, (classmethod, staticmethod)) or inspect.isfunction(
      value
    ):
      methods.append((member, getattr(cls, member)))
    elif not re.search(rf'^  {member}: ', said, re.MULTILINE):
      raise ValueError(
        f'{name}.{member}: the docstring of {name} does not say what it is '
        '(under Attributes).'
      )
  for member, value in properties:
    summary, rest = _doc(f'{name}.{member}', value)
    yield f'* `{member}`: {" ".join((summary + " " + rest).split())}'
  if properties:
    yield ''
  for member, value in methods:
    yield from _documented(member, value, '####')


def _hook(function: Callable[..., Any]) -> Iterator[str]:
  name = function.__name__
  summary, rest = _doc(name, function)
  yield f'### {_signature(name, function)}'
  yield ''
  yield summary
  yield ''
  pieces = _LABEL.split(rest)
  labels = tuple(pieces[1::2])
  if labels != LABELS:
    missing = [label for label in LABELS if label not in labels]
    raise ValueError(f'{name}: its docstring must say {missing or LABELS}.')
  for label, text in zip(labels, pieces[2::2], strict=True):
    yield f'* **{label}**: {" ".join(text.split())}'
  yield ''


if __name__ == '__main__':
  sys.stdout.write(markdown())
