"""The frameworks that the library knows, offered like anybody's.

None of them is imported for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.contract.hookspecs import hookimpl
from surgery.contract.trees import Tree


@hookimpl
def surgery_trees() -> Mapping[str, Tree]:
  """Offers them by name; the first that owns a value decides."""
  from surgery.trees.equinox import Equinox
  from surgery.trees.haiku import Haiku
  from surgery.trees.linen import Linen
  from surgery.trees.nnx import Nnx
  from surgery.trees.pytrees import Plain

  return {
    'nnx': Nnx(),
    'equinox': Equinox(),
    'linen': Linen(),
    'haiku': Haiku(),
    'plain': Plain(),
  }
