"""Norms of columns, which need no dense array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from surgery.aliases import Array
from surgery.contract.lowrank import RANK
from surgery.factoring.labelled import product
from surgery.factoring.rules.products import joined
from surgery.factoring.rules.table import Table, is_number, ordered
from surgery.factoring.views import (
  Decline,
  Factor,
  Labels,
  Squared,
  Term,
  View,
  cast,
)

RULES = Table()
rule = RULES.rule


@rule('reduce_sum')
def reduce_sum(squared: Squared, *, axes: Sequence[int], **_: Any) -> Array:
  """Sums the squares of columns: the norm that DoRA divides by.

  `Σ(W + s·A·B)² = ΣW² + 2s·Σ(WᵀA)ᵀ∘B +
  s²·ΣB∘(AᵀA)B` over axes that A owns and B does not, or the other way round.
  """
  view, summed = squared.view, set(axes)
  base, low = _base_and_update(view)
  a, b = _summed_first(low, summed)
  kept = tuple(i for i in range(view.ndim) if i not in summed)
  # An ensemble's axes are kept, and both factors own them.
  both = tuple(x for x in kept if a.owns(x))
  if not set(both) <= set(b.axes):
    raise Decline  # Columns that both factors have a part of.
  w, fa, fb = (cast(f.value, view.arithmetic) for f in (base.factors[0], a, b))
  w_axes, a_axes, b_axes = (
    base.factors[0].axes,
    _ranked(a, 'q'),
    _ranked(b, 'q'),
  )
  by_rank = (*kept, 'q')
  # Σ(WᵀA)ᵀ∘B: the sum over rows meets the rank first, so that nothing is as
  # large as W.
  wa = product(w, w_axes, fa, a_axes, by_rank)
  b_ordered = ordered(fb, b_axes, by_rank)
  cross = (wa * b_ordered).sum(-1)
  # ΣB∘(AᵀA)B: the Gram matrix of A is rank by rank; "q'" is its second axis.
  pairs = (*both, 'q', "q'")
  gram = product(fa, a_axes, fa, _ranked(a, "q'"), pairs)
  gb = product(gram, pairs, fb, _ranked(b, "q'"), by_rank)
  update = (gb * b_ordered).sum(-1)
  # ΣW², its axes in the order in which the result has them.
  squares = (w * w).sum(tuple(w_axes.index(x) for x in summed))
  squares = ordered(squares, [x for x in w_axes if x not in summed], kept)
  if not is_number(base.scale, 1.0):
    squares = squares * base.scale**2
    cross = cross * base.scale
  total = squares + 2 * low.scale * cross + low.scale**2 * update
  # Rounding may leave a little less than nothing of a column of zeros.
  return jnp.maximum(total, 0)


def _base_and_update(view: View) -> tuple[Term, Term]:
  """Returns the two terms of a view that is a whole base and one product.

  Raises:
    Decline: if it is something else.
  """
  terms = joined(view.terms, view.arithmetic)
  if [len(t.factors) for t in terms] != [1, 2] or any(t.spreads for t in terms):
    raise Decline
  base, low = terms
  if sorted(base.factors[0].axes) != list(range(view.ndim)):
    raise Decline
  return base, low


def _summed_first(low: Term, summed: set[int]) -> tuple[Factor, Factor]:
  """Returns the factor that owns all axes that are summed over, then the other.

  Raises:
    Decline: if none does, or both own some.
  """
  a, b = low.factors
  if not summed <= set(a.axes):
    a, b = b, a
  if not summed <= set(a.axes) or summed & set(b.axes):
    raise Decline
  return a, b


def _ranked(factor: Factor, rank: str) -> Labels:
  """Returns labels of a factor's axes, with a name for the rank."""
  return tuple(rank if x == RANK else x for x in factor.axes)
