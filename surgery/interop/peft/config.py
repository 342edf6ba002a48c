"""`adapter_config.json`: which adapter type it is of, and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.contract.adapter import Adapter
from surgery.contract.peft import PeftMapping
from surgery.host.manager import Host

# Under which key a manifest keeps a configuration.
KEY = 'peft'

# Keys of all types that do not change what weights compute.
_IGNORED = (
  'auto_mapping',
  'base_model_name_or_path',
  'inference_mode',
  'peft_type',
  'peft_version',
  'revision',
  'task_type',
)
# Keys of all types that say which modules there are, or what else is saved.
_COMMON: dict[str, Any] = {
  'target_modules': None,
  'exclude_modules': None,
  'layers_to_transform': None,
  'layers_pattern': None,
  'modules_to_save': None,
  'bias': 'none',
  'fan_in_fan_out': False,
  'ensure_weight_tying': False,
}

# Methods that no adapter type of ours has, and why.
_REFUSED = {
  'ADALORA': 'its ranks are masked by singular values',
  'ADAPTION_PROMPT': 'its weights are prompts inside of attention',
  'CARTRIDGE': 'its weights are keys and values, not those of layers',
  'CPT': 'its weights are prompts, not those of layers',
  'FOURIERFT': 'the places of its numbers come from torch’s generator of '
  'random numbers, and are not in the folder',
  'LORA': 'none of the installed types reads this variant',
  'MULTITASK_PROMPT_TUNING': 'its weights are prompts, not those of layers',
  'POLY': 'a router chooses among adapters',
  'PREFIX_TUNING': 'its weights are keys and values, not those of layers',
  'PROMPT_TUNING': 'its weights are prompts, not those of layers',
  'P_TUNING': 'its weights are prompts, not those of layers',
  'XLORA': 'a router chooses among adapters',
}
# Distributions that read what the library alone does not.
_ELSEWHERE = {
  'BOFT': 'surgery-orthogonal',
  'HRA': 'surgery-orthogonal',
  'IA3': 'surgery-scaling',
  'LN_TUNING': 'surgery-scaling',
  'LOHA': 'surgery-products',
  'LOKR': 'surgery-products',
  'LORA': 'surgery-lora-family',
  'MISS': 'surgery-shared',
  'OFT': 'surgery-orthogonal',
  'TRAINABLE_TOKENS': 'surgery-scaling',
  'VBLORA': 'surgery-shared',
  'VERA': 'surgery-shared',
}


def mappings(host: Host) -> Iterator[tuple[type[Adapter], PeftMapping]]:
  """Yields the adapter types that PEFT has too, and how it stores them.

  A type that cannot be loaded is none of them: whoever needs it is told by the
  error for what no type reads.
  """
  for name in host.adapter_names():
    try:
      cls = host.adapter_type(name)
    except errors.SurgeryError:
      continue
    found = mapping_of(cls)
    if found is not None:
      yield cls, found


def mapping_of(cls: type[Adapter]) -> PeftMapping | None:
  """Returns how PEFT stores a type; a subclass inherits nothing of it."""
  found: PeftMapping | None = vars(cls).get('peft')
  return found


def chosen(
  said: Mapping[str, Any], origin: str, host: Host
) -> tuple[type[Adapter], PeftMapping]:
  """Returns the adapter type that a configuration is of.

  Raises:
    FormatError: if it is of none, with the reason.
  """
  kind = said.get('peft_type')
  if not isinstance(kind, str):
    raise errors.FormatError(
      f'{origin}: expected the name of a method as peft_type, found {kind!r}.'
    )
  known = list(mappings(host))
  found = [(c, m) for c, m in known if m.peft_type == kind and m.reads(said)]
  if len(found) == 1:
    return found[0]
  if found:
    names = ', '.join(repr(c.name) for c, _ in found)
    raise errors.FormatError(
      f'{origin}: adapter types {names} all read peft_type {kind!r} with this '
      'configuration. Block the plugins of all but one.'
    )
  reason = _REFUSED.get(kind, 'no adapter type reads it')
  there = sorted({m.peft_type for _, m in known})
  advice = (
    f'Install {_ELSEWHERE[kind]}'
    if kind in _ELSEWHERE
    else 'Merge it with PEFT'
  )
  raise errors.FormatError(
    f'{origin}: peft_type {kind!r} cannot be read: {reason}. Installed types '
    f'read {", ".join(there) or "none"}. {advice}.'
  )


def checked(
  said: Mapping[str, Any], mapping: PeftMapping, origin: str
) -> dict[str, Any]:
  """Returns a configuration with PEFT's defaults for absent keys.

  Args:
    said: what the file says.
    mapping: how the type is stored.
    origin: the file, for messages.

  Raises:
    ConfigError: for a key that may change the result and is not known, or
      for what the type cannot do.
  """
  known = {
    *_IGNORED,
    *_COMMON,
    *mapping.fields,
    *mapping.defaults,
    *mapping.ignored,
  }
  for key, reason in mapping.off.items():
    value = said.get(key)
    if not is_nothing(value) and value != mapping.defaults.get(key):
      raise errors.ConfigError(
        f'{origin}: {key} is {_short(value)}, and cannot be done: {reason}. '
        'Merge it with PEFT.'
      )
  # A key of a later release, or somebody's own, may change everything.
  odd = [
    key
    for key, value in said.items()
    if key not in known and key not in mapping.off and not is_nothing(value)
  ]
  if odd:
    shown = ', '.join(f'{key} = {_short(said[key])}' for key in odd)
    raise errors.ConfigError(
      f'{origin}: unknown keys may change the result: {shown}. If they do not, '
      'remove them from the file; otherwise merge it with PEFT.'
    )
  config = {**_COMMON, **mapping.defaults, **said}
  with errors.within(origin):
    mapping.check(config)
  return config


def is_nothing(value: Any) -> bool:
  """Whether a value asks for nothing; 0 may ask for something."""
  if isinstance(value, (str, list, dict)):
    return value in ('', 'none', [], {})
  return value is None or value is False


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}…'


def texts(config: Mapping[str, Any], key: str, origin: str) -> list[str] | None:
  """Returns names that a key lists; None if it lists none.

  Raises:
    ConfigError: if it is no list of text.
  """
  value = config.get(key)
  if value is None or value == []:
    return None
  if (
    isinstance(value, Sequence)
    and not isinstance(value, str)
    and all(isinstance(one, str) for one in value)
  ):
    return list(value)
  raise errors.ConfigError(
    f'{origin}: {key}: expected a list of names, found {_short(value)}.'
  )


def describe(said: Mapping[str, Any]) -> str:
  """Returns what a configuration says in a line, for people."""
  shown = [
    f'{key}={_short(value)}'
    for key, value in said.items()
    if key not in _IGNORED and not is_nothing(value)
  ]
  return f'{said.get("peft_type")}: {", ".join(shown)}'
