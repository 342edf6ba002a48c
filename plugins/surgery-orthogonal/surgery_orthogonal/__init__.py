"""OFT, BOFT and HRA: updates that turn inputs and keep their lengths."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import surgery
from surgery_orthogonal.peft import PeftBOFT, PeftHRA, PeftOFT

__all__ = ['BOFT', 'HRA', 'OFT']


def _rows(base: jax.Array, site: surgery.Site) -> jax.Array:
  """Returns a parameter as a matrix `(in, out)`."""
  return base.reshape(math.prod(site.in_shape), -1)


def _skew(numbers: jax.Array, size: int) -> jax.Array:
  """Returns skew-symmetric matrices of what is above their diagonals.

  Args:
    numbers: `(blocks, size·(size - 1) / 2)`.
    size: rows of a block.

  Returns:
    Array `(blocks, size, size)`.
  """
  upper = np.triu_indices(size, 1)
  q = jnp.zeros((len(numbers), size, size), numbers.dtype)
  q = q.at[:, upper[0], upper[1]].set(numbers)
  return q - q.transpose(0, 2, 1)


def _cayley(q: jax.Array) -> jax.Array:
  """Returns orthogonal matrices `(I - Q)·(I + Q)⁻¹`, for each `Q`."""
  one = jnp.eye(q.shape[-1], dtype=q.dtype)
  return jnp.linalg.solve(one + q, one - q)


def _rotations(numbers: jax.Array, size: int) -> jax.Array:
  """Returns orthogonal matrices for what is above the diagonals of `Q`."""
  return _cayley(_skew(numbers, size))


def _series(numbers: jax.Array, size: int, terms: int) -> jax.Array:
  """Returns almost orthogonal matrices, by a series of `(I - Q)⁻¹`.

  `(I + Q)·(I - Q)⁻¹ = I + 2·Q + 2·Q² + …`, of whose last term half is taken, as
  by PEFT (`num_cayley_neumann_terms`); it is the inverse of what Cayley has.
  """
  q = _skew(numbers, size)
  one = jnp.eye(size, dtype=q.dtype)
  total, power = jnp.broadcast_to(one, q.shape) + 2 * q, q
  if terms == 2:
    return total
  # With three terms as with four: PEFT adds the half of a term in any case.
  for _ in range(max(terms - 3, 1)):
    power = power @ q
    total = total + 2 * power
  return total + power @ q


class OFT(surgery.Adapter):
  """Turns blocks of inputs (Qiu et al. 2023, arXiv 2306.07280).

  `W'` has the blocks `Rₖ·Wₖ`, where `Wₖ` are `block_size` rows of `W` and `Rₖ =
  (I - Qₖ)·(I + Qₖ)⁻¹` (Cayley) is orthogonal, `Qₖ` being skew-symmetric with
  `block_size·(block_size - 1) / 2` numbers of its own above the diagonal. They
  are zero at the start, so `W' = W`. Axes of inputs are taken together.
  """

  name = 'oft'
  peft = PeftOFT()

  block_size: int = surgery.field(
    default=2, ge=2, doc='Rows of a block; a divisor of the number of inputs.'
  )
  terms: int | None = surgery.field(
    default=None,
    ge=2,
    doc='Compute the rotations by a series of so many terms, as PEFT does by '
    'default; exactly by default.',
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
        f'{"/".join(site.path)}: {rows} inputs cannot be cut into blocks of '
        f'{size}. Take one of {fitting}, for this layer by patterns.'
      )
    shape = (rows // size, size * (size - 1) // 2)
    return {'oft_q': jnp.zeros(shape, 'float32')}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the turned parameter, of the shape of `base`."""
    del name
    numbers = weights['oft_q']
    turn = (
      _rotations(numbers, self.block_size)
      if self.terms is None
      else _series(numbers, self.block_size, self.terms)
    )
    blocks = _rows(base, site).reshape(len(numbers), self.block_size, -1)
    # Not an einsum: `factored` turns blocks of inputs, and no matrix.
    turned = lambda turn, block: surgery.LowRank(None, turn, block).dense()
    return jax.vmap(turned)(turn, blocks).reshape(base.shape)


class BOFT(surgery.Adapter):
  """Turns inputs by a butterfly (Liu et al. 2023, arXiv 2311.06243).

  `W' = M_factors·…·M₁·W·diag(s)`. Each `Mₖ` is orthogonal: it turns blocks of
  `block_size` inputs as OFT does, by `(I - Q)·(I + Q)⁻¹` (Cayley) with a
  skew-symmetric `Q` of its own for each block. A block of `M₁` are neighbours;
  one of `Mₖ` are two half blocks that lie `2ᵏ⁻¹` half blocks apart, as in the
  fast Fourier transform, so that with `log₂(blocks) + 1` factors each input
  reaches each other one. `s` `out_shape` scales the outputs. At the start all
  `Q` are zero and `s` is one, so `W' = W`. Axes of inputs are taken together.
  """

  name = 'boft'
  peft = PeftBOFT()

  block_size: int | None = surgery.field(
    default=None, ge=2, doc='Rows of a block; 4 if blocks is not given either.'
  )
  blocks: int | None = surgery.field(
    default=None, ge=1, doc='Number of blocks, instead of block_size.'
  )
  factors: int = surgery.field(
    default=1, ge=1, doc='Number of butterfly factors; 1 is OFT with a scale.'
  )
  whole: bool = surgery.field(
    default=False,
    doc='Weights are whole matrices, of which the skew-symmetric part counts, '
    'as PEFT has them.',
  )

  def check(self) -> None:
    """Checks options that depend on each other."""
    if self.block_size is not None and self.blocks is not None:
      raise surgery.ConfigError(
        "adapter type 'boft': expected one of the options block_size and "
        f'blocks, found block_size={self.block_size} and blocks={self.blocks}. '
        'Set the other one to None.'
      )

  def _size(self, site: surgery.Site) -> int:
    """Returns the rows of a block.

    Raises:
      SiteError: if blocks or butterfly do not fit the inputs.
    """
    rows = site.in_size
    if self.blocks is not None:
      size, rest = divmod(rows, self.blocks)
    else:
      size = 4 if self.block_size is None else self.block_size
      rest = rows % size
    if not rest and self._fits(rows, size):
      return size
    many = f'{self.blocks} blocks' if self.blocks else f'blocks of {size}'
    fitting = [n for n in range(2, min(rows, 64) + 1) if self._fits(rows, n)]
    raise surgery.SiteError(
      f'{"/".join(site.path)}: {rows} inputs cannot be cut into {many} for a '
      f'butterfly of factors={self.factors}, which needs blocks of two rows or '
      f'more, an even number of rows if there are several factors, and a '
      f'multiple of {2 ** (self.factors - 1)} blocks. '
      + (
        f'With that many factors take a block_size of {fitting}, for this '
        'layer by patterns.'
        if fitting
        else 'Take fewer factors, for this layer by patterns.'
      )
    )

  def _fits(self, rows: int, size: int) -> bool:
    if size < 2 or (self.factors > 1 and size % 2):
      return False
    return rows % (size << (self.factors - 1)) == 0

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `boft_q` and `boft_s`, or with `whole` `boft_r` and `boft_s`.

    They are zeros `(factors, blocks, block_size·(block_size - 1) / 2)`, or
    `(factors, blocks, block_size, block_size)`, and ones `out_shape`.

    Raises:
      SiteError: if blocks or butterfly do not fit the inputs.
    """
    del key
    size = self._size(site)
    front = (self.factors, site.in_size // size)
    scale = jnp.ones(site.out_shape, 'float32')
    if self.whole:
      matrices = jnp.zeros((*front, size, size), 'float32')
      return {'boft_r': matrices, 'boft_s': scale}
    numbers = jnp.zeros((*front, size * (size - 1) // 2), 'float32')
    return {'boft_q': numbers, 'boft_s': scale}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the turned and scaled parameter, of the shape of `base`."""
    del name
    size, matrix = self._size(site), _rows(base, site)
    for k, numbers in enumerate(weights['boft_r' if self.whole else 'boft_q']):
      turn = (
        _cayley((numbers - numbers.swapaxes(-1, -2)) / 2)
        if self.whole
        else _rotations(numbers, size)
      )
      shape = (len(turn), size, matrix.shape[1])
      if k == 0:  # Neighbours; their number may be odd.
        matrix = jnp.einsum('kij,kjo->kio', turn, matrix.reshape(shape))
      else:
        # (groups, the two halves of a block, between them, rows, outputs)
        apart = (-1, 2, 2**k, size // 2, matrix.shape[1])
        pairs = matrix.reshape(apart).swapaxes(1, 2)
        pairs = jnp.einsum('kij,kjo->kio', turn, pairs.reshape(shape))
        together = (-1, 2**k, 2, size // 2, matrix.shape[1])
        matrix = pairs.reshape(together).swapaxes(1, 2)
      matrix = matrix.reshape(site.in_size, -1)
    return matrix.reshape(base.shape) * weights['boft_s']


class HRA(surgery.Adapter):
  """Reflects inputs, several times (Yuan et al. 2024, arXiv 2405.17484).

  `W' = Hᵣ·…·H₁·W` with `Hᵢ = I - 2·uᵢ·uᵢᵀ / ‖uᵢ‖²`, where `u` has shape `(in,
  rank)`. At the start each `u` is there twice in a row, and a reflection undoes
  itself, so `W' = W` up to rounding; the rank is even for that. Axes of inputs
  are taken together.
  """

  name = 'hra'
  peft = PeftHRA()

  rank: int = surgery.field(default=8, ge=2, doc='Number of reflections; even.')

  def check(self) -> None:
    """Checks options that depend on each other."""
    if self.rank % 2:
      raise surgery.ConfigError(
        f"adapter type 'hra', option 'rank': expected an even number, found "
        f'{self.rank}.'
      )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `hra_u`, `(in, rank)`, whose columns are in pairs.

    Raises:
      SiteError: if there are more reflections than inputs.
    """
    shape = (math.prod(site.in_shape), self.rank // 2)
    if self.rank > shape[0]:
      raise surgery.SiteError(
        f'{"/".join(site.path)}: rank {self.rank} exceeds the {shape[0]} '
        'inputs, and as many reflections make any rotation. Choose a rank of '
        f'at most {shape[0] // 2 * 2}, for this layer by patterns.'
      )
    half = jax.random.normal(key, shape, 'float32') / math.sqrt(shape[0])
    return {'hra_u': jnp.repeat(half, 2, axis=1)}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> surgery.LowRank:
    """Returns the reflected parameter, of the shape of `base`."""
    del name
    u = weights['hra_u']
    u = u / jnp.linalg.norm(u, axis=0)
    # A reflection adds uᵢ·bᵢ, bᵢ = -2·uᵢᵀ·(W + Σⱼ uⱼ·bⱼ) over those before it:
    # (I/2 + the lower triangle of uᵀu)·b = -uᵀW.
    half = 0.5 * jnp.eye(self.rank, dtype=u.dtype)
    before = jnp.tril(u.T @ u, -1) + half
    solved = jax.scipy.linalg.solve_triangular(before, -2 * half, lower=True)
    a, b = u @ solved, u.T @ _rows(base, site)
    return surgery.LowRank(
      base,
      a.reshape(*site.in_shape, self.rank),
      b.reshape(self.rank, *site.out_shape),
    )
