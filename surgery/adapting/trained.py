"""What was trained with an adapter and is none of its weights.

A head that was let train, running statistics that moved: the adapter is nothing
without them. They are saved in its file, and stand in place of the base's as
long as it is enabled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

from surgery import errors
from surgery.adapting import attachment
from surgery.editing import choosing, following, marks
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerTypes
from surgery.model.records import AdapterRecord, Records, WeightSpec
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

# The weight's name of a parameter that is saved with an adapter.
WEIGHT = 'saved'

_HOW = 'Set modules_to_save, e.g. modules_to_save=[] to save nothing else.'


# Choosing what is saved.


def chosen(
  checkpoint: Checkpoint,
  record: AdapterRecord,
  select: selectors.Text | Selection | None,
  layer_types: LayerTypes | None,
  host: Host,
) -> list[Path]:
  """Returns the parameters that are saved with an adapter.

  Args:
    checkpoint: the model.
    record: the adapter.
    select: which; by default those that differ from the base, where the base
      is known, and otherwise all that `freeze` has not frozen.
    layer_types: types of layers.
    host: whose hooks are asked.

  Raises:
    SelectorError: for a selector that matches nothing.
    AdapterError: for a value that the file of an adapter cannot hold.
  """
  records = checkpoint.records(host)
  ours = _free(checkpoint, records, record)
  if select is None:
    known = any(leaf.base for leaf in checkpoint.values())
    found = [p for p in ours if _changed(checkpoint, p, known)]
  elif not isinstance(select, str) and not list(select):
    return []
  else:
    picked = choosing.chosen(checkpoint, select, layer_types or {}, host)
    meant = set(picked)
    # A layer means all beneath it, and weights of adapters are saved anyway.
    found = [p for p in ours if p in meant]
    if not found:
      raise errors.AdapterError(
        f'modules_to_save: {paths.show(min(picked))} is saved with its adapter '
        'anyway. Select parameters of the base.'
      )
  odd = [p for p in found if not _array(checkpoint, p)]
  if odd:
    shown = errors.listed(paths.show(p) for p in odd)
    raise errors.AdapterError(
      f'adapter {record.name!r}: {shown}: changed in training, and the value '
      'is no array, which the file of an adapter cannot hold. '
      f'{_HOW}'
      if select is None
      else f'modules_to_save: {shown}: the value is no array of numbers, which '
      'the file of an adapter cannot hold. Select others.'
    )
  return found


def _free(
  checkpoint: Checkpoint, records: Records, record: AdapterRecord
) -> list[Path]:
  """Returns the parameters that no adapter owns or stands for."""
  owned, standing = records.owned, records.standing
  return [
    path
    for path, leaf in checkpoint.items()
    if path not in owned
    and path not in standing
    and path not in record.saved
    # The state of a generator of random numbers is nobody's to learn.
    and leaf.key is None
    and leaf.codes is None  # Codes of quantised weights do not train.
    and not str(leaf.metadata.get('tag', '')).startswith('rng')
  ]


def _changed(checkpoint: Checkpoint, path: Path, known: bool) -> bool:
  """Whether a parameter is another than the base's, as far as is known.

  Where it is not known what the base was, as after a transformation of JAX,
  flags say what could change: all that trains, and what never trained but moves
  by itself, as running statistics do. What `freeze` froze stayed as it was.

  Args:
    checkpoint: the model.
    path: the parameter.
    known: whether it is known of any parameter that it is the base's.
  """
  leaf = checkpoint[path]
  if known:
    return not leaf.base
  if leaf.shape is None and not _in_tree(checkpoint, path):
    return False  # Plain values do not train.
  return marks.may_have_trained(leaf)


def _in_tree(checkpoint: Checkpoint, path: Path) -> bool:
  return following.tree_of(path, checkpoint.manifest.trees) is not None


def _array(checkpoint: Checkpoint, path: Path) -> bool:
  return checkpoint[path].shape is not None and not _in_tree(checkpoint, path)


def added(
  checkpoint: Checkpoint, record: AdapterRecord, found: Iterable[Path]
) -> tuple[AdapterRecord, dict[Path, Leaf]]:
  """Returns an adapter that has more parameters saved with it, and these.

  Args:
    checkpoint: the model.
    record: the adapter.
    found: the parameters.
  """
  saved: dict[Path, WeightSpec] = dict(record.saved)
  leaves: dict[Path, Leaf] = {}
  for path in found:
    leaf = checkpoint[path]
    to = attachment.weight_path(
      path[:-1],
      path[-1],
      WEIGHT,
      record.name,
      lambda p: p in checkpoint or p in leaves,
    )
    assert leaf.shape is not None and leaf.dtype is not None
    saved[path] = WeightSpec(to, leaf.shape, leaf.dtype, leaf.trainable)
    metadata = {**leaf.metadata, 'adapter': record.name}
    leaves[to] = leaf.replace(metadata=metadata, base=False)
  return dataclasses.replace(record, saved=saved), leaves


# Putting it back.


def _alike(a: Leaf, b: Leaf, digest: Callable[[Leaf], str]) -> bool:
  """Whether two tensors are equal; their bytes are read only if they may be."""
  return (a.shape, a.dtype) == (b.shape, b.dtype) and digest(a) == digest(b)


def settled(
  checkpoint: Checkpoint,
  alone: Mapping[Path, Leaf],
  record: AdapterRecord,
  beneath: Collection[str],
  digest: Callable[[Leaf], str],
  host: Host,
) -> AdapterRecord:
  """Returns an adapter with only those saved parameters that change something.

  Args:
    checkpoint: the model that it is attached to.
    alone: the adapter's file.
    record: the adapter as its file records it.
    beneath: adapters that it was trained over.
    digest: returns the digest of a leaf.
    host: knows the adapters' types.

  Raises:
    AdapterError: if an enabled adapter has a value for the same parameter, and
      is not one that was beneath and had this value.
  """
  records = checkpoint.records(host)
  kept: dict[Path, WeightSpec] = {}
  both: dict[str, list[Path]] = {}
  for path, spec in record.saved.items():
    there = records.standing.get(path)
    same = _alike(alone[spec.path], checkpoint[there or path], digest)
    owner = None if there is None else records.owned[there]
    # Where the model has that value already, nothing has to be replaced. An
    # adapter that is not beneath may go, and would take it along.
    if same and (owner is None or owner in beneath):
      continue
    if owner is not None and record.enabled:
      both.setdefault(owner, []).append(path)
    kept[path] = spec
  for owner, clash in both.items():
    raise errors.AdapterError(
      f'{", ".join(map(paths.show, clash))}: adapter {record.name!r} was saved '
      f'with values of its own, and so was {owner!r}, which is enabled. '
      f'Disable or detach {owner!r} first. Where one was trained over the '
      'other, save both again after the last training.'
    )
  return dataclasses.replace(record, saved=kept)
