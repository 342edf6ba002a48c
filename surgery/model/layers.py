"""What is known of layers from a graph: their types, and roles of axes."""

from __future__ import annotations

from typing import Any

from surgery.contract.layers import LayerType, LayerTypes
from surgery.naming.paths import Path

__all__ = ['LayerType', 'LayerTypes', 'is_graph', 'of_graph', 'of_module']


def _layouts(module: Any) -> dict[str, str]:
  """Returns the layouts of blox's own layers and of those derived from them.

  A layer is known by its class, not by the name of it: somebody else's `Linear`
  may have axes of any meaning. blox is not imported for that.
  """
  own = {
    cls.__name__
    for cls in type(module).__mro__
    if cls.__module__.partition('.')[0] == 'blox'
  }
  if 'Linear' in own:
    return {'kernel': 'io', 'bias': 'o'}
  if 'Embed' in own:
    return {'embedding': 'io'}
  if 'Conv' in own or 'ConvTranspose' in own:
    spatial = 'i' * len(module.kernel_size)
    # ConvTranspose keeps its kernel as (*spatial, out, in).
    last = 'io' if 'Conv' in own else 'oi'
    return {'kernel': spatial + last, 'bias': 'o'}
  if {'LayerNorm', 'RMSNorm', 'BatchNorm'} & own:
    return dict.fromkeys(('scale', 'bias', 'running_mean', 'running_var'), 'o')
  return {}


def of_module(module: Any) -> LayerType:
  """Returns the type of a `bx.Module`."""
  names = []
  for cls in type(module).__mro__:
    if cls.__name__ in ('Module', 'Generic', 'object'):
      break
    names.append(cls.__name__)
  return LayerType(tuple(names), _layouts(module))


def of_graph(graph: Any) -> dict[Path, LayerType]:
  """Returns the types of all layers of a `bx.Graph`, by path."""
  found = {path: of_module(module) for path, module in graph.walk()}
  if graph.module is not None:
    found[graph.path] = of_module(graph.module)
  return found


def is_graph(value: Any) -> bool:
  """Whether a value is a `bx.Graph`, without importing blox."""
  return hasattr(value, 'walk') and hasattr(value, 'child')
