"""A model of any framework as params of the library, and back.

This is the one place where the two meet. Verbs work on `bx.Params`, which a
checkpoint is made of; a tree becomes such params, by path, and what comes out
becomes a tree of the same structure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import blox as bx

from surgery import errors
from surgery.contract.trees import Slot, Tree
from surgery.host.manager import Host
from surgery.live import params as live
from surgery.model.layers import LayerType, LayerTypes
from surgery.model.manifest import Manifest
from surgery.model.records import Records
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.trees.adapted import AdaptedTree, Flag, Flags, flat, make, nested

_NONE = Records()
_PLAIN = Flags({})


def kind_of(value: Any, host: Host) -> Tree | None:
  """Returns the framework that a model is of; None if it is no model."""
  if isinstance(value, bx.Params):
    return None
  return next((t for t in host.trees.values() if t.owns(value)), None)


def bare(value: Any, kind: Tree) -> AdaptedTree:
  """Returns a model as a tree without adapters, of which no type is known."""
  return make(kind, value, {}, _NONE, _PLAIN, (), {})


def tree_of(
  value: Any, kind: Tree, layer_types: LayerTypes | None = None
) -> AdaptedTree:
  """Returns a user's own model as a tree without adapters."""
  types = dict(layer_types or kind.layers(value, (), {}))
  notes = {'manifest': Manifest(layer_types=_placed(types, value))}
  return make(kind, value, {}, _NONE, _PLAIN, (), notes)


def with_layers(tree: AdaptedTree, layer_types: LayerTypes) -> AdaptedTree:
  """Returns a tree of which more is known of the layers."""
  said = tree._notes.get('manifest', Manifest())
  known = {**said.layer_types, **_placed(layer_types, tree.base)}
  notes = {**tree._notes, 'manifest': said.replace(layer_types=known)}
  return make(
    tree._kind,
    tree.base,
    tree.weights,
    tree.records,
    tree._flags,
    tree._aliases,
    notes,
  )


def _placed(types: LayerTypes, value: Any) -> dict[Path, LayerType]:
  """Returns types of layers by the paths that they have in variables."""
  if not isinstance(value, Mapping) or not isinstance(
    value.get('params'), Mapping
  ):
    return dict(types)
  return {(name, *path): one for name in value for path, one in types.items()}


def to_params(tree: AdaptedTree) -> live.AdaptedParams:
  """Returns a tree as params of which each array is one, without copying.

  Raises:
    AdapterError: if arrays that were one have been separated.
  """
  kind, flags = tree._kind, tree._flags
  data = {}
  slots = kind.slots(tree.base)
  for path, slot in slots.items():
    trainable, metadata = flags.get(path, _default(slot))
    data[path] = bx.Param(slot.value, trainable, dict(metadata))
  for path, weight in flat(tree.weights):
    if path in data:
      raise errors.AdapterError(
        f'{paths.show(path)}: the model has a parameter of this path, and so '
        'has an adapter a weight. Attach under another name=.'
      )
    trainable, metadata = flags[path]
    value = kind.unweighted(weight)
    if value is not None:
      data[path] = bx.Param(value, trainable, dict(metadata))
  _check_shared(tree)
  _check_sites(tree.records, slots)
  notes = {**tree._notes, 'tree': tree}
  return live.noted(data, tree.records, notes)


def _check_sites(records: Records, slots: Mapping[Path, Slot]) -> None:
  """Raises if an adapted array is not what the adapter was attached to.

  Raises:
    AdapterError: naming the parameter, and both shapes.
  """
  for record in records.adapters:
    for site in record.sites.values():
      for spec in site.site.params:
        slot = slots.get((*site.site.layer, spec.name))
        shape = getattr(getattr(slot, 'value', None), 'shape', None)
        if shape is None or len(shape) < len(spec.shape):
          continue
        core = tuple(shape[len(shape) - len(spec.shape) :])
        if core != spec.shape:
          where = paths.show((*site.site.layer, spec.name))
          raise errors.AdapterError(
            f'{where}: the model has an array of shape {tuple(shape)} there '
            f'now, and adapter {record.name!r} was attached to one of '
            f'{spec.shape}. Somebody has changed the model since; attach to it '
            'as it is now.'
          )


def _default(slot: Slot) -> Flag:
  sharding = any(slot.sharding)
  return slot.trainable, {'sharding': slot.sharding} if sharding else {}


def _check_shared(tree: AdaptedTree) -> None:
  """Raises if an adapted array is not any more the one that two layers share.

  Raises:
    AdapterError: naming both.
  """
  if not tree._aliases:
    return
  now = tree._kind.shared(tree.base)
  adapted = tree.records.chains
  for other, first in tree._aliases:
    if now.get(other) == first:
      continue
    if any(path[: len(first)] == first for path in adapted):
      raise errors.AdapterError(
        f'{paths.show(other)} and {paths.show(first)} were one when the '
        'adapter was attached, and a transformation of JAX has made two of '
        'them, of which one would go unadapted. Use those of the framework, as '
        'nnx.jit and nnx.grad.'
      )


def from_params(
  params: bx.Params, like: AdaptedTree, *, half: bool = False
) -> Any:
  """Returns params as a tree of the structure of another.

  Args:
    params: what a verb made.
    like: the tree that it was given.
    half: whether what is missing is that of a half.

  Returns:
    An `AdaptedTree`; the user's own structure if there is no adapter, and
    nothing was frozen in what had none before.
  """
  kind, records = like._kind, live.records_of(params)
  owned = records.owned
  values = {p: one.value for p, one in params.items() if p not in owned}
  slots = kind.slots(like.base)
  half = half or bool(live.missing_of(params))
  lacking = half and values.keys() != slots.keys()
  moved = not half and values.keys() != slots.keys()
  if lacking:
    # What trains is a half without functions and the like.
    held = {path: values.get(path) for path in slots}
    base = kind.build(like.base, held, None)
  elif moved:
    base = kind.rebuilt(like.base, values)
    slots = kind.slots(base)
  else:
    base = kind.build(like.base, values)
  flags = _flags(params, slots, _stay(params, like, moved))
  if not records.adapters and (like.records.adapters or not flags):
    return base
  weights = {
    path: kind.weight(
      param.value,
      param.metadata,
      param.trainable and path not in records.idle,
    )
    for path, param in params.items()
    if path in owned
  }
  weights = {**dict.fromkeys(owned), **weights}
  aliases = tuple(sorted(kind.shared(base).items()))
  notes = {k: v for k, v in live.notes_of(params).items() if k != 'tree'}
  return make(kind, base, nested(weights), records, flags, aliases, notes)


def _stay(
  params: bx.Params, like: AdaptedTree, moved: bool
) -> dict[Path, Flag]:
  """Returns flags of what a half lacks, so that halves have one structure.

  Args:
    params: what a verb made.
    like: the tree that it was given.
    moved: whether parameters were renamed or left out.
  """
  owned, before = live.records_of(params).owned, like.records.owned
  return {
    path: flag
    for path, flag in like._flags.items()
    if path not in params
    and (path in owned or (not moved and path not in before))
  }


def _flags(
  params: bx.Params, slots: Mapping[Path, Slot], found: dict[Path, Flag]
) -> Flags:
  """Returns what slots do not say by themselves, and what is found already."""
  for path, param in params.items():
    flag = param.trainable, dict(param.metadata)
    if path not in slots or _default(slots[path]) != flag:
      found[path] = flag
  return Flags(found)


def check_stacked(tree: AdaptedTree, params: bx.Params, said: bool) -> None:
  """Raises where an array is stacked, and not in front, as far as is known.

  Args:
    tree: the tree, which knows shapes of its layers.
    params: the same as params.
    said: whether the caller says what is stacked.

  Raises:
    SiteError: naming the parameter and both shapes.
  """
  types = tree._notes.get('manifest', Manifest()).layer_types
  for path, param in params.items():
    known = types.get(path[:-1])
    core = None if known is None else known.shapes.get(path[-1])
    shape = tuple(getattr(param.value, 'shape', ()))
    if core is None or len(shape) <= len(core):
      continue
    extra = len(shape) - len(core)
    kept = itertools.combinations(range(len(shape)), len(core))
    fits = {axes for axes in kept if tuple(shape[i] for i in axes) == core}
    front = tuple(range(extra, len(shape)))
    if front not in fits:
      raise errors.SiteError(
        f'{paths.show(path)}: it has the shape {shape} and its layer one of '
        f'{core}, so it is stacked along another axis than the first, which '
        'adapters cannot follow. Stack along axis 0 (variable_axes={'
        "'params': 0}, out_axes=0)."
      )
    if len(fits) > 1 and not said:
      raise errors.SiteError(
        f'{paths.show(path)}: it has the shape {shape} and its layer one of '
        f'{core}, so several axes may be the stacked one. If it is the first, '
        f'say stacked={extra}; no other can be.'
      )


def masked(mask: bx.Params, like: AdaptedTree) -> Any:
  """Returns flags as a tree of the structure of another.

  What is no array has False: a function in its place would be called.
  """
  made = from_params(mask, like)
  kind = like._kind
  base = made.base if isinstance(made, AdaptedTree) else made
  flags = {p: mask[p].value for p in mask.keys() if p not in like.records.owned}
  flagged = kind.build(like.base, flags, False)
  if not isinstance(made, AdaptedTree):
    return flagged
  del base
  made.base = flagged
  return made


def loaded(params: bx.Params, like: AdaptedTree, where: str) -> Any:
  """Returns what a file holds in the structure of a model.

  Raises:
    BaseMismatchError: naming a parameter that the model has otherwise.
  """
  kind, owned = like._kind, live.records_of(params).owned
  slots = kind.slots(like.base)
  for path in (*slots, *params.keys()):
    if path in owned:
      continue
    shape = _shape(slots[path].value) if path in slots else None
    held = _shape(params[path].value) if path in params else None
    if shape != held:
      said = lambda one: 'is missing' if one is None else f'has shape {one}'
      raise errors.BaseMismatchError(
        f'load: {paths.show(path)} {said(held)} in {where}, and in the model '
        f'that was given as like= it {said(shape)}. Give a model that was made '
        'with the same configuration.'
      )
  empty = tree_of(like.base, kind)
  notes = {**empty._notes, **live.notes_of(params)}
  data = {path: params[path] for path in params.keys()}
  noted = live.noted(data, live.records_of(params), notes)
  return from_params(noted, empty)


def _shape(value: Any) -> tuple[int, ...]:
  return tuple(getattr(value, 'shape', ()))


def as_dicts(params: bx.Params) -> Any:
  """Returns params as nested dicts by the segments of their paths."""
  from surgery.trees.pytrees import Plain

  owned = live.records_of(params).owned
  values = {p: one.value for p, one in params.items() if p not in owned}
  empty = tree_of(nested(values), Plain())
  return from_params(params, empty)
