"""Map: tensors under the names, and with the axes, of another framework."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.adapting.beneath import handles_adapters
from surgery.contract.site import ParamSpec, default_layout
from surgery.editing import following
from surgery.host.manager import Host
from surgery.interop import maps
from surgery.interop.maps import Place, Way
from surgery.model import layouts
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType
from surgery.model.manifest import Manifest
from surgery.model.records import AdapterRecord, Records, SiteRecord
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.naming.renaming import Rule
from surgery.passes import drop, rename
from surgery.passes.reshape import transposed


@handles_adapters
def map_(
  checkpoint: Checkpoint,
  name: str | Mapping[str, Any],
  *,
  to: Way | None = None,
  root: str | None = None,
  host: Host,
) -> Checkpoint:
  """Gives all tensors the names and axes of another framework.

  A tensor that the map does not name is an error. Tensors that models compute
  themselves (positions, masks) may be left out by a map on the way to JAX, and
  are missing on the way back; all others are restored bit for bit. Adapters are
  kept.

  Args:
    checkpoint: the model.
    name: the map, as `surgery maps` lists them; a file of YAML; or the content
      of such a file.
    to: `jax` or `torch`; by default the direction that matches all tensors.
    root: prefix of all paths in the tree: the name of blox's graph, or `params`
      of flax.
    host: offers the maps.

  Raises:
    RenameError: for an unknown map, or tensors that it does not name.
    SurgeryError: for a tensor with another number of axes than in the map.
    AdapterError: for an adapter that cannot follow.

  Example:
    map: llama-flax
    map: {name: bert-blox, to: torch, root: net}
  """
  found = maps.find(name, host, root)
  following.check_model(checkpoint)
  records = following.settled(checkpoint, host)
  # Weights of adapters go where their sites go.
  owned = {path for one in records.adapters for path in one.weight_paths()}
  universe = [path for path in checkpoint if path not in owned]
  way = found.way(universe) if to is None else to
  lost = found.homeless(universe, way)
  if lost:
    raise found.lacking(lost, universe, way)
  gone = {path for path in universe if found.is_left_out(path, way)}
  if gone:
    shown = [paths.literal(path) for path in universe if path in gone]
    checkpoint = drop.drop(checkpoint, shown, host=host)
  kept = [path for path in universe if path not in gone]
  places = {path: found.place(path, way) for path in kept}
  where = {path: one for path, one in places.items() if one is not None}
  known = _layouts(checkpoint, where)
  # Names first, as one rule, so that adapters, types of layers and metadata
  # follow as they do in `rename`; then axes.
  after = rename.renamed(checkpoint, [_Whole(found.name, where)], host=host)
  orders = {
    place.path: place.axes for place in where.values() if place.axes is not None
  }
  adapters = [_turned(one, orders) for one in after.records(host).adapters]
  return after.replace(
    leaves=_ordered(after, orders, found.name),
    records=Records(adapters, records.probe),
    manifest=_manifest(after, way, known),
  )


def _ordered(
  after: Checkpoint, orders: Mapping[Path, Sequence[int]], name: str
) -> dict[Path, Leaf]:
  """Returns leaves with their axes in other orders.

  Raises:
    SurgeryError: for a tensor with another number of axes than in the map.
  """
  leaves = dict(after)
  for path, order in orders.items():
    leaf = leaves[path]
    if len(leaf.shape or ()) != len(order):
      raise errors.SurgeryError(
        f'{paths.show(path)}: map {name!r} expects {len(order)} axes, found '
        f'{leaf.shape}.'
      )
    if tuple(order) != tuple(range(len(order))):
      leaves[path] = transposed(leaf, order)
  return leaves


_NOTHING = re.compile(r'(?!)')


class _Whole(Rule):
  """All rules of a map as one rule, by a table of paths."""

  def __init__(self, name: str, where: Mapping[Path, Place]) -> None:
    super().__init__(f'map {name} -> map {name}', _NOTHING, (), ())
    object.__setattr__(self, '_where', where)

  def apply(self, path: Path) -> Path | None:
    """Returns the new name of a path; None for one that is no tensor."""
    place = self._where.get(path)  # type: ignore[attr-defined]
    return None if place is None else place.path

  def unmet(self, universe: Any) -> list[str]:
    """Returns nothing: a map serves models that have only some of its names."""
    del universe
    return []


def _layouts(
  checkpoint: Checkpoint, where: Mapping[Path, Place]
) -> dict[Path, str]:
  """Returns layouts of the tree that differ from JAX's usual ones."""
  before = layouts.found(checkpoint, checkpoint.manifest)
  known = {}
  for path, place in where.items():
    if path not in before:
      continue
    letters = before[path].letters
    if place.axes is not None and len(place.axes) == len(letters):
      letters = ''.join(letters[axis] for axis in place.axes)
    if letters != default_layout(len(letters)):
      known[place.path] = letters
  return known


def _manifest(
  after: Checkpoint, way: Way, known: Mapping[Path, str]
) -> Manifest:
  """Returns the manifest of a model of another framework."""
  manifest = after.manifest
  metadata = dict(manifest.metadata)
  # Layouts that earlier steps recorded were those of the other framework.
  types = {path: one for path, one in manifest.layer_types.items() if one.names}
  if way == 'torch':
    metadata[layouts.FORMAT] = layouts.TORCH
  else:
    metadata.pop(layouts.FORMAT, None)
    for path, letters in known.items():
      one = types.get(path[:-1], LayerType(()))
      types[path[:-1]] = dataclasses.replace(
        one, layouts={**one.layouts, path[-1]: letters}
      )
  return manifest.replace(metadata=metadata, layer_types=types)


# Adapters.


def _turned(
  record: AdapterRecord, orders: Mapping[Path, Sequence[int] | None]
) -> AdapterRecord:
  """Returns a record whose parameters have their axes in other orders.

  An adapter sees inputs and outputs, not the layout. So its weights are
  unchanged as long as inputs keep their order among themselves, and outputs.

  Raises:
    AdapterError: if they do not.
  """
  sites: dict[Path, SiteRecord] = {}
  for path, one in record.sites.items():
    params = tuple(
      _spec(spec, orders.get((*one.site.layer, spec.name)), path, record.name)
      for spec in one.site.params
    )
    site = dataclasses.replace(one.site, params=params)
    sites[path] = dataclasses.replace(one, site=site)
  if sites == record.sites:
    return record
  return dataclasses.replace(record, sites=sites)


def _spec(
  spec: ParamSpec, order: Sequence[int] | None, path: Path, name: str
) -> ParamSpec:
  if order is None:
    return spec
  if len(order) != len(spec.shape) or any(
    [axis for axis in order if spec.layout[axis] == role]
    != [axis for axis, letter in enumerate(spec.layout) if letter == role]
    for role in 'io'
  ):
    raise errors.AdapterError(
      f'{paths.show(path)}: its inputs have another order in the other '
      f'framework, and adapter {name!r} cannot follow. Merge or detach it '
      'first.'
    )
  turn = lambda some: tuple(some[axis] for axis in order)
  return dataclasses.replace(
    spec,
    shape=turn(spec.shape),
    layout=''.join(turn(spec.layout)),
    sharding=turn(spec.sharding) if spec.sharding else (),
  )
