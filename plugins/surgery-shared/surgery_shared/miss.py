"""MiSS and BAT: updates of which all shards of a matrix share one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import surgery
from surgery_shared.peft import PeftBAT, PeftMiSS

__all__ = ['BAT', 'MiSS']


class MiSS(surgery.Adapter):
  """Adds one block to all shards of inputs (Kang & Yin 2024, arXiv 2409.15371).

  `W' = W + S·D`, where row `i` of `S` `(in, rank)` is one at `i mod rank` and
  zero elsewhere: the rows of `W` are cut into shards of `rank`, and to each the
  same block `D` `(rank, out)` is added. With `columns` the block is `(rank,
  columns)`, and repeated along the outputs, too. `D` is zero at the start, so
  `W' = W`. Axes of inputs, and of outputs, are taken together.
  """

  name = 'miss'
  peft = PeftMiSS()
  adds = True

  rank: int = surgery.field(default=64, ge=1, doc='Rows of a shard.')
  columns: int | None = surgery.field(
    default=None,
    ge=1,
    doc='Columns of the block, a divisor of the number of outputs; as many as '
    'there are outputs by default.',
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `miss_block`, zeros `(rank, out)` or `(rank, columns)`.

    Raises:
      SiteError: if a shard exceeds the inputs, or blocks do not divide the
        outputs.
    """
    del key
    if self.rank > site.in_size:
      raise surgery.SiteError(
        f'{"/".join(site.path)}: rank {self.rank} exceeds the {site.in_size} '
        'inputs, which are cut into shards of so many. Choose a smaller one, '
        'for this layer by patterns.'
      )
    columns = self.columns or site.out_size
    if site.out_size % columns:
      fitting = [n for n in range(1, site.out_size) if site.out_size % n == 0]
      raise surgery.SiteError(
        f'{"/".join(site.path)}: {site.out_size} outputs cannot be cut into '
        f'blocks of {columns} columns. Take one of {fitting[-8:]}, for this '
        'layer by patterns.'
      )
    return {'miss_block': jnp.zeros((self.rank, columns), 'float32')}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> surgery.LowRank:
    """Returns the base with the block added to each shard, as factors."""
    del name
    block = weights['miss_block']
    block = jnp.tile(block, (1, site.out_size // block.shape[1]))
    # A table of Python's, so that it is a constant of the program.
    shards = np.arange(site.in_size) % self.rank
    rows = np.eye(self.rank, dtype=np.float32)[shards]
    return surgery.LowRank(
      base,
      jnp.asarray(rows, block.dtype).reshape(*site.in_shape, self.rank),
      block.reshape(self.rank, *site.out_shape),
    )


class BAT(surgery.Adapter):
  """Maps shards of a matrix by one block (Kang & Yin 2024, arXiv 2409.15371).

  `W` `(in, out)` is cut into blocks `Wᵢₒ` of `rank` inputs and outputs, and
  `Wᵢₒ' = Wᵢₒ + Dₒ·Wᵢₒ + Dₒ` with `D` `(out / rank, rank, rank)`, which is zero
  at the start, so `W' = W`. Axes of inputs, and of outputs, are taken together.
  """

  name = 'bat'
  peft = PeftBAT()

  rank: int = surgery.field(
    default=64, ge=1, doc='Rows of a block; divides inputs and outputs.'
  )

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `bat_block`, zeros `(out / rank, rank, rank)`.

    Raises:
      SiteError: if blocks do not divide inputs and outputs.
    """
    del key
    if site.in_size % self.rank or site.out_size % self.rank:
      raise surgery.SiteError(
        f'{"/".join(site.path)}: blocks of {self.rank} do not divide '
        f'{site.in_size} inputs and {site.out_size} outputs. Take a rank that '
        'divides both, for this layer by patterns.'
      )
    shape = (site.out_size // self.rank, self.rank, self.rank)
    return {'bat_block': jnp.zeros(shape, 'float32')}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the mapped parameter, of the shape of `base`."""
    del name
    block = weights['bat_block']
    # (input blocks, inputs of one, output blocks, outputs of one)
    cut = base.reshape(-1, self.rank, len(block), self.rank)
    mapped = jnp.einsum('obk,ikoa->iboa', block, cut)
    added = block.transpose(1, 0, 2)
    return (cut + mapped + added).reshape(base.shape)
