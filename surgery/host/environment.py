"""What the environment says of plugins."""

from __future__ import annotations

import os
import sys
from typing import Any

from surgery import errors

VARIABLES = (
  'SURGERY_PLUGINS',
  'SURGERY_PREFER',
  'SURGERY_STRICT_PLUGINS',
  'SURGERY_TRACE',
)


def options() -> dict[str, Any]:
  """Returns arguments of a host, as the environment's variables want it.

  `SURGERY_PLUGINS`, a list with commas, names the plugins of other
  distributions that may be loaded; empty, there are none. `SURGERY_PREFER=
  name=distribution,…` says which of two is meant. `SURGERY_STRICT_PLUGINS=1`
  makes a broken plugin an error. `SURGERY_TRACE=1` prints calls of hooks to
  stderr.

  Raises:
    PluginError: for a variable that cannot be read.
  """
  listed = lambda text: [t.strip() for t in text.split(',') if t.strip()]
  found: dict[str, Any] = {}
  only = os.environ.get('SURGERY_PLUGINS')
  if only is not None:
    found['only'] = listed(only)
  prefer = {}
  for item in listed(os.environ.get('SURGERY_PREFER', '')):
    name, sign, distribution = item.partition('=')
    if not (name and sign and distribution):
      raise errors.PluginError(
        f'SURGERY_PREFER: expected name=distribution, found {item!r}.'
      )
    prefer[name] = distribution
  found['prefer'] = prefer
  found['strict'] = _is_on('SURGERY_STRICT_PLUGINS')
  if _is_on('SURGERY_TRACE'):
    found['trace'] = lambda line: print(line, file=sys.stderr)
  return found


def _is_on(variable: str) -> bool:
  return os.environ.get(variable, '') not in ('', '0')
