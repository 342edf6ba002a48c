"""The mark of what `freeze` froze."""

from __future__ import annotations

from surgery.model.checkpoint import Leaf

# Metadata of what `freeze` froze, so that `unfreeze` restores that alone.
MARK, OURS = 'frozen', 'surgery'


# The same of what may have been trained before, together with an adapter.
ALONG = 'surgery, trained along'


def is_ours(leaf: Leaf) -> bool:
  """Whether `freeze` froze the parameter."""
  return leaf.metadata.get(MARK) in (OURS, ALONG)


def may_have_trained(leaf: Leaf) -> bool:
  """Whether a parameter may have changed while an adapter was attached."""
  return leaf.metadata.get(MARK) != OURS
