"""Layers of nnx."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from surgery.model.layers import LayerTypes
from surgery.trees.layers import FLAX, fixed, general, of_class


def _conv(module: Any) -> Mapping[str, str]:
  return {'kernel': 'i' * (len(module.kernel_shape) - 2) + 'io', 'bias': 'o'}


def _general(module: Any) -> Mapping[str, str]:
  if module.batch_axis:
    return {}  # The same layer once for each place of these axes.
  return general(len(module.in_features), len(module.out_features))


_ROLES = {
  **FLAX,
  'Linear': fixed(kernel='io', bias='o'),
  'LinearGeneral': _general,
  'Conv': _conv,
}


def layer_types(
  model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerTypes:
  """Returns the types of all modules in a model, by path."""
  from flax import nnx

  found = {}
  for path, module in nnx.iter_modules(model):
    known = of_class(module, 'flax.nnx', _ROLES)
    if 'Linear' in known.names and known.layouts:
      core = module.in_features, module.out_features
      known = dataclasses.replace(known, shapes={'kernel': core})
    found[tuple(map(str, path))] = known
  return found
