"""Ranks of adapters: the axis of each weight, and how many were drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery import errors
from surgery.contract import config
from surgery.model.records import AdapterRecord, SiteRecord
from surgery.naming import paths


def axes_of(record: AdapterRecord, site: SiteRecord) -> dict[str, int]:
  """Returns which axis of each weight of a site is its rank, from 0.

  Empty, if the site has no weight with a rank.

  Raises:
    PluginError: if a weight has no such axis, ranks differ, or sites share it.
  """
  found: dict[str, int] = {}
  for weight, axis in record.adapter.rank_axes.items():
    if weight in record.shared:
      raise _wrong(
        record,
        f'{weight!r} is shared by sites, which have ranks of their own.',
      )
    if weight not in site.weights:
      continue
    shape = site.weights[weight].shape
    if not -len(shape) <= axis < len(shape):
      raise _wrong(
        record, f'{weight!r} has no axis {axis}, its shape is {shape}.'
      )
    found[weight] = axis % len(shape)
  if len({site.weights[w].shape[axis] for w, axis in found.items()}) > 1:
    shapes = ', '.join(f'{w} {site.weights[w].shape}' for w in found)
    where = paths.show(site.site.path)
    raise _wrong(record, f'{where}: the ranks of its weights differ: {shapes}.')
  return found


def _wrong(record: AdapterRecord, why: str) -> errors.PluginError:
  called = config.called(type(record.adapter))
  return errors.PluginError(f'{called}: rank_axes: {why}')


def rank_axes(record: AdapterRecord, site: SiteRecord) -> dict[str, int]:
  """Returns which axis of each weight of a site is its rank, from 0.

  Raises:
    PluginError: if a weight has no such axis, or ranks differ.
    AdapterError: if the site has none of these weights.
  """
  found = axes_of(record, site)
  if not found:
    raise errors.AdapterError(
      f'{paths.show(site.site.path)}: adapter {record.name!r} has none of the '
      f'weights {", ".join(record.adapter.rank_axes)} there, so no rank to '
      'prune.'
    )
  return found


def pruned_shapes(
  record: AdapterRecord, site: SiteRecord, made: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns shapes that `init` makes, with the rank that a site has.

  The rank may differ from that of `init` only where the record says that ranks
  were pruned, and how many there were; otherwise the configuration was changed.
  """
  result = dict(made)
  if site.drawn_rank is None:
    return result
  try:
    axes = rank_axes(record, site)
  except errors.SurgeryError:
    return result  # The type has no rank, or its weights have several.
  for weight, axis in axes.items():
    shape, own = made.get(weight), site.weights[weight].shape
    if shape is None or len(shape) != len(own):
      return dict(made)
    # Pruned from another rank than the configuration has, or grown: then it is
    # not what was pruned, and the file is refused.
    if shape[axis] != site.drawn_rank or own[axis] > site.drawn_rank:
      return dict(made)
    result[weight] = (*shape[:axis], own[axis], *shape[axis + 1 :])
  return result
