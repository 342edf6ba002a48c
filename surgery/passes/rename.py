"""Rename: tensors and layers under other names; adapters go along."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.adapting.beneath import handles_adapters
from surgery.contract.adapter import Adapter
from surgery.contract.site import PathNeeded, Site
from surgery.editing import following, tensors
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType, LayerTypes
from surgery.model.records import AdapterRecord, Records, SiteRecord, WeightSpec
from surgery.naming import paths, renaming, selectors
from surgery.naming.paths import Path
from surgery.naming.renaming import Rule


@handles_adapters
def rename(
  checkpoint: Checkpoint, rules: str | Iterable[str], *, host: Host
) -> Checkpoint:
  """Gives tensors and layers other names; their bytes are copied unread.

  All rules hold at once, so names may be swapped; the first that matches a path
  decides. An adapter follows the parameter that it rewrites, scales and the
  like follow the codes of a quantised weight, and what is known of layers
  follows them.

  Args:
    checkpoint: the model.
    rules: `OLD -> NEW`, or several; see `surgery.naming.renaming`.
    host: whose hooks are asked.

  Raises:
    RenameError: for a rule that cannot be read or decides nothing, and if two
      tensors would get one name, or one a name beneath another's.
    AdapterError: for an adapter that cannot follow.

  Example:
    rename: '**/h<i>/** -> **/block<i+1>/**'
    rename: ['a -> b', 'b -> a']
  """
  read = [renaming.parse(text) for text in tensors.texts(rules)]
  return renamed(checkpoint, read, host=host)


def renamed(
  checkpoint: Checkpoint, rules: Sequence[Rule], *, host: Host
) -> Checkpoint:
  """Gives tensors and layers other names, by rules that have been read.

  Args:
    checkpoint: the model.
    rules: the rules.
    host: whose hooks are asked.

  Raises:
    RenameError: for a rule that decides nothing, and if two tensors would get
      one name.
    AdapterError: for an adapter that cannot follow.
  """
  following.check_model(checkpoint)
  records = following.settled(checkpoint, host)
  names = _Names(checkpoint, rules, records)
  said = checkpoint.manifest
  trees = _trees(said.trees, names)
  moved = [_moved(record, names, host) for record in records.adapters]
  for of, parts in quantised.groups(checkpoint).items():
    for part in parts:
      if not names.decided(part):
        names.follow(part, quantised.beside(part, of, names(of)))
  leaves = _leaves(checkpoint, names, records)
  told = [
    _meaning(old, new, names)
    for old, new in zip(records.adapters, moved, strict=True)
  ]
  return checkpoint.replace(
    leaves=leaves,
    records=Records(told, records.probe),
    manifest=said.replace(
      trees=trees, layer_types=_layer_types(said.layer_types, names)
    ),
  )


class _Names:
  """Where each path goes.

  Args:
    checkpoint: the model.
    rules: the rules.
    records: the adapters.
  """

  def __init__(
    self, checkpoint: Checkpoint, rules: Sequence[Rule], records: Records
  ) -> None:
    # Weights that the sites of an adapter share belong to no layer, and stay.
    shared = {s.path for a in records.adapters for s in a.shared.values()}
    universe = [p for p in following.with_empty(checkpoint) if p not in shared]
    self._rules = rules
    self._new = renaming.resolved(rules, universe)
    if all(old == new for old, new in self._new.items()):
      raise errors.RenameError(
        'every tensor would keep its name. Change the rules.'
      )
    self.universe = universe

  def decided(self, path: Path) -> bool:
    """Whether a rule matches a path."""
    return path in self._new

  def follow(self, path: Path, new: Path) -> None:
    """Gives a path that no rule matches a new name."""
    self._new[path] = new

  def __call__(self, path: Path) -> Path:
    """Returns the new name of a tensor, which may lie in another half."""
    if path in self._new:
      return self._new[path]
    return self.of_layer(path)

  def of_layer(self, layer: Path) -> Path:
    """Returns the new name of a layer as a whole."""
    found = renaming.first(self._rules, layer) if layer else None
    return layer if found is None else found[1]


# Tensors.


def _leaves(
  checkpoint: Checkpoint, names: _Names, records: Records
) -> dict[Path, Leaf]:
  """Returns the leaves under their new names.

  Raises:
    RenameError: if two get one name.
  """
  owned = records.owned
  where = {
    p: p if p in owned and not names.decided(p) else paths.kept(names(p), p)
    for p in checkpoint
  }
  renaming.check_targets(where)
  leaves = {
    new: _retagged(checkpoint[old], old, names) for old, new in where.items()
  }
  # Sorted stays sorted, as all files of params are: renaming there and back
  # gives the same bytes.
  if list(checkpoint) == sorted(checkpoint):
    return {path: leaves[path] for path in sorted(leaves)}
  return leaves


def _retagged(leaf: Leaf, path: Path, names: _Names) -> Leaf:
  """Returns a leaf whose metadata has the new name of its parameter."""

  def change(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**said, 'name': names((*path[:-1], said['name']))[-1]}

  metadata = following.retagged(leaf.metadata, change)
  if leaf.codes is not None:
    leaf = quantised.moved(leaf, names(leaf.codes.of))
  if metadata == leaf.metadata:
    return leaf
  return leaf.replace(metadata=metadata)


def _trees(trees: Mapping[Path, Any], names: _Names) -> dict[Path, Any]:
  """Returns the structures of parameters under their new names.

  Raises:
    RenameError: if the parts of a parameter would go different ways.
  """
  if not trees:
    return {}
  new: dict[Path, Path] = {}
  for path in names.universe:
    tree = following.tree_of(path, trees)
    if tree is None:
      continue
    # What lies beneath the parameter must keep its path there, and all parts
    # must get the same new parameter above them.
    target, inner = names(path), path[len(tree) :]
    root = target[: len(target) - len(inner)]
    if target != root + inner or not root or new.setdefault(tree, root) != root:
      raise errors.RenameError(
        f'{paths.show(path)} is a part of the parameter '
        f'{paths.show(tree)} and would be {paths.show(target)}. Rename the '
        'parameter, which takes its parts along.'
      )
  return {new[path]: tree for path, tree in trees.items()}


# Types of layers.


def _layer_types(types: LayerTypes, names: _Names) -> LayerTypes:
  """Returns the types of layers by their new names.

  A layer that is split has its type in all places, and one that is made of
  layers of different types has none.
  """
  if not types:
    return types
  own: dict[Path, list[Path]] = {}
  for path in names.universe:
    own.setdefault(path[:-1], []).append(path)
  found: dict[Path, set[tuple[Any, ...]]] = {}
  made: dict[Path, LayerType] = {}
  for layer, kind in types.items():
    for new, layouts in _homes(layer, kind, own.get(layer, ()), names).items():
      made.setdefault(new, dataclasses.replace(kind, layouts=layouts))
      if made[new].names == kind.names:
        merged = {**made[new].layouts, **layouts}
        made[new] = dataclasses.replace(kind, layouts=merged)
      found.setdefault(new, set()).add(kind.names)
  return {p: kind for p, kind in made.items() if len(found[p]) == 1}


def _homes(
  layer: Path, kind: LayerType, own: Iterable[Path], names: _Names
) -> dict[Path, dict[str, str]]:
  """Returns where a layer goes, with the layouts of its parameters there."""
  homes: dict[Path, dict[str, str]] = {}
  for path in own:
    new = names(path)
    layouts = homes.setdefault(new[:-1], {})
    if path[-1] in kind.layouts:
      layouts[new[-1]] = kind.layouts[path[-1]]
  if not homes:
    return {names.of_layer(layer): dict(kind.layouts)}
  if len(homes) == 1:
    # And what such a layer may have, and this one has not.
    [(_, layouts)] = homes.items()
    here = {path[-1] for path in own}
    for name, layout in kind.layouts.items():
      if name not in here:
        layouts.setdefault(name, layout)
  return homes


# Adapters.


def _moved(record: AdapterRecord, names: _Names, host: Host) -> AdapterRecord:
  """Returns the record of an adapter that followed its parameters.

  Raises:
    AdapterError: if it cannot follow.
  """
  targets = {
    path: _target(record, one, names) for path, one in record.sites.items()
  }
  saved = _saved(record, names)
  moved = [one.site for one in targets.values()]
  stayed = [one.site for one in record.sites.values()]
  if moved == stayed and all(
    targets[p].weights == one.weights for p, one in record.sites.items()
  ):
    if saved == record.saved:
      return record
    return dataclasses.replace(record, saved=saved)
  patterns = _patterns(record.adapter, stayed, moved, names)
  adapter = dataclasses.replace(record.adapter, patterns=patterns)  # type: ignore[type-var]
  record = dataclasses.replace(record, adapter=adapter)
  sites = {}
  for path, one in targets.items():
    if one.site != record.sites[path].site:
      who = following.interceptor(record, one.site, host)
      _check_same(record, record.sites[path], one.site, who)
      one = dataclasses.replace(one, interceptor=who)
    sites[one.site.path] = one
  return dataclasses.replace(record, sites=sites, saved=saved)


def _saved(record: AdapterRecord, names: _Names) -> dict[Path, WeightSpec]:
  """Returns what was saved with an adapter, which goes where its layer goes."""
  saved = {}
  for path, spec in record.saved.items():
    new = names(path)
    if not names.decided(spec.path):
      names.follow(spec.path, (*new[:-1], spec.path[-1]))
    saved[new] = dataclasses.replace(spec, path=names(spec.path))
  return saved


def _target(
  record: AdapterRecord, one: SiteRecord, names: _Names
) -> SiteRecord:
  """Returns a site where it goes, served as before; sends its weights along.

  Raises:
    AdapterError: if its parts would go different ways.
  """
  site = one.site
  base = following.base_of(one)
  new = [names(path) for path in base]
  layer = new[0][:-1]
  for old, path in zip(base, new, strict=True):
    if path[:-1] != layer:
      raise _apart(record, base[0], new[0], old, path)
    if len(base) > 1 and path[-1] != old[-1]:
      raise errors.AdapterError(
        f'{paths.show(old)} would be {paths.show(path)}, and adapter '
        f'{record.name!r} knows the {len(base)} parameters that it rewrites in '
        'this layer by their names. Merge or detach the adapter first.'
      )
  weights: dict[str, WeightSpec] = {}
  for name, spec in one.weights.items():
    if not names.decided(spec.path):
      names.follow(spec.path, (*layer, spec.path[-1]))
    path = names(spec.path)
    if path[:-1] != layer:
      raise _apart(record, base[0], new[0], spec.path, path)
    weights[name] = dataclasses.replace(spec, path=path)
  params = tuple(
    dataclasses.replace(spec, name=path[-1])
    for spec, path in zip(site.params, new, strict=True)
  )
  site = dataclasses.replace(site, layer=layer, params=params)
  return dataclasses.replace(one, site=site, weights=weights)


def _apart(
  record: AdapterRecord, a: Path, new_a: Path, b: Path, new_b: Path
) -> errors.AdapterError:
  return errors.AdapterError(
    f'{paths.show(a)} would be {paths.show(new_a)}, and '
    f'{paths.show(b)} would be {paths.show(new_b)}: adapter {record.name!r} '
    'needs both in one layer. Rename the whole layer, or merge or detach the '
    'adapter first.'
  )


def _check_same(
  record: AdapterRecord, old: SiteRecord, site: Site, who: Any
) -> None:
  """Raises unless an adapter computes the same under the new name.

  Raises:
    AdapterError: naming the parameter.
  """
  from surgery.adapting import compute

  kinds = compute.kinds_of(old, record.shared)
  try:
    with compute.calling('apply', who, site):
      same = who == old.interceptor
      for spec in site.params:
        compute.uses(who, site.anonymous, spec.name, kinds)
  except PathNeeded:
    same = False
  if not same:
    raise errors.AdapterError(
      f'{paths.show(old.site.path)}: what adapter {record.name!r} '
      f"('{record.adapter.name}') computes depends on the parameter's name, so "
      f'it cannot follow to {paths.show(site.path)}. Merge or detach it first.'
    )


def _selector(text: str, names: _Names) -> str:
  """Returns a selector that names a path, with the path's new name."""
  item = selectors.parse(text).items[0]
  path = paths.parse(item.text)
  if (
    item.kind != 'glob' or not item.literal or item.text != paths.literal(path)
  ):
    return text
  beneath = [p for p in names.universe if p[: len(path)] == path]
  if not beneath:
    return text
  inner = beneath[0][len(path) :]
  new = names(beneath[0])
  new = new[: len(new) - len(inner)]
  if not new or any(names(p) != (*new, *p[len(path) :]) for p in beneath):
    return text
  return ('!' if item.negate else '') + paths.literal(new)


def _patterns(
  adapter: Adapter, old: Sequence[Site], new: Sequence[Site], names: _Names
) -> dict[str, dict[str, Any]]:
  """Returns patterns that give each site the options that it had.

  Those that name a path follow; a site that others do not give the same
  options any more gets a pattern of its own.
  """
  patterns = {_selector(s, names): dict(v) for s, v in adapter.patterns}

  def options(patterns: Iterable[tuple[str, Any]], site: Site) -> Any:
    for selector, values in patterns:
      if selectors.parse(selector).matches(site.path, site.types):
        return dict(values)
    return None

  own = {
    paths.literal(b.path): options(adapter.patterns, a) or {}
    for a, b in zip(old, new, strict=True)
    if options(adapter.patterns, a) != options(patterns.items(), b)
  }
  used = {
    selector: values
    for selector, values in patterns.items()
    if any(selectors.parse(selector).matches(s.path, s.types) for s in new)
  }
  return {**own, **{s: v for s, v in used.items() if s not in own}}


def _meaning(
  old: AdapterRecord, new: AdapterRecord, names: _Names
) -> AdapterRecord:
  """Returns a record whose selector means what it meant, or that has none."""
  if old is new or new.to is None:
    return new
  to = _followed(new.to, names)
  read = selectors.parse(to if isinstance(to, str) else list(to))
  sites = [one.site for one in new.sites.values()]
  same = all(read.matches(s.path, s.types) for s in sites)
  return dataclasses.replace(new, to=to if same else None)


def _followed(
  to: str | tuple[str, ...], names: _Names
) -> str | tuple[str, ...]:
  if isinstance(to, str):
    return _selector(to, names)
  return tuple(_selector(text, names) for text in to)
