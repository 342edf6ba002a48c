"""Params in notebooks: a tree of arrays, flags and adapters."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

from surgery import errors
from surgery.live import params as live
from surgery.model.checkpoint import nested
from surgery.naming import paths


@dataclasses.dataclass
class Param:
  """One parameter, as it is shown.

  Attributes:
    value: what is stored.
    trainable: whether it trains.
  """

  value: Any
  trainable: bool


@dataclasses.dataclass
class AdaptedParam(Param):
  """A parameter that adapters rewrite.

  Attributes:
    adapters: the adapters that rewrite it, innermost first.
  """

  adapters: tuple[str, ...]


@dataclasses.dataclass
class AdapterWeight(Param):
  """A weight of an adapter.

  Attributes:
    adapter: the adapter's name.
  """

  adapter: str


def as_html(params: Any) -> str:
  """Returns adapted params as HTML, rendered by treescope."""
  # blox shows its own objects with it, so it is there.
  import treescope

  records = live.records_of(params)
  shown: dict[paths.Path, Param] = {}
  for path, param in params.items():
    chain = records.chains.get(path)
    if path in records.owned:
      owner = records.owned[path]
      shown[path] = AdapterWeight(param.value, param.trainable, owner)
    elif chain:
      names = tuple(
        f'{a.name}: {a.adapter!r}' + ('' if a.enabled else ', disabled')
        for a, _ in chain
      )
      shown[path] = AdaptedParam(param.value, param.trainable, names)
    else:
      shown[path] = Param(param.value, param.trainable)
  tree: dict[str, Any]
  try:
    tree = nested(shown)
  except errors.FormatError:
    # A parameter lies beneath another one, as dicts cannot.
    tree = {paths.show(path): one for path, one in shown.items()}
  adapters = ', '.join(records.names) or 'no adapter'
  title = f'AdaptedParams: {len(shown)} parameters, {adapters}'
  rendered = treescope.render_to_html(tree)
  return f'<div>{html.escape(title)}</div>{rendered}'
