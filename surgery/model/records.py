"""Records: adapters and the sites that they rewrite, as immutable data.

`Records` is what makes a function that was compiled for one model fit another:
it is the static part of adapted params, so it holds what decides the program
and nothing else. Two are equal if their digests are.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from surgery import errors, expect
from surgery.contract.adapter import Adapter, Interceptor
from surgery.contract.site import Site
from surgery.model.layers import LayerTypes
from surgery.naming import paths, selectors
from surgery.naming.paths import Path

_MODULUS = 1 << 128


def _hash(*parts: object) -> int:
  # All parts are strings, numbers, None and tuples of these, whose repr tells
  # any two of them apart.
  text = repr(parts)
  return int.from_bytes(
    hashlib.blake2b(text.encode(), digest_size=16).digest(), 'little'
  )


def _token(adapter: Adapter) -> tuple[str, str]:
  kind, config = adapter.identity()
  return f'{kind.__module__}.{kind.__qualname__}', config


def _weights(specs: Mapping[str, WeightSpec]) -> list[Any]:
  # Without `trainable`, which no program depends on, and sorted, since the
  # order is that of `init`'s dict the first time and of JSON the next.
  return [
    (name, spec.path, spec.shape, spec.dtype)
    for name, spec in sorted(specs.items())
  ]


@dataclasses.dataclass(frozen=True)
class WeightSpec:
  """A weight that an adapter added.

  Attributes:
    path: where it is stored.
    shape: its shape without stacked axes.
    dtype: name of its dtype.
    trainable: whether it trains at all.
  """

  path: Path
  shape: tuple[int, ...]
  dtype: str
  trainable: bool = True

  def to_json(self) -> dict[str, Any]:
    """Returns the specification as JSON data."""
    return {
      'path': paths.show(self.path),
      'shape': list(self.shape),
      'dtype': self.dtype,
      'trainable': self.trainable,
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> WeightSpec:
    """Returns the specification that `to_json` wrote."""
    return cls(
      paths.parse(data['path']),
      tuple(data['shape']),
      data['dtype'],
      data['trainable'],
    )


@dataclasses.dataclass(frozen=True)
class SiteRecord:
  """One site of one adapter.

  Attributes:
    site: the parameters.
    weights: what the adapter added, by the name that `init` gave it.
    interceptor: computes what layers get.
    drawn_rank: the rank that `init` made, if ranks were pruned since; the file
      of an adapter is checked against it.
  """

  site: Site
  weights: Mapping[str, WeightSpec]
  interceptor: Interceptor
  drawn_rank: int | None = None

  @functools.cached_property
  def digest(self) -> int:
    """128 bits of a hash of all that a compiled function depends on."""
    work = self.interceptor
    # Another interceptor of a plugin's has no configuration that could be
    # hashed, so it is known by the object; hence the digest is of this process.
    token = _token(work) if isinstance(work, Adapter) else id(work)
    # Types and sharding decide no program, but records with equal digests are
    # interned as one object, and that object is what is saved.
    params = [
      (p.name, p.shape, p.dtype, p.layout, p.sharding) for p in self.site.params
    ]
    weights = _weights(self.weights)
    pruned = [] if self.drawn_rank is None else [self.drawn_rank]
    return _hash(
      self.site.layer, self.site.types, params, weights, token, pruned
    )

  def __reduce__(self) -> Any:
    # Without the digest, which may depend on an object of this process.
    values = self.site, self.weights, self.interceptor, self.drawn_rank
    return SiteRecord, values


@dataclasses.dataclass(frozen=True)
class Pending:
  """The sites that an adapter still looks for, until `locked()` closes it.

  Attributes:
    selector: where it goes.
    met: indices of the selector's items that have found a site.
    layouts: layouts by selector.
    stacked: numbers of stacked axes by selector.
    types: types of layers, where a graph was given.
    graph: the graph, for layers that are made later.
    interceptor: serves the sites to come.
  """

  selector: selectors.Selector
  met: frozenset[int] = frozenset()
  layouts: tuple[tuple[str, str], ...] = ()
  stacked: tuple[tuple[str, int], ...] = ()
  types: LayerTypes = dataclasses.field(default_factory=dict, compare=False)
  graph: Any = dataclasses.field(default=None, compare=False)
  interceptor: Any = None

  def __reduce__(self) -> Any:
    if self.graph is not None:
      raise TypeError(
        'params with an adapter that still looks for sites cannot be pickled: '
        "they hold the model's graph. Initialise the model and call "
        'params.locked() first, or attach without graph=.'
      )
    names = (f.name for f in dataclasses.fields(self))
    return Pending, tuple(getattr(self, name) for name in names)

  @property
  def unmet(self) -> list[selectors.Item]:
    """The items of the selector that have found no site yet."""
    items = enumerate(self.selector.positive)
    return [item for index, item in items if index not in self.met]

  @property
  def token(self) -> list[Any]:
    """The parts that a compiled initialisation depends on."""
    return [
      [i.written for i in self.selector.items],
      sorted(self.met),
      self.layouts,
      self.stacked,
      id(self.graph) if self.graph else None,
    ]


class Sites(Mapping[Path, SiteRecord]):
  """The sites of an adapter by path, and the sum of their digests.

  The sum is kept with the sites, so that the two always belong together. Since
  it is a sum, adding a site costs one digest, not all of them.

  Args:
    sites: the sites.
  """

  __slots__ = ('_sites', 'total')

  def __init__(self, sites: Mapping[Path, SiteRecord]) -> None:
    self._sites = dict(sites)
    self.total = sum(r.digest for r in self._sites.values()) % _MODULUS

  def with_site(self, record: SiteRecord) -> Sites:
    """Returns these with a site added or replaced."""
    new = Sites({})
    new._sites = {**self._sites, record.site.path: record}
    old = self._sites.get(record.site.path)
    less = old.digest if old else 0
    new.total = (self.total + record.digest - less) % _MODULUS
    return new

  def __getitem__(self, path: Path) -> SiteRecord:
    return self._sites[path]

  def __iter__(self) -> Iterator[Path]:
    return iter(self._sites)

  def __len__(self) -> int:
    return len(self._sites)

  def __repr__(self) -> str:
    return f'Sites({self._sites!r})'

  def __reduce__(self) -> Any:
    return Sites, (self._sites,)  # Digests may depend on this process.


def written(to: Any) -> str | tuple[str, ...]:
  """Returns a selector as it was written, one text or several."""
  return to if isinstance(to, str) else tuple(to)


@dataclasses.dataclass(frozen=True)
class AdapterRecord:
  """One adapter: a named instance of a type on its sites.

  Attributes:
    name: the adapter's name.
    adapter: type and configuration.
    enabled: whether it takes part in what layers get.
    sites: its sites by path of their primary parameter.
    shared: weights that its sites share, by name.
    seed: from which its weights derive, where that is known.
    to: the selector by which it was attached, where that is known.
    foreign: what the file of another program said of it, as JSON text.
    pending: what it still looks for; None once it is closed.
    saved: where it keeps its own values of parameters that it does not rewrite,
      by path of the parameter; they stand in place of what is stored there.
  """

  name: str
  adapter: Adapter
  enabled: bool = True
  sites: Mapping[Path, SiteRecord] = dataclasses.field(default_factory=dict)
  shared: Mapping[str, WeightSpec] = dataclasses.field(default_factory=dict)
  seed: int | None = None
  pending: Pending | None = None
  saved: Mapping[Path, WeightSpec] = dataclasses.field(default_factory=dict)
  to: str | tuple[str, ...] | None = None
  foreign: str | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.sites, Sites):
      object.__setattr__(self, 'sites', Sites(self.sites))

  @functools.cached_property
  def digest(self) -> int:
    """128 bits of a hash of all that a compiled function depends on.

    The origin is not part of it, unless the adapter still initialises.
    """
    assert isinstance(self.sites, Sites)
    # Seed, selector and foreign configuration are left out: no program depends
    # on them, and including them would compile again for each seed. While the
    # model is initialised the seed decides what is drawn, so it counts.
    waiting = [self.seed, self.pending.token] if self.pending else None
    return _hash(
      self.name,
      _token(self.adapter),
      self.enabled,
      self.sites.total,
      len(self.sites),
      _weights(self.shared),
      waiting,
      [
        (path, spec.path, spec.shape, spec.dtype)
        for path, spec in sorted(self.saved.items())
      ],
    )

  def __reduce__(self) -> Any:
    # Without the digest, which may depend on an object of this process.
    names = (f.name for f in dataclasses.fields(self))
    return AdapterRecord, tuple(getattr(self, name) for name in names)

  @property
  def route(self) -> WeightSpec | None:
    """The weight that says which row has which adapter, if rows differ."""
    return self.shared.get(ROUTE)

  def with_site(self, record: SiteRecord, met: Iterable[int]) -> AdapterRecord:
    """Returns this record with a site added or replaced."""
    assert isinstance(self.sites, Sites)
    pending = self.pending
    if pending is not None:
      pending = dataclasses.replace(pending, met=pending.met | frozenset(met))
    return dataclasses.replace(
      self, sites=self.sites.with_site(record), pending=pending
    )

  def closed(self) -> AdapterRecord:
    """Returns this record without what only initialisation needs."""
    if self.pending is None:
      return self
    return dataclasses.replace(
      self, pending=None, to=written(self.pending.selector.text)
    )

  @property
  def origin(self) -> tuple[Any, ...]:
    """The adapter's origin, which no compiled function depends on."""
    return self.seed, self.to, self.foreign

  @property
  def is_known(self) -> bool:
    """Whether anything of the adapter's origin is known."""
    return any(one is not None for one in self.origin)

  def anonymous(self) -> AdapterRecord:
    """Returns this record without its origin."""
    if self.pending is not None or not self.is_known:
      return self
    return dataclasses.replace(self, seed=None, to=None, foreign=None)

  def check_met(self) -> None:
    """Raises if an item of the selector has found no site yet.

    Raises:
      AdapterError: naming the item of the selector.
    """
    for item in self.pending.unmet if self.pending else ():
      raise errors.AdapterError(
        f'adapter {self.name!r} has found no layer for its selector '
        f'{item.written!r} yet. Initialise the model and lock its params first.'
      )

  def weights(self) -> Iterator[tuple[str, WeightSpec]]:
    """Yields all weights that the adapter added, with `init`'s names.

    What it saves of other parameters has the name of the parameter.
    """
    for record in self.sites.values():
      yield from record.weights.items()
    yield from self.shared.items()
    yield from ((path[-1], spec) for path, spec in self.saved.items())

  def weight_paths(self) -> list[Path]:
    """Returns the paths of all weights that the adapter added."""
    return [spec.path for _, spec in self.weights()]

  def needed(self) -> Iterator[Path]:
    """Yields what has to be there to use the adapter: bases and weights."""
    for record in self.sites.values():
      for spec in record.site.params:
        yield (*record.site.layer, spec.name)
    yield from self.saved
    yield from self.weight_paths()


Chain = tuple[tuple[AdapterRecord, SiteRecord], ...]
# The shared weight that says which row of an input has which of many adapters.
ROUTE = 'route'


class Probe:
  """Records the adapted parameters that a traced call reads.

  No two probes are equal, so a function that was traced with one is traced
  again with the next.
  """

  _numbers = itertools.count(1)

  def __init__(self, reads: bool = False) -> None:
    """Initializes the probe.

    Args:
      reads: whether what adapters read of the base is marked as theirs.
    """
    self.number = next(self._numbers)
    self.asked: set[Path] = set()
    # Adapters whose dropout does nothing in the call.
    self.dropless: set[str] = set()
    self.reads = reads


class Records:
  """All adapters of a model, innermost first. Immutable and interned.

  Two are equal if compiled functions are the same for both; they are one object
  only if their adapters came from the same seeds and selectors, too.

  Attributes:
    adapters: their records, in the order in which they were attached.
    probe: records the parameters that a traced call reads.
  """

  __slots__ = (
    '__weakref__',
    '_anonymous',
    '_chains',
    '_digest',
    '_idle',
    '_owned',
    '_standing',
    'adapters',
    'probe',
  )

  _interned: ClassVar[weakref.WeakValueDictionary[int, Records]] = (
    weakref.WeakValueDictionary()
  )
  # Lookup and insertion are one step, or two threads would make two objects.
  _interning: ClassVar[threading.Lock] = threading.Lock()

  adapters: tuple[AdapterRecord, ...]
  probe: Probe | None
  _digest: int
  _anonymous: Records | None
  _owned: dict[Path, str] | None
  _idle: frozenset[Path] | None
  _chains: dict[Path, Chain] | None
  _standing: dict[Path, Path] | None

  def __new__(
    cls, adapters: Iterable[AdapterRecord] = (), probe: Probe | None = None
  ) -> Records:
    """Returns the one object for these adapters."""
    adapters = tuple(adapters)
    number = probe.number if probe is not None else 0
    digest = _hash([a.digest for a in adapters], number)
    self = object.__new__(cls)
    self.adapters = adapters
    self.probe = probe
    self._digest = digest
    self._anonymous = None
    self._owned = None
    self._idle = None
    self._chains = None
    self._standing = None
    # Interned with their origins, so that records of another seed do not come
    # back; compared without, so that they share compiled functions.
    key = _hash(digest, [a.origin for a in adapters])
    with cls._interning:
      known = cls._interned.get(key)
      if known is not None and known._same(adapters):
        return known
      cls._interned[key] = self
    return self

  def _same(self, adapters: tuple[AdapterRecord, ...]) -> bool:
    """Whether the classes are the same; two hosts may differ in them."""
    return len(adapters) == len(self.adapters) and all(
      type(a.adapter) is type(b.adapter)
      for a, b in zip(adapters, self.adapters, strict=True)
    )

  def __eq__(self, other: object) -> bool:
    if self is other:
      return True
    if not isinstance(other, Records):
      return NotImplemented
    return self._digest == other._digest and self._same(other.adapters)

  def __hash__(self) -> int:
    return hash(self._digest)

  def __repr__(self) -> str:
    names = ', '.join(
      f'{a.name}: {a.adapter.name} on {len(a.sites)}' for a in self.adapters
    )
    return f'Records({names})'

  def __copy__(self) -> Records:
    return self

  def __deepcopy__(self, memo: Any) -> Records:
    return self

  def __reduce__(self) -> Any:
    return Records, (self.adapters,)

  # Looking up.

  def __len__(self) -> int:
    return len(self.adapters)

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the adapters, innermost first."""
    return tuple(a.name for a in self.adapters)

  @property
  def pending(self) -> bool:
    """Whether an adapter still looks for sites."""
    return any(a.pending for a in self.adapters)

  def get(self, name: str) -> AdapterRecord:
    """Returns the record of an adapter.

    Raises:
      AdapterError: if there is no adapter of that name.
    """
    for record in self.adapters:
      if record.name == name:
        return record
    if not self.adapters:
      raise errors.AdapterError(
        f'there is no adapter {name!r}: no adapter is attached.'
      )
    raise errors.AdapterError(
      f'there is no adapter {name!r}.{errors.suggest(name, self.names)}'
    )

  def chosen(self, names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of the chosen adapters, in the order of attaching.

    Args:
      names: a name, several, or None for all.

    Raises:
      AdapterError: for an unknown name, or if there is no adapter at all.
    """
    if names is None:
      if not self.names:
        raise errors.AdapterError('no adapter is attached.')
      return self.names
    wanted = expect.names(names)
    if not wanted:
      raise errors.AdapterError('no adapter was named.')
    for name in wanted:
      self.get(name)
    return tuple(n for n in self.names if n in wanted)

  @property
  def owned(self) -> Mapping[Path, str]:
    """Names of the adapters that own weights, by the weight's path."""
    if self._owned is None:
      self._owned = {
        path: a.name for a in self.adapters for path in a.weight_paths()
      }
    return MappingProxyType(self._owned)

  @property
  def idle(self) -> frozenset[Path]:
    """Paths of the weights of adapters that are disabled."""
    if self._idle is None:
      off = [a for a in self.adapters if not a.enabled]
      self._idle = frozenset(p for a in off for p in a.weight_paths())
    return self._idle

  @property
  def chains(self) -> Mapping[Path, Chain]:
    """The adapters of each rewritten parameter, innermost first."""
    if self._chains is None:
      found: dict[Path, list[tuple[AdapterRecord, SiteRecord]]] = {}
      for adapter in self.adapters:
        for record in adapter.sites.values():
          for spec in record.site.params:
            path = (*record.site.layer, spec.name)
            found.setdefault(path, []).append((adapter, record))
      self._chains = {path: tuple(chain) for path, chain in found.items()}
    return MappingProxyType(self._chains)

  @property
  def standing(self) -> Mapping[Path, Path]:
    """Paths of the values that enabled adapters saved, by parameter."""
    if self._standing is None:
      self._standing = {
        path: spec.path
        for adapter in self.adapters
        if adapter.enabled
        for path, spec in adapter.saved.items()
      }
    return MappingProxyType(self._standing)

  @property
  def answered(self) -> dict[Path, tuple[str, ...]]:
    """Adapters that rewrite a parameter, or have a value of their own for it.

    Disabled ones too, since they may be enabled again.
    """
    found: dict[Path, list[str]] = {}
    for path, chain in self.chains.items():
      found[path] = [adapter.name for adapter, _ in chain]
    for adapter in self.adapters:
      for path in adapter.saved:
        names = found.setdefault(path, [])
        if adapter.name not in names:
          names.append(adapter.name)
    return {path: tuple(names) for path, names in found.items()}

  def stored(self, path: Path) -> Path:
    """Returns the path of the value that the innermost adapter is given."""
    return self.standing.get(path, path)

  def check_standing(self) -> None:
    """Raises if two enabled adapters saved the same parameter.

    Raises:
      AdapterError: naming the parameter and both.
    """
    found: dict[Path, str] = {}
    for adapter in self.adapters:
      for path in adapter.saved if adapter.enabled else ():
        other = found.setdefault(path, adapter.name)
        if other != adapter.name:
          raise errors.AdapterError(
            f'{paths.show(path)}: adapters {other!r} and {adapter.name!r} were '
            'both saved with a value of their own for this parameter, so only '
            'one of them can be enabled. Disable the other first.'
          )

  # Changing: each returns new records.

  def replace(self, record: AdapterRecord) -> Records:
    """Returns records in which the adapter of that name is replaced."""
    return Records(
      (record if a.name == record.name else a for a in self.adapters),
      self.probe,
    )

  def grown(self, record: AdapterRecord, site: SiteRecord) -> Records:
    """Returns `replace(record)`, where only `site` is new or has grown."""
    # During initialisation each layer adds a site: making all chains anew for
    # each would take the square of their number, so those of before are edited.
    owned, chains = {**self.owned}, {**self.chains}
    new = self.replace(record)
    for spec in site.weights.values():
      owned[spec.path] = record.name
    order = {name: i for i, name in enumerate(new.names)}
    for param in site.site.params:
      path = (*site.site.layer, param.name)
      others = [k for k in chains.get(path, ()) if k[0].name != record.name]
      chain = sorted([*others, (record, site)], key=lambda k: order[k[0].name])
      chains[path] = tuple(chain)
    if new._chains is None:
      new._owned, new._chains = owned, chains
    return new

  def add(self, record: AdapterRecord) -> Records:
    """Returns records with one more adapter, outside of all others."""
    return Records((*self.adapters, record), self.probe)

  def remove(self, names: Iterable[str]) -> Records:
    """Returns records without some adapters."""
    names = set(names)
    return Records(
      (a for a in self.adapters if a.name not in names), self.probe
    )

  def closed(self) -> Records:
    """Returns records in which no adapter looks for sites any more."""
    return Records((a.closed() for a in self.adapters), self.probe)

  def anonymous(self) -> Records:
    """Returns records without the origins of adapters.

    Transformations return these: a program that was compiled for one model
    would otherwise attribute the seed of that one to another model.
    """
    if self._anonymous is None:
      new = [a.anonymous() for a in self.adapters]
      if all(a is b for a, b in zip(new, self.adapters, strict=True)):
        return self  # The usual case: they came from a transformation.
      self._anonymous = Records(new, self.probe)
    return self._anonymous

  def probed(self, probe: Probe | None) -> Records:
    """Returns records with a probe, which records what is read."""
    return Records(self.adapters, probe)


def unite(a: Records, b: Records) -> Records:
  """Returns the adapters of both, in an order that suits both.

  Raises:
    AdapterError: if an adapter differs in the two, or their orders disagree.
  """
  if a is b or not b.adapters:
    return a
  if not a.adapters:
    return b
  united = Records(_woven(a, b, _common(a, b)), a.probe)
  united.check_standing()
  return united


def _common(a: Records, b: Records) -> list[str]:
  """Returns the names of adapters that both have, which must be the same ones.

  Raises:
    AdapterError: if an adapter differs in the two, or their orders disagree.
  """
  for record in b.adapters:
    if record.name in a.names and a.get(record.name).digest != record.digest:
      raise errors.AdapterError(
        f'two params cannot be merged: both have an adapter {record.name!r}, '
        'with different sites, configuration or state. Rename one, or bring '
        'both to the same state first.'
      )
  common = [n for n in a.names if n in b.names]
  if common != [n for n in b.names if n in a.names]:
    raise errors.AdapterError(
      'two params cannot be merged: their adapters were attached in different '
      f'orders, {list(a.names)} and {list(b.names)}.'
    )
  return common


def _woven(
  a: Records, b: Records, common: Sequence[str]
) -> Iterator[AdapterRecord]:
  """Yields the adapters of both, in the order of each of them.

  Args:
    a: some records.
    b: other records.
    common: names of the adapters that both have, in their order.
  """
  # Between two that are common, those of `a` come first and so lie inside of
  # those of `b`, since `b` is merged into `a`.
  ours, theirs = list(a.adapters), list(b.adapters)
  for name in (*common, None):
    while ours and ours[0].name != name:
      yield ours.pop(0)
    while theirs and theirs[0].name != name:
      yield theirs.pop(0)
    # A transformation drops the origin, so that of the other one is taken.
    known = [r for r in (*ours[:1], *theirs[:1]) if r.is_known]
    yield from known[:1] or ours[:1]
    del ours[:1], theirs[:1]
