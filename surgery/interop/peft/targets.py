"""Which modules of a model a configuration means, by PEFT's own rules.

They are those of `check_target_module_exists` and `ModulesToSaveWrapper` in
PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from surgery import errors
from surgery.interop.peft import config as configs

Matches = Callable[[str], bool]


def meant(config: Mapping[str, Any], origin: str) -> Matches | None:
  """Returns whether a module is adapted, by its name.

  Args:
    config: the configuration.
    origin: the file, for messages.

  Returns:
    None if it names no modules, so that PEFT decides by the architecture.

  Raises:
    ConfigError: for what is no list of names and no regular expression.
  """
  found = config['target_modules']
  if found in (None, [], ''):
    return None
  named = _named(config, 'target_modules', origin)
  out = (
    _named(config, 'exclude_modules', origin)
    if config['exclude_modules']
    else _never
  )
  whole = saved(config, origin)
  layers = _layers(config, origin) if not isinstance(found, str) else None
  exact = set(found) if not isinstance(found, str) else set()

  def matches(name: str) -> bool:
    if out(name) or whole(name) or not named(name):
      return False
    # Layers are counted where names are ends of names.
    return layers is None or name in exact or layers(name)

  return matches


def saved(config: Mapping[str, Any], origin: str) -> Matches:
  """Returns whether a module is saved as a whole, by its name.

  Raises:
    ConfigError: for what is no list of names.
  """
  names = configs.texts(config, 'modules_to_save', origin) or []
  # PEFT takes them for regular expressions here.
  rules = [_compiled(rf'(^|.*\.){one}($|\..*)', origin) for one in names]
  return lambda name: any(rule.match(name) for rule in rules)


def parameters(config: Mapping[str, Any], origin: str) -> Matches | None:
  """Returns whether a parameter is adapted by itself, by its name.

  Such parameters are those of experts; see `target_parameters` of PEFT.

  Returns:
    None if no parameter is.

  Raises:
    ConfigError: for what is no list of names.
  """
  names = configs.texts(config, 'target_parameters', origin)
  if names is None:
    return None
  ends = tuple(f'.{name}' for name in names)
  return lambda name: f'.{name}'.endswith(ends)


def _never(name: str) -> bool:
  del name
  return False


def _named(config: Mapping[str, Any], key: str, origin: str) -> Matches:
  value = config[key]
  if isinstance(value, str):
    if value == 'all-linear':
      raise errors.ConfigError(
        f"{origin}: {key}: 'all-linear' is a word for PEFT's own use, which it "
        'replaces by names when it saves. Save the adapter again.'
      )
    rule = _compiled(value, origin)
    return lambda name: rule.fullmatch(name) is not None
  names = set(configs.texts(config, key, origin) or [])
  # Ends of names are looked up, so that a thousand names take no longer.
  return lambda name: any(
    name[at:] in names
    for at in (0, *(m.end() for m in re.finditer(r'\.', name)))
  )


def _layers(config: Mapping[str, Any], origin: str) -> Matches | None:
  wanted = config['layers_to_transform']
  if wanted is None or wanted == []:
    return None
  numbers = {wanted} if isinstance(wanted, int) else set(wanted)
  patterns = config['layers_pattern'] or [r'[^.]*']
  if isinstance(patterns, str):
    patterns = [patterns]
  front = '.*?\\.' if not config['layers_pattern'] else '(?:^|.*?\\.)'
  rules = [_compiled(rf'{front}{p}\.(?P<idx>\d+)\.', origin) for p in patterns]

  def matches(name: str) -> bool:
    found = next((m for m in (r.match(name) for r in rules) if m), None)
    return found is not None and int(found['idx']) in numbers

  return matches


def _compiled(text: str, origin: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as error:
    raise errors.ConfigError(
      f'{origin}: {text!r} is no regular expression: {error}.'
    ) from None
