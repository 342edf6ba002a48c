r"""Paths: tuples of strings, and how they are written down.

A path names a parameter, a layer or a tensor in a file. The tuple is
canonical, because names may contain any character. Written down, segments are
joined by `/`, and a `/` or a `\` inside of a name is escaped by a `\`.
"""

from __future__ import annotations

import functools
import re

Path = tuple[str, ...]

# What has a meaning in a selector and so needs an escape to stand for itself.
_SPECIAL = re.compile(r'([\\/*?\[\]{},!:])')


class Integer(str):
  """A segment that is an integer where it was read, as `{3: …}` of msgpack.

  It equals its text, so selectors and rules take it for one; only who writes
  the format again tells it apart.
  """

  __slots__ = ()


def kept(new: Path, old: Path) -> Path:
  """Returns a new path in which integers of the old one are integers again.

  Args:
    new: the path, all of text.
    old: the path that it was made of; what both end in is the same.
  """
  if not any(type(segment) is Integer for segment in old):
    return new
  segments = list(new)
  for k in range(1, min(len(old), len(new)) + 1):
    if old[-k] != new[-k]:
      break
    segments[-k] = old[-k]
  return tuple(segments)


@functools.lru_cache(maxsize=131072)
def show(path: Path) -> str:
  r"""Returns `path` written down: `('net', 'a/b')` is `net/a\/b`."""
  if path == ('',):
    return '\\'  # Not the empty path.
  return '/'.join(s.replace('\\', '\\\\').replace('/', '\\/') for s in path)


def parse(text: str) -> Path:
  """Returns the path that `show` wrote as `text`."""
  if text == '':
    return ()
  if '\\' not in text:
    return tuple(text.split('/'))
  segments, current, escaped = [], [], False
  for char in text:
    if escaped:
      current.append(char)
      escaped = False
    elif char == '\\':
      escaped = True
    elif char == '/':
      segments.append(''.join(current))
      current = []
    else:
      current.append(char)
  segments.append(''.join(current))
  return tuple(segments)


def literal(path: Path) -> str:
  """Returns a selector that matches `path` and nothing else at its level."""
  if path == ('',):
    return '\\'  # Not the empty path.
  if path == ('all',):
    return '\\all'  # Not everything.
  return '/'.join(_SPECIAL.sub(r'\\\1', segment) for segment in path)
