"""The methods that come with the library, offered like anybody's."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from surgery.contract.hookspecs import hookimpl
from surgery.contract.method import Method

# Where each lives, in this room.
HOMES = {
  'arcee_fusion': 'selective.ArceeFusion',
  'breadcrumbs': 'task.Breadcrumbs',
  'breadcrumbs_ties': 'task.BreadcrumbsTies',
  'dare_linear': 'task.DareLinear',
  'dare_ties': 'task.DareTies',
  'della': 'task.Della',
  'della_linear': 'task.DellaLinear',
  'karcher': 'spherical.Karcher',
  'linear': 'linear.Linear',
  'magnitude_prune': 'task.MagnitudePrune',
  'mean': 'linear.Mean',
  'model_stock': 'selective.ModelStock',
  'multislerp': 'spherical.MultiSlerp',
  'nearswap': 'selective.NearSwap',
  'nuslerp': 'spherical.NuSlerp',
  'passthrough': 'linear.Passthrough',
  'sce': 'selective.Sce',
  'slerp': 'spherical.Slerp',
  'task_arithmetic': 'task.TaskArithmetic',
  'ties': 'task.Ties',
}


@hookimpl
def surgery_methods() -> Mapping[str, type[Method]]:
  """Offers the methods by name."""
  room = __name__.rpartition('.')[0]
  found = {}
  for name, home in HOMES.items():
    module, _, cls = home.partition('.')
    found[name] = getattr(importlib.import_module(f'{room}.{module}'), cls)
  return found
