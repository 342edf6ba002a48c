"""Says so when params that hold something new are thrown away unread."""

from __future__ import annotations

import sys
import warnings
from typing import Any


class Unread:
  """Warns when it goes with the params that hold it, if nobody read these.

  Python frees an object where its last name is gone, so the warning is at the
  line that threw the params away.

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
    return _done, ()  # Of a copy nothing is expected.

  def __del__(self) -> None:
    if not self.read and not sys.is_finalizing():
      warnings.warn(self._message, UserWarning, stacklevel=2)


def _done() -> Unread:
  made = Unread('')
  made.read = True
  return made
