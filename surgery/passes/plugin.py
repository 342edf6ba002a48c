"""The passes that come with the library, offered like anybody's.

The host imports this whenever any hook is asked, so a pass is imported when it
is called, or asked what it is.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from surgery.core.hookspecs import hookimpl

if TYPE_CHECKING:
  from surgery.core.checkpoint import Checkpoint

# Where each pass lives, in this room.
_HOMES = {
  'attach': 'attach',
  'cast': 'cast',
  'detach': 'detach',
  'disable': 'enable',
  'drop': 'drop',
  'enable': 'enable',
  'freeze': 'freeze',
  'keep': 'keep',
  'merge': 'merge',
  'rename': 'rename',
  'unfreeze': 'freeze',
}


class Pass:
  """A function from a checkpoint to a checkpoint, imported when it is needed.

  Its documentation and signature are those of the function.

  Args:
    name: its name.
    module: the module that it lives in.
  """

  def __init__(self, name: str, module: str) -> None:
    self.__name__ = self.__qualname__ = name
    self.__module__ = module

  @functools.cached_property
  def __wrapped__(self) -> Callable[..., Checkpoint]:
    module = importlib.import_module(self.__module__)
    return getattr(module, self.__name__)

  def __call__(self, *args: Any, **kwargs: Any) -> Checkpoint:
    """Calls the function."""
    return self.__wrapped__(*args, **kwargs)

  def __getattribute__(self, name: str) -> Any:
    # The class's own would hide the function's.
    if name == '__doc__':
      return self.__wrapped__.__doc__
    return super().__getattribute__(name)

  @property
  def __signature__(self) -> inspect.Signature:
    return inspect.signature(self.__wrapped__)

  def __repr__(self) -> str:
    return f'<pass {self.__module__}.{self.__name__}>'


@hookimpl
def surgery_passes() -> Mapping[str, Callable[..., Any]]:
  """Offers the passes by name."""
  room = __name__.rpartition('.')[0]
  return {name: Pass(name, f'{room}.{home}') for name, home in _HOMES.items()}
