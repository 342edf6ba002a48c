"""The reference of what embedders and testers meet: `make docs` writes it.

Contract and hooks are on a page of their own, `docs.tools.hooks`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import surgery
from docs.tools import hooks
from surgery import testing
from surgery.testing import cases

_HEAD = """\
# Reference

Made from docstrings by `make docs`. The contract of adapter types and the hooks
have [a page of their own](plugins/hooks.md), and so do [the steps](steps.md).
"""

CHAPTERS: dict[str, tuple[str, ...]] = {
  'Checkpoints': ('Checkpoint', 'Leaf'),
  'Patches': ('make_patch', 'apply_patch'),
  'Merging models': ('combine', 'combine_adapters'),
  'Being sure': ('check', 'explain', 'adapters', 'stats', 'TensorStats'),
  'Under training': (
    'weights',
    'with_weights',
    'regulariser',
    'prune_ranks',
    'migrate',
    'optimizer',
  ),
}


def markdown() -> str:
  """Returns the page.

  Raises:
    ValueError: naming what is not documented.
  """
  lines = [_HEAD]
  for title, names in CHAPTERS.items():
    lines += [f'## {title}', '']
    for name in names:
      one = getattr(surgery, name)
      lines += hooks.documented(f'surgery.{name}', one)
  lines += ['## Errors and warnings', '', _ERRORS, '']
  for name in errors():
    lines += _error(name)
  lines += ['## The conformance kit', '']
  for name in ('AdapterConformance', 'check'):
    one = getattr(testing, name)
    lines += hooks.documented(f'surgery.testing.{name}', one)
  lines += ['### Laws', '']
  lines += [f'* `{law}`: {cases.summary(law)}' for law in testing.LAWS]
  return '\n'.join(lines).rstrip() + '\n'


_ERRORS = (
  'All errors derive from `surgery.SurgeryError`; those about values are also '
  "Python's own."
)


def errors() -> list[str]:
  """Returns the names of all public errors and warnings."""
  return [
    name
    for name in surgery.__all__
    if isinstance(getattr(surgery, name), type)
    and issubclass(getattr(surgery, name), Exception)
  ]


def _error(name: str) -> Iterator[str]:
  one: Any = getattr(surgery, name)
  bases = ', '.join(f'`{base.__name__}`' for base in one.__bases__)
  yield from hooks.documented(f'surgery.{name}', one)
  yield f'Derives from {bases}.'
  yield ''


if __name__ == '__main__':
  sys.stdout.write(markdown())
