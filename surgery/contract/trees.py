"""What a framework says of its models, so that verbs work on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from surgery import errors
from surgery.contract.layers import LayerTypes
from surgery.naming import paths
from surgery.naming.paths import Path


@dataclasses.dataclass(frozen=True)
class Slot:
  """A place of a model's structure that holds an array.

  Attributes:
    value: the array, without a box that the framework keeps it in.
    trainable: whether it trains as long as nothing is frozen.
    sharding: names of mesh axes, one for each axis, or empty.
  """

  value: Any
  trainable: bool = True
  sharding: tuple[Any, ...] = ()


class Tree:
  """How models of one framework hold their parameters.

  An object without state: two of one class are equal. A plugin offers it by the
  hook `surgery_trees`, under a name.

  Attributes:
    name: what a model is called in messages, with an article.
    writes: whether the code of a model may write to it when it is called. Of
      one that does not, a call says which step of a training it is.
  """

  name = 'a tree'
  writes = False

  def __eq__(self, other: object) -> bool:
    return type(self) is type(other)

  def __hash__(self) -> int:
    return hash(type(self))

  def owns(self, value: Any) -> bool:
    """Whether a value is a model of this framework. Imports nothing."""
    raise NotImplementedError

  def slots(self, value: Any) -> Mapping[Path, Slot]:
    """Returns the arrays of a model by path, each of them once."""
    raise NotImplementedError

  def build(
    self, like: Any, values: Mapping[Path, Any], rest: Any = dataclasses.MISSING
  ) -> Any:
    """Returns a model of the same structure with other arrays.

    Args:
      like: the model; it is not changed and shares no mutable part.
      values: an array for each slot, or whatever stands for one, as a
        `PartitionSpec` or a flag. None where the model is a half without it.
      rest: what stands in the place of all that is no slot; by default it
        stays as it is.
    """
    raise NotImplementedError

  def join(self, first: Any, second: Any) -> Any:
    """Returns the whole of two halves; where both have an array, the second's.

    Args:
      first: a model with None in the place of what it lacks.
      second: the other half.
    """
    both = {**self.slots(first), **self.slots(second)}
    return self.build(second, {p: slot.value for p, slot in both.items()})

  def rebuilt(self, like: Any, values: Mapping[Path, Any]) -> Any:
    """Returns a model whose slots have other paths than those of `like`.

    Raises:
      SurgeryError: if the structure is one of code, as a module's is.
    """
    before = self.slots(like)
    gone = [path for path in before if path not in values]
    new = [path for path in values if path not in before]
    which = ', '.join(map(paths.show, (gone or new)[:3]))
    raise errors.SurgeryError(
      f'{self.name} has the parameters that its code makes, and {which} would '
      f'{"be missing" if gone else "be new"}. Change its code, and change the '
      'parameters in a saved file, which may have any names (surgery.save, '
      'surgery.open).'
    )

  def weight(
    self, value: Any, metadata: Mapping[str, Any], trainable: bool
  ) -> Any:
    """Returns the weight of an adapter as the framework holds arrays.

    Args:
      value: the array.
      metadata: with `sharding`, names of mesh axes, where they are known.
      trainable: whether it trains.
    """
    return value

  def unweighted(self, weight: Any) -> Any:
    """Returns the array of what `weight` returned."""
    return weight

  def layers(
    self, model: Any, example: tuple[Any, ...], kwargs: Mapping[str, Any]
  ) -> LayerTypes:
    """Returns types of layers and roles of axes, by path of the layer.

    Nothing is computed.

    Args:
      model: the model, or the module whose parameters are a tree of arrays.
      example: what the model would be called with, arrays or shapes; empty if
        nobody says it.
      kwargs: the same by name.
    """
    return {}

  def knows(self, model: Any) -> bool:
    """Whether `layers` can be asked about it."""
    return self.owns(model)

  def function(self, model: Any) -> Callable[..., Any]:
    """Returns the function that a call of a model is, which takes it first.

    Raises:
      SurgeryError: if models of the framework are data, and are not called.
    """
    if not callable(model):
      raise errors.SurgeryError(
        f'{self.name} is data and cannot be called. Wrap the function that '
        'takes it: surgery.factored(model.apply), or surgery.factored(loss).'
      )
    return _call

  def set_weight(self, weight: Any, value: Any) -> None:
    """Writes the array of an adapter's weight, where models are written to."""
    raise NotImplementedError

  def changes(self, built: Any, given: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns what a call has changed in a model that `build` made.

    Args:
      built: the model.
      given: the arrays that it was made with.

    Returns:
      By path, what is new or another; None for what is gone.
    """
    return {}

  def write(self, model: Any, changes: Mapping[Path, Any]) -> None:
    """Writes into a model what `changes` returned."""

  def shared(self, model: Any) -> Mapping[Path, Path]:
    """Returns other paths under which an array is found, and its own.

    Transformations of JAX that know nothing of the framework make two arrays
    of such a one; it is found out by comparing.
    """
    return {}


def _call(model: Any, *args: Any, **kwargs: Any) -> Any:
  return model(*args, **kwargs)
