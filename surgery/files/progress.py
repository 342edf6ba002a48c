"""How far writing has come, exactly: tensors and their bytes, not headers."""

from __future__ import annotations

import collections
from collections.abc import Callable

# Takes a number of tensors and of bytes that were written since the last call.
Told = Callable[[int, int], None]


class Progress:
  """Tells of tensors whose bytes have been handed to the system.

  Bytes wait in memory, and ranges of other files are joined, so what was given
  to an `Output` is not what was written.

  Args:
    told: the function to call.
  """

  def __init__(self, told: Told) -> None:
    self._told = told
    # Where bytes of tensors lie in the file, and how many tensors end there.
    self._coming: collections.deque[tuple[int, int, int]] = collections.deque()

  def expect(self, start: int, stop: int, tensors: int) -> None:
    """Takes note that a tensor's bytes will lie there.

    Args:
      start: where they start in the file.
      stop: where they end.
      tensors: number of tensors that are complete with them.
    """
    self._coming.append((start, stop, tensors))

  def reached(self, position: int) -> None:
    """Tells of what lies before a position of the file."""
    tensors = nbytes = 0
    while self._coming and self._coming[0][1] <= position:
      start, stop, complete = self._coming.popleft()
      tensors += complete
      nbytes += stop - start
    if self._coming and self._coming[0][0] < position:
      start, stop, complete = self._coming[0]
      self._coming[0] = position, stop, complete
      nbytes += position - start
    if tensors or nbytes:
      self._told(tensors, nbytes)
