"""Rules for primitives that are applied to views.

A rule is a function of the operands, of which at least one is a view, and of
the primitive's parameters. It returns the result, or raises `Decline`; then the
views are made dense and the primitive is bound as it stands. So a rule that is
missing or too careful costs time and never a result. Rules take parameters by
name and ignore those that have no influence, since JAX adds some; a rule must
check each parameter that changes what is computed
(tests/factoring/test_transform.py compares every rule with the dense arrays).

`arithmetic` and `moves` keep a view a view; `products`, `lookups` and `norms`
make an array of it. `folded` is for views whose axes were joined.
"""

from collections.abc import Sequence

from surgery.factoring.rules import (
  arithmetic,
  folded,
  lookups,
  moves,
  norms,
  products,
)
from surgery.factoring.rules.moves import EACH
from surgery.factoring.rules.table import Rule
from surgery.factoring.views import Folded, Looked, Squared, View

# Primitives that use a view up: what they make is an array.
CONSUMERS: dict[str, Rule] = {**lookups.RULES, **norms.RULES, **products.RULES}
RULES: dict[str, Rule] = {**arithmetic.RULES, **moves.RULES, **CONSUMERS}

__all__ = ['CONSUMERS', 'EACH', 'RULES', 'Rule', 'rule_for']


def rule_for(name: str, views: Sequence[View]) -> Rule | None:
  """Returns the rule for a primitive and views; none if they are made dense."""
  if any(isinstance(view, Squared) for view in views):
    return norms.RULES.get(name)
  if any(isinstance(view, Looked) for view in views):
    return lookups.LOOKED.get(name)
  if any(isinstance(view, Folded) for view in views):
    return folded.RULES.get(name)
  return None if name in norms.RULES else RULES.get(name)
