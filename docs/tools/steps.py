"""The reference of steps, from their definitions: `make docs` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from surgery.host.manager import Host
from surgery.recipes import definitions
from surgery.recipes.definitions import Definition, Option

_HEAD = """\
# Steps

What recipes can do; [recipes](recipes.md) says how they are written. Made from
the steps' own definitions by `make docs`.

An option that stands first can be given alone: `drop: '**/mask'` is
`drop: {select: '**/mask'}`. A *selector* is text, or a list of texts, of which
all are meant: a path with `*`, `**` and `{a,b}`, `re:…`, `type:…`, `!…` for
exceptions; `{8..15}` stands for the numbers from 8 to 15, in rules, too. A
*rule* is `OLD -> NEW`, or a list of them: wildcards of the left stand on the
right for what they matched, `{a,b} -> {x,y}` goes name by name, `<i>` is a
number that the right may compute with (`<i+1>`, `<i//2>`). Where several become
one, or one becomes several, one pair of braces or one number stands on one side
only. `ALIAS::` before a pattern means the tensors of another input.
"""


def markdown(host: Host) -> str:
  """Returns a page with all steps of a host."""
  steps = definitions.every(host)
  lines = [_HEAD, '| step | does |', '| --- | --- |']
  for name, step in steps.items():
    lines.append(f'| [`{name}`](#{name}) | {_cell(step.summary)} |')
  for step in steps.values():
    lines += ['', *_section(step)]
  return '\n'.join(lines) + '\n'


def _section(step: Definition) -> Iterator[str]:
  yield f'## {step.name}'
  yield ''
  yield step.summary
  if step.doc:
    yield ''
    yield step.doc
  if step.example:
    yield ''
    yield '```yaml'
    for line in step.example.splitlines():
      yield f'- {line}'
    yield '```'
  if step.options:
    yield ''
    yield '| option | takes | default | |'
    yield '| --- | --- | --- | --- |'
    for option in step.options.values():
      yield _row(option)


def _row(option: Option) -> str:
  takes = definitions.described(option.annotation)
  default = 'needed' if option.required else _shown(option.default)
  cells = (f'`{option.name}`', takes, default, option.doc)
  return f'| {" | ".join(map(_cell, cells))} |'


def _shown(value: object) -> str:
  if value is None:
    return ''
  return str(value).lower() if isinstance(value, bool) else f'`{value}`'


def _cell(text: str) -> str:
  return text.replace('|', '\\|')


if __name__ == '__main__':
  sys.stdout.write(markdown(Host(entry_points=True)))
