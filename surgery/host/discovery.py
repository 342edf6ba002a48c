"""Plugins as installed distributions name them; nothing is imported for it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import traceback
from typing import Any

from surgery import version
from surgery.contract import origin
from surgery.contract.adapter import Adapter

ADAPTERS = origin.GROUP


PLUGINS = 'surgery.plugins'


# The library's own.
DISTRIBUTION = 'blox-surgery'


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
    traceback: where it broke, for `surgery plugins show`.
  """

  name: str
  kind: str
  distribution: str = ''
  version: str = ''
  state: str = 'available'
  reason: str = ''
  hooks: tuple[str, ...] = ()
  traceback: str = ''

  @property
  def origin(self) -> str:
    """Distribution and version, or where else it came from."""
    if not self.distribution:
      return 'given to the host'
    return f'{self.distribution} {self.version}'.rstrip()


@dataclasses.dataclass
class Entry:
  """A plugin that is known by name; loaded or not."""

  info: PluginInfo
  entry_point: importlib.metadata.EntryPoint | None
  value: Any = None
  error: BaseException | None = None


# What comes with the library, as its own distribution says it.
_OWN = {
  ADAPTERS: {'lora': 'surgery.builtin.lora:LoRA'},
  PLUGINS: {
    'files': 'surgery.files.plugin',
    'interop': 'surgery.interop.plugin',
    'maps': 'surgery.interop.maps.plugin',
    'methods': 'surgery.methods.plugin',
    'passes': 'surgery.passes.plugin',
    'trees': 'surgery.trees.plugin',
  },
}


def entries(group: str, kind: str, installed: bool) -> list[Entry]:
  """Returns what is known by name, of installed distributions or of ours."""
  found = []
  if not installed:
    for name, value in _OWN[group].items():
      info = PluginInfo(name, kind, DISTRIBUTION, version.VERSION)
      point = importlib.metadata.EntryPoint(name, value, group)
      found.append(Entry(info, point))
    return found
  for point in importlib.metadata.entry_points(group=group):
    dist = point.dist
    info = PluginInfo(
      point.name, kind, dist.name if dist else '', dist.version if dist else ''
    )
    found.append(Entry(info, point))
  # The order of installation decides nothing.
  return sorted(found, key=lambda e: (e.info.name, e.info.distribution))


def is_entry(cls: type[Adapter], entry: Entry) -> bool:
  """Whether a type is the one that an entry point names, without importing."""
  point = entry.entry_point
  if point is None or entry.value is cls:
    return entry.value is cls
  return origin.is_named(point, cls)


def line_of(error: BaseException) -> str:
  """Returns the line of a plugin's file where it broke, if it was there."""
  ours = pathlib.Path(__file__).parents[1]
  for frame in reversed(traceback.extract_tb(error.__traceback__)):
    file = pathlib.Path(frame.filename)
    if (
      file.is_file()
      and ours not in file.parents
      and 'importlib'
      not in (
        file.parent.name,
        file.parent.parent.name,
      )
    ):
      return f' ({file.name}:{frame.lineno})'
  return ''


def release(entry: Entry) -> str:
  """Returns what a broken plugin was made for, if it says so."""
  point = entry.entry_point
  if point is None or point.dist is None:
    return ''
  wanted = [
    text
    for text in point.dist.requires or ()
    if text.replace('_', '-').lower().startswith(DISTRIBUTION)
  ]
  if not wanted:
    return ''
  return f' (it requires {wanted[0]}; this is {version.VERSION})'
