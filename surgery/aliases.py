"""Names for types that come from JAX and blox, which this room does not import.

A type checker sees the real ones. At run time they are stand-ins, so that
`typing.get_type_hints` works on whatever is annotated with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
  import jax

  Array = jax.Array
else:
  Array = Any

# Weights of a site, by the names that `init` gave them.
Weights = Mapping[str, Array]


@runtime_checkable
class Params(Protocol):
  """What `bx.Params` and params with adapters have in common.

  blox has no type annotations that a checker may rely on, so its own class is
  `Any` to it, and anything at all would be accepted.
  """

  @property
  def is_locked(self) -> bool:
    """Whether no parameter can be added."""

  def split(
    self, predicate: Callable[..., bool] | None = None
  ) -> tuple[Any, Any]:
    """Returns what trains, and the rest."""

  def items(self) -> Any:
    """Returns paths and parameters."""


@runtime_checkable
class Optimizer(Protocol):
  """An optimizer of optax, or anything that is called as one."""

  @property
  def init(self) -> Callable[..., Any]:
    """Returns the state for params."""

  @property
  def update(self) -> Callable[..., Any]:
    """Returns updates and the next state."""
