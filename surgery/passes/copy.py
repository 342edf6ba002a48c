"""Copy and move: tensors under further names, or under others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from surgery import errors
from surgery.adapting.beneath import handles_adapters
from surgery.editing import following, tensors
from surgery.host.manager import Host
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType
from surgery.naming import paths, renaming, selectors
from surgery.naming.paths import Path
from surgery.passes.drop import drop
from surgery.passes.rename import rename


def copy(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  overwrite: bool = False,
  inputs: tensors.Inputs | None = None,
  host: Host,
) -> Checkpoint:
  """Copies tensors and layers to further names, also from another model.

  Bytes are copied unread. What is known of a layer goes along, and so do scales
  with the codes of a quantised weight; adapters do not.

  Args:
    checkpoint: the model.
    rules: `OLD -> NEW`, or several. `ALIAS::OLD -> NEW` copies from another
      input, `ALIAS::OLD` alone under the same names.
    overwrite: whether a new name may be that of a tensor that is there.
    inputs: other checkpoints by alias.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, a name that is taken, or two
      tensors that would get one name.
    AdapterError: if a weight of an adapter would be copied.

  Example:
    copy: 'encoder/** -> target_encoder/**'
    copy: ['other::**/mlp -> **/experts/1']
  """
  fresh: dict[Path, Leaf] = {}
  types = dict(checkpoint.manifest.layer_types)
  trees = dict(checkpoint.manifest.trees)
  for text in tensors.texts(rules):
    alias, _ = tensors.split_alias(text)
    source = tensors.aliased(checkpoint, alias, inputs)
    owned = following.settled(source, host).owned
    found = tensors.pairs(checkpoint, [text], inputs)
    for old, leaf, new in _with_parts(source, found):
      if old in owned:
        raise errors.AdapterError(
          f'{paths.show(old)} is a weight of an adapter, and copies have '
          'no adapters. Merge or detach first, or copy other tensors.'
        )
      if new in fresh:
        raise errors.RenameError(
          f'{text!r}: two tensors would be {paths.show(new)}. Change the rules.'
        )
      fresh[new] = tensors.as_new(leaf)
      _describe(source, old, new, types, trees, text)
  result = tensors.edited(
    checkpoint,
    'copy',
    fresh=fresh,
    overwrite=overwrite,
    host=host,
  )
  said = result.manifest.replace(layer_types=types, trees=trees)
  return result.replace(manifest=said)


def _with_parts(
  source: Checkpoint, found: list[tuple[Path, Leaf, Path, str]]
) -> Iterator[tuple[Path, Leaf, Path]]:
  """Yields what is copied; codes of a quantised weight take its scales along.

  Raises:
    QuantisedError: for scales that would be copied without their codes.
  """
  groups = quantised.groups(source)
  where = {old: new for old, _, new, _ in found}
  for of, parts in groups.items() if where.keys() & groups.keys() else ():
    if of in where:
      for part in parts:
        where.setdefault(part, quantised.beside(part, of, where[of]))
  for old, new in where.items():
    leaf = source[old]
    if leaf.codes is not None:
      if leaf.codes.of not in where:
        quantised.refuse(leaf, f'copy: {paths.show(old)} without its codes')
      leaf = quantised.moved(leaf, where[leaf.codes.of])
    yield old, leaf, new


def _describe(
  source: Checkpoint,
  old: Path,
  new: Path,
  types: dict[Path, LayerType],
  trees: dict[Path, Any],
  text: str,
) -> None:
  """Adds what is known of a tensor and its layers for its copy.

  Raises:
    RenameError: if a part of a parameter would be copied without the rest.
  """
  tree = following.tree_of(old, source.manifest.trees)
  if tree is not None:
    inner = old[len(tree) :]
    if new[len(new) - len(inner) :] != inner:
      raise errors.RenameError(
        f'{text!r}: {paths.show(old)} is a part of the parameter '
        f'{paths.show(tree)}. Copy all of it under one name.'
      )
    trees[new[: len(new) - len(inner)]] = source.manifest.trees[tree]
  known = source.manifest.layer_types
  for n in range(1, min(len(old), len(new))):
    a, b = old[:-n], new[:-n]
    if a[-1] != b[-1] and n > 1:
      break
    if a in known:
      types.setdefault(b, known[a])


@handles_adapters
def move(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  overwrite: bool = False,
  host: Host,
) -> Checkpoint:
  """Moves tensors and layers to other names; adapters go along.

  As `rename`, but that what is there under a new name may be replaced.

  Args:
    checkpoint: the model.
    rules: `OLD -> NEW`, or several.
    overwrite: whether what is there under a new name is dropped first.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    AdapterError: for an adapter that cannot follow.

  Example:
    move: {rules: 'ema/** -> net/**', overwrite: true}
  """
  written = tensors.texts(rules)
  if overwrite:
    read = [renaming.parse(text) for text in written]
    where = renaming.resolved(read, list(checkpoint))
    taken = [p for p in where.values() if p in checkpoint and p not in where]
    if taken:
      select: selectors.Text = [paths.literal(p) for p in taken]
      checkpoint = drop(checkpoint, select, host=host)
  return rename(checkpoint, written, host=host)
