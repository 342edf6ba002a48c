"""Progress of reading and writing, as a line on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
  from surgery.model.checkpoint import Leaf

# Nothing is shown in the first second.
DELAY = 1.0
_INTERVAL = 0.1
_UNITS = ('B', 'KB', 'MB', 'GB', 'TB')

Told = Callable[[int, int], None]


def _of(done: int, total: int) -> str:
  """Returns two numbers of bytes in the unit of the second: `1.2/2.5 GB`."""
  power = 0
  while total >= 1000 ** (power + 1) and power + 1 < len(_UNITS):
    power += 1
  digits = 1 if power else 0
  parts = [f'{n / 1000**power:.{digits}f}' for n in (done, total)]
  return f'{"/".join(parts)} {_UNITS[power]}'


class _Line:
  """A line of a terminal that is overwritten."""

  def __init__(self, stream: TextIO, tensors: int, nbytes: int) -> None:
    self._stream = stream
    self._total = tensors, nbytes
    self._done = 0, 0
    self._next = time.monotonic() + DELAY
    self._width = 0

  def told(self, tensors: int, nbytes: int) -> None:
    """Adds what was done since the last call."""
    self._done = self._done[0] + tensors, self._done[1] + nbytes
    if time.monotonic() >= self._next:
      self._next = time.monotonic() + _INTERVAL
      size = _of(self._done[1], self._total[1])
      self._show(f'{self._done[0]}/{self._total[0]} tensors, {size}')

  def clear(self) -> None:
    if self._width:
      self._show('')
      self._stream.write('\r')
      self._stream.flush()

  def _show(self, text: str) -> None:
    self._stream.write(f'\r{text:<{self._width}}')
    self._stream.flush()
    self._width = len(text)


@contextlib.contextmanager
def shown(leaves: Iterable[Leaf], quiet: bool = False) -> Iterator[Told | None]:
  """Yields the function to call with progress.

  Args:
    leaves: all tensors.
    quiet: whether nothing is shown.

  Yields:
    A function of the numbers of tensors and bytes that were done since the last
    call; None if stderr is no terminal.
  """
  if quiet or not sys.stderr.isatty():
    yield None
    return
  leaves = list(leaves)
  line = _Line(sys.stderr, len(leaves), sum(leaf.nbytes for leaf in leaves))
  try:
    yield line.told
  finally:
    line.clear()
