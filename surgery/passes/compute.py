"""The arithmetic of adapters: drawing weights, and what layers get.

Live params, merging and files all come here, so that they cannot differ. Each
step is one compiled function, shared by all sites that look alike; where
operands are tracers it is inlined in the caller's program.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery.core import errors, paths
from surgery.core.adapter import Interceptor
from surgery.core.lowrank import LowRank
from surgery.core.paths import Path
from surgery.core.records import Chain, SiteRecord, WeightSpec
from surgery.core.site import ParamSpec, PathNeeded, Site

Arrays = Mapping[str, Any]
Fetch = Callable[[Path], Any]

# Adapter weights are drawn with this generator whatever JAX's default is, so
# that a file and a live model get the same bits.
_IMPL = 'threefry2x32'


# Keys.


def keys(seed: int, adapter: str, sites: Sequence[Path]) -> np.ndarray:
  """Returns a key for each site, which depends on nothing but the arguments.

  Args:
    seed: the adapter's seed.
    adapter: the adapter's name.
    sites: paths of the sites; `()` for what the sites share.

  Returns:
    uint32 array `(len(sites), 2)`, the data of threefry keys: 64 bits of
    BLAKE2b of the arguments.
  """
  digests = [
    hashlib.blake2b(
      json.dumps([seed, adapter, *site]).encode(), digest_size=8
    ).digest()
    for site in sites
  ]
  words = np.frombuffer(b''.join(digests), '<u4').astype(np.uint32)
  return words.reshape(len(sites), 2)


# Roles of axes.


def wide(dtype: Any) -> Any:
  """Returns the dtype of arithmetic: float32, or the base's if wider."""
  dtype = jnp.dtype(dtype)
  if dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating):
    return jnp.dtype(jnp.float32)  # JAX promotes 8 bits only when told.
  return jnp.promote_types(dtype, jnp.float32)


def _canonical(spec: ParamSpec, value: Any) -> Any:
  """Brings stored axes into the order inputs, outputs."""
  order = spec.order
  return value if order == tuple(range(len(order))) else value.transpose(order)


def _stored(spec: ParamSpec, value: Any) -> Any:
  """The inverse of `_canonical`."""
  order = spec.order
  if order == tuple(range(len(order))):
    return value
  return value.transpose(tuple(np.argsort(order)))


def stack_of(where: Path, shape: Sequence[int], core: Sequence[int]) -> int:
  """Returns how many axes are stacked in front of a parameter's own.

  Raises:
    SiteError: if the array does not end in the recorded shape.
  """
  extra = len(shape) - len(core)
  if extra < 0 or tuple(shape[extra:]) != tuple(core):
    raise errors.SiteError(
      f'{paths.show(where)}: the adapter was attached to a parameter of shape '
      f'{tuple(core)}, found {tuple(shape)}. Attach again after changing the '
      'shape of a parameter.'
    )
  return extra


def _checked(
  who: Interceptor, name: str, value: Any, shape: tuple[int, ...]
) -> Any:
  """Returns what `apply` returned as an array.

  Raises:
    PluginError: if it is no array of the parameter's shape.
  """
  if isinstance(value, LowRank):
    value = value.dense()
  found = getattr(value, 'shape', None)
  if found is None or tuple(found) != shape:
    shown = type(value).__name__ if found is None else f'shape {tuple(found)}'
    raise errors.PluginError(
      f'apply of {_called(who)!r} for parameter {name!r} returned {shown}, '
      f'expected an array of shape {shape}.'
    )
  return value


def _called(who: Any) -> str:
  """Returns the name of an adapter type, or of another interceptor's class."""
  return getattr(who, 'name', type(who).__name__)


# What a layer gets.


def _whole_shape(spec: ParamSpec) -> tuple[int, ...]:
  return spec.in_shape + spec.out_shape


def _applied(
  who: Interceptor, site: Site, name: str, bases: Arrays, weights: Arrays
) -> Any:
  """Returns one answer for one site without stacked axes, as stored."""
  specs = {spec.name: spec for spec in site.params}
  whole = {n: _canonical(specs[n], b) for n, b in bases.items()}
  bound = site.bind(whole.__getitem__)
  value = who.apply(bound, name, whole[name], weights)
  value = _checked(who, name, value, _whole_shape(specs[name]))
  return _stored(specs[name], value)


@functools.lru_cache(maxsize=8192)
def _uses(
  who: Interceptor, site: Site, name: str, weights: Any
) -> frozenset[str]:
  """Returns the parameters whose base `apply` asks for, beside its own."""
  used = set()

  def probe(bases: Arrays, weights: Arrays) -> Any:
    def base(asked: str) -> Any:
      used.add(asked)
      return bases[asked]

    return _checked(
      who,
      name,
      who.apply(site.bind(base), name, bases[name], weights),
      _whole_shape(site.param(name)),
    )

  bases = {
    p.name: jax.ShapeDtypeStruct(_whole_shape(p), wide(p.dtype))
    for p in site.params
  }
  structs = {
    n: jax.ShapeDtypeStruct(shape, wide(dtype)) for n, shape, dtype in weights
  }
  jax.eval_shape(probe, bases, structs)
  return frozenset(used - {name})


@functools.lru_cache(maxsize=8192)
def _program(
  who: Interceptor,
  site: Site,
  name: str,
  stack: int,
  shared: frozenset[str],
  dtype: Any,
) -> Callable[[Arrays, Arrays], Any]:
  """Returns the compiled function that answers for one kind of site."""

  def answer(bases: Arrays, weights: Arrays) -> Any:
    with jax.default_matmul_precision('highest'):
      bases = {n: b.astype(wide(b.dtype)) for n, b in bases.items()}
      weights = {n: w.astype(wide(w.dtype)) for n, w in weights.items()}
      one = functools.partial(_applied, who, site, name)
      axes = (
        dict.fromkeys(bases, 0),
        {n: None if n in shared else 0 for n in weights},
      )
      for _ in range(stack):
        one = jax.vmap(one, axes)
      return one(bases, weights).astype(dtype)

  return jax.jit(answer, inline=True)


def _anonymously(compute: Callable[[Site], Any], site: Site) -> Any:
  """Computes for all sites that look alike, or for this one if it must be."""
  try:
    return compute(site.anonymous)
  except PathNeeded:
    return compute(site)


def _failed(who: Any, site: Site, what: str, error: Exception) -> Exception:
  """Returns the error to raise for what a plugin raised."""
  where = paths.show(site.path)
  if isinstance(error, errors.SurgeryError):
    text = str(error)
    return error if where in text else type(error)(f'{where}: {text}')
  return errors.PluginError(
    f'{where}: {what} of {_called(who)!r} failed: {type(error).__name__}: '
    f'{error}'
  )


def step(
  record: SiteRecord,
  shared: Mapping[str, WeightSpec],
  name: str,
  base: Callable[[str], Any],
  fetch: Fetch,
  dtype: Any = None,
) -> Any:
  """Returns what one adapter makes of one parameter.

  Args:
    record: the site.
    shared: weights that the adapter's sites share.
    name: the parameter.
    base: what the inner adapters answer for a parameter of the site.
    fetch: returns a stored weight by its path.
    dtype: of the result; that of arithmetic by default.

  Returns:
    Array of the parameter's shape, with stacked axes in front.

  Raises:
    SiteError: if weights and parameter do not fit together.
    PluginError: if the adapter fails.
  """
  site, who = record.site, record.interceptor
  own = base(name)
  where = (*site.layer, name)
  stack = stack_of(where, own.shape, site.param(name).shape)
  weights = {}
  for weight, spec in record.weights.items():
    value = fetch(spec.path)
    found = stack_of(spec.path, value.shape, spec.shape)
    if found != stack:
      raise errors.SiteError(
        f'{paths.show(spec.path)} has {found} stacked axes, '
        f"{paths.show(where)} has {stack}. Map, scan or stack an adapter's "
        'weights along with the parameter that it rewrites.'
      )
    weights[weight] = value
  for weight, spec in shared.items():
    value = fetch(spec.path)
    if stack_of(spec.path, value.shape, spec.shape):
      raise errors.SiteError(
        f'{paths.show(spec.path)} is shared by sites and cannot be stacked.'
      )
    weights[weight] = value
  kinds = tuple(
    (n, s.shape, s.dtype) for n, s in {**record.weights, **shared}.items()
  )
  shared_names = frozenset(shared)

  def compute(site: Site) -> Any:
    bases = {name: own}
    if len(site.params) > 1:
      for other in _uses(who, site, name, kinds):
        bases[other] = base(other)
    to = wide(own.dtype) if dtype is None else dtype
    run = _program(who, site, name, stack, shared_names, jnp.dtype(to))
    return run(bases, weights)

  try:
    return _anonymously(compute, site)
  except Exception as error:  # A plugin's code ran inside.
    raised = _failed(who, site, 'apply', error)
    if raised is error:
      raise
    raise raised from error


def answer(
  chain: Chain,
  path: Path,
  fetch: Fetch,
  chains: Mapping[Path, Chain],
  *,
  rounded: bool = True,
) -> Any:
  """Returns what a layer gets when it asks for a parameter.

  The adapters are applied one after another, innermost first, in float32 or
  wider; the result is rounded once.

  Args:
    chain: the adapters that take part.
    path: the parameter.
    fetch: returns a stored array by its path.
    chains: who rewrites which parameter, for adapters that ask for another
      parameter of their site.
    rounded: whether the result has the dtype of the stored parameter.

  Returns:
    Array of the parameter's stored shape.
  """
  value = fetch(path)
  dtype = value.dtype
  for index, (adapter, record) in enumerate(chain):
    last = index == len(chain) - 1

    def base(
      name: str,
      inner: Any = value,
      record: SiteRecord = record,
      adapter: Any = adapter,
    ) -> Any:
      other = (*record.site.layer, name)
      if other == path:
        return inner
      before = tuple(
        link
        for link in _until(chains.get(other, ()), adapter.name)
        if link[0].enabled
      )
      return answer(before, other, fetch, chains, rounded=False)

    value = step(
      record,
      adapter.shared,
      path[-1],
      base,
      fetch,
      dtype if last and rounded else None,
    )
  return value


def _until(chain: Chain, name: str) -> Chain:
  """Returns the part of a chain that lies inside of an adapter."""
  inside = []
  for link in chain:
    if link[0].name == name:
      break
    inside.append(link)
  return tuple(inside)


def enabled(chain: Chain) -> Chain:
  """Returns the links of a chain whose adapters are enabled."""
  return tuple(link for link in chain if link[0].enabled)


# Drawing weights.


def _wrapped(key: Any) -> Any:
  return jax.random.wrap_key_data(key, impl=_IMPL)


def _initial(
  who: Interceptor, site: Site, key: Any, bases: Arrays
) -> dict[str, Any]:
  specs = {spec.name: spec for spec in site.params}

  def base(name: str) -> Any:
    value = bases[name]
    return _canonical(specs[name], value.astype(wide(value.dtype)))

  with jax.default_matmul_precision('highest'):
    return _named(who, 'init', who.init(site.bind(base), _wrapped(key)))


def _named(who: Any, what: str, weights: Any) -> dict[str, Any]:
  """Returns the weights that an adapter drew.

  Raises:
    PluginError: if they are no arrays by name.
  """
  if not isinstance(weights, Mapping) or not all(
    isinstance(n, str) and n and not set(n) & set('./\0') for n in weights
  ):
    shown = list(weights) if isinstance(weights, Mapping) else type(weights)
    raise errors.PluginError(
      f'{what} of {_called(who)!r} returned {shown}, expected a mapping from '
      'names without dots and slashes to arrays.'
    )
  arrays = {n: jnp.asarray(w) for n, w in weights.items()}
  # No weak types: what is trained or loaded must not be another type.
  return {n: w.astype(w.dtype) for n, w in arrays.items()}


@functools.lru_cache(maxsize=4096)
def shapes(who: Interceptor, site: Site) -> tuple[Any, frozenset[str]]:
  """Returns what `init` returns, and which parameters' values it asks for.

  Args:
    who: the adapter.
    site: the site.

  Returns:
    Shapes and dtypes by weight name, and names of parameters.
  """
  used = set()

  def probe(key: Any, bases: Arrays) -> Any:
    class Asked(dict[str, Any]):
      def __getitem__(self, name: str) -> Any:
        used.add(name)
        return super().__getitem__(name)

    return _initial(who, site, key, Asked(bases))

  bases = {
    p.name: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype))
    for p in site.params
  }
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return jax.eval_shape(probe, key, bases), frozenset(used)


# Numbers of sites that are drawn at once.
_PIECES = (4, 64)


@functools.lru_cache(maxsize=4096)
def _drawing(
  who: Interceptor, site: Site, stack: tuple[int, ...], many: int
) -> Callable[[Any, Arrays], Any]:
  """Returns the compiled function that draws for one site, or for several.

  Args:
    who: the adapter.
    site: the site, or one like all of them.
    stack: sizes of the stacked axes.
    many: for how many sites; 0 for one, whose base may be asked for.
  """

  def one(key: Any, bases: Arrays) -> Any:
    if not stack:
      return _initial(who, site, key, bases)
    count = int(np.prod(stack))
    split = jax.random.key_data(jax.random.split(_wrapped(key), count))
    draw = functools.partial(_initial, who, site)
    for _ in stack:
      draw = jax.vmap(draw)
    return draw(split.reshape((*stack, 2)), bases)

  def draw(key: Any, bases: Arrays) -> Any:
    # Fences on both sides: the same arithmetic whatever surrounds it.
    key = jax.lax.optimization_barrier(key)
    if not many:
      return jax.lax.optimization_barrier(one(key, bases))
    out = jax.vmap(one, (0, None))(key, bases)
    out = jax.lax.optimization_barrier(out)
    return [{n: w[i] for n, w in out.items()} for i in range(many)]

  return jax.jit(draw)


def draw(
  who: Interceptor,
  sites: Sequence[Site],
  stack: tuple[int, ...],
  key_data: np.ndarray | jax.Array,
  base: Callable[[Site, str], Any] | None = None,
) -> list[dict[str, Any]]:
  """Returns the first weights of sites that look alike.

  Args:
    who: the adapter.
    sites: sites of equal shapes, dtypes and types.
    stack: sizes of the stacked axes.
    key_data: uint32 array `(len(sites), 2)`.
    base: returns a parameter as the inner adapters answer it, as stored.

  Returns:
    For each site its weights by name, with stacked axes in front.
  """

  def compute(like: Site) -> list[dict[str, Any]]:
    _, used = shapes(who, like)
    if used:
      assert base is not None
      # One by one: bases of many sites at once would double the memory.
      run = _drawing(who, like, stack, 0)
      return [
        run(key, {n: base(site, n) for n in used})
        for site, key in zip(sites, key_data, strict=True)
      ]
    if len(sites) == 1:
      return [_drawing(who, like, stack, 0)(key_data[0], {})]
    # In pieces of one size, so that one program serves any number of sites.
    size = next(s for s in _PIECES if len(sites) <= s or s == _PIECES[-1])
    run = _drawing(who, like, stack, size)
    drawn: list[dict[str, Any]] = []
    for start in range(0, len(sites), size):
      piece = key_data[start : start + size]
      drawn += run(np.resize(piece, (size, 2)), {})[: len(piece)]
    return drawn

  try:
    try:
      return compute(sites[0].anonymous)
    except PathNeeded:
      if len(sites) == 1:
        return compute(sites[0])
      return [
        draw(who, [site], stack, key[None], base)[0]
        for site, key in zip(sites, key_data, strict=True)
      ]
  except Exception as error:  # A plugin's code ran inside.
    raised = _failed(who, sites[0], 'init', error)
    if raised is error:
      raise
    raise raised from error


def site_shapes(who: Interceptor, site: Site) -> tuple[Any, frozenset[str]]:
  """Returns `shapes`, once for all sites that look alike."""
  try:
    return _anonymously(functools.partial(shapes, who), site)
  except Exception as error:  # A plugin's code ran inside.
    raised = _failed(who, site, 'init', error)
    if raised is error:
      raise
    raise raised from error


@functools.lru_cache(maxsize=64)
def _drawing_shared(
  adapter: Any, sites: tuple[Site, ...]
) -> Callable[[Any], dict[str, Any]]:
  """Returns the compiled function that draws what sites share."""

  def draw(key: Any) -> dict[str, Any]:
    # Fences on both sides, as for what is drawn for a site.
    key = _wrapped(jax.lax.optimization_barrier(key))
    with jax.default_matmul_precision('highest'):
      weights = adapter.init_shared(sites, key)
    return jax.lax.optimization_barrier(_named(adapter, 'init_shared', weights))

  return jax.jit(draw)


def draw_shared(
  adapter: Any, sites: Sequence[Site], seed: int, name: str
) -> dict[str, Any]:
  """Returns the weights that all sites of an adapter share, by name."""
  key = keys(seed, name, [()])[0]
  try:
    return _drawing_shared(adapter, tuple(sites))(key)
  except Exception as error:
    raised = _failed(adapter, sites[0], 'init_shared', error)
    if raised is error:
      raise
    raise raised from error


def finite(value: Any) -> bool:
  """Whether an array has no NaN and no infinity; True for tracers."""
  if isinstance(value, jax.core.Tracer) or not jnp.issubdtype(
    value.dtype, jnp.inexact
  ):
    return True
  return bool(jnp.isfinite(value).all())
