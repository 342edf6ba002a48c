"""OFT and HRA: updates that turn a layer's inputs and keep their lengths."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import surgery

__all__ = ['HRA', 'OFT']


def _rows(base: jax.Array, site: surgery.Site) -> jax.Array:
  """Returns a parameter as a matrix `(in, out)`."""
  return base.reshape(math.prod(site.in_shape), -1)


class OFT(surgery.Adapter):
  """Turns blocks of inputs (Qiu et al. 2023, arXiv 2306.07280).

  `W'` has the blocks `Rₖ·Wₖ`, where `Wₖ` are `block_size` rows of `W` and `Rₖ =
  (I - Qₖ)·(I + Qₖ)⁻¹` (Cayley) is orthogonal, `Qₖ` being skew-symmetric with
  `block_size·(block_size - 1) / 2` numbers of its own above the diagonal. They
  are zero at the start, so `W' = W`. Axes of inputs are taken together.
  """

  name = 'oft'

  block_size: int = surgery.field(
    default=2, ge=2, doc='Rows of a block; a divisor of the number of inputs.'
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `oft_q`, zeros `(blocks, block_size·(block_size - 1) / 2)`.

    Raises:
      SiteError: if the blocks do not divide the inputs.
    """
    del key
    rows, size = math.prod(site.in_shape), self.block_size
    if rows % size:
      fitting = [n for n in range(2, min(rows, 65) + 1) if rows % n == 0]
      raise surgery.SiteError(
        f'{"/".join(site.layer)}: {rows} inputs cannot be cut into blocks of '
        f'{size}. Take one of {fitting}, for this layer by patterns.'
      )
    return {'oft_q': jnp.zeros((rows // size, size * (size - 1) // 2))}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the turned parameter, of the shape of `base`."""
    del name
    size, numbers = self.block_size, weights['oft_q']
    upper = np.triu_indices(size, 1)
    q = jnp.zeros((*numbers.shape[:1], size, size), numbers.dtype)
    q = q.at[:, upper[0], upper[1]].set(numbers)
    q = q - q.transpose(0, 2, 1)
    one = jnp.eye(size, dtype=q.dtype)
    turn = jnp.linalg.solve(one + q, one - q)
    blocks = _rows(base, site).reshape(len(numbers), size, -1)
    return jnp.einsum('kij,kjo->kio', turn, blocks).reshape(base.shape)


class HRA(surgery.Adapter):
  """Reflects inputs, several times (Yuan et al. 2024, arXiv 2405.17484).

  `W' = Hᵣ·…·H₁·W` with `Hᵢ = I - 2·uᵢ·uᵢᵀ / ‖uᵢ‖²`, where `u` has shape `(in,
  rank)`. At the start each `u` is there twice in a row, and a reflection undoes
  itself, so `W' = W` up to rounding; the rank is even for that. Axes of inputs
  are taken together.
  """

  name = 'hra'

  rank: int = surgery.field(default=8, ge=2, doc='Number of reflections; even.')

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.rank % 2:
      raise surgery.ConfigError(
        f"adapter type 'hra', option 'rank': expected an even number, found "
        f'{self.rank}.'
      )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `hra_u`, `(in, rank)`, whose columns are in pairs."""
    shape = (math.prod(site.in_shape), self.rank // 2)
    half = jax.random.normal(key, shape, 'float32') / math.sqrt(shape[0])
    return {'hra_u': jnp.repeat(half, 2, axis=1)}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the reflected parameter, of the shape of `base`."""
    del name
    u = weights['hra_u']
    u = u / jnp.linalg.norm(u, axis=0)
    matrix = _rows(base, site)
    for k in range(self.rank):
      matrix = matrix - 2 * jnp.outer(u[:, k], u[:, k] @ matrix)
    return matrix.reshape(base.shape)
