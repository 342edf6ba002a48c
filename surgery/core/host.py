"""The host: finds plugins, loads them when they are needed, names the broken.

A host owns one plugin manager; nothing about plugins is global. A default host
exists for convenience (`default_host`), and every verb takes `host=`.

Two groups of entry points are read. `surgery.adapters`: the entry's name is the
adapter type's name and its value an `Adapter` subclass; only what is asked for
is imported. `surgery.plugins`: objects with hooks; loaded when the first hook
is asked. An installed plugin is arbitrary code; files and recipes never name
importable modules.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import inspect
import os
import pathlib
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pluggy

from surgery.core import errors, hookspecs, location
from surgery.core.adapter import Adapter

ADAPTERS = 'surgery.adapters'
PLUGINS = 'surgery.plugins'


class PluginWarning(UserWarning):
  """A plugin could not be loaded; the rest goes on without it."""


@dataclasses.dataclass(frozen=True)
class PluginInfo:
  """What is known of one plugin.

  Attributes:
    name: name of its entry point, or under which it was registered.
    kind: `adapter` or `plugin`.
    distribution: name of the distribution that it came from, or empty.
    version: that distribution's version, or empty.
    state: `available` (not imported yet), `loaded`, `broken` or `blocked`.
    reason: why it is broken.
    hooks: names of the hooks that it implements, where it is loaded.
  """

  name: str
  kind: str
  distribution: str = ''
  version: str = ''
  state: str = 'available'
  reason: str = ''
  hooks: tuple[str, ...] = ()

  @property
  def origin(self) -> str:
    """Distribution and version, or where else it came from."""
    if not self.distribution:
      return 'given to the host'
    return f'{self.distribution} {self.version}'.rstrip()


@dataclasses.dataclass
class _Entry:
  """A plugin that is known by name; loaded or not."""

  info: PluginInfo
  entry_point: importlib.metadata.EntryPoint | None
  value: Any = None
  error: BaseException | None = None


def _entries(group: str, kind: str) -> list[_Entry]:
  found = []
  for point in importlib.metadata.entry_points(group=group):
    dist = point.dist
    info = PluginInfo(
      point.name, kind, dist.name if dist else '', dist.version if dist else ''
    )
    found.append(_Entry(info, point))
  # The order of installation decides nothing.
  return sorted(found, key=lambda e: (e.info.name, e.info.distribution))


class Host:
  """Owns the plugins that verbs ask.

  Args:
    plugins: adapter types and objects with hooks, beside what is installed.
    entry_points: whether installed distributions are asked for plugins.
    block: names of plugins that must not be loaded.

  Example:
    host = surgery.Host(plugins=[MyAdapter], entry_points=False)
    params = surgery.attach(params, MyAdapter(), to='**', host=host)
  """

  def __init__(
    self,
    plugins: Iterable[Any] = (),
    *,
    entry_points: bool = True,
    block: Iterable[str] = (),
  ) -> None:
    self._lock = threading.RLock()
    self._block = frozenset(block)
    self._entry_points = entry_points
    self._manager: pluggy.PluginManager | None = None
    self._given: list[Any] = []
    self._types: dict[str, type[Adapter]] = {}
    for plugin in plugins:
      self.register(plugin)

  # Adapter types.

  @functools.cached_property
  def _adapters(self) -> dict[str, list[_Entry]]:
    found: dict[str, list[_Entry]] = {}
    for entry in _entries(ADAPTERS, 'adapter') if self._entry_points else ():
      found.setdefault(entry.info.name, []).append(entry)
    return found

  def adapter_names(self) -> tuple[str, ...]:
    """Returns the names of all adapter types, without importing them."""
    names = {*self._types, *self._adapters} - self._block
    return tuple(sorted(names))

  def adapter_type(self, name: str) -> type[Adapter]:
    """Returns an adapter type, importing it if need be.

    Raises:
      UnknownAdapterType: if nothing offers it.
      PluginError: if what offers it is broken, or two distributions do.
    """
    if name in self._types and name not in self._block:
      return self._types[name]
    entries = self._adapters.get(name, []) if name not in self._block else []
    if not entries:
      raise errors.UnknownAdapterType(
        f"unknown adapter type '{name}'."
        f'{errors.suggest(name, self.adapter_names())} Adapter types come '
        f"from installed distributions (entry points in '{ADAPTERS}'); "
        '`surgery plugins` lists them.'
      )
    if len(entries) > 1:
      origins = ' and '.join(e.info.origin for e in entries)
      raise errors.PluginError(
        f"adapter type '{name}' is offered by {origins}. Uninstall one of "
        'them, or block it.'
      )
    entry = self._load(entries[0])
    if entry.error is not None:
      raise errors.PluginError(
        f"adapter type '{name}' of {entry.info.origin} is broken: "
        f'{entry.info.reason}'
      ) from entry.error
    return entry.value

  def distribution(self, name: str) -> str:
    """Returns the distribution and version an adapter type comes from."""
    entries = self._adapters.get(name, ())
    return entries[0].info.origin if entries else ''

  def _load(self, entry: _Entry) -> _Entry:
    """Loads an entry once; what goes wrong is kept in it."""
    with self._lock:
      if entry.value is not None or entry.error is not None:
        return entry
      assert entry.entry_point is not None
      try:
        value = entry.entry_point.load()
        if entry.info.kind == 'adapter':
          _check_type(value, entry.info.name)
        entry.value = value
        entry.info = dataclasses.replace(entry.info, state='loaded')
      except Exception as error:  # A plugin is somebody else's code.
        entry.error = error
        last = traceback.extract_tb(error.__traceback__)[-1]
        entry.info = dataclasses.replace(
          entry.info,
          state='broken',
          reason=f'{type(error).__name__}: {error} '
          f'({pathlib.Path(last.filename).name}:{last.lineno})',
        )
      return entry

  # Hooks.

  def register(self, plugin: Any) -> None:
    """Adds an adapter type or an object with hooks.

    Args:
      plugin: an `Adapter` subclass, or any object with functions that are
        marked with `surgery.hookimpl`.

    Raises:
      PluginError: if it offers nothing, has a misspelt hook, or its name is
        taken.
    """
    with self._lock:
      if inspect.isclass(plugin) and issubclass(plugin, Adapter):
        _check_type(plugin, plugin.name)
        if plugin.name in self._types:
          raise errors.PluginError(
            f"adapter type '{plugin.name}' is registered already, as "
            f'{self._types[plugin.name].__qualname__}.'
          )
        self._types[plugin.name] = plugin
        return
      self._given.append(plugin)
      if self._manager is not None:
        _register(self._manager, plugin, None)

  @functools.cached_property
  def _plugin_entries(self) -> list[_Entry]:
    return _entries(PLUGINS, 'plugin') if self._entry_points else []

  @property
  def manager(self) -> pluggy.PluginManager:
    """The plugin manager, with all plugins loaded."""
    with self._lock:
      if self._manager is None:
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        # The last that was registered is asked first.
        for entry in reversed(self._plugin_entries):
          self._load_plugin(manager, entry)
        for plugin in self._given:
          _register(manager, plugin, None)
        self._manager = manager
      return self._manager

  def _load_plugin(self, manager: pluggy.PluginManager, entry: _Entry) -> None:
    if entry.info.name in self._block:
      entry.info = dataclasses.replace(entry.info, state='blocked')
      return
    self._load(entry)
    if entry.error is None:
      try:
        _register(manager, entry.value, entry.info.name)
        hooks = manager.get_hookcallers(entry.value) or []
        entry.info = dataclasses.replace(
          entry.info, hooks=tuple(sorted(h.name for h in hooks))
        )
      except errors.PluginError as error:
        entry.error = error
        entry.info = dataclasses.replace(
          entry.info, state='broken', reason=str(error)
        )
    if entry.error is not None:
      warnings.warn(
        f"plugin '{entry.info.name}' of {entry.info.origin} is broken and left "
        f'out: {entry.info.reason}',
        PluginWarning,
        stacklevel=2,
      )

  def ask(self, hook: str, *, of: Any = None, **arguments: Any) -> Any:
    """Asks a hook.

    Args:
      hook: its name.
      of: an object whose method takes part first, for hooks of which the first
        result wins; e.g. the adapter that is being attached.
      **arguments: the hook's arguments.

    Returns:
      What the hook's specification says: the first result, or a list of all.

    Raises:
      PluginError: if an implementation raises something that is no
        `SurgeryError`; it names the plugin.
    """
    caller = getattr(self.manager.hook, hook)
    extra = getattr(of, hook, None)
    try:
      if extra is None:
        return caller(**arguments)
      if not caller.get_hookimpls():
        # Nobody else has a say: a model of ten thousand layers asks often.
        return extra(**{n: arguments[n] for n in _names(extra.__func__)})
      return caller.call_extra([extra], arguments)
    except errors.SurgeryError:
      raise
    except Exception as error:
      owner = self._owner(caller, extra, error)
      raise errors.PluginError(
        f"plugin '{owner}' failed in {hook}: {type(error).__name__}: {error}"
      ) from error

  def _owner(self, caller: Any, extra: Any, error: BaseException) -> str:
    """Returns the name of the plugin whose implementation raised."""
    codes = {
      frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    for impl in caller.get_hookimpls():
      if getattr(impl.function, '__code__', None) in codes:
        return impl.plugin_name
    owner = getattr(extra, '__self__', None)
    return getattr(owner, 'name', '?')

  def plugins(self) -> list[PluginInfo]:
    """Returns all plugins that are known, without importing adapter types."""
    _ = self.manager  # Loads plugins with hooks, so that states are true.
    infos = [
      dataclasses.replace(
        e.info, state='blocked' if e.info.name in self._block else e.info.state
      )
      for entries in self._adapters.values()
      for e in entries
    ]
    infos += [
      PluginInfo(name, 'adapter', state='loaded') for name in self._types
    ]
    infos += [e.info for e in self._plugin_entries]
    for plugin in self._given:
      hooks = self.manager.get_hookcallers(plugin) or []
      name = self.manager.get_name(plugin) or repr(plugin)
      infos.append(
        PluginInfo(
          name,
          'plugin',
          state='loaded',
          hooks=tuple(sorted(h.name for h in hooks)),
        )
      )
    return sorted(infos, key=lambda i: (i.kind, i.name, i.distribution))

  # What plugins offer by name.

  def _offers(self, hook: str) -> dict[str, Any]:
    found: dict[str, tuple[str, Any]] = {}
    for impl in getattr(self.manager.hook, hook).get_hookimpls():
      try:
        offered = impl.function()
      except Exception as error:
        raise errors.PluginError(
          f"plugin '{impl.plugin_name}' failed in {hook}: "
          f'{type(error).__name__}: {error}'
        ) from error
      for name, value in dict(offered or {}).items():
        if name in found:
          raise errors.PluginError(
            f"'{name}' is offered by two plugins, '{found[name][0]}' and "
            f"'{impl.plugin_name}' ({hook}). Uninstall or block one of them."
          )
        found[name] = (impl.plugin_name, value)
    return {name: value for name, (_, value) in sorted(found.items())}

  @functools.cached_property
  def formats(self) -> Mapping[str, Any]:
    """File formats by name."""
    return self._offers('surgery_formats')

  @functools.cached_property
  def passes(self) -> Mapping[str, Callable[..., Any]]:
    """Passes by name."""
    return self._offers('surgery_passes')

  @functools.cached_property
  def methods(self) -> Mapping[str, Callable[..., Any]]:
    """Methods that combine checkpoints or adapters, by name."""
    return self._offers('surgery_methods')

  def format_of(self, path: Any, name: str | None = None) -> Any:
    """Returns the format of a file, the index of a set, or a folder's model.

    Args:
      path: the file; its suffix tells the format. `out.msgpack.index.json` has
        that of `out.msgpack`.
      name: name of the format, where the suffix does not tell it.

    Raises:
      FormatError: if there is none.
    """
    return self.located(path, name)[0]

  def located(
    self, path: Any, name: str | None = None
  ) -> tuple[Any, pathlib.Path]:
    """Returns the format of a saved model, and where its file or index is.

    Args:
      path: a file, the index of a set, or a folder that holds one model.
      name: name of the format, where the suffix does not tell it.

    Raises:
      FormatError: if there is none, or a folder holds several models.
    """
    path = pathlib.Path(os.fsdecode(path))
    forms = list(self.formats.values())
    if name is not None:
      if name not in self.formats:
        raise errors.FormatError(
          f"unknown format '{name}'.{errors.suggest(name, self.formats)}"
        )
      forms = [self.formats[name]]
    known = [suffix for form in forms for suffix in form.suffixes]
    if path.is_dir():
      path = location.in_folder(path, known)
    elif name is not None:
      return forms[0], path
    suffix = location.suffix(path)
    for form in forms:
      if suffix in form.suffixes:
        return form, path
    raise errors.FormatError(
      f"{path}: no format is known for the suffix '{suffix}'. Known: "
      f'{", ".join(sorted(known)) or "none"}.'
    )

  def observed(self, verb: str, arguments: Mapping[str, Any]) -> _Observed:
    """Tells observers of a verb: `with host.observed('merge', {…}):`."""
    return _Observed(self, verb, arguments)


class _Observed:
  def __init__(
    self, host: Host, verb: str, arguments: Mapping[str, Any]
  ) -> None:
    self._host = host
    self._event = hookspecs.Event(verb, arguments)

  def __enter__(self) -> None:
    self._host.ask('surgery_started', event=self._event)

  def __exit__(self, kind: Any, error: BaseException | None, tb: Any) -> None:
    event = dataclasses.replace(self._event, failed=error)
    self._host.ask('surgery_finished', event=event)


@functools.lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
  """Returns the arguments that an implementation takes, without self."""
  return tuple(inspect.signature(function).parameters)[1:]


def _check_type(value: Any, name: str) -> None:
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


def _register(
  manager: pluggy.PluginManager, plugin: Any, name: str | None
) -> None:
  """Registers an object with hooks, or raises and leaves nothing behind."""
  if inspect.isclass(plugin):
    plugin = plugin()
  shown = name or getattr(plugin, '__name__', type(plugin).__name__)
  try:
    manager.register(plugin, name)
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


@functools.cache
def default_host() -> Host:
  """Returns the host that verbs use where none is given."""
  return Host()
