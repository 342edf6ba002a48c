"""Trainable tokens: some rows of an embedding are all that trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import surgery
from surgery_scaling.peft import PeftTokens

if TYPE_CHECKING:
  import jax


class TrainableTokens(surgery.Adapter):
  """Trains some rows of an embedding, by their numbers.

  `W'` is `W` `(rows, features)` with the rows `tokens` replaced by `rows`
  `(len(tokens), features)`, which begin as they are in `W`, so `W' = W`. All
  other rows are the base's, whatever is trained. There is no paper; PEFT has it
  as `TRAINABLE_TOKENS`, for tokens that were added to a vocabulary.
  """

  name = 'trainable-tokens'
  peft = PeftTokens()

  tokens: tuple[int, ...] = surgery.field(
    default=(), doc='Numbers of the rows that train.'
  )

  def serves(self, site: surgery.Site) -> str | None:
    """Returns why a site has no rows: above all, that it looks none up."""
    if len(site.in_shape) != 1:
      return f'its inputs are the axes {site.in_shape}, expected one, of rows'
    return super().serves(site)

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, Any]:
    """Returns `token_rows` `(len(tokens), features)`, those of the base.

    Raises:
      SiteError: for rows that are not there, or that are named twice.
    """
    import jax.numpy as jnp

    del key
    wrong = [n for n in self.tokens if not 0 <= n < site.in_size]
    if wrong or len(set(self.tokens)) < len(self.tokens) or not self.tokens:
      raise surgery.SiteError(
        f'{"/".join(site.path)}: expected numbers of rows, each once, below '
        f'{site.in_size}, found tokens={self.tokens}.'
      )
    return {'token_rows': site.base()[jnp.asarray(self.tokens)]}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    """Returns the parameter with its rows replaced."""
    import jax.numpy as jnp

    del site, name
    return base.at[jnp.asarray(self.tokens)].set(weights['token_rows'])

  def sharding(self, site: surgery.Site, weight: str) -> tuple[Any, ...]:
    """The features are split as the base's are."""
    del weight
    return (None, *site.primary.roles_sharding('o'))
