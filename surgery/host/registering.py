"""What a plugin must be, checked when it is taken in."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pluggy

from surgery import errors
from surgery.contract import hookspecs
from surgery.contract.adapter import Adapter

HOOKS = tuple(n for n in sorted(vars(hookspecs)) if n.startswith('surgery_'))


@functools.lru_cache(maxsize=256)
def arguments_of(function: Callable[..., Any]) -> tuple[str, ...]:
  """Returns the arguments that an implementation takes, without self."""
  return tuple(inspect.signature(function).parameters)[1:]


def hooks_of(cls: type[Adapter]) -> tuple[str, ...]:
  """Returns the hooks that an adapter type implements, four at least."""
  return tuple(name for name in HOOKS if hasattr(cls, name))


def check_type(value: Any, name: str) -> None:
  """Raises unless `value` is an adapter type of that name."""
  if not (inspect.isclass(value) and issubclass(value, Adapter)):
    raise errors.PluginError(
      f"entry point '{name}': expected a subclass of surgery.Adapter, found "
      f'{value!r}.'
    )
  if value.name != name or not name:
    raise errors.PluginError(
      f"entry point '{name}': its adapter type calls itself '{value.name}'. "
      'The two names must be equal.'
    )
  for method in ('init', 'apply'):
    if getattr(value, method) is getattr(Adapter, method):
      raise errors.PluginError(
        f"adapter type '{name}' has no method `{method}`."
      )
  check_hooks(value, name)


def check_hooks(cls: type[Adapter], name: str) -> None:
  """Raises unless all that a type marks as hooks are hooks.

  pluggy checks plugins; it never sees an adapter type, whose methods are called
  for the adapters in a model.
  """
  for method, function in inspect.getmembers(cls, inspect.isfunction):
    if not hasattr(function, f'{hookspecs.PROJECT}_impl'):
      continue
    if method not in HOOKS:
      raise errors.PluginError(
        f"adapter type '{name}': no hook is called '{method}'."
        f'{errors.suggest(method, HOOKS)}'
      )
    given = set(inspect.signature(getattr(hookspecs, method)).parameters)
    extra = [a for a in arguments_of(function) if a not in given]
    if extra:
      raise errors.PluginError(
        f"adapter type '{name}': hook '{method}' has no argument '{extra[0]}'; "
        f'it has {", ".join(sorted(given))}.'
      )


def without_plugins() -> pluggy.PluginManager:
  """Returns a manager that knows the hooks, and no plugin."""
  manager = pluggy.PluginManager(hookspecs.PROJECT)
  manager.add_hookspecs(hookspecs)
  return manager


def object_of(plugin: Any, name: str | None) -> Any:
  """Returns a plugin, or an instance of it if it is a class.

  Raises:
    PluginError: if it is an adapter type, or cannot be made without arguments.
  """
  kind = plugin if inspect.isclass(plugin) else type(plugin)
  if issubclass(kind, Adapter):
    raise errors.PluginError(
      f"plugin '{name or kind.__name__}' is an adapter type. Its entry point "
      "goes into the group 'surgery.adapters'."
    )
  if not inspect.isclass(plugin):
    return plugin
  try:
    return plugin()
  except errors.SurgeryError:
    raise
  except (Exception, SystemExit) as error:
    hint = ' Give an object of the class.'
    said = f'{type(error).__name__}: {error}.'
    raise errors.PluginError(
      f"plugin '{name or plugin.__name__}': {said}"
      f'{hint if isinstance(error, TypeError) else ""}'
    ) from error


def register(
  manager: pluggy.PluginManager, plugin: Any, name: str | None
) -> None:
  """Registers an object with hooks, or raises and leaves nothing behind."""
  if manager.is_registered(plugin):
    return  # Given to the host, and known by name too.
  shown = str(name or getattr(plugin, '__name__', type(plugin).__name__))
  # Of those that are given to a host, several may be of one class.
  others = (f'{shown} {number}' for number in itertools.count(2))
  names = itertools.chain([shown], others)
  unique = next(n for n in names if not manager.has_plugin(n))
  try:
    manager.register(plugin, unique)
    manager.check_pending()
  except (pluggy.PluginValidationError, ValueError) as error:
    if manager.is_registered(plugin):
      manager.unregister(plugin)
    raise errors.PluginError(f"plugin '{shown}': {error}") from error
  if not manager.get_hookcallers(plugin):
    manager.unregister(plugin)
    raise errors.PluginError(
      f"plugin '{shown}' implements no hook. Mark its functions with "
      'surgery.hookimpl.'
    )
