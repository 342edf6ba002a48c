"""Layers of haiku, met in an abstract call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from surgery import errors
from surgery.model.layers import LayerType, LayerTypes
from surgery.naming.paths import Path
from surgery.trees.layers import fixed, of_class


def _conv(module: Any) -> Mapping[str, str]:
  return {'w': 'i' * module.num_spatial_dims + 'io', 'b': 'o'}


def _transposed(module: Any) -> Mapping[str, str]:
  return {'w': 'i' * module.num_spatial_dims + 'oi', 'b': 'o'}


_ROLES = {
  'Linear': fixed(w='io', b='o'),
  'Embed': fixed(embeddings='io'),
  'ConvND': _conv,
  'ConvNDTranspose': _transposed,
  'LayerNorm': fixed(scale='o', offset='o'),
  'BatchNorm': fixed(scale='o', offset='o'),
  'GroupNorm': fixed(scale='o', offset='o'),
  'RMSNorm': fixed(scale='o'),
}


def layer_types(
  model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LayerTypes:
  """Returns the types of all modules that a call meets, by path.

  Raises:
    SurgeryError: if nobody says what the function is called with.
  """
  import haiku

  if not example and not kwargs:
    raise errors.SurgeryError(
      'layers: a function of haiku makes its layers when it is called. Say '
      'what it is called with: surgery.layers(transformed, x).'
    )
  found: dict[Path, LayerType] = {}

  def meet(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
    result = method(*args, **kwargs)
    # It is called for a module's own initialisation, too, before it has a name.
    module = context.module
    path = tuple(module.module_name.split('/'))
    found[path] = of_class(module, 'haiku', _ROLES)
    return result

  with haiku.intercept_methods(meet):
    jax.eval_shape(lambda: model.init(jax.random.key(0), *example, **kwargs))
  return found
