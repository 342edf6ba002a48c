"""equinox: modules that are pytrees."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from surgery.model.layers import LayerTypes
from surgery.trees import pytrees


class Equinox(pytrees.Pytrees):
  """Modules of equinox."""

  name = 'a module of equinox'

  def owns(self, value: Any) -> bool:
    """Whether a value is a module."""
    module = sys.modules.get('equinox')
    return module is not None and isinstance(value, module.Module)

  def layers(
    self, model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
  ) -> LayerTypes:
    """Returns types of layers, as the modules say them."""
    from surgery.trees.layers import equinox

    return equinox.layer_types(model, example, kwargs)
