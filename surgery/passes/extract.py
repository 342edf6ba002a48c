"""Extract and insert: an adapter in a file of its own, bound to its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from surgery.core import errors, manifest, recording
from surgery.core.checkpoint import Checkpoint, Leaf
from surgery.core.host import Host
from surgery.core.paths import Path
from surgery.core.records import AdapterRecord, SiteRecord, WeightSpec
from surgery.passes import attach, bound, fitting
from surgery.passes.beneath import handles_adapters


@handles_adapters
def extract(
  checkpoint: Checkpoint,
  name: str | None = None,
  *,
  host: Host,
  known: Mapping[str, Any] | None = None,
) -> Checkpoint:
  """Returns an adapter without its base.

  Args:
    checkpoint: the model.
    name: the adapter's name; None for the only one.
    host: knows the adapter's type.
    known: seed and selector, where they are known.

  Raises:
    AdapterError: for an unknown name, or if there is not only one.

  Example:
    extract: default
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
  said = next(
    (a for a in checkpoint.manifest.adapters if a['name'] == name), {}
  )
  entry = recording.adapter_to_json(record, host, {**said, **(known or {})})
  entry |= bound.said_of(checkpoint, record, host)
  many = fitting.many_of(checkpoint, record)
  if many is not None:
    entry[fitting.MANY] = many
  return Checkpoint(
    {path: checkpoint[path] for path in record.weight_paths()},
    manifest.Manifest(
      kind=manifest.ADAPTER,
      locked=True,
      adapters=(entry,),
      history=checkpoint.manifest.history,
    ),
    origin=f'adapter {name!r}',
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
  taken = checkpoint.__contains__
  moved: dict[Path, Path] = {}
  sites = {}
  for path, one in record.sites.items():
    weights = {}
    for weight, spec in one.weights.items():
      to = attach.weight_path(
        one.site.layer, one.site.name, weight, name, taken
      )
      moved[spec.path] = to
      weights[weight] = dataclasses.replace(spec, path=to)
    sites[path] = SiteRecord(one.site, weights, one.interceptor)
  shared: dict[str, WeightSpec] = {}
  for weight, spec in record.shared.items():
    to = attach.shared_path(weight, name)
    moved[spec.path] = to
    shared[weight] = dataclasses.replace(spec, path=to)
  return (
    dataclasses.replace(
      record, name=name, sites=sites, shared=shared, total=None
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
  host: Host,
) -> Checkpoint:
  """Attaches an adapter that `extract` took out.

  Args:
    checkpoint: the base.
    alone: the adapter.
    name: its name here; the one that it had by default.
    check_base: whether the base must have the very values that it had, and the
      adapters beneath that it was trained over.
    host: knows the adapter's type.

  Raises:
    BaseMismatchError: if the base is another one.
    AdapterError: if the name is taken.
    FormatError: if `alone` is no adapter, or its tensors are not those that its
      configuration makes.
  """
  said = _only(alone)
  record = recording.adapter_from_json(said, host)
  name = record.name if name is None else name
  attach.check_name(name, checkpoint.records(host))
  fitting.check_base(checkpoint, record)
  fitting.check_file(alone, record, checkpoint, said.get(fitting.MANY))
  if check_base:
    bound.check(checkpoint, record, said, host)
  renamed, moved = _renamed(record, name, checkpoint)
  new: dict[Path, Leaf] = {}
  for source, target in moved.items():
    leaf = alone[source]
    metadata = {**leaf.metadata, 'adapter': name}
    new[target] = leaf.replace(metadata=metadata)
  leaves = attach.inserted(checkpoint, new)
  known = {k: said[k] for k in ('seed', 'to') if k in said}
  return checkpoint.replace(
    leaves=leaves,
    records=checkpoint.records(host).add(renamed),
    manifest=checkpoint.manifest.replace(
      adapters=(*checkpoint.manifest.adapters, {'name': name, **known})
    ),
  )
