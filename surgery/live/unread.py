"""A warning for params that are discarded unread."""

from __future__ import annotations

import sys
import warnings
from typing import Any


class Unread:
  """Warns when the params that hold it are freed, if they were never read.

  Python frees an object when its last reference is gone, so the warning is at
  the line that discarded the params.

  Attributes:
    read: whether something was done with the params.
  """

  def __init__(self, message: str) -> None:
    """Initializes the object.

    Args:
      message: the warning.
    """
    self._message = message
    self.read = False

  def __reduce__(self) -> Any:
    return _done, ()  # A copy need not be read.

  def __del__(self) -> None:
    if not self.read and not sys.is_finalizing():
      warnings.warn(self._message, UserWarning, stacklevel=2)


def _done() -> Unread:
  made = Unread('')
  made.read = True
  return made
