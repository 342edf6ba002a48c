"""Prune ranks: an adapter keeps some columns and rows of its factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import attachment, ranks
from surgery.adapting.beneath import handles_adapters
from surgery.editing import following
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.records import WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import slicing

_VERB = 'prune-ranks'


@handles_adapters
def prune_ranks(
  checkpoint: Checkpoint,
  keep: Mapping[str, Sequence[int]],
  *,
  name: str = 'default',
  host: Host,
) -> Checkpoint:
  """Keeps some ranks of an adapter at some sites, and leaves out the others.

  The adapter's type says which axes of its weights are the rank
  (`Adapter.rank_axes`); these are cut together. Options stay as they are, so
  the scale `alpha / rank` is that of the rank that was configured, and what is
  left out is missing in the sum and nothing else changes. Of layers that are
  stacked in one parameter all keep the same ranks.

  Args:
    checkpoint: the model.
    keep: by site, the path of the parameter that is rewritten, the numbers of
      the ranks that stay, from 0; none leaves the site's base alone. Sites that
      are not named keep all.
    name: the adapter.
    host: knows the adapters' types.

  Raises:
    AdapterError: for an unknown adapter, site or rank, or a type that does not
      say what its rank is.
    PluginError: if what the type says does not fit its weights.

  Example:
    prune-ranks: {keep: {net/h0/query/kernel: [0, 3]}, name: default}
  """
  record = following.settled(checkpoint, host).get(name)
  if not record.adapter.rank_axes:
    raise errors.AdapterError(
      f"adapter {name!r}: type '{record.adapter.name}' does not say "
      'which axes of its weights are the rank (`rank_axes`).'
    )
  leaves: dict[Path, Leaf] = dict(checkpoint)
  for path, wanted in read(keep).items():
    site = record.sites.get(path)
    if site is None:
      known = [paths.show(p) for p in record.sites]
      raise errors.AdapterError(
        f'adapter {name!r} has no site {paths.show(path)}. A site is '
        'the path of the parameter that it rewrites, with its name.'
        f'{errors.suggest(paths.show(path), known)}'
      )
    axes = ranks.rank_axes(record, site)
    sizes = {site.weights[w].shape[axis] for w, axis in axes.items()}
    rank = sizes.pop()
    indices = _indices(wanted, rank, path)
    weights: dict[str, WeightSpec] = dict(site.weights)
    for weight, axis in axes.items():
      spec = weights[weight]
      if spec.path not in leaves:
        raise errors.AdapterError(
          f'{paths.show(spec.path)} is not there. Give the whole '
          'model, not a half that split() made.'
        )
      leaf = leaves[spec.path]
      assert leaf.shape is not None
      # Stacked layers, and many adapters for many rows, are axes in front.
      front = len(leaf.shape) - len(spec.shape)
      leaves[spec.path] = slicing.taken(leaf, front + axis, indices)
      shape = (*spec.shape[:axis], len(indices), *spec.shape[axis + 1 :])
      weights[weight] = dataclasses.replace(spec, shape=shape)
    drawn = rank if site.drawn_rank is None else site.drawn_rank
    cut = dataclasses.replace(site, weights=weights, drawn_rank=drawn)
    try:
      attachment.check_apply(cut, record.shared)
    except errors.PluginError as error:
      raise errors.PluginError(
        f'{error} A type that has `rank_axes` takes the rank from its '
        "weights' shapes in `apply`, not from its options."
      ) from error
    record = record.with_site(cut, ())
  records = checkpoint.records(host).replace(record)
  return checkpoint.replace(leaves=leaves, records=records)


def read(keep: Any) -> dict[Path, Any]:
  """Returns what stays, by the paths of sites.

  Args:
    keep: by site, as a tuple or text.

  Raises:
    AdapterError: for anything else, or a site that is given twice.
  """
  if not isinstance(keep, Mapping):
    raise errors.AdapterError(
      f'expected ranks by site, found {type(keep).__name__}.'
    )
  found: dict[Path, Any] = {}
  for key, wanted in keep.items():
    is_path = isinstance(key, tuple) and all(isinstance(p, str) for p in key)
    if not key or not (isinstance(key, str) or is_path):
      raise errors.AdapterError(f'expected the path of a site, found {key!r}.')
    path = paths.parse(key) if isinstance(key, str) else key
    if path in found:
      raise errors.AdapterError(
        f'{paths.show(path)} is given twice, as text and as a tuple.'
      )
    found[path] = wanted
  return found


def plain(keep: Any) -> dict[str, list[int] | list[bool]]:
  """Returns what stays as data: text, and lists of numbers or of flags.

  Raises:
    AdapterError: if it is something else.
  """
  return {
    paths.show(path): _array(wanted, path).tolist()
    for path, wanted in read(keep).items()
  }


def _array(wanted: Any, path: Path) -> np.ndarray:
  """Returns ranks as an array of whole numbers or of flags.

  Raises:
    AdapterError: if they are something else.
  """
  where = f'{_VERB}: {paths.show(path)}'
  try:
    found = np.asarray(wanted)
  except Exception as error:
    raise errors.AdapterError(
      f'{where}: the ranks that stay decide shapes, so they must be known '
      'outside of jit; found a traced value.'
    ) from error
  if found.ndim == 1 and not found.size:
    return found.astype(bool if found.dtype == bool else np.int64)
  if found.ndim != 1 or found.dtype.kind not in 'iub':
    raise errors.AdapterError(
      f'{where}: expected a list of ranks, or a flag for each, found '
      f'{wanted!r}.'
    )
  return found


def _indices(wanted: Any, rank: int, path: Path) -> list[int]:
  """Returns the numbers of ranks that stay.

  Raises:
    AdapterError: for a rank that there is not, or one given twice.
  """
  found = _array(wanted, path)
  where = f'{_VERB}: {paths.show(path)}'
  if found.dtype == bool:
    if len(found) != rank and (len(found) or rank):
      raise errors.AdapterError(
        f'{where}: expected a flag for each of {rank} ranks, found '
        f'{len(found)}.'
      )
    return [int(k) for k in np.flatnonzero(found)]
  for index in found:
    if not 0 <= index < rank:
      raise errors.AdapterError(
        f'{where}: there is no rank {index}, only 0 to {rank - 1}.'
        if rank
        else f'{where}: there is no rank {index}; none is left there.'
      )
  listed = [int(k) for k in found]
  if len(set(listed)) < len(listed):
    raise errors.AdapterError(
      f'{where}: a rank is given twice in {listed}; it would count twice.'
    )
  return listed
