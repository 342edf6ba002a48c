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
  """

  names: tuple[str, ...]
  layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)


LayerTypes = Mapping[Path, LayerType]
