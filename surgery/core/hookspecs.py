"""All hooks, in one place.

Hooks announce; named, typed objects do the work. They are asked when an
adapter is attached or a recipe is planned, never inside a traced function. An
implementation may take fewer arguments than are listed here; later releases may
add arguments, never take one away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
  from surgery.core.adapter import Adapter, Interceptor
  from surgery.core.site import Site

# mypy: disable-error-code=empty-body

PROJECT = 'surgery'

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclasses.dataclass(frozen=True)
class Refusal:
  """What a hook returns to refuse.

  Attributes:
    reason: what a user will read, without a full stop.
  """

  reason: str


@dataclasses.dataclass(frozen=True)
class Event:
  """What observers are told.

  Attributes:
    verb: name of the verb or pass, e.g. `merge`.
    arguments: its arguments as JSON data.
    failed: the error it ended with, or None.
  """

  verb: str
  arguments: Mapping[str, Any]
  failed: BaseException | None = None


@hookspec(firstresult=True)
def surgery_match_layer(site: Site, term: str) -> bool | None:
  """Answers a term of a selector, e.g. `attention:` or `attention:8`.

  Called: for each layer, when a selector with a term that is not built in
  (`re:`, `type:`) is resolved; for each candidate site, with the term
  `serves:<type>`, when an adapter is attached.
  Order: adapters being attached first, then plugins, last registered first;
  the first result that is not None wins.
  Return: True if the layer is meant, False if not, None if the term is
  somebody else's.
  May raise: a `SurgeryError`, for a term that is its own but cannot be read.
  Since: 0.1.
  """


@hookspec(firstresult=True)
def surgery_intercept_param(site: Site) -> Interceptor | None:
  """Returns what stands between stored parameters and the layer.

  Called: once for each site when an adapter is attached or loaded. Where an
  adapter is attached before initialisation it is called once with a site
  whose `known` is False, and what it returns serves every site to come.
  Order: the adapter being attached first, then plugins, last registered
  first; the first result that is not None wins. Wrappers may wrap it.
  Return: an object with `init(site, key)` and `apply(site, name, base,
  weights)`, hashable and equal only to what computes the same; or None.
  May raise: a `SurgeryError`, to refuse the site.
  Since: 0.1.
  """


@hookspec(firstresult=True)
def surgery_freeze_param(site: Site, policy: str) -> bool | None:
  """Says whether a parameter trains under a named policy, e.g. `bitfit`.

  Called: for each parameter when `freeze` is given a policy. `site.name` is the
  parameter; for a weight of an adapter it is the weight's name.
  Order: the owning adapter first, then plugins, last registered first; the
  first result that is not None wins.
  Return: True to train it, False to freeze it, None if the policy is somebody
  else's.
  May raise: a `SurgeryError`.
  Since: 0.1.
  """


@hookspec(firstresult=True)
def surgery_merge_param(
  site: Site, adapter: Adapter
) -> Refusal | Callable[[Any], Any] | None:
  """May refuse a merge, or re-encode its result; never computes it otherwise.

  Called: once for each site when an adapter is merged.
  Order: the adapter first, then plugins, last registered first; the first
  result that is not None wins.
  Return: `surgery.Refusal(reason)`; or a function from the merged array to
  what is stored, of the same shape and dtype; or None for the array itself.
  May raise: a `SurgeryError`.
  Since: 0.1.
  """


@hookspec
def surgery_passes() -> Mapping[str, Callable[..., Any]]:
  """Offers further passes.

  Called: once a host, when a pass is looked up by name.
  Order: all are asked; a name that two offer is an error.
  Return: by name, functions from a `Checkpoint` and keyword arguments to a
  `Checkpoint`. In a recipe they are given parameters as layers get them, with
  enabled adapters, and may not change those that an adapter rewrites; one that
  knows about adapters is marked by `surgery.handles_adapters`.
  May raise: no.
  Since: 0.1.
  """


@hookspec
def surgery_formats() -> Mapping[str, Any]:
  """Offers file formats.

  Called: once a host, when a file is opened or written.
  Order: all are asked; a name that two offer is an error.
  Return: by name, objects with `suffixes`, `open(path)` that returns a
  `Checkpoint` and `write(checkpoint, path, *, overwrite=False, manifest=True,
  shard_size=None, progress=None)`. Of these `write` may take fewer, since only
  what is not the default is passed: without `manifest` or `shard_size` who asks
  for it gets an error, without `progress` nobody is told. A format whose
  `write` takes `shard_size` is also given indexes (`out.suffix.index.json`) to
  open. `surgery.files.sharding` reads and writes sets for any format with the
  methods of `surgery.files.sharding.Parts`.
  May raise: no.
  Since: 0.1.
  """


@hookspec
def surgery_methods() -> Mapping[str, Callable[..., Any]]:
  """Offers methods that combine checkpoints or adapters, e.g. `ties`.

  Called: once a host, when a method is looked up by name.
  Order: all are asked; a name that two offer is an error.
  Return: by name, functions from a list of arrays, one a model, and keyword
  arguments to one array.
  May raise: no.
  Since: 0.1.
  """


@hookspec
def surgery_started(event: Event) -> None:
  """Observes that a verb starts; for progress and provenance.

  Called: before a verb does anything.
  Order: all are told.
  Return: nothing.
  May raise: no; what it raises is reported as a failure of the plugin.
  Since: 0.1.
  """


@hookspec
def surgery_finished(event: Event) -> None:
  """Observes that a verb ended, well or with `event.failed`.

  Called: after each verb that was announced by `surgery_started`.
  Order: all are told.
  Return: nothing.
  May raise: no; what it raises is reported as a failure of the plugin.
  Since: 0.1.
  """
