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

from surgery.contract.hookspecs import hookimpl

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint

# Where each pass lives, in this room.
_HOMES = {
  'add': 'arithmetic',
  'assert': 'assertion',
  'attach': 'attach',
  'cast': 'cast',
  'clamp': 'clamp',
  'combine': 'combine',
  'combine-adapters': 'combine_adapters',
  'concat': 'concat',
  'copy': 'copy',
  'detach': 'detach',
  'disable': 'enable',
  'drop': 'drop',
  'enable': 'enable',
  'extract': 'extract',
  'extract-lora': 'extract_lora',
  'factorise': 'factorise',
  'fill': 'fill',
  'fold-norm': 'fold_norm',
  'freeze': 'freeze',
  'interpolate': 'interpolate',
  'keep': 'keep',
  'matmul': 'arithmetic',
  'mean': 'mean',
  'merge': 'merge',
  'move': 'copy',
  'multiply': 'multiply',
  'pad': 'reshape',
  'permute': 'slicing',
  'prune': 'prune',
  'prune-ranks': 'prune_ranks',
  'random': 'fill',
  'rename': 'rename',
  'renumber': 'renumber',
  'repeat': 'renumber',
  'reshape': 'reshape',
  'resize-vocab': 'vocabulary',
  'scale': 'arithmetic',
  'slice': 'slicing',
  'split': 'concat',
  'stack': 'concat',
  'subtract': 'arithmetic',
  'tie': 'tie',
  'transpose': 'reshape',
  'unfreeze': 'freeze',
  'unstack': 'concat',
  'untie': 'tie',
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
    name = self.__name__.replace('-', '_')
    # What is a word of Python ends in an underscore.
    return getattr(module, f'{name}_', None) or getattr(module, name)

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
