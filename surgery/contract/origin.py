"""Which distribution an adapter type comes from, for messages."""

from __future__ import annotations

import functools
import importlib.metadata
import sys

# The library's own types are named without it.
_OURS = 'blox-surgery'
GROUP = 'surgery.adapters'


@functools.lru_cache(maxsize=512)
def origin(cls: type) -> str:
  """Returns the distribution and version that offer a type, or ''.

  It asks the metadata of what is installed, so it is called once there is an
  error. A host knows what it has loaded; a class that is being made, or an
  option that is being read, has no host.

  Args:
    cls: the class.
  """
  points = importlib.metadata.entry_points(group=GROUP)
  for point in points.select(name=getattr(cls, 'name', '')):
    if point.dist and point.dist.name != _OURS and is_named(point, cls):
      return f'{point.dist.name} {point.dist.version}'
  return ''


def is_named(point: importlib.metadata.EntryPoint, cls: type) -> bool:
  """Whether an entry point names a class; nothing is imported for it."""
  if (point.module, point.attr) == (cls.__module__, cls.__qualname__):
    return True
  # It may be named by a module that only passes it on.
  return getattr(sys.modules.get(point.module), point.attr, None) is cls
