"""Heads that may be copies of an embedding, and have to stay copies.

A file may hold the embedding twice, under the name of the head, too, and there
transposed. Whatever depends on the order of elements, on a tensor's name or on
its rows would make the two different, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.model.checkpoint import Leaf
from surgery.naming import paths
from surgery.naming.paths import Path

EMBEDDING = ('embed', 'wte', 'token')
_HEAD = ('head', 'output', *EMBEDDING)


def twin(path: Path, leaves: Mapping[Path, Leaf]) -> tuple[Path, bool]:
  """Returns the embedding of which a tensor may be a copy, else itself.

  Args:
    path: the tensor.
    leaves: all tensors.

  Returns:
    The path, and whether the tensor is the transpose.
  """
  shape = leaves[path].shape or ()
  if len(shape) != 2 or not named(path, _HEAD):
    return path, False
  # A square table is first taken for a copy that lies as the embedding does.
  for turned in (False, True):
    wanted = shape[::-1] if turned else shape
    alike = [
      other
      for other, leaf in leaves.items()
      if leaf.shape == wanted and named(other, EMBEDDING)
    ]
    if alike:
      return min(alike), turned
  return path, False


def named(path: Path, words: tuple[str, ...]) -> bool:
  """Whether a path contains one of some words."""
  name = paths.show(path).lower()
  return any(word in name for word in words)
