"""Layers of linen, met in an abstract call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from surgery import errors
from surgery.model.layers import LayerType, LayerTypes
from surgery.naming.paths import Path
from surgery.trees.layers import FLAX, fixed, general, of_class


def _conv(module: Any) -> Mapping[str, str]:
  return {'kernel': 'i' * len(module.kernel_size) + 'io', 'bias': 'o'}


def _general(module: Any) -> Mapping[str, str]:
  if module.batch_dims:
    return {}  # The same layer once for each place of these axes.
  count = lambda sizes: len(sizes) if hasattr(sizes, '__len__') else 1
  return general(count(module.axis), count(module.features))


_ROLES = {
  **FLAX,
  'Dense': fixed(kernel='io', bias='o'),
  # Of cells: the kernels of all gates.
  'DenseParams': fixed(kernel='io', bias='o'),
  'DenseGeneral': _general,
  'Conv': _conv,
}


def layer_types(
  model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerTypes:
  """Returns the types of all modules that a call meets, by path.

  Raises:
    SurgeryError: if nobody says what the module is called with.
  """
  import flax.linen as nn

  if not example and not kwargs:
    raise errors.SurgeryError(
      f'layers: a module of linen makes its layers when it is called. Say what '
      f'{type(model).__name__} is called with: surgery.layers(model, x).'
    )
  found: dict[Path, LayerType] = {}

  def meet(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    result = method(*args, **kwargs)
    module = context.module
    known = of_class(module, 'flax.linen', _ROLES)
    # Inside of a scan a module sees the parameters of one layer.
    own = nn.unbox(module.variables.get('params', {}))
    shapes = {
      name: tuple(value.shape)
      for name, value in own.items()
      if name in known.layouts and hasattr(value, 'shape')
    }
    found[tuple(module.path)] = dataclasses.replace(known, shapes=shapes)
    return result

  with nn.intercept_methods(meet):
    jax.eval_shape(lambda: model.init(jax.random.key(0), *example, **kwargs))
  return found
