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

import contextlib
import contextvars
import dataclasses
import inspect
import os
import pathlib
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from surgery import errors, once
from surgery.contract import hookspecs
from surgery.contract.adapter import Adapter
from surgery.contract.site import Site
from surgery.host import discovery, environment, foreign, location, registering
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.contract.method import Method
  from surgery.contract.trees import Tree


class PluginWarning(UserWarning):
  """A plugin could not be loaded; the rest goes on without it."""


class Host:
  """Owns the plugins that verbs ask.

  Args:
    plugins: adapter types and objects with hooks, beside what is installed.
    entry_points: whether installed distributions are asked for plugins. What
      comes with the library is there without being asked for, and blocked by
      name.
    block: names of plugins that must not be loaded.
    only: names of the plugins of other distributions that may be loaded; all
      by default. What comes with the library is always there, unless blocked.
    prefer: where two offer one name, or one offers a name that comes with the
      library: by name the distribution that is meant, or the class of a type
      that is given in `plugins`.
    strict: whether a broken plugin is an error, not a warning.
    trace: is told of each call of a hook, in a line.

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
    only: Iterable[str] | None = None,
    prefer: Mapping[str, str] | None = None,
    strict: bool = False,
    trace: Callable[[str], Any] | None = None,
  ) -> None:
    self._lock = threading.RLock()
    self._block = frozenset(block)
    self._only = None if only is None else frozenset(only)
    self._prefer = dict(prefer or {})
    self._strict = strict
    self._trace = trace
    self._entry_points = entry_points
    self._manager: pluggy.PluginManager | None = None
    self._given: list[Any] = []
    self._types: dict[str, type[Adapter]] = {}
    self._providers: dict[tuple[str, str], Any] = {}
    for plugin in plugins:
      self.register(plugin)

  def __copy__(self) -> Host:
    return self

  def __deepcopy__(self, memo: Any) -> Host:
    return self

  def __reduce__(self) -> Any:
    raise TypeError(
      'a surgery.Host cannot be pickled: it holds plugins, which are code. '
      'Make one in each process, or call surgery.default_host() there.'
    )

  # Adapter types.

  @once.attribute
  def _adapters(self) -> dict[str, list[discovery.Entry]]:
    found: dict[str, list[discovery.Entry]] = {}
    for entry in discovery.entries(
      discovery.ADAPTERS, 'adapter', self._entry_points
    ):
      found.setdefault(entry.info.name, []).append(entry)
    return found

  def _blocked(self, info: discovery.PluginInfo) -> bool:
    """Whether a plugin must not be loaded."""
    if info.name in self._block:
      return True
    own = info.distribution in ('', discovery.DISTRIBUTION)
    return not own and self._only is not None and info.name not in self._only

  def _chosen(
    self, entries: list[discovery.Entry], what: str
  ) -> list[discovery.Entry]:
    """Returns the entry to use of those with the same name, if there is one.

    Raises:
      PluginError: if there are several, naming their distributions.
    """
    open_ = [e for e in entries if not self._blocked(e.info)]
    if len(open_) < 2:
      return open_
    name = open_[0].info.name
    wanted = self._prefer.get(name)
    meant = [e for e in open_ if e.info.distribution == wanted]
    if len(meant) == 1:
      return meant
    origins = ' and '.join(e.info.origin for e in open_)
    if wanted is not None:
      raise errors.PluginError(
        f"{what} '{name}' is offered by {origins}, but not by '{wanted}', "
        'which `prefer` names.'
      )
    raise errors.PluginError(
      f"{what} '{name}' is offered by {origins}. Uninstall or block one of "
      f'them, or choose one: Host(prefer={{{name!r}: '
      f'{open_[0].info.distribution!r}}}), or SURGERY_PREFER='
      f'{name}={open_[0].info.distribution}.'
    )

  def adapter_names(self) -> tuple[str, ...]:
    """Returns the names of all adapter types, without importing them."""
    found = {
      name
      for name, entries in self._adapters.items()
      if not all(self._blocked(e.info) for e in entries)
    }
    return tuple(sorted((found | self._types.keys()) - self._block))

  def adapter_type(self, name: str) -> type[Adapter]:
    """Returns an adapter type, importing it if need be.

    Raises:
      UnknownAdapterType: if nothing offers it.
      PluginError: if what offers it is broken, or two distributions do.
    """
    if name in self._types and name not in self._block:
      return self._types[name]
    entries = self._chosen(self._adapters.get(name, []), 'adapter type')
    if not entries:
      raise errors.UnknownAdapterType(
        f"unknown adapter type '{name}'."
        f'{errors.suggest(name, self.adapter_names())} Adapter types come '
        'from installed distributions (entry points in '
        f"'{discovery.ADAPTERS}'); `surgery plugins` lists them."
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
    if name in self._types:
      return ''
    entries = self._chosen(self._adapters.get(name, []), 'adapter type')
    return entries[0].info.origin if entries else ''

  def _load(self, entry: discovery.Entry) -> discovery.Entry:
    """Loads an entry once; an error is kept in it."""
    with self._lock:
      if entry.value is not None or entry.error is not None:
        return entry
      # Under the lock, since another thread may ask for the same type; and an
      # entry is loaded once even if it fails, because Python would import half
      # of it again.
      assert entry.entry_point is not None
      try:
        with foreign.printing():
          value = entry.entry_point.load()
          if entry.info.kind == 'plugin':
            value = registering.object_of(value, entry.info.name)
        if entry.info.kind == 'adapter':
          registering.check_type(value, entry.info.name)
        entry.value = value
        entry.info = dataclasses.replace(entry.info, state='loaded')
      # The code of a plugin may raise anything, or even end the process.
      except (Exception, SystemExit) as error:
        entry.error = error
        entry.info = dataclasses.replace(
          entry.info,
          state='broken',
          reason=f'{type(error).__name__}: {error}{discovery.line_of(error)}'
          f'{discovery.release(entry)}',
          traceback=''.join(traceback.format_exception(error)),
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
        registering.check_type(plugin, plugin.name)
        if plugin.name in self._types:
          raise errors.PluginError(
            f"adapter type '{plugin.name}' is registered already, as "
            f'{self._types[plugin.name].__qualname__}.'
          )
        if self._is_meant(plugin):
          self._types[plugin.name] = plugin
        return
      with foreign.printing():
        plugin = registering.object_of(plugin, None)
      # Errors are raised here rather than when a hook is first called.
      # Against a manager of its own first: a plugin with a misspelt hook must
      # not stay registered in part.
      registering.register(registering.without_plugins(), plugin, None)
      self._given.append(plugin)
      if self._manager is not None:
        registering.register(self._manager, plugin, None)

  def _is_meant(self, cls: type[Adapter]) -> bool:
    """Whether a registered type is the one to use of its name.

    Raises:
      PluginError: if a distribution offers another type of that name, and
        `prefer` chooses none.
    """
    others = [
      entry.info
      for entry in self._adapters.get(cls.name, ())
      if not self._blocked(entry.info) and not discovery.is_entry(cls, entry)
    ]
    wanted = self._prefer.get(cls.name)
    if not others or wanted == cls.__name__:
      return True
    if wanted in [info.distribution for info in others]:
      return False
    origin = others[0].origin
    raise errors.PluginError(
      f"adapter type '{cls.name}' is offered by {origin}, and "
      f'{cls.__module__}.{cls.__qualname__}, which the host was given, has '
      'the same name. Rename it, or choose one: '
      f'Host(prefer={{{cls.name!r}: {cls.__name__!r}}}).'
    )

  @once.attribute
  def _plugin_entries(self) -> list[discovery.Entry]:
    return discovery.entries(discovery.PLUGINS, 'plugin', self._entry_points)

  @property
  def manager(self) -> pluggy.PluginManager:
    """The plugin manager, with all plugins loaded."""
    with self._lock:
      if self._manager is None:
        manager = registering.without_plugins()
        # pluggy calls the plugin first that was registered last.
        for entry in reversed(self._wanted()):
          self._load_plugin(manager, entry)
        for plugin in self._given:
          registering.register(manager, plugin, None)
        if self._trace is not None:
          manager.add_hookcall_monitoring(lambda *_: None, self._traced)
        self._manager = manager
      return self._manager

  def _wanted(self) -> list[discovery.Entry]:
    """Returns the plugins that may be loaded; of one name only one.

    Raises:
      PluginError: if two distributions offer one name.
    """
    names = dict.fromkeys(e.info.name for e in self._plugin_entries)
    wanted = []
    for name in names:
      same = [e for e in self._plugin_entries if e.info.name == name]
      try:
        meant = self._chosen(same, 'plugin')
      except errors.PluginError as error:
        # Neither is loaded, since the order of entry points is arbitrary.
        for entry in same:
          self._broken(entry, error)
        continue
      for entry in same:
        if entry not in meant:
          entry.info = dataclasses.replace(entry.info, state='blocked')
      wanted += meant
    return wanted

  def _broken(self, entry: discovery.Entry, error: errors.PluginError) -> None:
    entry.error = error
    entry.info = dataclasses.replace(
      entry.info, state='broken', reason=f'{error}{discovery.release(entry)}'
    )
    self._report(entry)

  def _report(self, entry: discovery.Entry) -> None:
    """Warns of a broken plugin, or raises in strict mode."""
    text = f"plugin '{entry.info.name}' of {entry.info.origin} is broken"
    if self._strict:
      raise errors.PluginError(
        f'{text}: {entry.info.reason} Uninstall it, block it (--no-plugin '
        f'{entry.info.name}), or unset SURGERY_STRICT_PLUGINS.'
      ) from entry.error
    warnings.warn(
      f'{text} and left out: {entry.info.reason}', PluginWarning, stacklevel=2
    )

  def _traced(
    self, outcome: Any, hook: str, impls: Any, arguments: Mapping[str, Any]
  ) -> None:
    assert self._trace is not None
    names = [impl.plugin_name for impl in impls]
    given = ', '.join(f'{k}={_short(v)}' for k, v in arguments.items())
    result = (
      f'raised {_short(outcome.exception)}'
      if outcome.exception is not None
      else _short(outcome.get_result())
    )
    self._trace(f'{hook}({given}) asked of {", ".join(names)} → {result}')

  def _load_plugin(
    self, manager: pluggy.PluginManager, entry: discovery.Entry
  ) -> None:
    self._load(entry)
    if entry.error is None:
      try:
        registering.register(manager, entry.value, entry.info.name)
        hooks = manager.get_hookcallers(entry.value) or []
        entry.info = dataclasses.replace(
          entry.info, hooks=tuple(sorted(h.name for h in hooks))
        )
      except errors.PluginError as error:
        self._broken(entry, error)
        return
    if entry.error is not None:
      self._report(entry)

  def ask(self, hook: str, *, of: Any = None, **arguments: Any) -> Any:
    """Calls a hook.

    Args:
      hook: its name.
      of: an object whose method takes part first, for hooks of which the first
        result wins; e.g. the adapter that is being attached.
      **arguments: the hook's arguments.

    Returns:
      What the hook's specification says: the first result, or a list of all.

    Raises:
      PluginError: if an implementation raises anything but a `SurgeryError`;
        it names the plugin.
    """
    caller = getattr(self.manager.hook, hook)
    extra = getattr(of, hook, None)
    try:
      with foreign.printing():
        if extra is None:
          result = caller(**arguments)
        elif not caller.get_hookimpls() and self._trace is None:
          # There is one implementation alone. Calling it without pluggy counts
          # in a model of ten thousand layers, each of which asks.
          result = _called_with(extra, arguments)
        else:
          result = caller.call_extra([extra], arguments)
    except errors.SurgeryError:
      raise
    except (Exception, SystemExit) as error:
      owner = self._owner(caller, extra, error)
      raise errors.PluginError(
        f'{owner} failed in {hook}: {type(error).__name__}: {error}'
      ) from error
    if result is not None and hook in hookspecs.RETURNS:
      fits, expected = hookspecs.RETURNS[hook]
      if not fits(result):
        owner = self._answerer(caller, extra, arguments, fits)
        raise errors.PluginError(
          f'{owner} returned {_short(result)} in {hook}, expected {expected}.'
        )
    return result

  def _answerer(
    self,
    caller: Any,
    extra: Any,
    arguments: Mapping[str, Any],
    fits: Callable[[Any], bool],
  ) -> str:
    """Returns the plugin that gave an answer of the wrong kind.

    pluggy does not say which implementation answered, so all are called again,
    in its order.
    """
    wrong = lambda answer: answer is not None and not fits(answer)
    if extra is not None and wrong(_called_with(extra, arguments)):
      return self._type_called(extra)
    wrappers = [i for i in caller.get_hookimpls() if i.wrapper or i.hookwrapper]
    for impl in reversed(caller.get_hookimpls()):
      # A wrapper is a generator around the others, and cannot be called alone.
      if impl not in wrappers and wrong(
        impl.function(*(arguments[name] for name in impl.argnames))
      ):
        return self._called(impl)
    # All answers were right, so a wrapper has changed one.
    return self._called(wrappers[-1]) if wrappers else 'a plugin'

  def _owner(self, caller: Any, extra: Any, error: BaseException) -> str:
    """Returns the plugin whose implementation raised."""
    # By the traceback: the code of one of the implementations is in it.
    codes = {
      frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)
    }
    for impl in caller.get_hookimpls():
      if getattr(impl.function, '__code__', None) in codes:
        return self._called(impl)
    return 'a plugin' if extra is None else self._type_called(extra)

  def _type_called(self, method: Any) -> str:
    """Returns the name of an adapter's type, with its distribution."""
    name = getattr(getattr(method, '__self__', None), 'name', '?')
    if origin := self.distribution(name):
      return f"adapter type '{name}' of {origin}"
    return f"adapter type '{name}'"

  def _called(self, impl: Any) -> str:
    """Returns the name of an implementation's plugin, with its distribution."""
    for entry in self._plugin_entries:
      if entry.value is not None and entry.value is impl.plugin:
        return f"plugin '{impl.plugin_name}' of {entry.info.origin}"
    return f"plugin '{impl.plugin_name}'"

  def plugins(self) -> list[discovery.PluginInfo]:
    """Returns all plugins that are known, without importing adapter types."""
    _ = self.manager  # Loads plugins with hooks, so that states are true.
    infos = [
      info
      for entries in self._adapters.values()
      for info in self._offered(entries)
    ]
    infos += [
      discovery.PluginInfo(
        name, 'adapter', state='loaded', hooks=registering.hooks_of(cls)
      )
      for name, cls in self._types.items()
    ]
    infos += [e.info for e in self._plugin_entries]
    for plugin in self._given:
      hooks = self.manager.get_hookcallers(plugin) or []
      name = self.manager.get_name(plugin) or repr(plugin)
      infos.append(
        discovery.PluginInfo(
          name,
          'plugin',
          state='loaded',
          hooks=tuple(sorted(h.name for h in hooks)),
        )
      )
    return sorted(infos, key=lambda i: (i.kind, i.name, i.distribution))

  def _offered(
    self, entries: list[discovery.Entry]
  ) -> Iterator[discovery.PluginInfo]:
    """Yields the adapter types of one name; at most one can be had."""
    try:
      meant, reason = self._chosen(entries, 'adapter type'), ''
    except errors.PluginError as error:
      meant, reason = [], str(error)
    for entry in entries:
      info = entry.info
      if info.state == 'loaded':
        info = dataclasses.replace(
          info, hooks=registering.hooks_of(entry.value)
        )
      if self._blocked(info) or (entry not in meant and not reason):
        info = dataclasses.replace(info, state='blocked')
      elif reason:
        info = dataclasses.replace(info, state='broken', reason=reason)
      yield info

  # What plugins offer by name.

  def implementations(self, hook: str, plugin: str) -> list[Any]:
    """Returns the functions of one plugin that implement a hook.

    Args:
      hook: its name.
      plugin: the plugin's name.
    """
    impls = getattr(self.manager.hook, hook).get_hookimpls()
    return [impl.function for impl in impls if impl.plugin_name == plugin]

  def offers(self, hook: str, plugin: str) -> dict[str, Any]:
    """Returns what one plugin offers, by name.

    Args:
      hook: `surgery_passes` or another that offers things.
      plugin: the plugin's name.

    Raises:
      PluginError: if it fails, or offers something else.
    """
    found: dict[str, Any] = {}
    for impl in getattr(self.manager.hook, hook).get_hookimpls():
      if impl.plugin_name == plugin:
        found |= self._offered_of(impl, hook)
    return found

  def about(self, plugin: str) -> str:
    """Returns the docstring of a plugin: a module, a class or an object."""
    one = self.manager.get_plugin(plugin)
    return (inspect.getdoc(one) or '') if one is not None else ''

  def _offered_of(self, impl: Any, hook: str) -> dict[str, Any]:
    """Returns what an implementation offers, checked."""
    with foreign.code(f'{self._called(impl)}: {hook}'):
      offered = impl.function()
    self._check_offer(impl, hook, offered)
    if self._trace is not None:
      names = _short(list(offered or ()))
      self._trace(f'{hook}() asked of {impl.plugin_name} → {names}')
    return dict(offered or {})

  def _offers(self, hook: str) -> dict[str, Any]:
    found: dict[str, tuple[str, Any]] = {}
    for impl in getattr(self.manager.hook, hook).get_hookimpls():
      for name, value in self._offered_of(impl, hook).items():
        if name in found:
          both = (found[name][0], impl.plugin_name)
          wanted = self._prefer.get(name)
          if wanted not in both:
            raise errors.PluginError(
              f"'{name}' is offered by two plugins, '{both[0]}' and "
              f"'{both[1]}' ({hook}). Uninstall or block one of them, or "
              f'choose one: Host(prefer={{{name!r}: {both[0]!r}}}), or '
              f'SURGERY_PREFER={name}={both[0]}.'
            )
          if wanted == found[name][0]:
            continue
        found[name] = (impl.plugin_name, value)
        self._providers[hook, name] = impl
    return {name: value for name, (_, value) in sorted(found.items())}

  def _check_offer(self, impl: Any, hook: str, offered: Any) -> None:
    """Raises unless a plugin offers what the hook is for, by name."""
    if offered is None:
      return
    fits, expected = hookspecs.OFFERS[hook]
    if not isinstance(offered, Mapping):
      raise errors.PluginError(
        f'{self._called(impl)} returned {_short(offered)} in {hook}, expected '
        'a mapping by name.'
      )
    for name, value in offered.items():
      if not isinstance(name, str) or not fits(value):
        raise errors.PluginError(
          f'{self._called(impl)} offers {_short(value)} as {name!r} in {hook}, '
          f'expected {expected}.'
        )

  def offered_by(self, hook: str, name: str) -> str | None:
    """Returns the plugin that offers something by name, or None if it is ours.

    Args:
      hook: `surgery_passes` or another that offers things.
      name: the name.
    """
    impl = self._providers.get((hook, name))
    if impl is None:
      return None
    for entry in self._plugin_entries:
      own = entry.info.distribution == discovery.DISTRIBUTION
      if own and entry.value is not None and entry.value is impl.plugin:
        return None
    return self._called(impl)

  def format_called(self, form: Any) -> str:
    """Returns a format's name, and its plugin unless it is built in."""
    for name, known in self.formats.items():
      if known is form:
        owner = self.offered_by('surgery_formats', name)
        return f'format {name!r}' + (f' of {owner}' if owner else '')
    return f'format {type(form).__name__!r}'

  @once.attribute
  def formats(self) -> Mapping[str, Any]:
    """File formats by name."""
    return self._offers('surgery_formats')

  @once.attribute
  def passes(self) -> Mapping[str, Callable[..., Any]]:
    """Passes by name."""
    return self._offers('surgery_passes')

  @once.attribute
  def methods(self) -> Mapping[str, type[Method]]:
    """Methods that combine models or adapters, by name."""
    return self._offers('surgery_methods')

  @once.attribute
  def maps(self) -> Mapping[str, Any]:
    """Maps of names between frameworks, by name, as data."""
    return self._offers('surgery_maps')

  @once.attribute
  def trees(self) -> Mapping[str, Tree]:
    """Frameworks of models by name, in the order in which they are asked."""
    offered = self._offers('surgery_trees')
    ours = {n for n in offered if not self.offered_by('surgery_trees', n)}
    theirs = {n: tree for n, tree in offered.items() if n not in ours}
    return {**theirs, **{n: offered[n] for n in offered if n in ours}}

  @once.attribute
  def adapter_files(self) -> Mapping[str, Any]:
    """Other programs' ways to store an adapter, by name."""
    return self._offers('surgery_adapter_files')

  def format_of(self, path: Any, name: str | None = None) -> Any:
    """Returns the format of a file, the index of a set, or a folder's model.

    Args:
      path: the file, whose suffix determines the format.
        `out.msgpack.index.json` has the suffix of `out.msgpack`.
      name: name of the format; by default the suffix determines it.

    Raises:
      FormatError: if no format fits.
    """
    return self.located(path, name)[0]

  def writes_folder(self, path: pathlib.Path, name: str | None) -> bool:
    """Whether the format of what is to be written writes whole folders.

    Args:
      path: where it is to be written.
      name: name of the format, where the suffix does not tell it.
    """
    if name is not None:
      forms = [form for key, form in self.formats.items() if key == name]
    else:
      forms = [f for f in self.formats.values() if path.suffix in f.suffixes]
    return any(hasattr(form, 'recognises') for form in forms)

  def located(
    self, path: Any, name: str | None = None
  ) -> tuple[Any, pathlib.Path]:
    """Returns the format of a saved model, and where its file or index is.

    Args:
      path: a file, the index of a set, or a folder that holds one model.
      name: name of the format; by default the suffix determines it.

    Raises:
      FormatError: if no format fits, or a folder holds several models.
    """
    path = pathlib.Path(os.fsdecode(path))
    forms = self._candidates(name)
    known = [suffix for form in forms for suffix in form.suffixes]
    # A format whose models are folders decides by looking into them, before a
    # folder is taken for one that holds a file; a new folder has only a suffix.
    of_folders = [form for form in forms if hasattr(form, 'recognises')]
    for form in of_folders:
      by_name = name is not None or path.suffix in form.suffixes
      if by_name or form.recognises(path):
        return form, path
    if path.is_dir():
      path = location.in_folder(path, known)
    elif name is not None:
      return forms[0], path
    suffix = location.suffix(path)
    for form in forms:
      if suffix in form.suffixes:
        return form, path
    what = f'for the suffix {suffix!r}' if suffix else 'for a name without one'
    raise errors.FormatError(
      f'{path}: no format is known {what}. Known suffixes: '
      f'{", ".join(sorted(known)) or "none"}.'
    )

  def _candidates(self, name: str | None) -> list[Any]:
    """Returns the format of a name, or all formats.

    Raises:
      FormatError: for a name that is not known.
    """
    if name is None:
      return list(self.formats.values())
    if name not in self.formats:
      raise errors.FormatError(
        f"unknown format '{name}'.{errors.suggest(name, self.formats)}"
      )
    return [self.formats[name]]

  def observed(self, verb: str, arguments: Mapping[str, Any]) -> _Observed:
    """Notifies observers of a verb: `with host.observed('merge', {…}):`."""
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


def _called_with(method: Any, arguments: Mapping[str, Any]) -> Any:
  """Calls a method with the arguments that it takes, as pluggy does."""
  names = registering.arguments_of(method.__func__)
  return method(**{name: arguments[name] for name in names})


def _short(value: Any) -> str:
  """Returns a value in a few characters, for a trace."""
  if isinstance(value, Site):
    return paths.show(value.path) if value.known else '?'
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}…'


def from_environment(**changes: Any) -> Host:
  """Returns a host that is configured by the environment's variables.

  Args:
    **changes: further arguments of the host.

  Raises:
    PluginError: for a variable that cannot be read.
  """
  return Host(**{**environment.options(), **changes})


@once.once
def _default() -> Host:
  return from_environment()


_CURRENT: contextvars.ContextVar[Host | None] = contextvars.ContextVar(
  'surgery_host', default=None
)


def default_host() -> Host:
  """Returns the host that verbs use where none is given."""
  return _CURRENT.get() or _default()


@contextlib.contextmanager
def used(host: Host) -> Iterator[None]:
  """Makes a host the default one, in this thread and for a time."""
  token = _CURRENT.set(host)
  try:
    yield
  finally:
    _CURRENT.reset(token)
