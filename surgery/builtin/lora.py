"""LoRA: low-rank updates of a layer's matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from surgery.builtin.peft import PeftLoRA
from surgery.contract.adapter import Adapter, named_key
from surgery.contract.config import field
from surgery.contract.lowrank import LowRank
from surgery.contract.site import Site


class LoRA(Adapter):
  """Adds a product of two small matrices (Hu et al. 2021, arXiv 2106.09685).

  `W' = W + s·A·B`, with `A` of shape `in_shape + (rank,)`, `B` of shape
  `(rank,) + out_shape`, and `s = alpha / rank`, or `alpha / √rank` with
  `rslora` (Kalajdzievski 2023, arXiv 2312.03732). `A` is Gaussian with
  standard deviation `1 / √rank`, `B` is zero, so `W' = W` at the start.

  With `dropout`, what goes into `A` is dropped with that probability where a
  call is in training: through `surgery.factored`, which alone sees a layer's
  input (`x·W + s·(dropout(x)·A)·B`); looking rows up has no such input. The
  masks derive from the seed and count calls in `lora_dropout`, uint32 `(3,)`,
  beside the factors; the model's own Rng is not touched.
  """

  name = 'lora'
  adds = True
  counters = ('lora_dropout',)
  rank_axes: ClassVar[Mapping[str, int]] = {'lora_a': -1, 'lora_b': 0}
  peft = PeftLoRA()

  rank: int = field(default=8, ge=1, doc='Rank of the update.')
  alpha: float | None = field(
    default=None, gt=0, doc='Scale times rank; twice the rank by default.'
  )
  rslora: bool = field(default=False, doc='Scale by 1/√rank instead of 1/rank.')
  dropout: float = field(
    default=0.0,
    ge=0,
    lt=1,
    doc='Dropped share of the input of A, in training through `factored`.',
  )

  @property
  def scale(self) -> float:
    """Factor of the product."""
    alpha = 2 * self.rank if self.alpha is None else self.alpha
    return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  def init(self, site: Site, key: Any) -> dict[str, Any]:
    """Returns `lora_a`, `in_shape + (rank,)`, and `lora_b`, zeros."""
    import jax
    import jax.numpy as jnp

    # In float32 whatever JAX's default is, as files have it.
    draw = jax.random.normal(
      named_key(key, 'lora_a'), (*site.in_shape, self.rank), 'float32'
    )
    weights = {
      'lora_a': draw / math.sqrt(self.rank),
      'lora_b': jnp.zeros((self.rank, *site.out_shape), 'float32'),
    }
    if self.dropout:
      # Two words of a key, and the number of calls in training.
      words = jax.random.bits(named_key(key, 'lora_dropout'), (2,), 'uint32')
      weights['lora_dropout'] = jnp.append(words, jnp.uint32(0))
    return weights

  def apply(
    self, site: Site, name: str, base: Any, weights: Any
  ) -> Any | LowRank:
    """Returns `base + scale · lora_a · lora_b`, as factors."""
    del site, name
    key = None
    if self.dropout:
      import jax

      words = weights['lora_dropout']
      key = jax.random.wrap_key_data(words[:2], impl='threefry2x32')
      key = jax.random.fold_in(key, words[2])
    factors = weights['lora_a'], weights['lora_b']
    return LowRank(base, *factors, self.scale, self.dropout, key)

  def sharding(self, site: Site, weight: str) -> tuple[Any, ...]:
    """The outer axes of the factors are split as the base's are."""
    if weight == 'lora_dropout':
      return (None,)
    if weight == 'lora_a':
      return (*site.primary.roles_sharding('i'), None)
    return (None, *site.primary.roles_sharding('o'))
