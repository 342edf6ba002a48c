"""Extract and insert: an adapter in a file of its own, bound to its base."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.adapting import attachment, bound, fitting, trained
from surgery.adapting.beneath import handles_adapters
from surgery.host import foreign
from surgery.host.manager import Host
from surgery.model import manifest, record_json
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerTypes
from surgery.model.records import AdapterRecord, WeightSpec
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

_nothing = contextlib.nullcontext

# What the modules of another program's adapter are called in a base.
Names = str | Sequence[str] | Mapping[str, str] | None


@handles_adapters
def extract(
  checkpoint: Checkpoint,
  name: str | None = None,
  *,
  modules_to_save: selectors.Text | Selection | None = None,
  layer_types: LayerTypes | None = None,
  host: Host,
) -> Checkpoint:
  """Returns an adapter without its base.

  What was trained with it and is none of its weights goes along: what differs
  from the base, where it is known what that was, and otherwise all that
  `freeze` did not freeze.

  Args:
    checkpoint: the model.
    name: the adapter's name; None for the only one.
    modules_to_save: what goes along instead; `[]` for nothing.
    layer_types: types of layers; by default those of the checkpoint.
    host: knows the adapter's type.

  Raises:
    AdapterError: for an unknown name, if there is not only one, or for a value
      that was trained along and is no array.
    SelectorError: for a selector that matches nothing.

  Example:
    extract: default
    extract: {name: default, modules-to-save: '**/head'}
  """
  names = checkpoint.records(host).names
  if name is None and not names:
    raise errors.AdapterError('no adapter is attached.')
  if name is None and len(names) > 1:
    raise errors.AdapterError(
      f'{len(names)} adapters are attached, and a file holds one. Name it with '
      f'--adapter: {", ".join(names)}.'
    )
  name = names[0] if name is None else name
  record = checkpoint.records(host).get(name)
  _check_whole(checkpoint, record)
  said = next(
    (a for a in checkpoint.manifest.adapters if a['name'] == name), {}
  )
  types = (
    checkpoint.manifest.layer_types if layer_types is None else layer_types
  )
  along = trained.chosen(checkpoint, record, modules_to_save, types, host)
  record, fresh = trained.added(checkpoint, record, along)
  entry = record_json.adapter_to_json(record, host, said)
  entry |= bound.said_of(checkpoint, record, along, host)
  many = fitting.many_of(checkpoint, record)
  if many is not None:
    entry[fitting.MANY] = many
  return Checkpoint(
    {
      path: fresh[path] if path in fresh else checkpoint[path]
      for path in record.weight_paths()
    },
    manifest.Manifest(
      kind=manifest.ADAPTER,
      locked=True,
      adapters=(entry,),
      history=checkpoint.manifest.history,
    ),
    origin=f'adapter {name!r}',
  )


def _check_whole(checkpoint: Checkpoint, record: AdapterRecord) -> None:
  """Raises unless an adapter's weights and its base are there.

  Raises:
    AdapterError: naming all that is missing.
  """
  needed = (*bound.rewritten(record), *record.saved, *record.weight_paths())
  missing = [paths.show(path) for path in needed if path not in checkpoint]
  if missing:
    raise errors.AdapterError(
      f'{errors.listed(missing)}: adapter {record.name!r} cannot be saved '
      'without it. Put the halves that split() made together first: a.merge(b).'
    )


def with_names(alone: Checkpoint, names: Names) -> Checkpoint:
  """Returns an adapter whose file knows what another program calls modules.

  Args:
    alone: the adapter without its base.
    names: what modules are called in the base, as `insert` takes it.
  """
  [entry] = alone.manifest.adapters
  told = {**entry.get(record_json.FOREIGN, {}), 'names': names}
  entry = {**entry, record_json.FOREIGN: told}
  return alone.replace(manifest=alone.manifest.replace(adapters=(entry,)))


def _ours(
  alone: Checkpoint, base: Checkpoint, names: Names, host: Host
) -> Checkpoint:
  """Returns an adapter of another program as one of ours, for a base.

  Raises:
    ConfigError: if `names` are given for an adapter of ours.
    SurgeryError: if it cannot be read, or does not fit the base.
  """
  if alone.manifest.adapters:
    if names is not None:
      raise errors.ConfigError(
        f'{alone.origin or "the file"}: names are for adapters of other '
        'programs. This one says itself where it goes; rename the model.'
      )
    return alone
  for kind, one in host.adapter_files.items():
    owner = host.offered_by('surgery_adapter_files', kind)
    # What a plugin does wrong is said with its name.
    with foreign.code(f'{kind!r} of {owner}') if owner else _nothing():
      if one.knows(alone):
        return _adopted(one.bound(alone, base, names=names, host=host), kind)
  return alone


def _adopted(found: Any, kind: str) -> Checkpoint:
  """Returns what another program's adapter became, if it is an adapter.

  Raises:
    PluginError: naming what it is instead.
  """
  if isinstance(found, Checkpoint) and len(found.manifest.adapters) == 1:
    return found
  raise errors.PluginError(
    f'adapter file {kind!r}: bound returned {found!r}, expected a Checkpoint '
    'with one adapter on record, as extract makes it.'
  )


def _only(alone: Checkpoint) -> Mapping[str, Any]:
  if alone.manifest.kind != manifest.ADAPTER or not alone.manifest.adapters:
    raise errors.FormatError(
      f'{alone.origin}: not the file of an adapter. Write one with '
      'surgery.save_adapter.'
    )
  if len(alone.manifest.adapters) > 1:
    raise errors.FormatError(
      f'{alone.origin}: expected one adapter, found '
      f'{len(alone.manifest.adapters)}. Save each in a file of its own.'
    )
  return alone.manifest.adapters[0]


def _renamed(
  record: AdapterRecord, name: str, checkpoint: Checkpoint
) -> tuple[AdapterRecord, dict[Path, Path]]:
  """Returns the record under another name, and where its weights go."""
  moved: dict[Path, Path] = {}

  def taken(path: Path) -> bool:
    return path in checkpoint or path in moved.values()

  sites = {}
  for path, one in record.sites.items():
    weights = {}
    for weight, spec in one.weights.items():
      to = attachment.weight_path(
        one.site.layer, one.site.name, weight, name, taken
      )
      moved[spec.path] = to
      weights[weight] = dataclasses.replace(spec, path=to)
    sites[path] = dataclasses.replace(one, weights=weights)
  shared: dict[str, WeightSpec] = {}
  for weight, spec in record.shared.items():
    to = attachment.shared_path(weight, name)
    moved[spec.path] = to
    shared[weight] = dataclasses.replace(spec, path=to)
  saved: dict[Path, WeightSpec] = {}
  for path, spec in record.saved.items():
    to = attachment.weight_path(
      path[:-1], path[-1], trained.WEIGHT, name, taken
    )
    moved[spec.path] = to
    saved[path] = dataclasses.replace(spec, path=to)
  return (
    dataclasses.replace(
      record, name=name, sites=sites, shared=shared, saved=saved
    ),
    moved,
  )


@handles_adapters
def insert(
  checkpoint: Checkpoint,
  alone: Checkpoint,
  *,
  name: str | None = None,
  check_base: bool = True,
  check_same: bool = False,
  names: Names = None,
  host: Host,
) -> Checkpoint:
  """Attaches an adapter that `extract` took out, or another program saved.

  Args:
    checkpoint: the base.
    alone: the adapter.
    name: its name here; the one that it had by default.
    check_base: whether the base must have the very values that it had, and the
      adapters beneath that it was trained over, where the file says them.
    check_same: whether the very same adapter may not take part already.
    names: for an adapter of another program: what its modules are called in
      this base, where it calls them otherwise; by name, as rules of `rename`,
      or by a map (`llama-flax`).
    host: knows the adapter's type.

  Raises:
    BaseMismatchError: if the base is another one.
    AdapterError: if the name is taken, an enabled adapter was saved with
      another value of the same parameter, or is the same adapter.
    FormatError: if `alone` is no adapter, or its tensors are not those that its
      configuration makes.
  """
  alone = _ours(alone, checkpoint, names, host)
  said = _only(alone)
  record = record_json.adapter_from_json(said, host)
  name = record.name if name is None else name
  attachment.check_name(name, checkpoint.records(host))
  fitting.check_base(checkpoint, record)
  fitting.check_file(alone, record, checkpoint, said.get(fitting.MANY))
  if check_same:
    bound.check_new(checkpoint, alone, record, host)
  check_base = check_base and not bound.is_unknown(said)
  beneath = bound.check(checkpoint, record, said, host) if check_base else []
  record = trained.settled(
    checkpoint, alone, record, beneath, bound.digest, host
  )
  renamed, moved = _renamed(record, name, checkpoint)
  new: dict[Path, Leaf] = {}
  for source, target in moved.items():
    leaf = alone[source]
    metadata = {**leaf.metadata, 'adapter': name}
    new[target] = leaf.replace(metadata=metadata)
  records = checkpoint.records(host)
  leaves = attachment.inserted(attachment.marked(checkpoint, records), new)
  return checkpoint.replace(leaves=leaves, records=records.add(renamed))
