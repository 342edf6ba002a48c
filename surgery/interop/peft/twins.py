"""Tensors that a folder has twice, for parameters that are tied.

Where a head is tied to an embedding, PEFT saves what it trained for both, and
the head's LoRA is the embedding's, turned. A base has one parameter for both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from surgery.adapting import bound
from surgery.model.checkpoint import Leaf
from surgery.naming.paths import Path


def found(
  leaves: Mapping[Path, Leaf], homeless: Iterable[Path], placed: Iterable[Path]
) -> dict[Path, tuple[Path, bool]]:
  """Returns of which tensors others are copies, and whether turned ones.

  Args:
    leaves: all tensors.
    homeless: tensors of one module that has no place.
    placed: tensors of modules that have.

  Returns:
    Nothing unless all of them are copies.
  """
  several = list(placed)
  twins: dict[Path, tuple[Path, bool]] = {}
  for path in homeless:
    one = leaves[path]
    for other in several:
      turned = _same(one, leaves[other])
      if turned is not None:
        twins[path] = other, turned
        break
    else:
      return {}
  return twins


def _same(one: Leaf, other: Leaf) -> bool | None:
  """Whether a tensor is another turned; None if they are not the same."""
  if one.dtype != other.dtype:
    return None
  if one.shape == other.shape and bound.digest(one) == bound.digest(other):
    return False
  back = turned(other)
  if one.shape == back.shape and np.array_equal(one.load(), back.load()):
    return True
  return None


def turned(leaf: Leaf) -> Leaf:
  """Returns a matrix with its axes exchanged."""
  shape = (leaf.shape or ())[::-1]
  return Leaf(functools.partial(_turned, leaf), shape, leaf.dtype)


def _turned(leaf: Leaf) -> Any:
  return np.ascontiguousarray(np.asarray(leaf.load()).T)
