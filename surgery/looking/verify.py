"""Verify: whether tensors still are what their digests say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from surgery import errors
from surgery.files import arrays, source
from surgery.files.digest import Digester
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming.paths import Path

OK, DIFFERS, MISSING = 'ok', 'differs', 'missing'


@dataclasses.dataclass(frozen=True)
class Verified:
  """What became of one tensor.

  Attributes:
    path: its path.
    state: `ok`, `differs`, or `missing` if no digest is recorded.
    expected: the digest that is recorded, or None.
    found: the digest of what is there; None if it cannot be read.
    reason: why it cannot be read.
  """

  path: Path
  state: str
  expected: str | None
  found: str | None
  reason: str = ''


def computed(leaf: Leaf) -> str:
  """Returns the digest of a tensor, read block by block.

  Raises:
    FormatError: if it cannot be read.
  """
  digester = Digester()
  for block in source.unchecked(leaf).parts():
    for data in arrays.blocks(arrays.payload(arrays.little(block))):
      digester.update(data)
  return digester.digest()


def verify(checkpoint: Checkpoint) -> Iterator[Verified]:
  """Recomputes the digests of all tensors, one at a time.

  Plain values have no digest and are passed over.

  Args:
    checkpoint: the model or adapter.

  Returns:
    For each tensor, in order, what became of it.

  Raises:
    FormatError: if a tensor without a digest cannot be read.
  """
  for path, leaf in checkpoint.items():
    if leaf.shape is not None:
      yield _verified(path, leaf)


def _verified(path: Path, leaf: Leaf) -> Verified:
  try:
    found = computed(leaf)
  except errors.FormatError as error:
    if leaf.digest is None:
      raise
    # Bytes that no tensor of its dtype has are not what was written.
    return Verified(path, DIFFERS, leaf.digest, None, str(error))
  if leaf.digest is None:
    return Verified(path, MISSING, None, found)
  state = OK if found == leaf.digest else DIFFERS
  return Verified(path, state, leaf.digest, found)


def complete(checkpoint: Checkpoint, found: Mapping[Path, str]) -> Checkpoint:
  """Returns a checkpoint whose tensors have digests where they had none.

  Args:
    checkpoint: the model or adapter.
    found: digests by path, as `verify` found them.
  """
  leaves = {
    path: leaf.replace(digest=found[path])
    if leaf.digest is None and path in found
    else leaf
    for path, leaf in checkpoint.items()
  }
  return checkpoint.replace(leaves=leaves)
