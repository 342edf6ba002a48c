"""Running passes, and checking what they return and raise.

A pass may be a plugin's. After each one a model is whole: it is a `Checkpoint`,
no adapter has lost a part of itself, and the value of a leaf has the leaf's
shape and dtype. This is checked in one place, so that no pass has to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import nonfinite, rounding
from surgery.host import foreign
from surgery.host.manager import Host
from surgery.model import manifest
from surgery.model.checkpoint import Check, Checkpoint, Leaf
from surgery.model.grid import Index
from surgery.naming import paths
from surgery.naming.paths import Path

Run = Callable[
  [Callable[..., Any], str, Checkpoint, Mapping[str, Any], Host], Any
]


def performed(
  name: str,
  function: Callable[..., Any],
  before: Checkpoint,
  host: Host,
  given: Mapping[str, Any],
  *,
  run: Run | None = None,
) -> Checkpoint:
  """Runs a pass, and checks its result.

  Args:
    name: its name.
    function: the pass.
    before: its input.
    host: offers the pass.
    given: its other arguments.
    run: calls it, given the function, its name, the input, the other arguments
      and the host; by default a plain call.

  Raises:
    PluginError: if a plugin's pass raises anything but a `SurgeryError`, or a
      pass returns anything but a checkpoint of leaves.
    AdapterError: if it leaves half an adapter.
    FormatError: if the input is a patch.
  """
  manifest.check_no_patch(before.manifest, before.origin)
  owner = host.offered_by('surgery_passes', name)
  what = f'pass {name!r} of {owner}' if owner else f'pass {name!r}'

  # `run` may wrap the result, so it is checked where the function returns it.
  @functools.wraps(function)
  def looked_at(*args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    _check_kind(result, what)
    return result

  # An unexpected error in the library's own pass is a bug, and must look so.
  with foreign.code(what) if owner else contextlib.nullcontext():
    after = (run or _called)(looked_at, name, before, given, host)
  if owner is not None:
    after = _guarded(before, after, what, not _decides(function))
  _check_adapters(before, after, what)
  return after


def _called(
  function: Callable[..., Any],
  name: str,
  before: Checkpoint,
  given: Mapping[str, Any],
  host: Host,
) -> Any:
  """Calls a pass."""
  del name, host
  return function(before, **given)


def _check_kind(after: Any, what: str) -> None:
  """Raises unless a pass returned a checkpoint of leaves."""
  if not isinstance(after, Checkpoint):
    raise errors.PluginError(
      f'{what} returned {type(after).__name__}, expected a surgery.Checkpoint.'
    )
  for path, leaf in after.items():
    if not (
      isinstance(path, tuple) and path and all(isinstance(n, str) for n in path)
    ):
      raise errors.PluginError(
        f'{what} returned a tensor under {path!r}, expected a path: a tuple of '
        'strings.'
      )
    if not isinstance(leaf, Leaf):
      raise errors.PluginError(
        f'{paths.show(path)}: {what} returned {type(leaf).__name__} in place '
        'of a surgery.Leaf.'
      )


# Leaves of plugins' passes, which are checked when they are loaded.


@dataclasses.dataclass(frozen=True)
class _Load:
  """Loads a leaf that a plugin's pass made."""

  made: Leaf
  path: Path
  what: str
  was: Leaf | None

  def __call__(self) -> Any:
    with foreign.code(f'{paths.show(self.path)}: {self.what}'):
      value = self.made.load()
    _check_value(self.made, value, (), self.path, self.what)
    _check_finite(self.was, value, (), self.path, self.what)
    return value


@dataclasses.dataclass(frozen=True)
class _Part:
  """Loads a part of a leaf that a plugin's pass made."""

  made: Leaf
  path: Path
  what: str
  was: Leaf | None

  def __call__(self, index: Index) -> Any:
    assert self.made.part is not None
    with foreign.code(f'{paths.show(self.path)}: {self.what}'):
      value = self.made.part(index)
    _check_value(self.made, value, index, self.path, self.what)
    _check_finite(self.was, value, index, self.path, self.what)
    return value


def _check_value(
  leaf: Leaf, value: Any, index: Index, path: Path, what: str
) -> None:
  """Raises if a value has another shape or dtype than its leaf."""
  wrong = leaf.mismatch(value, index)
  if wrong is not None:
    raise errors.PluginError(f'{paths.show(path)}: {what}: {wrong}')


def _decides(function: Callable[..., Any]) -> bool:
  """Whether a pass decides by an option of its own what may not be finite."""
  try:
    return 'nonfinite' in inspect.signature(function).parameters
  except (TypeError, ValueError):  # What is written in C may have none.
    return False


def _check_finite(
  was: Leaf | None, value: Any, index: Index, path: Path, what: str
) -> None:
  """Raises if a number became NaN or infinite that was finite.

  Args:
    was: the tensor before the pass, if it had this name and shape. Of others
      nobody but the pass knows what they were made of.
    value: the block that the pass made.
    index: the block.
    path: the tensor.
    what: the pass.

  Raises:
    CastError: naming the first such number.
  """
  if was is None or _is_traced(value):
    return
  block = np.asarray(value)
  dtype = block.dtype.name
  inexact = rounding.is_float(dtype) or block.dtype.kind == 'c'
  if not inexact or nonfinite.within(block, dtype):
    return
  known = was.load() if was.part is None or not index else was.part(index)
  if _is_traced(known):
    return
  old = np.asarray(known)
  if old.shape != block.shape:
    old = old[index]
  new = ~np.isfinite(block) & np.isfinite(old)
  if not new.any():
    return
  first = np.unravel_index(int(np.argmax(new)), new.shape)
  starts = (*(cut.start for cut in index), *[0] * (new.ndim - len(index)))
  at = [int(a) + b for a, b in zip(first, starts, strict=True)]
  raise errors.CastError(
    f'{paths.show(path)}: {what}: the result at index {at} is {block[first]}, '
    f'and was {old[first]}. A pass that may make such numbers has an argument '
    "`nonfinite: Literal['refuse', 'allow'] = 'refuse'`, and looks at them "
    'itself.'
  )


def _is_traced(value: Any) -> bool:
  """Whether a value is one of a function that JAX traces."""
  if 'jax' not in sys.modules:
    return False
  from surgery import jaxcompat

  return jaxcompat.is_traced(value)


def _guarded(
  before: Checkpoint, after: Checkpoint, what: str, finite: bool
) -> Checkpoint:
  """Returns a checkpoint whose new leaves name the plugin in their errors.

  Args:
    before: the input of the pass.
    after: its result.
    what: the pass, for messages.
    finite: whether finite numbers must stay finite.
  """
  # Unchanged leaves keep their functions, by which they are recognised.
  old = {id(leaf.load) for leaf in before.values()}
  leaves = {}
  for path, leaf in after.items():
    if id(leaf.load) not in old and leaf.load is not leaf.source:
      was = before.get(path) if finite else None
      if was is not None and (was.shape != leaf.shape or was.key is not None):
        was = None
      part = None if leaf.part is None else _Part(leaf, path, what, was)
      leaf = leaf.replace(load=_Load(leaf, path, what, was), part=part)
    leaves[path] = leaf
  known = {id(one) for one in before.checks}
  checks = tuple(
    one if id(one) in known else _checked(one, what) for one in after.checks
  )
  return after.replace(leaves=leaves, checks=checks)


def _checked(check: Check, what: str) -> Check:
  """Returns a check that names the plugin if it raises another error."""

  def run() -> None:
    with foreign.code(f'{check.text}: a check of {what}'):
      check.run()

  return dataclasses.replace(check, run=run)


# Whether adapters are whole.


@dataclasses.dataclass(frozen=True)
class _Needed:
  """A parameter or weight without which an adapter is not whole.

  Attributes:
    path: where it is.
    shape: its shape without stacked axes.
    owned: whether the adapter added it.
  """

  path: Path
  shape: tuple[int, ...]
  owned: bool


def _check_adapters(before: Checkpoint, after: Checkpoint, what: str) -> None:
  """Raises if a pass left half of an adapter that was whole.

  One that was incomplete before, as in a half that `split()` made, may stay so.
  """
  if after is before:
    return
  was, now = _needed(before), _needed(after)
  # Records whose tensors are gone.
  for name, some in now.items():
    fault = _lacking(after, some)
    if fault is not None and _lacking(before, was.get(name, ())) is None:
      raise _half(what, name, *fault)
  # Tensors whose records are gone: by their metadata, or by their names alone,
  # since a pass may have made a tensor again without metadata.
  mine, owners = _owners(now), _owners(was)
  lost = set(_orphans(before, owners).values())
  left = {path: name for path, name in owners.items() if path in after}
  for path, name in {**_orphans(after, mine), **left}.items():
    if path not in mine and name not in lost:
      raise _half(what, name, path, 'is left, but its record is gone')


def _owners(needed: Mapping[str, Iterable[_Needed]]) -> dict[Path, str]:
  """Returns the adapter of each weight."""
  return {
    one.path: name for name, some in needed.items() for one in some if one.owned
  }


def _half(what: str, name: str, path: Path, fault: str) -> errors.SurgeryError:
  kind = errors.PluginError if ' of ' in what else errors.AdapterError
  return kind(
    f'{paths.show(path)}: {what} left half of adapter {name!r}: this tensor '
    f'{fault}. Merge or detach the adapter first; a pass that keeps adapters '
    'has to change their records as well.'
  )


def _needed(checkpoint: Checkpoint) -> dict[str, list[_Needed]]:
  """Returns what each adapter needs, without importing its type."""
  records = checkpoint.known_records
  if records is None:
    return {
      said['name']: list(_needed_json(said))
      for said in checkpoint.manifest.adapters
    }
  found: dict[str, list[_Needed]] = {}
  for record in records.adapters:
    some = found[record.name] = []
    for one in record.sites.values():
      for param in one.site.params:
        path = (*one.site.layer, param.name)
        some.append(_Needed(path, param.shape, False))
    for _, spec in record.weights():
      some.append(_Needed(spec.path, spec.shape, True))
  return found


def _needed_json(said: Mapping[str, Any]) -> Iterator[_Needed]:
  """Yields what an adapter in a manifest needs; nothing of a malformed one.

  Reading its record raises an error that names the mistake.
  """
  try:
    weights = [*said['shared'].values(), *said.get('saved', {}).values()]
    for site in said['sites']:
      layer = paths.parse(site['layer'])
      for param in site['params']:
        yield _Needed((*layer, param['name']), tuple(param['shape']), False)
      weights += site['weights'].values()
    for spec in weights:
      yield _Needed(paths.parse(spec['path']), tuple(spec['shape']), True)
  except (KeyError, TypeError, ValueError, AttributeError):
    return


def _lacking(
  checkpoint: Checkpoint, needed: Iterable[_Needed]
) -> tuple[Path, str] | None:
  """Returns the first tensor that is not as the record has it, and why."""
  alone = checkpoint.manifest.kind == manifest.ADAPTER
  for one in needed:
    if alone and not one.owned:
      continue  # The file of an adapter has no base.
    leaf = checkpoint.get(one.path)
    if leaf is None:
      return one.path, 'is gone'
    # Records have shapes without stacked axes, which are in front.
    core = () if leaf.shape is None else leaf.shape
    if leaf.shape is not None and (
      len(core) < len(one.shape)
      or core[len(core) - len(one.shape) :] != one.shape
    ):
      return one.path, f'has shape {core}, its record says {one.shape}'
  return None


def _orphans(checkpoint: Checkpoint, owned: Container[Path]) -> dict[Path, str]:
  """Returns weights without a record, with the adapter in their metadata."""
  return {
    path: leaf.metadata['adapter']
    for path, leaf in checkpoint.items()
    if isinstance(leaf.metadata.get('adapter'), str)
    and path not in owned
    # Weights that a layer made itself are described by their metadata.
    and 'surgery' not in leaf.metadata
  }
