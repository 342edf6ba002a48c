"""Choosing parameters of a checkpoint by selectors, for passes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract.site import ParamSpec, Site, default_layout
from surgery.host.manager import Host, default_host
from surgery.model import layers
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerTypes
from surgery.naming import selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection, describe


def _types(types: LayerTypes, layer: Path) -> tuple[str, ...]:
  known = types.get(layer)
  return known.names if known else ()


def _owner(param: Any) -> str | None:
  """Returns the adapter that a parameter or leaf is a weight of."""
  owner = param.metadata.get('adapter')
  return owner if isinstance(owner, str) else None


def shown(name: str, leaf: Leaf) -> ParamSpec:
  """Returns a parameter as hooks are shown it: alike in params and in a file.

  A PRNG key has the shape of the keys and no dtype, as params have it, and not
  the numbers as which a file holds it.

  Args:
    name: the parameter's name in its layer, or that which an adapter gave it.
    leaf: the parameter.
  """
  if leaf.key is None:
    shape, dtype = leaf.shape or (), leaf.dtype or ''
  else:
    # Params have keys, whose shape it is; a file has each key's numbers as a
    # last axis.
    keys = leaf.load().shape if leaf.shape is None else leaf.shape[:-1]
    shape, dtype = tuple(keys), ''
  return ParamSpec(name, shape, dtype, default_layout(len(shape)))


def term(
  leaves: Mapping[Path, Leaf], types: LayerTypes, host: Host
) -> selectors.Term:
  """Returns a function that asks hooks for the terms of a selector."""
  layers: dict[Path, list[ParamSpec]] = {}
  for path, leaf in leaves.items():
    layers.setdefault(path[:-1], []).append(shown(path[-1], leaf))

  def ask(text: str, layer: Path) -> bool:
    if layer not in layers:
      return False
    site = Site(layer, tuple(layers[layer]), _types(types, layer))
    return bool(host.ask('surgery_match_layer', site=site, term=text))

  return ask


def chosen(
  checkpoint: Checkpoint,
  select: selectors.Text | selectors.Selector | Selection,
  types: LayerTypes,
  host: Host,
  *,
  missing: str = 'error',
) -> tuple[Path, ...]:
  """Returns the paths that a selector means; a layer means all beneath it.

  Args:
    checkpoint: the model.
    select: the selector.
    types: types of layers.
    host: whose hooks answer terms.
    missing: `'pass'` lets items and alternatives match nothing.

  Raises:
    SelectorError: for an item or an alternative that matches nothing.
  """
  if isinstance(select, Selection):
    return tuple(p for p in checkpoint if p in select)
  match = selectors.resolve(
    selectors.parse(select),
    checkpoint,
    lambda layer: _types(types, layer),
    term(checkpoint, types, host),
    owner=lambda path: _owner(checkpoint[path]),
    missing=missing,
  )
  return tuple(match.levels)


def _described(
  model: Any, graph: Any
) -> tuple[dict[Path, Any], LayerTypes, dict[Path, str | None]]:
  """Returns what there is to choose from, types of layers, and owners."""
  if isinstance(model, Checkpoint):
    types = model.manifest.layer_types
    owners = {path: _owner(leaf) for path, leaf in model.items()}
    types = types if graph is None else layers.of_graph(graph)
    return dict(model), types, owners
  if layers.is_graph(model):
    types = layers.of_graph(model)
    return dict(types), types, {}
  if hasattr(model, 'items') and hasattr(model, 'is_locked'):
    types = {} if graph is None else layers.of_graph(graph)
    owners = {path: _owner(param) for path, param in model.items()}
    return {path: p.value for path, p in model.items()}, types, owners
  raise errors.SurgeryError(
    'select: expected bx.Params, a bx.Graph or a Checkpoint, found '
    f'{type(model).__name__}.'
  )


def _text(value: Any) -> str:
  if isinstance(value, layers.LayerType):
    return value.names[0] if value.names else ''
  return str(value) if isinstance(value, Leaf) else describe(value)


def _leaf(value: Any) -> Leaf:
  """Returns a value of params, or a layer of a graph, as a leaf.

  This is `live.checkpoints.leaf_of` as far as hooks are shown it, without JAX.
  """
  load = functools.partial(_same, value)
  shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
  if shape is None or dtype is None:
    return Leaf(load)
  try:
    return Leaf(load, tuple(shape), str(np.dtype(dtype)))
  except TypeError:  # numpy has no dtype of PRNG keys.
    return Leaf(load, key=str(dtype))


def _same(value: Any) -> Any:
  return value


def select(
  model: Any,
  *select: selectors.Text,
  graph: Any = None,
  host: Host | None = None,
) -> Selection:
  """Chooses parameters of a model, or layers of a graph.

  Args:
    model: `bx.Params`, a `bx.Graph`, or a `Checkpoint`.
    *select: selectors; several are one list. Everything by default.
    graph: the graph, for `type:` selectors on params.
    host: whose plugins answer further terms.

  Returns:
    A selection; a layer stands for everything beneath it.

  Raises:
    SelectorError: for a selector that matches nothing.

  Example:
    surgery.select(params, '**/{query,value}', '!**/bias')
  """
  universe, types, owners = _described(model, graph)
  items: list[str] = []
  for one in select or (selectors.ALL,):
    items += [one] if isinstance(one, str) else list(one)
  leaves = {p: v for p, v in universe.items() if isinstance(v, Leaf)}
  for path, value in universe.items():
    if path not in leaves:
      leaves[path] = _leaf(value)
  chosen = selectors.resolve(
    selectors.parse(items),
    universe,
    lambda layer: _types(types, layer),
    term(leaves, types, host or default_host()),
    owner=owners.get,
  )
  return Selection({p: _text(v) for p, v in universe.items()}, chosen.levels)
