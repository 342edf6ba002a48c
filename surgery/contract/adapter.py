"""The contract: an adapter type is two pure functions over parameters."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from surgery import errors
from surgery.aliases import Array, Weights
from surgery.contract import config, hookspecs
from surgery.contract.lowrank import LowRank
from surgery.contract.peft import PeftMapping
from surgery.contract.site import Site
from surgery.naming import paths, selectors

# Names under which layers keep the parameter that is meant by their name.
DEFAULT_PARAMS = ('kernel', 'embedding', 'weight')


@typing.dataclass_transform(
  frozen_default=True, kw_only_default=True, field_specifiers=(config.field,)
)
class _Configured:
  """Makes its subclasses frozen dataclasses with checked options."""

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    # Equality and hash are by configuration, see Adapter.
    config.make_dataclass(cls, eq=False)
    made: Callable[..., None] = cls.__init__

    # The checks stand around whatever a subclass writes: a `__post_init__`
    # that forgets `super()` must not switch them off.
    @functools.wraps(made)
    def checked(self: Any, **given: Any) -> None:
      options = _options(type(self), given)
      patterns = _patterns(type(self), given.get('patterns', ()))
      with _foreign(type(self), '__post_init__'):
        made(self, **options, patterns=patterns)
      _check_made(self, options)

    cls.__init__ = checked  # type: ignore


def _options(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the options in the arguments of a class, each of them checked."""
  if not isinstance(cls.name, str) or not cls.name:
    raise errors.PluginError(
      f'{cls.__module__}.{cls.__qualname__} has no name. Set the class '
      "attribute `name`, e.g. name = 'mine'."
    )
  options = {k: v for k, v in given.items() if k != 'patterns'}
  config.check_keys(cls, options)
  config.check_required(cls, given)
  _check_class(cls)
  return {k: config.check(cls, k, v) for k, v in options.items()}


def _check_made(adapter: Any, options: Mapping[str, Any]) -> None:
  """Raises unless an instance is valid as its class has made it.

  Args:
    adapter: the instance.
    options: the options that it was made with, which have been checked.
  """
  cls: Any = type(adapter)
  for key in config.options(cls):
    value = getattr(adapter, key)
    # Defaults were not checked yet, nor what `__post_init__` has set.
    if key not in options or value is not options[key]:
      object.__setattr__(adapter, key, config.check(cls, key, value))
  base: Any
  for base in reversed(cls.__mro__):
    # `check` of each class is called, so that one that does not call `super()`
    # leaves out none of its bases' checks.
    if 'check' not in vars(base):
      continue
    with _foreign(cls, 'check'):
      answer = base.check(adapter)
    if answer is not None:
      raise errors.PluginError(
        f'{config.called(cls)}: check returned {answer!r}, expected None. It '
        'raises surgery.ConfigError for options that do not go together.'
      )
  for selector, values in adapter.patterns:
    # Options that go together may not do so with those of a pattern.
    with errors.within(f'patterns, {selector!r}'):
      dataclasses.replace(adapter, patterns=(), **dict(values))


def _patterns(cls: Any, given: Any) -> tuple[Any, ...]:
  """Returns options by selector as nested tuples, each of them checked."""
  patterns = []
  for selector, values in config.freeze(given):
    selectors.parse(selector)
    with errors.within(f'patterns, {selector!r}'):
      config.check_keys(cls, dict(values))
      checked = tuple((k, config.check(cls, k, v)) for k, v in values)
    patterns.append((selector, checked))
  return tuple(patterns)


@contextlib.contextmanager
def _foreign(
  cls: Any, method: str, about: type[Exception] | None = ValueError
) -> Iterator[None]:
  """Names the type in errors that its own code raises.

  Args:
    cls: the type.
    method: what of it runs.
    about: errors that are about the options; None if there are none.

  Raises:
    ConfigError: for one of `about`.
    PluginError: for any other exception that is not a `SurgeryError`, even for
      an attempt to end the process.
  """
  try:
    yield
  except errors.SurgeryError:
    raise
  except (Exception, SystemExit) as error:
    if about is not None and isinstance(error, about):
      raise errors.ConfigError(f'{config.called(cls)}: {error}') from error
    raise errors.PluginError(
      f'{config.called(cls)}: {method} failed: {type(error).__name__}: {error}'
    ) from error


class Adapter(_Configured):
  """An adapter type; an instance is one configuration of it.

  A subclass is made a frozen dataclass: its annotated attributes are options,
  checked when an instance is made. All that a subclass must write is `init`
  and `apply`; what a live model sees, what merging writes, and what happens to
  a saved file follow from them.

  Attributes:
    name: name of the type, as its entry point is called.
    rewrites: parameters of a layer that it rewrites together, the first being
      the primary one; `'kernel'` stands for the layer's default parameter
      (`kernel`, `embedding` or `weight`; where there is none of these, each
      matrix by itself).
    frozen: names of its weights that never train; each is one that `init` or
      `init_shared` returns.
    adds: True if `apply` adds to the base something that does not depend on
      it, so that such adapters can be merged in any order.
    counters: names of integer weights of a site whose last element counts the
      calls in training through `surgery.factored`, for keys of dropout.
    mergeable: False if what `apply` returns cannot be stored as a parameter.
    rank_axes: which axis of a site's weight is its rank, by the weight's name,
      e.g. `{'lora_a': -1, 'lora_b': 0}`, so that `surgery.prune_ranks` can cut
      these weights together; `apply` takes the rank from their shapes then.
    version: number of the type's options, at least 1, which files record; it
      is raised when their names or meaning change, see `upgraded`.
    peft: how PEFT stores options and weights, a `surgery.PeftMapping`, if it
      has the method. Subclasses do not inherit it: they compute another thing.
    patterns: options for some sites only, by selector; the first selector that
      matches a site decides, e.g. `{'**/query': {'rank': 16}}`.

  Example:
    class IA3(surgery.Adapter):
      name = 'ia3'
      rewrites = ('kernel', 'bias')

      def init(self, site, key):
        return {'scale': jnp.ones(site.out_shape)}

      def apply(self, site, name, base, weights):
        return base * weights['scale']
  """

  name: ClassVar[str] = ''
  rewrites: ClassVar[tuple[str, ...]] = ('kernel',)
  frozen: ClassVar[tuple[str, ...]] = ()
  adds: ClassVar[bool] = False
  counters: ClassVar[tuple[str, ...]] = ()
  mergeable: ClassVar[bool] = True
  rank_axes: ClassVar[Mapping[str, int]] = {}
  version: ClassVar[int] = 1
  peft: ClassVar[PeftMapping | None] = None

  patterns: Any = dataclasses.field(default=(), repr=False)

  def __post_init__(self) -> None:
    """Does nothing; it is there for subclasses that call `super()`."""

  # The two functions.

  def init(self, site: Site, key: Array) -> Weights:
    """Returns the weights that this adapter adds to a layer, by name.

    Traced, and compiled once for sites of the same shapes. It must be pure,
    written in JAX, and draw random numbers from `key` alone.

    Args:
      site: the parameters, with shapes and roles, and `site.base()`.
      key: PRNG key that depends on seed, adapter name and the site's path.

    Returns:
      Arrays by name; a name has no dots and slashes. All train but those in
      `frozen` and integers. Empty, if it adds none.
    """
    raise NotImplementedError

  def apply(
    self, site: Site, name: str, base: Array, weights: Weights
  ) -> Array | LowRank:
    """Returns what the layer gets when it asks for a parameter.

    Called once for each rewritten parameter. Must be pure and written in JAX;
    attaching evaluates it on shapes alone, to find mistakes there.

    Args:
      site: the parameters, with shapes and roles, and `site.base()`.
      name: name of the parameter that the layer reads.
      base: what the inner adapters answer for it, of shape `in_shape +
        out_shape`, in float32 or wider; the core rounds the result once, to
        the dtype in which the parameter is stored.
      weights: what `init` returned, and what `init_shared` returned, as
        trained since then, in float32 or wider.

    Returns:
      An array of the shape of `base`, or a `surgery.LowRank`.
    """
    raise NotImplementedError

  def init_shared(self, sites: Sequence[Site], key: Array) -> Weights:
    """Returns weights that all sites of this adapter share, by name.

    `apply` gets them beside those of `init`, whose names they may not have.

    Args:
      sites: all sites of this adapter.
      key: PRNG key that depends on seed and adapter name.
    """
    del sites, key
    return {}

  # What a type may say beyond them.

  def check(self) -> None:
    """Raises if options do not go together; by default they all do.

    Called whenever an instance is made, after each option has been checked by
    itself: in Python, from a file, from `--set`, and for the options that
    `patterns` give to some sites. What base classes check is checked first,
    with `super()` and without.

    Raises:
      ConfigError: saying what was expected, found, and what to do. A
        `ValueError` becomes one.
    """

  def serves(self, site: Site) -> str | None:
    """Returns why this type cannot serve a site, or None if it can.

    By default it serves floating-point parameters that have an input and an
    output axis. A layer that is not served is an error where a selector names
    it, and left out where a pattern or a wildcard matches it, with a
    `SiteWarning` or a line in the plan. A `SiteError` that is raised here is a
    reason, too. For options that do not fit a layer raise one in `init`, which
    is an error always.

    Returns:
      The reason, without a full stop: `it has 7 outputs, at most 4 can be
      served`.
    """
    if not site.dtype.startswith(('float', 'bfloat')):
      return f'its dtype is {site.dtype}, a floating-point one is needed'
    if not site.in_shape or not site.out_shape:
      return f'its shape {site.primary.shape} has no input and output axis'
    return None

  def sharding(self, site: Site, weight: str) -> tuple[Any, ...] | None:
    """Returns mesh axis names for the axes of a weight, or None.

    Args:
      site: the site; `site.primary.roles_sharding('i')` are the base's.
      weight: name of the weight, as `init` returned it.
    """
    del site, weight
    return None

  def regulariser(self, site: Site, weights: Weights) -> Array | None:
    """Returns what a site adds to the loss, or None for nothing.

    `surgery.regulariser(params)` sums it over all sites, and over the layers
    that are stacked in one. Must be pure and written in JAX.

    Args:
      site: the parameters, with shapes and roles; `site.base()` has no values
        here.
      weights: as `apply` gets them, in float32 or wider.

    Returns:
      A real scalar.
    """
    del site, weights
    return None

  @classmethod
  def upgraded(
    cls, config: Mapping[str, Any], version: int
  ) -> Mapping[str, Any]:
    """Returns options of an older version as those of this `version`.

    Called when a file is read whose adapter was made by an older version of
    the type; a file of a newer version is refused. Called once for the
    options of the adapter, and once for those that each of its `patterns`
    gives to some sites, so any of them may be absent. A type whose `version`
    is above 1 must have it. Weights keep their names and shapes.

    Args:
      config: options by name, as JSON data.
      version: the version that wrote them, lower than `cls.version`.

    Returns:
      Options by name, as JSON data.

    Example:
      @classmethod
      def upgraded(cls, config, version):
        config = dict(config)
        if version < 2 and 'scaling' in config:  # Version 2 renamed it.
          config['alpha'] = config.pop('scaling')
        return config
    """
    raise NotImplementedError

  # The four hooks, in terms of these.

  @hookspecs.hookimpl
  def surgery_match_layer(self, site: Site, term: str) -> bool | None:
    """Answers the term `serves:<type>`: whether this type serves the site."""
    if term != f'serves:{self.name}':
      return None
    return unserved(self, site) is None

  @hookspecs.hookimpl
  def surgery_intercept_param(self, site: Site) -> Interceptor:
    """Stands between the stored parameters of a site and the layer."""
    return self.at(site) if site.known else self

  @hookspecs.hookimpl
  def surgery_freeze_param(self, site: Site, policy: str) -> bool | None:
    """Under the policy `adapters`, what it adds trains unless in `frozen`."""
    if policy != 'adapters':
      return None
    return site.name not in self.frozen

  @hookspecs.hookimpl
  def surgery_merge_param(
    self, site: Site, adapter: Adapter
  ) -> hookspecs.Refusal | None:
    """Refuses for types that declare `mergeable = False`."""
    del site, adapter
    if self.mergeable:
      return None
    return hookspecs.Refusal(f"adapter type '{self.name}' cannot be merged")

  # Configuration as data.

  def config(self) -> dict[str, Any]:
    """Returns the whole configuration as JSON data."""
    data = {k: _plain(getattr(self, k)) for k in config.options(type(self))}
    if self.patterns:
      data['patterns'] = {s: dict(v) for s, v in self.patterns}
    return data

  @classmethod
  def from_config(cls, data: Mapping[str, Any]) -> Adapter:
    """Returns the adapter that `config` described.

    Raises:
      ConfigError: for an unknown option or a wrong value.
    """
    data = dict(data)
    patterns = data.pop('patterns', {})
    values = config.from_json(cls, data)
    found = {}
    for selector, options in patterns.items():
      with errors.within(f'patterns, {selector!r}'):
        found[selector] = config.from_json(cls, options)
    return cls(**{**values, 'patterns': found})

  def at(self, site: Site) -> Adapter:
    """Returns this adapter with the options that hold for one site."""
    for selector, values in self.patterns:
      if selectors.parse(selector).matches(site.path, site.types):
        return dataclasses.replace(self, patterns=(), **dict(values))  # type: ignore[type-var]
    if not self.patterns:
      return self
    return dataclasses.replace(self, patterns=())  # type: ignore[type-var]

  def identity(self) -> tuple[type, str]:
    """Returns what makes two configurations one: class and options."""
    known = self.__dict__.get('_identity')
    if known is None:
      known = type(self), json.dumps(self.config(), sort_keys=True)
      object.__setattr__(self, '_identity', known)
    return known  # type: ignore[no-any-return]

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Adapter):
      return NotImplemented
    return self is other or self.identity() == other.identity()

  def __hash__(self) -> int:
    return hash(self.identity())


@functools.lru_cache(maxsize=512)
def _check_class(cls: type[Adapter]) -> None:
  """Raises unless a class declares an adapter type.

  Once a class: each site has an adapter with its own options.

  Raises:
    PluginError: naming the class and what is wrong with it.
  """
  for option in config.options(cls):
    if hasattr(Adapter, option):
      raise errors.PluginError(
        f"{cls.__module__}.{cls.__qualname__}: '{option}' is part of the "
        'contract and cannot be an option. Give the option another name; class '
        "attributes are set without annotation, e.g. name = 'mine'."
      )
  _check_flags(cls)
  _check_version(cls)
  _check_rank_axes(cls)
  _check_spelling(cls)
  _check_names(cls)
  config.check_declaration(cls)
  # A type that returns another interceptor needs no functions of its own.
  if cls.surgery_intercept_param is Adapter.surgery_intercept_param:
    for method in ('init', 'apply'):
      if getattr(cls, method) is getattr(Adapter, method):
        raise errors.PluginError(
          f'{config.called(cls)} has no method `{method}`.'
        )


def _check_flags(cls: type[Adapter]) -> None:
  """Raises unless attributes that are no names have the right type.

  Raises:
    PluginError: naming the attribute.
  """
  for flag in ('adds', 'mergeable'):
    if not isinstance(getattr(cls, flag), bool):
      raise errors.PluginError(
        f'{config.called(cls)}: {flag}: expected True or False, found '
        f'{getattr(cls, flag)!r}.'
      )
  if cls.peft is not None and not isinstance(cls.peft, PeftMapping):
    raise errors.PluginError(
      f'{config.called(cls)}: peft: expected a surgery.PeftMapping, found '
      f'{cls.peft!r}.'
    )


def _check_names(cls: type[Adapter]) -> None:
  """Raises unless attributes that list names are tuples of text.

  Raises:
    PluginError: naming the attribute.
  """
  for attribute in ('rewrites', 'frozen', 'counters'):
    names = getattr(cls, attribute)
    # `('kernel')` is text, whose letters would be taken for names.
    if isinstance(names, str) or not all(isinstance(n, str) for n in names):
      raise errors.PluginError(
        f'{config.called(cls)}: {attribute}: expected a tuple of names, found '
        f'{names!r}. One name is written with a comma: ({names!r},).'
      )
  if not cls.rewrites:
    raise errors.PluginError(
      f'{config.called(cls)}: rewrites: expected the names of one parameter or '
      "more, as ('kernel',), found none."
    )


def _check_version(cls: type[Adapter]) -> None:
  """Raises unless older configurations can be read.

  Raises:
    PluginError: for an invalid version, or if it needs an `upgraded`.
  """
  if not _is_version(cls.version):
    raise errors.PluginError(
      f'{config.called(cls)}: version: expected a whole number of at '
      f'least 1, found {cls.version!r}.'
    )
  # Of functions, as a classmethod is bound anew whenever it is looked up.
  theirs: Any = cls.upgraded
  if cls.version > 1 and theirs.__func__ is Adapter.upgraded.__func__:  # type: ignore[attr-defined]
    raise errors.PluginError(
      f'{config.called(cls)}: version {cls.version} needs a classmethod '
      '`upgraded(cls, config, version)`, which converts older options to this '
      'version; without it, files that older versions wrote would be misread.'
    )


def _is_version(version: object) -> bool:
  """Whether something is a whole number of at least 1."""
  whole = isinstance(version, int) and not isinstance(version, bool)
  return whole and version >= 1  # type: ignore[operator]


def _check_rank_axes(cls: type[Adapter]) -> None:
  """Raises unless `rank_axes` names axes by weight.

  Raises:
    PluginError: naming what was found instead.
  """
  declared: Any = cls.rank_axes
  if not isinstance(declared, Mapping) or not all(
    isinstance(name, str) and isinstance(axis, int) and axis is not True
    for name, axis in declared.items()
  ):
    raise errors.PluginError(
      f'{config.called(cls)}: rank_axes: expected a mapping from the name of a '
      "weight to an axis, as {'lora_a': -1, 'lora_b': 0}, found "
      f'{declared!r}.'
    )


def unserved(adapter: Adapter, site: Site) -> str | None:
  """Returns why an adapter does not serve a site; None if it does.

  What `serves` returns and a `SiteError` that it raises are reasons alike.

  Args:
    adapter: the adapter, of which the options for that site are taken.
    site: the site.

  Returns:
    The reason, without the site's path in front and a full stop behind.

  Raises:
    PluginError: if `serves` fails otherwise, or returns something else than a
      reason or None.
  """
  cls: Any = type(adapter)
  try:
    with _foreign(cls, 'serves', None):
      answer: Any = adapter.at(site).serves(site)
  except errors.SiteError as error:
    answer = str(error)
    for path in (site.path, site.layer):
      answer = answer.removeprefix(f'{paths.show(path)}: ')
  if answer is None:
    return None
  if isinstance(answer, str) and answer.strip(' .\n'):
    return answer.strip().rstrip('.')
  raise errors.PluginError(
    f'{config.called(cls)}: serves returned {answer!r}, expected None, or as '
    'text the reason why the type cannot serve the site.'
  )


def current(
  cls: type[Adapter], data: Mapping[str, Any], version: Any, origin: str
) -> Mapping[str, Any]:
  """Returns a configuration from a file as one of the installed version.

  Args:
    cls: the type.
    data: what `Adapter.config` returned when the file was written.
    version: of the type that wrote it.
    origin: the distribution that the type comes from, or an empty string.

  Raises:
    FormatError: for a version that is invalid, or newer than the installed one.
    ConfigError: if `upgraded` raises a `ValueError`, or returns an unknown
      option.
    PluginError: if it raises anything else, or does not return options.
  """
  if not _is_version(version):
    raise errors.FormatError(
      f"a configuration of type '{cls.name}': expected a version of at least "
      f'1, found {version!r}.'
    )
  declared: Any = cls  # mypy takes the class for an instance, see __hash__.
  _check_class(declared)
  if version > cls.version:
    raise errors.FormatError(
      f"a configuration of type '{cls.name}' has version {version}, and the "
      f'installed type reads versions up to {cls.version}. Update '
      f'{origin or "the distribution that the type comes from"}.'
    )
  if version == cls.version:
    return data

  def one(options: Mapping[str, Any]) -> dict[str, Any]:
    with _foreign(cls, 'upgraded'):
      # A copy, since the caller keeps what the file says.
      result: Any = cls.upgraded(copy.deepcopy(dict(options)), version)
    if not isinstance(result, Mapping):
      raise errors.PluginError(
        f'{config.called(cls)}: upgraded returned {result!r}, expected '
        'options by name.'
      )
    with errors.within(f'upgraded from version {version} to {cls.version}'):
      config.check_keys(declared, result)
    return dict(result)

  found = one({k: v for k, v in data.items() if k != 'patterns'})
  patterns = {}
  for selector, options in data.get('patterns', {}).items():
    with errors.within(f'patterns, {selector!r}'):
      patterns[selector] = one(options)
  return {**found, 'patterns': patterns} if 'patterns' in data else found


# What a class may say of a type and need not, so that a misspelt one would be
# taken for the author's own. Shorter names have too many neighbours.
_OPTIONAL = (
  'counters',
  'frozen',
  'init_shared',
  'mergeable',
  'rank_axes',
  'regulariser',
  'rewrites',
  'serves',
  'sharding',
  'upgraded',
)


def _check_spelling(cls: type[Adapter]) -> None:
  """Raises for a class attribute that is almost one of the contract's.

  Raises:
    PluginError: naming both.
  """
  options = config.options(cls)
  for base in cls.__mro__[: cls.__mro__.index(Adapter)]:
    for name in vars(base):
      if name in options or name.startswith('_') or hasattr(Adapter, name):
        continue
      close = difflib.get_close_matches(name, _OPTIONAL, n=1, cutoff=0.85)
      if close:
        raise errors.PluginError(
          f'{config.called(cls)}: {name!r} is not part of the contract and '
          f'would have no effect. Did you mean {close[0]!r}? If it is private '
          'to the type, begin its name with an underscore.'
        )


@typing.runtime_checkable
class Interceptor(Hashable, typing.Protocol):
  """What `surgery_intercept_param` returns: what adapters are made of.

  Must be hashable, and equal only to what computes the same.
  """

  def init(self, site: Site, key: Array) -> Weights:
    """Returns the weights of a site, see `Adapter.init`."""
    ...

  def apply(
    self, site: Site, name: str, base: Array, weights: Weights
  ) -> Array | LowRank:
    """Returns what the layer gets, see `Adapter.apply`."""
    ...


def _plain(value: Any) -> Any:
  return [_plain(v) for v in value] if isinstance(value, tuple) else value


def named_key(key: Array, name: str) -> Array:
  """Returns a key for one of several weights that `init` draws.

  Args:
    key: the key that `init` was given.
    name: name of the weight.
  """
  import jax

  digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
  return jax.random.fold_in(key, int.from_bytes(digest, 'little'))
