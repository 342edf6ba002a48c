"""The reference of hooks and of the contract: `make docs` writes it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from surgery.core import hookspecs
from surgery.core.adapter import Adapter

_HEAD = """\
# Hooks and the contract

Made from their own documentation by `make docs`; [plugins](README.md) says how
they are used, and `plugins/examples/` has one of each.
"""
_LABEL = re.compile(r'^(Called|Order|Return|May raise|Since): ', re.M)


def markdown() -> str:
  """Returns a page with the contract of adapter types and all hooks."""
  lines = [_HEAD, '## The contract', '', 'Methods of `surgery.Adapter`.', '']
  for name in ('init', 'apply', 'init_shared', 'serves', 'sharding'):
    lines += _method(getattr(Adapter, name))
  lines += ['## Hooks', '']
  for name in vars(hookspecs):
    if name.startswith('surgery_'):
      lines += _hook(getattr(hookspecs, name))
  return '\n'.join(lines).rstrip() + '\n'


def _signature(function: Callable[..., Any]) -> str:
  names = [n for n in inspect.signature(function).parameters if n != 'self']
  return f'{function.__name__}({", ".join(names)})'


def _method(function: Callable[..., Any]) -> Iterator[str]:
  summary, _, rest = (inspect.getdoc(function) or '').partition('\n')
  yield f'### {_signature(function)}'
  yield ''
  yield summary
  yield ''
  body = rest.strip()
  if body:
    yield '```text'
    yield body
    yield '```'
    yield ''


def _hook(function: Callable[..., Any]) -> Iterator[str]:
  summary, _, rest = (inspect.getdoc(function) or '').partition('\n')
  yield f'### {_signature(function)}'
  yield ''
  yield summary
  yield ''
  pieces = _LABEL.split(rest.strip())
  for label, text in zip(pieces[1::2], pieces[2::2], strict=True):
    yield f'* **{label}**: {" ".join(text.split())}'
  yield ''


if __name__ == '__main__':
  sys.stdout.write(markdown())
