"""What is known of a model's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from surgery.naming.paths import Path


@dataclasses.dataclass(frozen=True)
class LayerType:
  """A layer's type.

  Attributes:
    names: names of its class and bases, most derived first.
    layouts: for parameters whose axes are known, a letter an axis: `i` input,
      `o` output. What an array has beyond that is stacked in front.
    shapes: for parameters of which it is known, the shape that the layer itself
      has, without stacked axes.
  """

  names: tuple[str, ...]
  layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(
    default_factory=dict, compare=False
  )


LayerTypes = Mapping[Path, LayerType]
