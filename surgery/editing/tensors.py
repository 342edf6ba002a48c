"""Edits a checkpoint: changed, new and removed tensors, checked."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.editing import choosing, following, regions
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, renaming, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

# Checkpoints beside the one that is changed, by the names that a recipe has
# for them.
Inputs = Mapping[str, Checkpoint]

_SHOWN = 5


def chosen(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  verb: str,
  host: Host,
) -> dict[Path, Leaf]:
  """Returns the arrays that a selector means.

  Raises:
    SelectorError: for a selector that matches nothing.
    SurgeryError: if one of them is not an array.
  """
  types = checkpoint.manifest.layer_types
  found = choosing.chosen(checkpoint, select, types, host)
  if not found:
    raise errors.SelectorError('nothing is selected.')
  for path in found:
    regions.array(checkpoint[path], path, verb)
  return {path: checkpoint[path] for path in found}


def texts(rules: str | Iterable[str]) -> list[str]:
  """Returns rules as a list.

  Raises:
    RenameError: if there is none, or one twice.
  """
  found = [rules] if isinstance(rules, str) else list(rules)
  if not found:
    raise errors.RenameError("expected rules 'OLD -> NEW', found none.")
  for text, count in collections.Counter(map(str, found)).items():
    if count > 1:
      raise errors.RenameError(f'rule {text!r} is given twice.')
  return found


def split_alias(text: str) -> tuple[str | None, str]:
  """Splits `alias::rest`; None where there is no alias."""
  head, sign, rest = text.partition('::')
  if sign and head.strip().isidentifier():
    return head.strip(), rest.strip()
  return None, text


def aliased(
  checkpoint: Checkpoint, alias: str | None, inputs: Inputs | None
) -> Checkpoint:
  """Returns the checkpoint that an alias stands for.

  Raises:
    SurgeryError: for an unknown alias.
  """
  if alias is None:
    return checkpoint
  known = inputs or {}
  if alias not in known:
    hint = errors.suggest(alias, known)
    shown = ', '.join(known) or 'none'
    raise errors.SurgeryError(
      f'no input is called {alias!r}; the inputs are: {shown}.{hint}'
    )
  return known[alias]


def pairs(
  checkpoint: Checkpoint,
  rules: Sequence[str],
  inputs: Inputs | None,
) -> list[tuple[Path, Leaf, Path, str]]:
  """Returns the tensors that rules `[ALIAS::]OLD [-> NEW]` match.

  Args:
    checkpoint: the model.
    rules: the rules; without an arrow names stay.
    inputs: other checkpoints by alias.

  Returns:
    For each tensor that a rule matches its path, itself, its new path, and
    the rule.

  Raises:
    RenameError: for a rule that cannot be read or matches nothing.
  """
  found = []
  for text in rules:
    alias, rest = split_alias(text)
    source = aliased(checkpoint, alias, inputs)
    read = renaming.parse if renaming.has_arrow(rest) else renaming.staying
    rule = read(rest)
    universe = dict(source)
    where = renaming.resolved([rule], universe)
    found += [(old, universe[old], new, text) for old, new in where.items()]
  return found


def reverse(text: str) -> renaming.Rule | None:
  r"""Returns the rule from new names to old ones.

  Args:
    text: a rule `OLD -> NEW`, or `OLD` alone, of which names stay.

  Returns:
    None if there is none, as where a name is computed: `<i+1>`, `\1`.
  """
  if not renaming.has_arrow(text):
    return renaming.parse(f'{text} -> {text}')
  old, new = renaming.sides(text)
  try:
    return renaming.parse(f'{new} -> {old}')
  except errors.RenameError:
    return None


def _owned(checkpoint: Checkpoint, host: Host) -> dict[Path, tuple[str, str]]:
  """Returns for each path that adapters rewrite or own which one, and how."""
  found: dict[Path, tuple[str, str]] = {}
  for record in following.settled(checkpoint, host).adapters:
    for path in record.weight_paths():
      found[path] = (record.name, 'is a weight of')
    for site in record.sites.values():
      for path in following.base_of(site):
        found.setdefault(path, (record.name, 'is rewritten by'))
    for path in record.saved:
      found.setdefault(path, (record.name, 'is saved with'))
  return found


def check_free(
  checkpoint: Checkpoint, touched: Iterable[Path], host: Host
) -> None:
  """Raises if an adapter rewrites or owns one of some tensors.

  Raises:
    AdapterError: naming both.
  """
  owned = _owned(checkpoint, host)
  for path in touched:
    if path in owned:
      name, how = owned[path]
      raise errors.AdapterError(
        f'{paths.show(path)} {how} adapter {name!r}, which cannot '
        f'follow. Merge or detach {name!r} first, or select other tensors.'
      )


def _check_trees(checkpoint: Checkpoint, touched: Iterable[Path]) -> None:
  trees = checkpoint.manifest.trees
  for path in touched if trees else ():
    tree = following.tree_of(path, trees)
    if tree is not None:
      raise errors.SurgeryError(
        f'{paths.show(path)} is a part of the parameter '
        f'{paths.show(tree)}, whose value is not an array. Select other '
        'tensors.'
      )


def check_new(
  checkpoint: Checkpoint,
  fresh: Mapping[Path, Leaf],
  gone: Collection[Path],
  overwrite: bool = False,
) -> None:
  """Raises unless new names are free, and none lies beneath another.

  Raises:
    RenameError: naming those that are not.
  """
  left = {p for p in checkpoint if p not in gone}
  taken = [] if overwrite else [p for p in fresh if p in left]
  if taken:
    shown = errors.listed(map(paths.show, taken), _SHOWN)
    raise errors.RenameError(
      f'{shown} exists already. Drop it first, or give another name.'
    )
  both = left | set(fresh)
  for path in both:
    if not path or '' in path:
      raise errors.RenameError(f'a name with an empty part: {path!r}.')
    # Old names may lie beneath old ones; what is new must not add such a pair.
    for above in (path[:n] for n in range(1, len(path))):
      if above in both and (path in fresh or above in fresh):
        _check_beneath(path, above, fresh.get(path))


def _check_beneath(path: Path, above: Path, leaf: Leaf | None) -> None:
  """Raises unless a tensor may lie beneath another one.

  Args:
    path: path of the tensor.
    above: path of the other one.
    leaf: the tensor, if it is new.
  """
  if leaf is not None and leaf.codes and leaf.codes.of == above:
    return  # As `weight.absmax` of bitsandbytes beneath `weight`.
  raise errors.RenameError(
    f'{paths.show(path)} would lie beneath the tensor {paths.show(above)}. '
    'Give another name.'
  )


def edited(
  checkpoint: Checkpoint,
  verb: str,
  *,
  changed: Mapping[Path, Leaf] | None = None,
  fresh: Mapping[Path, Leaf] | None = None,
  gone: Collection[Path] = (),
  behind: Mapping[Path, Path] | None = None,
  overwrite: bool = False,
  rearranged: bool = False,
  host: Host,
) -> Checkpoint:
  """Returns a checkpoint with some tensors changed, added and removed.

  Args:
    checkpoint: the model.
    verb: the pass, for messages.
    changed: tensors that keep their names.
    fresh: tensors under new names.
    gone: paths of tensors to remove.
    behind: the old tensor that a new one follows; by default it comes last.
    overwrite: whether a new name may be that of an old tensor.
    rearranged: whether an adapter cannot follow what changed even where shape
      and dtype are the same.
    host: knows the adapters' types.

  Raises:
    RenameError: for a name that is taken.
    AdapterError: for a tensor with an adapter that cannot follow.
    QuantisedError: for a part of a quantised weight that would change alone.
    SurgeryError: if nothing would be left.
  """
  changed, fresh, gone = changed or {}, fresh or {}, set(gone)
  following.check_model(checkpoint)
  check_new(checkpoint, fresh, gone, overwrite)
  _check_codes(checkpoint, {**changed, **fresh}, gone, verb)
  replaced = [p for p in fresh if p in checkpoint and p not in gone]
  # An adapter goes on with other values of the same shape and dtype, unless the
  # pass says that places were exchanged.
  moved = [
    p
    for p, leaf in {**changed, **{p: fresh[p] for p in replaced}}.items()
    if rearranged or _form(leaf) != _form(checkpoint[p])
  ]
  check_free(checkpoint, (*gone, *moved), host)
  _check_trees(checkpoint, (*gone, *changed, *replaced))
  leaves = _placed(checkpoint, changed, fresh, gone, behind or {})
  if not leaves:
    raise errors.SurgeryError(
      f'nothing would be left of {len(checkpoint)} tensors.'
    )
  types = following.layer_types(checkpoint, leaves) if gone else None
  manifest = checkpoint.manifest
  if types is not None:
    manifest = manifest.replace(layer_types=types)
  return checkpoint.replace(leaves=leaves, manifest=manifest)


def _check_codes(
  checkpoint: Checkpoint,
  made: Mapping[Path, Leaf],
  gone: Collection[Path],
  verb: str,
) -> None:
  """Raises if a part of a quantised weight would be replaced or go alone.

  Raises:
    QuantisedError: naming the weight.
  """
  if not any(leaf.codes for leaf in checkpoint.values()):
    return
  for path, leaf in made.items():
    if path in checkpoint and path not in gone and leaf.codes is None:
      quantised.refuse(checkpoint[path], verb)
  whole = quantised.without(checkpoint, gone)
  for path in whole.difference(gone):
    quantised.refuse(checkpoint[path], verb)


def _form(leaf: Leaf) -> tuple[Any, ...]:
  return leaf.shape, leaf.dtype


def _placed(
  checkpoint: Checkpoint,
  changed: Mapping[Path, Leaf],
  fresh: Mapping[Path, Leaf],
  gone: Collection[Path],
  behind: Mapping[Path, Path],
) -> dict[Path, Leaf]:
  """Returns the new leaves, sorted if the old ones were."""
  following_: dict[Path, list[Path]] = {}
  for path in fresh:
    if path in behind and behind[path] in checkpoint:
      following_.setdefault(behind[path], []).append(path)
  leaves: dict[Path, Leaf] = {}
  for path, leaf in checkpoint.items():
    if path not in gone:
      leaves[path] = fresh.get(path) or changed.get(path, leaf)
    # Also behind a tensor that is removed: it takes that one's place.
    leaves.update((new, fresh[new]) for new in following_.get(path, ()))
  for path, leaf in fresh.items():
    leaves.setdefault(path, leaf)
  # Sorted stays sorted, so that renaming there and back gives the same file.
  before = list(checkpoint)
  if before == sorted(before):
    return {path: leaves[path] for path in sorted(leaves)}
  return leaves


def as_new(leaf: Leaf) -> Leaf:
  """Returns a leaf as an independent tensor, without an adapter's metadata."""
  metadata = {
    k: v
    for k, v in leaf.metadata.items()
    if k not in ('adapter', following.TAG)
  }
  same = len(metadata) == len(leaf.metadata)
  return leaf if same else leaf.replace(metadata=metadata)


def together(leaves: Sequence[Leaf]) -> Leaf:
  """Returns a leaf with the flags and metadata that several tensors share."""
  first = as_new(leaves[0])
  metadata = {
    k: v
    for k, v in first.metadata.items()
    if all(one.metadata.get(k) == v for one in leaves)
  }
  trains = all(one.trainable for one in leaves)
  was = first.was if all(one.was == first.was for one in leaves) else None
  return first.replace(metadata=metadata, trainable=trains, was=was)
