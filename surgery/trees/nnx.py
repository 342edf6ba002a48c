"""flax.nnx: modules that are objects with Variables."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from surgery import errors
from surgery.contract.trees import Slot, Tree
from surgery.model.layers import LayerTypes
from surgery.naming.paths import Path
from surgery.trees import pytrees


def _nnx() -> Any:
  return sys.modules.get('flax.nnx')


def _raw(variable: Any) -> Any:
  """Returns what a Variable holds; flax 0.12.0 has an attribute for it."""
  get = getattr(type(variable), 'get_raw_value', None)
  return variable.raw_value if get is None else get(variable)


def _set_raw(variable: Any, value: Any) -> None:
  put = getattr(type(variable), 'set_raw_value', None)
  if put is None:
    variable.raw_value = value
  else:
    put(variable, value)


def _path(keys: tuple[Any, ...]) -> Path:
  return tuple(map(str, keys))


class Nnx(Tree):
  """Modules and States of nnx.

  A path is that of a Variable. A Variable that is found under two paths has the
  first. What is made has Variables of its own, so that training it changes no
  model that somebody else holds.
  """

  name = 'a module of nnx'
  writes = True

  def owns(self, value: Any) -> bool:
    """Whether a value is a module or a state."""
    nnx = _nnx()
    return nnx is not None and isinstance(value, (nnx.Pytree, nnx.State))

  def slots(self, value: Any) -> dict[Path, Slot]:
    """Returns the arrays of Variables, and such as lie in the module."""
    found = {}
    leaves = self._flat(value)
    pytrees.refuse_twice(self.name, (_path(keys) for keys, _ in leaves))
    for keys, leaf in leaves:
      slot = self._slot(leaf)
      if slot is not None:
        found[_path(keys)] = slot
    return found

  def _flat(self, value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    nnx = _nnx()
    state = value if isinstance(value, nnx.State) else nnx.state(value)
    return list(nnx.to_flat_state(state))

  def _slot(self, leaf: Any) -> Slot | None:
    nnx = _nnx()
    if not isinstance(leaf, nnx.Variable):
      return Slot(leaf, False) if pytrees.is_array(leaf) else None
    value = _raw(leaf)
    if not pytrees.is_array(value):
      return None  # A half lacks it, or it holds something else.
    said = leaf.get_metadata()
    names = tuple(said.get('out_sharding') or said.get('sharding_names') or ())
    trains = isinstance(leaf, nnx.Param) and pytrees.trains(value)
    return Slot(value, trains, names)

  def build(
    self, like: Any, values: Mapping[Path, Any], rest: Any = dataclasses.MISSING
  ) -> Any:
    """Returns a module with Variables of its own."""
    nnx = _nnx()
    made = []
    for keys, leaf in self._flat(like):
      value = values.get(_path(keys), rest)
      if isinstance(leaf, nnx.Variable):
        old = _raw(leaf)
        value = old if value is dataclasses.MISSING else value
        new = type(leaf).from_metadata(value, dict(leaf.get_metadata()))
      else:
        new = leaf if value is dataclasses.MISSING else value
      made.append((keys, new))
    state = nnx.from_flat_state(made)
    if isinstance(like, nnx.State):
      return state
    return nnx.merge(nnx.graphdef(like), state)

  def weight(
    self, value: Any, metadata: Mapping[str, Any], trainable: bool
  ) -> Any:
    """Returns a weight as a `nnx.LoRAParam`, by which optimizers choose."""
    nnx = _nnx()
    kind = nnx.LoRAParam if trainable else nnx.Variable
    found = kind(value)
    names = tuple(metadata.get('sharding') or ())
    if any(names):
      found.set_metadata(out_sharding=names)
    return found

  def unweighted(self, weight: Any) -> Any:
    """Returns the array of a Variable."""
    nnx = _nnx()
    return _raw(weight) if isinstance(weight, nnx.Variable) else weight

  def layers(
    self, model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
  ) -> LayerTypes:
    """Returns types of layers; a State knows none."""
    from surgery.trees.layers import nnx

    if isinstance(model, _nnx().State):
      return {}
    return nnx.layer_types(model, example, kwargs)

  def function(self, model: Any) -> Callable[..., Any]:
    """Returns the function that a call of a module is.

    Raises:
      SurgeryError: for a State.
    """
    if isinstance(model, _nnx().State):
      raise errors.SurgeryError(
        'a State of nnx cannot be called. Merge it with its graphdef in a '
        'function, and give that to surgery.factored.'
      )
    return super().function(model)

  def set_weight(self, weight: Any, value: Any) -> None:
    """Writes the array of a Variable."""
    _set_raw(weight, value)

  # What modules write when they are called: statistics, keys, what is sown.

  def changes(self, built: Any, given: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns Variables that a call has changed, made or removed."""
    nnx = _nnx()
    found: dict[Path, Any] = {}
    after = {_path(keys): leaf for keys, leaf in self._flat(built)}
    for path, leaf in after.items():
      value = leaf
      if isinstance(leaf, nnx.Variable):
        value = _raw(leaf)
      if path not in given or value is not given[path]:
        found[path] = leaf
    gone = {path: None for path in given if path not in after}
    return {**found, **gone}

  def write(self, model: Any, changes: Mapping[Path, Any]) -> None:
    """Writes Variables into the module that was called."""
    nnx = _nnx()
    known = {_path(keys): leaf for keys, leaf in self._flat(model)}
    for path, leaf in changes.items():
      old = known.get(path)
      if isinstance(old, nnx.Variable) and isinstance(leaf, nnx.Variable):
        _set_raw(old, _raw(leaf))
        continue
      parent, key = _parent(model, path)
      if leaf is None:
        delattr(parent, key)
      else:
        setattr(parent, key, leaf)

  def shared(self, model: Any) -> dict[Path, Path]:
    """Returns further paths of Variables that are found under two."""
    nnx = _nnx()
    if isinstance(model, nnx.State):
      return {}
    return {
      _path(other): _path(first)
      for first, *others in nnx.find_duplicates(model)
      for other in others
    }


def _parent(model: Any, path: Path) -> tuple[Any, str]:
  """Returns the object that holds what has a path, and its name there."""
  node = model
  for name in path[:-1]:
    node = node[int(name)] if name.isdigit() else getattr(node, name)
  return node, path[-1]
