"""Which framework a file's `format` names, for readers that insist on one.

transformers and accelerate take a file without metadata for one of PyTorch, and
refuse a file with metadata that lacks `format`.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.model import layouts
from surgery.model.checkpoint import Leaf
from surgery.naming.paths import Path

KEY = layouts.FORMAT


def named(
  metadata: Mapping[str, str], leaves: Mapping[Path, Leaf]
) -> dict[str, str]:
  """Returns metadata with a `format`: the one that it has, or ours."""
  return {KEY: layouts.framework(leaves), **metadata}
