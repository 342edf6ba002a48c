"""Which framework a file's `format` names, for readers that insist on one.

transformers and accelerate take a file without metadata for one of PyTorch, and
refuse a file with metadata that lacks `format`.
"""

from __future__ import annotations

from collections.abc import Mapping

from surgery.model.checkpoint import Leaf
from surgery.naming.paths import Path

KEY = 'format'
TORCH, FLAX = 'pt', 'flax'


def framework(leaves: Mapping[Path, Leaf]) -> str:
  """Returns `pt` if names and layout are those of PyTorch, otherwise `flax`.

  PyTorch calls a layer's matrix `weight` and stores it as `(outputs, inputs)`,
  so a bias beside it has the size of its first axis. Layers `c_…` do not count:
  transformers' Conv1D, of GPT-2, stores `(inputs, outputs)`.
  """
  names = {path[-1] for path in leaves if path}
  if not names.isdisjoint(('kernel', 'embedding')) or not any(
    name.endswith('weight') for name in names
  ):
    return FLAX
  for path, leaf in leaves.items():
    bias = leaves.get((*path[:-1], 'bias'))
    if path[-1] != 'weight' or bias is None or len(leaf.shape or ()) != 2:
      continue
    if path[-2:-1] and path[-2].startswith('c_'):
      continue
    outputs, inputs = leaf.shape or ()
    if bias.shape == (inputs,) != (outputs,):
      return FLAX
  return TORCH


def named(
  metadata: Mapping[str, str], leaves: Mapping[Path, Leaf]
) -> dict[str, str]:
  """Returns metadata with a `format`: the one that it has, or ours."""
  return {KEY: framework(leaves), **metadata}
