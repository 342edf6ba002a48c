"""Interception: params that answer with adapted parameters.

Every blox layer calls `get_param(params, name, …)`, which calls `params._get`.
`AdaptedParams` holds the weights of adapters beside the base, and returns the
adapted parameter there. The model is neither changed nor wrapped.

This module alone uses private names of blox (`_get`, `_set`, `_clone`, and the
attributes `_data` and `_locked`); importing it raises if they are missing. Its
children as a pytree are exactly blox's, its static data are blox's and the
`Records`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import blox as bx
import jax
import jax.numpy as jnp

from surgery import errors, jaxcompat
from surgery.adapting import blocks, compute
from surgery.live import described, dropping, pending, per_row, primitives
from surgery.live.plain import BloxParams
from surgery.live.unread import Unread
from surgery.model.records import Chain, Records, unite
from surgery.naming import paths
from surgery.naming.paths import Path

_EMPTY = Records()

# What `pyproject.toml` requires; a test compares the two.
REQUIRED_BLOX = 'jax-blox>=0.1.6,<0.2'

# Methods of `bx.Params` that are overridden or called, and how they are called.
_BLOX_METHODS = {
  '_get': ('path', 'shape', 'init', 'dtype', 'trainable', 'metadata', 'rng'),
  '_set': ('path', 'value', 'trainable', 'metadata'),
  '_clone': (),
  'locked': (),
  'unlocked': (),
  'split': ('predicate',),
  'merge': ('other',),
  'tree_flatten': (),
}


def _missing_in_blox() -> Iterator[str]:
  """Yields in words what this module needs of blox and does not find."""
  if not isinstance(getattr(bx, 'Params', None), type):
    yield 'no class Params'
    return
  for name, expected in _BLOX_METHODS.items():
    method = getattr(bx.Params, name, None)
    shown = f'Params.{name}({", ".join(expected)})'
    if not callable(method):
      yield f'no method {shown}'
      continue
    # Further parameters after those that are passed do no harm.
    found = tuple(inspect.signature(method).parameters)[1:]
    if found[: len(expected)] != expected:
      yield f'Params.{name}({", ".join(found)}) instead of {shown}'
  for name in {'_data', '_locked'} - vars(bx.Params()).keys():
    yield f'no attribute {name!r} of Params'
  param = getattr(bx, 'Param', None)
  if not isinstance(param, type):
    yield 'no class Param'
    return
  found = tuple(inspect.signature(param).parameters)
  if found[:3] != ('value', 'trainable', 'metadata'):
    shown = ', '.join(found)
    yield f'Param({shown}) instead of Param(value, trainable, metadata)'
  if not callable(getattr(param, 'replace', None)):
    yield 'no method Param.replace()'


def _check_blox() -> None:
  """Raises unless blox has the private names on which this module rests.

  Raises:
    DependencyError: naming what is missing, the version, and what to install.
  """
  missing = sorted(_missing_in_blox())
  if not missing:
    return
  try:
    version = importlib.metadata.version('jax-blox')
  except importlib.metadata.PackageNotFoundError:
    version = 'of unknown version'
  where = getattr(bx, '__file__', None)
  raise errors.DependencyError(
    f'surgery works inside of blox and needs {REQUIRED_BLOX}; the installed '
    f'jax-blox {version} ({where}) has {"; ".join(missing)}. Install one that '
    f"fits: pip install '{REQUIRED_BLOX}'"
  )


# Before the class below, which derives from a class that is checked here.
_check_blox()


class AdaptedParams(BloxParams):
  """`bx.Params` whose layers get adapted parameters.

  `params[path]`, `keys`, `items` and `len` give what is stored, adapters'
  weights included; a layer that asks for a parameter gets it adapted. The verbs
  (`surgery.attach`, `surgery.load`, …) return them; the class is not called.
  """

  _records: Records
  # Notes about the arrays, e.g. which of them are the base. They are no part of
  # the pytree: a compiled function would return those of other params.
  _notes: Mapping[str, Any]
  # Notices when these params are read; set by `watched` alone.
  _unread: Unread | None = None

  def __init__(self) -> None:
    super().__init__()
    self._records = _EMPTY
    self._notes = {}

  @property
  def records(self) -> Records:
    """The adapters, innermost first."""
    return self._records

  # Every method of blox's reads this attribute first, so it notices all uses.

  @property
  def _data(self) -> dict[Path, bx.Param]:
    if self._unread is not None:
      self._unread.read = True
    return self.__dict__['_data']  # type: ignore[no-any-return]

  @_data.setter
  def _data(self, data: dict[Path, bx.Param]) -> None:
    self.__dict__['_data'] = data

  # Methods that blox calls.

  def _clone(self) -> AdaptedParams:
    return _make(self._data.copy(), self._locked, self._records, self._notes)

  def _get(
    self,
    path: Path,
    shape: Any,
    init: Any,
    dtype: Any = jnp.float32,
    trainable: bool = True,
    metadata: dict[str, Any] | None = None,
    rng: Any = None,
  ) -> tuple[Any, bx.Params]:
    # A layer whose parameter has the path of a weight would share it.
    self._refuse_owned(path)
    if path not in self._data:
      self._refuse_half(path)
    # blox gives what is stored, and makes it first if it is not there yet.
    value, params = super()._get(
      path, shape, init, dtype, trainable, metadata, rng
    )
    params = cast(AdaptedParams, params)
    # A new parameter may be one that a pending adapter is to rewrite.
    if params._records.pending and path not in params._records.chains:
      params = pending.adopted(params, path)
    # Stored values stay as they are; only the layer gets the adapted one.
    return params._answered(path, value), params

  def _set(
    self,
    path: Path,
    value: Any,
    trainable: bool | None = None,
    metadata: dict[str, Any] | None = None,
  ) -> bx.Params:
    if value is not None:
      self._refuse_owned(path)
      chain = compute.enabled(self._records.chains.get(path, ()))
      if chain:
        names = ', '.join(repr(a.name) for a, _ in chain)
        raise errors.AdapterError(
          f'{paths.show(path)}: a layer writes this parameter, and adapter '
          f'{names} rewrites it, so the adapter would be folded in again at '
          'every call. Attach to other parameters, or merge or disable the '
          'adapter.'
        )
      # An adapter may have a value of its own for it, which the layer read.
      path = self._records.stored(path)
    return super()._set(path, value, trainable, metadata)

  def _refuse_owned(self, path: Path) -> None:
    owner = self._records.owned.get(path)
    if owner is not None:
      raise errors.AdapterError(
        f'{paths.show(path)}: a layer asks for this parameter, but it is a '
        f'weight of adapter {owner!r}. Attach the adapter under another '
        'name=.'
      )

  def _refuse_half(self, path: Path) -> None:
    """Raises if a parameter is missing because these params are a half.

    In params that are not locked, the layer would make a new one.

    Raises:
      AdapterError: naming the parameter.
    """
    records = self._records
    # During initialisation parameters are always missing.
    if not records.pending and missing_of(self):
      raise errors.AdapterError(
        f'{paths.show(path)}: the model asks for this parameter, which these '
        'params lack: they are a half that split() made. Merge the halves '
        'before calling the model: half.merge(rest).'
      )

  def _answered(self, path: Path, value: Any, without: str = '') -> Any:
    """Returns a parameter as its layer gets it.

    Args:
      path: the parameter.
      value: the stored value.
      without: the name of an adapter that is left out.
    """
    records = self._records
    chain = records.chains.get(path, ())
    stands = path in records.standing
    if not chain and not stands:
      return value  # The usual case: no adapter rewrites it.
    if stands:
      # An adapter was saved with a value of its own for it.
      value = self._fetch(path)
    fetch = self._fetch
    probe = records.probe
    if probe is not None:
      probe.asked.add(path)
      if probe.reads:
        # `check` follows bases from here on: what adapters read is marked.
        fetch = functools.partial(_read, self._fetch, records.chains)
        value = primitives.read_primitive().bind(value)
    on = tuple(k for k in compute.enabled(chain) if k[0].name != without)
    if not on:
      return value
    self._note_dropless(on)
    if any(adapter.route for adapter, _ in on):
      value = per_row.answer(on, path, fetch)
    else:
      value = blocks.answer(on, path, fetch, records.chains)
    if jaxcompat.is_traced(value):
      # `factored` finds the path of each answer by this tag.
      value = primitives.tag_primitive().bind(value, path=path)
    return value

  def _note_dropless(self, chain: Chain) -> None:
    """Warns of adapters with dropout that drop nothing in this call."""
    dropless = dropping.dropless(chain)
    if not dropless:
      return
    dropping.warn_of_training(dropless, self._data)
    if self._records.probe is not None:
      names = (adapter.name for adapter, _ in dropless)
      self._records.probe.dropless.update(names)

  def _fetch(self, path: Path) -> Any:
    """Returns a stored array; the adapter's own value where it has one."""
    path = self._records.stored(path)
    try:
      return self._data[path].value
    except KeyError:
      owner = self._records.owned.get(path)
      raise errors.AdapterError(
        f'{paths.show(path)}: this weight of adapter {owner!r} is not in these '
        'params. Merge the halves that split() made before calling the model.'
        if owner
        else f'{paths.show(path)}: not in these params.'
      ) from None

  def __getstate__(self) -> dict[str, Any]:
    # Weak references cannot be pickled, and a copy has arrays of its own: which
    # parameters are the base is stored by path.
    known = tuple(p for p in self._data if is_base(self, p))
    return {**self.__dict__, '_notes': {**self._notes, 'base': known}}

  def __setstate__(self, state: dict[str, Any]) -> None:
    known = {p: state['_data'][p].value for p in state['_notes']['base']}
    notes = {**state['_notes'], 'base': described.remembered(known)}
    self.__dict__.update(state, _notes=notes)

  # Public methods of params.

  def locked(self) -> AdaptedParams:
    """Returns locked params, in which no adapter is pending.

    Raises:
      SelectorError: if the selector of an adapter has matched nothing.
    """
    params = pending.closed(self) if self._records.pending else self
    return cast(AdaptedParams, bx.Params.locked(params))

  def unlocked(self) -> AdaptedParams:
    """Returns params to which parameters can be added."""
    return cast(AdaptedParams, super().unlocked())

  def split(
    self, predicate: Callable[[Path, bx.Param], bool] | None = None
  ) -> tuple[AdaptedParams, AdaptedParams]:
    """Partitions parameters into two containers.

    Args:
      predicate: whether a path and its parameter go into the first container;
        by default, whether it trains. The weights of a disabled adapter do not
        train, whatever their flags, which stay as they are.

    Returns:
      The parameters for which the predicate is true, and the rest.
    """
    return cast(Any, super().split(predicate or self.trains))

  def trains(self, path: Path, param: bx.Param) -> bool:
    """Whether a parameter trains: its flag is set, and its adapter enabled.

    Args:
      path: its path.
      param: the parameter.
    """
    return param.trainable and path not in self._records.idle

  def merge(self, other: bx.Params) -> AdaptedParams:
    """Combines two containers, and the adapters of both.

    Args:
      other: params that win conflicts, as in blox.

    Raises:
      AdapterError: if both have an adapter of one name that differs.
      ValueError: if one is locked and the other is not.
    """
    records = self._records
    if isinstance(other, AdaptedParams):
      records = unite(records, other._records)
    merged = cast(AdaptedParams, super().merge(other))
    merged._records = records
    if isinstance(other, AdaptedParams):
      merged._notes = _united(self._notes, other._notes)
    return merged

  def __repr__(self) -> str:
    lines = super().__repr__().splitlines()
    lines[0] = lines[0].replace('Params', 'AdaptedParams', 1)
    for record in self._records.adapters:
      state = '' if record.enabled else ', disabled'
      if record.pending:
        state += ', looking for sites'
      lines.append(
        f'# {record.name}: {record.adapter!r} on {len(record.sites)} '
        f'sites{state}'
      )
    return '\n'.join(lines)

  def _repr_html_(self) -> str:
    # Notebooks alone need what it imports.
    from surgery.live import rendering

    return rendering.as_html(self)

  # Pytree registration.

  def tree_flatten(self) -> tuple[Any, Any]:
    """Flattens as blox does, with the adapters as static data."""
    return (self._data,), (self._locked, self._records.anonymous())

  @classmethod
  def tree_unflatten(cls, aux: Any, children: Any) -> AdaptedParams:
    """Unflattens what `tree_flatten` flattened."""
    return _make(children[0], aux[0], aux[1], {})


jax.tree_util.register_pytree_node(
  AdaptedParams, AdaptedParams.tree_flatten, AdaptedParams.tree_unflatten
)


def _read(fetch: Any, bases: Mapping[Path, Any], path: Path) -> Any:
  """Returns a stored array, marked if adapters rewrite it."""
  value = fetch(path)
  return primitives.read_primitive().bind(value) if path in bases else value


def _make(
  data: dict[Path, bx.Param],
  locked: bool,
  records: Records,
  notes: Mapping[str, Any],
) -> AdaptedParams:
  params = object.__new__(AdaptedParams)
  params._data = data
  params._locked = locked
  params._records = records
  params._notes = notes
  return params


def make(
  data: Mapping[Path, bx.Param],
  locked: bool,
  records: Records,
  notes: Mapping[str, Any] | None = None,
) -> bx.Params:
  """Returns params; plain ones if there is no adapter.

  Args:
    data: parameters by path.
    locked: whether new ones are refused.
    records: the adapters.
    notes: notes about the arrays.
  """
  if records.adapters:
    return _make(dict(data), locked, records, notes or {})
  params = bx.Params()
  params._data = dict(data)
  params._locked = locked
  return params


def noted(
  data: Mapping[Path, bx.Param], records: Records, notes: Mapping[str, Any]
) -> AdaptedParams:
  """Returns locked params with notes, which plain ones cannot have.

  Args:
    data: parameters by path.
    records: the adapters; there may be none.
    notes: notes about the arrays.
  """
  return _make(dict(data), True, records, notes)


def _united(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the notes of two params together."""
  both = {
    key: {**b.get(key, {}), **a.get(key, {})}
    for key in ('base',)
    if key in a or key in b
  }
  return {**b, **a, **both}


def missing_of(params: bx.Params) -> list[Path]:
  """Returns the parameters that adapters need and params, e.g. halves, lack."""
  return [
    path
    for record in records_of(params).adapters
    for path in record.needed()
    if path not in params
  ]


def records_of(params: bx.Params) -> Records:
  """Returns the adapters of any params."""
  return params._records if isinstance(params, AdaptedParams) else _EMPTY


def notes_of(params: bx.Params) -> Mapping[str, Any]:
  """Returns the notes of any params."""
  return params._notes if isinstance(params, AdaptedParams) else {}


def lineage_of(params: bx.Params) -> tuple[Any, ...]:
  """Returns the passes that made params; see `surgery.live.lineage`."""
  if isinstance(params, AdaptedParams):
    return tuple(params._notes.get('lineage', ()))
  return tuple(getattr(params, '_surgery_lineage', ()))


def with_lineage(params: bx.Params, lineage: tuple[Any, ...]) -> bx.Params:
  """Returns params with another lineage."""
  clone = params._clone()
  if isinstance(clone, AdaptedParams):
    clone._notes = {**clone._notes, 'lineage': lineage}
  else:
    clone._surgery_lineage = lineage
  return clone


def with_values(
  params: AdaptedParams, values: Mapping[Path, Any]
) -> AdaptedParams:
  """Returns params with other values at some paths."""
  result = params._clone()
  for path, value in values.items():
    result._data[path] = params._data[path].replace(value=value)
  return result


def watched(params: AdaptedParams, message: str) -> AdaptedParams:
  """Returns params that warn if they are discarded unread."""
  result = params._clone()
  result._unread = Unread(message)
  return result


def with_param(
  params: AdaptedParams, path: Path, param: bx.Param
) -> AdaptedParams:
  """Returns params with one more parameter, or another in its place."""
  result = params._clone()
  result._data[path] = param
  return result


def with_records(
  params: bx.Params, records: Records, notes: Mapping[str, Any] | None = None
) -> bx.Params:
  """Returns params with other adapters and the same arrays."""
  kept = notes_of(params) if notes is None else notes
  return make(params._data, params._locked, records, kept)


def is_base(params: bx.Params, path: Path) -> bool:
  """Whether a parameter is known to be unchanged since the first attach."""
  known = notes_of(params).get('base', {}).get(path)
  return known is not None and known() is params[path].value
