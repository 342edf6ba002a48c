"""Code of plugins: what it raises, and what it prints.

The shell's results go to stdout, and nothing else may. What a plugin prints is
not a result, whether at its import, in a hook or in a pass.
"""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from typing import Any, cast

from surgery import errors

_RUNNING: contextvars.ContextVar[bool] = contextvars.ContextVar(
  'surgery_foreign', default=False
)


class printing:  # noqa: N801 - it is used as a function is.
  """Marks code that runs while it is entered as a plugin's, for `Product`.

  A class rather than a generator, for speed: hooks are called twice for each
  layer of a model.
  """

  __slots__ = ('_token',)

  def __enter__(self) -> None:
    self._token = _RUNNING.set(True)

  def __exit__(self, *raised: object) -> None:
    _RUNNING.reset(self._token)


@contextlib.contextmanager
def code(
  what: str, passing: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
  """Names the plugin in what its code raises.

  Args:
    what: the code, as in `pass 'clip' of plugin 'clip' of surgery-clip 1.0`.
    passing: further exceptions that are passed on unchanged.

  Raises:
    PluginError: for anything but a `SurgeryError`, even for an attempt to end
      the process.
  """
  try:
    with printing():
      yield
  except (Exception, SystemExit) as error:
    if isinstance(error, (errors.SurgeryError, *passing)):
      raise
    raise errors.PluginError(
      f'{what} failed: {type(error).__name__}: {error}'
    ) from error


class Product:
  """A stdout for results only: what plugins print goes to stderr.

  Args:
    stream: the real one.
  """

  def __init__(self, stream: Any) -> None:
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes to stdout, or to stderr while code of a plugin runs."""
    target = sys.stderr if _RUNNING.get() else self._stream
    # stderr may be closed; what a plugin prints is dropped then.
    return len(text) if target is None else int(target.write(text))

  def writelines(self, lines: Any) -> None:
    """Writes lines as `write` does."""
    for line in lines:
      self.write(line)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def product() -> Iterator[None]:
  """Keeps stdout for results while it is entered."""
  stream = sys.stdout
  if stream is None:
    yield  # stdout is closed, so there is nothing to keep apart.
    return
  with contextlib.redirect_stdout(cast(Any, Product(stream))):
    yield
