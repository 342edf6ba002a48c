"""Layers of equinox."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.model.layers import LayerTypes
from surgery.naming.paths import Path
from surgery.trees.layers import fixed, of_class


def _conv(module: Any) -> Mapping[str, str]:
  spatial = module.num_spatial_dims
  return {'weight': 'oi' + 'i' * spatial}


_ROLES = {
  'Linear': fixed(weight='oi', bias='o'),
  'Embedding': fixed(weight='io'),
  'Conv': _conv,
  'ConvTranspose': _conv,
  'LSTMCell': fixed(weight_ih='oi', weight_hh='oi', bias='o'),
  'GRUCell': fixed(weight_ih='oi', weight_hh='oi', bias='o', bias_n='o'),
  'LayerNorm': fixed(weight='o', bias='o'),
  'RMSNorm': fixed(weight='o', bias='o'),
  'GroupNorm': fixed(weight='o', bias='o'),
}


def _modules(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
  import equinox

  if isinstance(value, equinox.Module):
    yield path, value
    names = [field.name for field in dataclasses.fields(value)]
    below: list[Any] = [(n, getattr(value, n, None)) for n in names]
  elif isinstance(value, dict):
    below = list(value.items())
  elif isinstance(value, (list, tuple)):
    below = list(enumerate(value))
  else:
    return
  for key, inner in below:
    yield from _modules(inner, (*path, *str(key).split('/')))


def layer_types(
  model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerTypes:
  """Returns the types of all modules in a model, by path."""
  found = {}
  for path, module in _modules(model, ()):
    known = of_class(module, 'equinox', _ROLES)
    sizes = (
      getattr(module, 'out_features', None),
      getattr(module, 'in_features', None),
    )
    core: Any = tuple(1 if size == 'scalar' else size for size in sizes)
    if 'Linear' in known.names and known.layouts and None not in core:
      known = dataclasses.replace(known, shapes={'weight': core})
    found[path] = known
  return found
