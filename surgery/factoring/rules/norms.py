"""Norms of columns, which need no dense array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from surgery.contract.lowrank import RANK
from surgery.factoring.labelled import (
  product,
)
from surgery.factoring.rules.products import joined
from surgery.factoring.rules.table import Table, is_number, ordered
from surgery.factoring.views import (
  Decline,
  Labels,
  Squared,
  cast,
)

RULES = Table()
rule = RULES.rule


@rule('reduce_sum')
def reduce_sum(squared: Squared, *, axes: Sequence[int], **_: Any) -> Any:
  """The squares of columns, summed: the norm that DoRA divides by.

  `Σ(W + s·A·B)² = ΣW² + 2s·Σ(WᵀA)ᵀ∘B +
  s²·ΣB∘(AᵀA)B` over axes that A owns and B does not, or the other way round.
  """
  view, summed = squared.view, set(axes)
  terms = joined(view.terms, view.arithmetic)
  if len(terms) != 2 or any(t.spreads for t in terms):
    raise Decline
  base, low = terms
  if len(base.factors) != 1 or len(low.factors) != 2:
    raise Decline
  whole = tuple(range(view.ndim))
  if sorted(base.factors[0].axes) != list(whole):
    raise Decline
  a, b = low.factors
  if not summed <= set(a.axes):
    a, b = b, a
  if not summed <= set(a.axes) or summed & set(b.axes):
    raise Decline
  kept = tuple(i for i in whole if i not in summed)
  cast_to = lambda f: cast(f.value, view.arithmetic)
  w, w_axes = cast_to(base.factors[0]), base.factors[0].axes
  fa, fb = cast_to(a), cast_to(b)
  scale = low.scale
  b_axes = tuple('q' if x == RANK else x for x in b.axes)
  a_names = tuple('q' if x == RANK else x for x in a.axes)
  a_kept = [x for x in a.axes if x in kept]
  if a_kept and not set(a_kept) <= set(b.axes):
    raise Decline  # Columns that both factors have a part of.
  both = tuple(x for x in kept if x in a.axes)
  wa = product(w, w_axes, fa, a_names, (*kept, 'q'))
  cross = (wa * ordered(fb, b_axes, (*kept, 'q'))).sum(-1)
  pairs = (*both, 'q', "q'")
  gram = product(fa, a_names, fa, _primed(a_names), pairs)
  gb = product(gram, pairs, fb, _primed(b_axes), (*kept, 'q'))
  square_of = (gb * ordered(fb, b_axes, (*kept, 'q'))).sum(-1)
  squares = (w * w).sum(tuple(w_axes.index(x) for x in summed))
  left = [x for x in w_axes if x not in summed]
  squares = ordered(squares, tuple(left), kept)
  if not is_number(base.scale, 1.0):
    squares = squares * base.scale**2
    cross = cross * base.scale
  total = squares + 2 * scale * cross + scale**2 * square_of
  # Rounding may leave a little less than nothing of a column of zeros.
  return jnp.maximum(total, 0)


def _primed(labels: Sequence[Any]) -> Labels:
  return tuple("q'" if x == 'q' else x for x in labels)
