"""Model surgery for JAX: attach, freeze, train, merge, cut, combine, save.

Names are resolved when they are first used: `import surgery` imports neither
JAX nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery import version

if TYPE_CHECKING:
  from surgery.adapting.beneath import handles_adapters
  from surgery.builtin.lora import LoRA
  from surgery.builtin.peft import PeftLoRA
  from surgery.contract.adapter import Adapter, named_key
  from surgery.contract.config import field
  from surgery.contract.hookspecs import Refusal, hookimpl
  from surgery.contract.layers import LayerType
  from surgery.contract.lowrank import LowRank
  from surgery.contract.method import Method
  from surgery.contract.peft import PeftLayer, PeftMapping, PeftModule
  from surgery.contract.site import ParamSpec, Site
  from surgery.contract.trees import Slot, Tree
  from surgery.editing.choosing import select
  from surgery.errors import (
    AdapterError,
    BaseMismatchError,
    CastError,
    CheckError,
    ConfigError,
    DenseFallbackWarning,
    DependencyError,
    DropoutWarning,
    FormatError,
    OrderError,
    PluginError,
    QuantisedError,
    RecipeError,
    RenameError,
    SelectorError,
    ShardWarning,
    SiteError,
    SiteWarning,
    SurgeryError,
    UnknownAdapterType,
    UnreachedError,
  )
  from surgery.factoring.explain import Explanation, explain
  from surgery.factoring.transform import factored
  from surgery.files.patches import apply_patch, make_patch
  from surgery.host.manager import Host, PluginWarning, default_host
  from surgery.live.applying import apply
  from surgery.live.check import check
  from surgery.live.combining import combine
  from surgery.live.extracting import extract_lora
  from surgery.live.lora_linear import LoraLinear
  from surgery.live.migrating import migrate
  from surgery.live.optimizer import optimizer
  from surgery.live.params import AdaptedParams
  from surgery.live.routing import route, stack_adapters
  from surgery.live.saving import load_adapter, save, save_adapter
  from surgery.live.verbs import (
    AdapterInfo,
    adapters,
    attach,
    cast,
    combine_adapters,
    detach,
    disable,
    drop,
    enable,
    freeze,
    keep,
    merge,
    prune_ranks,
    rename,
    trainable_mask,
    unfreeze,
  )
  from surgery.live.weights import regulariser, weights, with_weights
  from surgery.looking.stats import TensorStats, stats
  from surgery.model.checkpoint import Checkpoint, Leaf
  from surgery.model.checkpoint import open_checkpoint as open
  from surgery.naming.selection import Selection
  from surgery.recipes.recipe import Recipe
  from surgery.trees.adapted import AdaptedTree
  from surgery.trees.verbs import layers, load

# Where each public name lives.
_HOMES = {
  'builtin.lora': ('LoRA',),
  'builtin.peft': ('PeftLoRA',),
  'contract.adapter': ('Adapter', 'named_key'),
  'model.checkpoint': ('Checkpoint', 'Leaf', 'open_checkpoint'),
  'contract.config': ('field',),
  'errors': (
    'AdapterError',
    'BaseMismatchError',
    'CastError',
    'CheckError',
    'ConfigError',
    'DenseFallbackWarning',
    'DependencyError',
    'DropoutWarning',
    'FormatError',
    'OrderError',
    'PluginError',
    'QuantisedError',
    'RecipeError',
    'RenameError',
    'SelectorError',
    'ShardWarning',
    'SiteError',
    'SiteWarning',
    'SurgeryError',
    'UnknownAdapterType',
    'UnreachedError',
  ),
  'contract.hookspecs': ('Refusal', 'hookimpl'),
  'files.patches': ('apply_patch', 'make_patch'),
  'host.manager': ('Host', 'PluginWarning', 'default_host'),
  'contract.lowrank': ('LowRank',),
  'contract.method': ('Method',),
  'contract.peft': ('PeftLayer', 'PeftMapping', 'PeftModule'),
  'naming.selection': ('Selection',),
  'contract.site': ('ParamSpec', 'Site'),
  'factoring.explain': ('Explanation', 'explain'),
  'factoring.transform': ('factored',),
  'live.lora_linear': ('LoraLinear',),
  'live.params': ('AdaptedParams',),
  'live.verbs': ('AdapterInfo',),
  'looking.stats': ('TensorStats',),
  'adapting.beneath': ('handles_adapters',),
  'recipes.recipe': ('Recipe',),
  'trees.verbs': (
    'adapters',
    'apply',
    'attach',
    'cast',
    'check',
    'combine',
    'combine_adapters',
    'detach',
    'disable',
    'drop',
    'enable',
    'extract_lora',
    'freeze',
    'keep',
    'layers',
    'load',
    'load_adapter',
    'merge',
    'migrate',
    'optimizer',
    'prune_ranks',
    'regulariser',
    'rename',
    'route',
    'save',
    'save_adapter',
    'stack_adapters',
    'trainable_mask',
    'unfreeze',
    'weights',
    'with_weights',
  ),
  'trees.adapted': ('AdaptedTree',),
  'contract.trees': ('Slot', 'Tree'),
  'trees.looking': ('select', 'stats'),
  'contract.layers': ('LayerType',),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}
_WHERE['open'] = 'model.checkpoint'

__version__ = version.VERSION

__all__ = [
  'AdaptedParams',
  'AdaptedTree',
  'Adapter',
  'AdapterError',
  'AdapterInfo',
  'BaseMismatchError',
  'CastError',
  'CheckError',
  'Checkpoint',
  'ConfigError',
  'DenseFallbackWarning',
  'DependencyError',
  'DropoutWarning',
  'Explanation',
  'FormatError',
  'Host',
  'LayerType',
  'Leaf',
  'LoRA',
  'LoraLinear',
  'LowRank',
  'Method',
  'OrderError',
  'ParamSpec',
  'PeftLayer',
  'PeftLoRA',
  'PeftMapping',
  'PeftModule',
  'PluginError',
  'PluginWarning',
  'QuantisedError',
  'Recipe',
  'RecipeError',
  'Refusal',
  'RenameError',
  'Selection',
  'SelectorError',
  'ShardWarning',
  'Site',
  'SiteError',
  'SiteWarning',
  'Slot',
  'SurgeryError',
  'TensorStats',
  'Tree',
  'UnknownAdapterType',
  'UnreachedError',
  'adapters',
  'apply',
  'apply_patch',
  'attach',
  'cast',
  'check',
  'combine',
  'combine_adapters',
  'default_host',
  'detach',
  'disable',
  'drop',
  'enable',
  'explain',
  'extract_lora',
  'factored',
  'field',
  'freeze',
  'handles_adapters',
  'hookimpl',
  'keep',
  'layers',
  'load',
  'load_adapter',
  'make_patch',
  'merge',
  'migrate',
  'named_key',
  'open',
  'optimizer',
  'prune_ranks',
  'regulariser',
  'rename',
  'route',
  'save',
  'save_adapter',
  'select',
  'stack_adapters',
  'stats',
  'trainable_mask',
  'unfreeze',
  'weights',
  'with_weights',
]


if not TYPE_CHECKING:
  # To a type checker a module with __getattr__ has every name, typos too.

  def __getattr__(name: str) -> Any:
    home = _WHERE.get(name)
    if home is None:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{home}')
    value = getattr(module, 'open_checkpoint' if name == 'open' else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
  # What is imported here is no part of the library's names.
  return sorted({*__all__, *(n for n in globals() if n.startswith('__'))})
