"""Drawing the weights that adapters add.

Each draw is one compiled function, shared by all sites that look alike. Keys
depend on seed, adapter name and path alone, so that a live model and a file
get the same bits.
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

from surgery import errors
from surgery.adapting import programs
from surgery.adapting.compute import (
  Arrays,
  Kinds,
  anonymously,
  as_written,
  called,
  calling,
  canonical,
  struct,
  wide,
)
from surgery.contract.adapter import Interceptor
from surgery.contract.site import PathNeeded, Site
from surgery.editing import devices
from surgery.naming.paths import Path

# Adapter weights are drawn with this generator whatever JAX's default is, so
# that a file and a live model get the same bits.
_IMPL = 'threefry2x32'


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


def _wrapped(key: Any) -> Any:
  return jax.random.wrap_key_data(key, impl=_IMPL)


def _initial(
  who: Interceptor, site: Site, key: Any, bases: Arrays
) -> dict[str, Any]:
  specs = {spec.name: spec for spec in site.params}

  def base(name: str) -> Any:
    value = bases[name]
    return canonical(specs[name], value.astype(wide(value.dtype)))

  with as_written(spec.dtype for spec in site.params):
    return _named(who, 'init', who.init(site.bind(base), _wrapped(key)))


def _named(who: Any, what: str, weights: Any) -> dict[str, Any]:
  """Returns the weights that an adapter drew.

  Raises:
    PluginError: if it is not a mapping from names to arrays.
  """
  if not isinstance(weights, Mapping) or not all(
    isinstance(n, str) and n and not set(n) & set('./\0') for n in weights
  ):
    shown = list(weights) if isinstance(weights, Mapping) else type(weights)
    raise errors.PluginError(
      f'{what} of {called(who)} returned {shown}, expected a mapping from '
      'names without dots and slashes to arrays.'
    )
  for name, weight in weights.items():
    _check_weight(who, what, name, weight)
  arrays = {n: jnp.asarray(w) for n, w in weights.items()}
  # A weak type would become another dtype when it meets float32 in training,
  # and is not what is loaded from a file.
  return {n: w.astype(w.dtype) for n, w in arrays.items()}


def _check_weight(who: Any, what: str, name: str, weight: Any) -> None:
  """Raises unless a weight is an array that can be saved.

  Raises:
    PluginError: naming the weight.
  """
  if isinstance(weight, (Mapping, str)) or weight is None:
    raise errors.PluginError(
      f'{what} of {called(who)} returned {type(weight).__name__} for '
      f'{name!r}, expected an array.'
    )
  dtype = getattr(weight, 'dtype', None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    raise errors.PluginError(
      f'{what} of {called(who)} returned a PRNG key for {name!r}, expected '
      'an array. Return jax.random.key_data(key), which can be saved.'
    )


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

  # As an array of it would be: JAX warns of 64 bits that it is not to have.
  bases = {
    p.name: jax.ShapeDtypeStruct(
      p.shape, jax.dtypes.canonicalize_dtype(jnp.dtype(p.dtype))
    )
    for p in site.params
  }
  key = jax.ShapeDtypeStruct((2,), jnp.uint32)
  return jax.eval_shape(probe, key, bases), frozenset(used)


# Programs that are kept, of a few MB each.
_PROGRAMS = programs.Programs(128)

_KEY = jax.ShapeDtypeStruct((2,), np.dtype(np.uint32))


def _drawing(
  who: Interceptor, site: Site, stack: tuple[int, ...], kinds: Kinds
) -> Callable[[Any, Arrays], Any]:
  """Returns the compiled function that draws for one site.

  Args:
    who: the adapter.
    site: the site, or one like it.
    stack: sizes of the stacked axes.
    kinds: name, shape and dtype of each base that is asked for.
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
    return jax.lax.optimization_barrier(one(key, bases))

  bases = {n: struct(shape, dtype) for n, shape, dtype in kinds}
  return _PROGRAMS.get((who, site, stack, kinds), draw, _KEY, bases)


def _kinds(bases: Arrays) -> Kinds:
  return tuple(
    (name, tuple(value.shape), str(value.dtype))
    for name, value in sorted(bases.items())
  )


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
    # One by one: a program for many sites saves 15 µs a site, and compiling it
    # takes seconds longer.
    if not used:
      with devices.drawing():
        run = _drawing(who, like, stack, ())
        return [run(key, {}) for key in key_data]
    assert base is not None
    drawn: list[dict[str, Any]] = []
    for site, key in zip(sites, key_data, strict=True):
      bases = {n: devices.on_cpu(base(site, n)) for n in used}
      with devices.drawing():
        drawn.append(_drawing(who, like, stack, _kinds(bases))(key, bases))
    return drawn

  try:
    with calling('init', who, sites[0]):
      return compute(sites[0].anonymous)
  except PathNeeded:
    if len(sites) > 1:
      return [
        draw(who, [site], stack, key[None], base)[0]
        for site, key in zip(sites, key_data, strict=True)
      ]
  with calling('init', who, sites[0]):
    return compute(sites[0])


def site_shapes(who: Interceptor, site: Site) -> tuple[Any, frozenset[str]]:
  """Returns `shapes`, once for all sites that look alike."""
  with calling('init', who, site):
    return anonymously(functools.partial(shapes, who), site)


def _drawing_shared(
  adapter: Any, sites: tuple[Site, ...]
) -> Callable[[Any], dict[str, Any]]:
  """Returns the compiled function that draws what sites share."""
  return _PROGRAMS.get(
    (adapter, sites), functools.partial(_shared, adapter, sites), _KEY
  )


def _shared(adapter: Any, sites: tuple[Site, ...], key: Any) -> dict[str, Any]:
  """Returns what sites share, by name, as it is compiled."""
  # Fences on both sides, as for what is drawn for a site.
  key = _wrapped(jax.lax.optimization_barrier(key))
  with as_written(spec.dtype for site in sites for spec in site.params):
    weights = adapter.init_shared(sites, key)
  weights = _named(adapter, 'init_shared', weights)
  return dict(jax.lax.optimization_barrier(weights))


def draw_shared(
  adapter: Any, sites: Sequence[Site], seed: int, name: str
) -> dict[str, Any]:
  """Returns the weights that all sites of an adapter share, by name."""
  key = keys(seed, name, [()])[0]
  with calling('init_shared', adapter, sites[0]), devices.drawing():
    return _drawing_shared(adapter, tuple(sites))(key)


def shared_shapes(
  adapter: Any, sites: Sequence[Site]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of what `init_shared` returns, by name."""
  with calling('init_shared', adapter, sites[0]):
    made = jax.eval_shape(
      functools.partial(_shared, adapter, tuple(sites)), _KEY
    )
  return {name: tuple(struct.shape) for name, struct in made.items()}
