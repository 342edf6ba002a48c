"""The low-rank value that `Adapter.apply` may return in place of an array."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LowRank:
  """`base + scale · a·b`, kept as its factors.

  It says no more than the dense array does: whoever wants the array calls
  `dense()`. Returning it lets the core keep the factors apart where that is
  cheaper.

  Attributes:
    base: array of shape `in_shape + out_shape`.
    a: array of shape `in_shape + (rank,)`.
    b: array of shape `(rank,) + out_shape`.
    scale: factor of the product.
  """

  base: Any
  a: Any
  b: Any
  scale: float | Any = 1.0

  def dense(self) -> Any:
    """Returns the array, of shape `in_shape + out_shape`."""
    import jax.numpy as jnp

    return self.base + self.scale * jnp.tensordot(self.a, self.b, axes=1)
