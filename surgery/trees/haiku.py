"""haiku: transformed functions, whose params are nested dicts."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from surgery.model.layers import LayerTypes
from surgery.trees import pytrees


class Haiku(pytrees.Plain):
  """Transformed functions. Their params are plain trees."""

  name = 'a tree of haiku params'

  def owns(self, value: Any) -> bool:
    """Whether a value is a model: haiku's params are dicts like any."""
    return False

  def knows(self, model: Any) -> bool:
    """Whether a value is what `haiku.transform` returned."""
    haiku = sys.modules.get('haiku')
    return haiku is not None and isinstance(
      model, (haiku.Transformed, haiku.TransformedWithState)
    )

  def layers(
    self, model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
  ) -> LayerTypes:
    """Returns types of the layers that a call meets."""
    from surgery.trees.layers import haiku

    return haiku.layer_types(model, example, kwargs)
