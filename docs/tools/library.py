"""The reference of what embedders and testers meet: `make docs` writes it.

Contract and hooks are on a page of their own, `docs.tools.hooks`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import surgery
from docs.tools import hooks
from surgery import testing
from surgery.contract import config
from surgery.testing import cases

_HEAD = """\
# Reference

Made from docstrings by `make docs`. The contract of adapter types and the hooks
have [a page of their own](plugins/hooks.md), and so do [the steps](steps.md)
and [types for checkers](typing.md).
"""

CHAPTERS: dict[str, tuple[str, ...]] = {
  'Adapters': (
    'attach',
    'LoRA',
    'LoraLinear',
    'AdaptedParams',
    'enable',
    'disable',
    'merge',
    'detach',
    'combine_adapters',
    'adapters',
    'AdapterInfo',
  ),
  'Training': (
    'freeze',
    'unfreeze',
    'trainable_mask',
    'optimizer',
    'factored',
    'weights',
    'with_weights',
    'regulariser',
    'prune_ranks',
    'migrate',
  ),
  'An adapter for each row': ('stack_adapters', 'route'),
  'Models of other frameworks': (
    'AdaptedTree',
    'layers',
    'LayerType',
    'Tree',
    'Slot',
  ),
  'Being sure': ('check', 'explain', 'Explanation', 'stats', 'TensorStats'),
  'Files': ('save', 'load', 'save_adapter', 'load_adapter', 'open'),
  'Checkpoints': ('Checkpoint', 'Leaf'),
  'From whole models': ('extract_lora',),
  'Patches': ('make_patch', 'apply_patch'),
  'Merging models': ('combine',),
  'Other changes': (
    'select',
    'Selection',
    'cast',
    'rename',
    'drop',
    'keep',
    'apply',
    'Recipe',
    'handles_adapters',
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
      lines += _public(name)
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


def _public(name: str) -> Iterator[str]:
  one: Any = getattr(surgery, name)
  if not (inspect.isclass(one) and issubclass(one, surgery.Adapter)):
    yield from hooks.documented(f'surgery.{name}', one)
    return
  # Of a type what it is configured by; its methods are the contract's.
  declared = config.declared(one)
  options = ', '.join(option['name'] for option in declared)
  yield from (f'### surgery.{name}(*, {options}, patterns)', '')
  yield from (inspect.getdoc(one) or '', '')
  for option in declared:
    limits = option['range'] and f', {option["range"]}'
    written = f'{option["name"]}: {option["type"]} = {option["default"]!r}'
    yield f'* `{written}`{limits}: {option["doc"]}'
  yield '* `patterns`: options by selector, for some sites only.'
  yield ''


def _error(name: str) -> Iterator[str]:
  one: Any = getattr(surgery, name)
  bases = ', '.join(f'`{base.__name__}`' for base in one.__bases__)
  yield from hooks.documented(f'surgery.{name}', one)
  yield f'Derives from {bases}.'
  yield ''


if __name__ == '__main__':
  sys.stdout.write(markdown())
