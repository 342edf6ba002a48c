"""All hooks, in one place.

Hooks announce; named, typed objects do the work. They are asked when an
adapter is attached or a recipe is planned, never inside a traced function. An
implementation may take fewer arguments than are listed here; later releases may
add arguments, never take one away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
  from surgery.contract.adapter import Adapter, Interceptor
  from surgery.contract.method import Method
  from surgery.contract.site import Site
  from surgery.contract.trees import Tree

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
  """What observers get.

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
  `serves:<type>`, when an adapter is attached. It is called for every layer,
  also for `rng` and layers of scalars: a key has the shape `()` and an empty
  dtype, a counter the shape `()`. So check the rank before sizes.
  Order: adapters being attached first, then plugins, last registered first;
  the first result that is not None wins.
  Return: True if the layer is meant, False if not, None if the term is
  another plugin's.
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
  parameter; for a weight of an adapter it is the weight's name. A policy is a
  whole name, without arguments: `heads` and `heads:query` are two names. One
  that lets all train is an error, and one that leaves nothing to train is
  warned of, as it may be misspelt.
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
  enabled adapters, and may not change those that an adapter rewrites; a pass
  that handles adapters itself is marked by `surgery.handles_adapters`. After
  each step the library checks that all leaves are `Leaf`s and that no adapter
  has lost a part (a weight, its parameter, or its record), and, when a leaf is
  computed, that it has the shape and the dtype that it declares.
  May raise: no. The functions may: a `SurgeryError` to refuse; anything else is
  a failure of the plugin, which is named with the step.
  Since: 0.1.
  """


@hookspec
def surgery_formats() -> Mapping[str, Any]:
  """Offers file formats.

  Called: once a host, when a file is opened or written.
  Order: all are asked; a name that two offer is an error.
  Return: by name, objects with `suffixes`, `open(path)` that returns a
  `Checkpoint` and `write(checkpoint, path, *, overwrite=False, manifest=True,
  shard_size=None, progress=None)`. `write` may take fewer of these, since only
  values that differ from the defaults are passed: without `manifest` or
  `shard_size` a caller who gives it gets an error, without `progress` there is
  no progress. A format whose `write` takes `shard_size` is also given indexes
  (`out.suffix.index.json`) to open. `surgery.files.sharding` reads and writes
  sets for any format with the methods of `surgery.files.sharding.Parts`. A
  format whose models are folders has `recognises(path)`, which returns whether
  a path is one of them and is called before suffixes are compared, and writes
  the whole folder itself; with `keeps_format = True` a folder that is made of
  one (`-o out/`) is one, too.
  May raise: no.
  Since: 0.1.
  """


@hookspec
def surgery_methods() -> Mapping[str, type[Method]]:
  """Offers methods that combine models or adapters, e.g. `ties`.

  Called: once a host, when a method is looked up by name.
  Order: all are asked; a name that two offer is an error.
  Return: by name, subclasses of `surgery.Method`: frozen dataclasses whose
  fields are options, with a function `combine` from a block of the same tensor
  of several models to a block of the result. The verb and step `combine`,
  `surgery.combine` and `combine_adapters` take them all.
  May raise: no.
  Since: 0.1.
  """


@hookspec
def surgery_maps() -> Mapping[str, Mapping[str, Any]]:
  """Offers maps of names between PyTorch's checkpoints and trees of JAX.

  Called: once a host, when a map is looked up by name.
  Order: all are asked; a name that two offer is an error.
  Return: by name, what the YAML of a map says: `rules`, a list of `TORCH <->
  JAX` or of `{rule: TORCH <-> JAX, axes: [1, 0]}`; and where there are some
  `about`, a text, and `left-out`, patterns of tensors that models compute by
  themselves.
  May raise: no. A map that cannot be read is an error when it is used.
  Since: 0.1.
  """


@hookspec
def surgery_adapter_files() -> Mapping[str, Any]:
  """Offers other programs' ways to store an adapter, beside formats of files.

  Called: once a host, when an adapter is attached or merged from a file.
  Order: all are asked; a name that two offer is an error.
  Return: by name, objects with `knows(alone)`, which says by names and manifest
  whether a `Checkpoint` holds such an adapter, and `bound(alone, base, *,
  names, host)`, which returns it as `extract` makes one of `base`: with
  records, so that all else goes on as with an adapter of ours.
  May raise: no. The methods may: a `SurgeryError`.
  Since: 0.2.
  """


@hookspec
def surgery_trees() -> Mapping[str, Tree]:
  """Offers frameworks whose models the verbs take, beside those of blox.

  Called: once a host, when a verb is given a model.
  Order: all are asked; a name that two offer is an error. The first that owns
  a model decides, plugins before the library: `nnx`, `equinox`, `linen` and,
  for all other pytrees, `plain`.
  Return: by name, objects of subclasses of `surgery.Tree`, which know what a
  model's arrays are, and how to build one with others.
  May raise: no. The methods may: a `SurgeryError`.
  Since: 0.2.
  """


@hookspec
def surgery_started(event: Event) -> None:
  """Observes that a verb starts; for progress and provenance.

  Called: before a verb does anything.
  Order: all are called.
  Return: nothing.
  May raise: no; what it raises is reported as a failure of the plugin.
  Since: 0.1.
  """


@hookspec
def surgery_finished(event: Event) -> None:
  """Observes that a verb ended, well or with `event.failed`.

  Called: after each verb that was announced by `surgery_started`.
  Order: all are called.
  Return: nothing.
  May raise: no; what it raises is reported as a failure of the plugin.
  Since: 0.1.
  """


# What implementations return: whether an answer is of the kind, and the kind in
# words. An answer of another kind would be taken for something, `'no'` for yes.


def _is_bool(value: Any) -> bool:
  # A comparison of numpy's numbers gives numpy's own.
  kind = type(value)
  return kind is bool or (
    kind.__module__ == 'numpy' and kind.__name__ in ('bool', 'bool_')
  )


def _is_interceptor(value: Any) -> bool:
  return (
    callable(getattr(value, 'init', None))
    and callable(getattr(value, 'apply', None))
    and type(value).__hash__ is not None
    and not isinstance(value, type)
  )


def _is_adapter_file(value: Any) -> bool:
  return callable(getattr(value, 'knows', None)) and callable(
    getattr(value, 'bound', None)
  )


def _is_format(value: Any) -> bool:
  suffixes = getattr(value, 'suffixes', None)
  return (
    isinstance(suffixes, Sequence)
    and not isinstance(suffixes, str)
    and all(isinstance(one, str) for one in suffixes)
  )


def _is_tree(value: Any) -> bool:
  from surgery.contract.trees import Tree

  return isinstance(value, Tree)


def _is_method(value: Any) -> bool:
  from surgery.contract.method import Method

  return isinstance(value, type) and issubclass(value, Method)


Kind = tuple[Callable[[Any], bool], str]
RETURNS: dict[str, Kind] = {
  'surgery_match_layer': (_is_bool, 'True, False or None'),
  'surgery_intercept_param': (
    _is_interceptor,
    'a hashable object with init(site, key) and apply(site, name, base, '
    'weights), or None',
  ),
  'surgery_freeze_param': (_is_bool, 'True, False or None'),
  'surgery_merge_param': (
    lambda value: isinstance(value, Refusal) or callable(value),
    'surgery.Refusal(reason), a function from array to array, or None',
  ),
}
# And what each thing is that an implementation offers by name.
OFFERS: dict[str, Kind] = {
  'surgery_passes': (callable, 'a function from a Checkpoint to a Checkpoint'),
  'surgery_formats': (
    _is_format,
    'an object with suffixes (a tuple of text), open and write',
  ),
  'surgery_adapter_files': (
    _is_adapter_file,
    'an object with knows(alone) and bound(alone, base, *, names, host)',
  ),
  'surgery_methods': (_is_method, 'a subclass of surgery.Method'),
  'surgery_trees': (_is_tree, 'an object of a subclass of surgery.Tree'),
  'surgery_maps': (
    lambda value: isinstance(value, Mapping) and 'rules' in value,
    "a mapping with 'rules'",
  ),
}
