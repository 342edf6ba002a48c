"""flax.linen: variables in dicts and FrozenDicts, with boxes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import jax

from surgery.contract.trees import Slot
from surgery.model.layers import LayerTypes
from surgery.naming.paths import Path
from surgery.trees import pytrees


def _meta() -> Any:
  return sys.modules.get('flax.core.meta')


class Linen(pytrees.Plain):
  """Params or variables of linen modules."""

  name = 'a tree of linen params'

  def is_box(self, value: Any) -> bool:
    """Whether a value is a box such as `nn.Partitioned`."""
    meta = _meta()
    return meta is not None and isinstance(value, meta.AxisMetadata)

  def owns(self, value: Any) -> bool:
    """Whether a value is a FrozenDict, has boxes, or has collections."""
    if _meta() is None or not isinstance(value, Mapping):
      return False
    frozen = sys.modules.get('flax.core.frozen_dict')
    if frozen is not None and isinstance(value, frozen.FrozenDict):
      return bool(jax.tree.leaves(value))
    if _collections(value):
      return True
    leaves = jax.tree.leaves(value, is_leaf=self.is_box)
    return any(map(self.is_box, leaves))

  def slot(self, path: Path, leaf: Any) -> Slot | None:
    """Returns a leaf as a slot, without its box."""
    if not self.is_box(leaf):
      return super().slot(path, leaf)
    inner = leaf.unbox(apply_constraint=False) if _constrains(leaf) else None
    inner = leaf.unbox() if inner is None else inner
    found = super().slot(path, inner)
    if found is None:
      return None
    names = tuple(getattr(leaf, 'names', None) or ())
    return Slot(found.value, found.trainable, names)

  def slots(self, value: Any) -> dict[Path, Slot]:
    """Returns the arrays by path; of collections only `params` train."""
    found = super().slots(value)
    if not _collections(value):
      return found
    return {
      path: slot
      if path[0] == 'params'
      else Slot(slot.value, False, slot.sharding)
      for path, slot in found.items()
    }

  def boxed(self, leaf: Any, value: Any) -> Any:
    """Returns a value in the box that a leaf is."""
    return leaf.replace_boxed(value) if self.is_box(leaf) else value

  def weight(
    self, value: Any, metadata: Mapping[str, Any], trainable: bool
  ) -> Any:
    """Returns a weight in a box that names its axes, where they have names."""
    names = tuple(metadata.get('sharding') or ())
    meta = _meta()
    if meta is None or not any(names):
      return value
    return meta.Partitioned(value, names)

  def unweighted(self, weight: Any) -> Any:
    """Returns the array in a box."""
    return weight.value if self.is_box(weight) else weight

  def knows(self, model: Any) -> bool:
    """Whether a value is a module, whose params `layers` are of."""
    linen = sys.modules.get('flax.linen')
    return linen is not None and isinstance(model, linen.Module)

  def layers(
    self, model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
  ) -> LayerTypes:
    """Returns types of the layers that a call of a module meets."""
    from surgery.trees.layers import linen

    return (
      linen.layer_types(model, example, kwargs) if self.knows(model) else {}
    )


def _constrains(box: Any) -> bool:
  # Its own class puts a constraint on what it gives out; we only look.
  meta = _meta()
  return isinstance(box, meta.Partitioned)


def _collections(value: Mapping[str, Any]) -> bool:
  """Whether a dict is one of collections, `params` among others."""
  return isinstance(value.get('params'), Mapping) and all(
    isinstance(one, Mapping) for one in value.values()
  )
