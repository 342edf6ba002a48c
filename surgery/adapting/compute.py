"""The arithmetic of adapters: drawing weights, and what layers get.

Live params, merging and files all come here, so that they cannot differ. Each
step is one compiled function, shared by all sites that look alike; where
operands are tracers it is inlined in the caller's program.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors, jaxcompat
from surgery.adapting import programs
from surgery.contract import origin
from surgery.contract.adapter import Interceptor
from surgery.contract.lowrank import LowRank
from surgery.contract.site import ParamSpec, PathNeeded, Site
from surgery.editing import devices, nonfinite
from surgery.host import foreign
from surgery.model.records import Chain, SiteRecord, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path

Arrays = Mapping[str, Any]
Fetch = Callable[[Path], Any]


@contextlib.contextmanager
def as_written(dtypes: Iterable[Any]) -> Iterator[None]:
  """The scope in which a type's formulas are traced: JAX's defaults.

  What a caller sets to find mistakes in their own code (`numpy_rank_promotion`,
  `numpy_dtype_promotion`) is about their code, and must not decide whether a
  type works. Nor may 64 bits decide what a file becomes: where no operand has
  them, `jnp.zeros(shape)` is float32 in a formula, as it is in the shell.
  Products are exact to the dtype.

  Args:
    dtypes: those of the operands.
  """
  narrow = all(jnp.dtype(one).name not in _LONG for one in dtypes)
  with (
    jax.default_matmul_precision('highest'),
    jax.numpy_rank_promotion('allow'),
    jax.numpy_dtype_promotion('standard'),
    jax.enable_x64(False) if narrow else contextlib.nullcontext(),
  ):
    yield


_LONG = ('float64', 'complex128', 'int64', 'uint64')


# Roles of axes.


def wide(dtype: Any) -> Any:
  """Returns the dtype of arithmetic: float32, or the base's if wider."""
  dtype = jnp.dtype(dtype)
  if dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating):
    return jnp.dtype(jnp.float32)  # JAX promotes 8 bits only when told.
  return jnp.promote_types(dtype, jnp.float32)


def precise(*dtypes: Any) -> contextlib.AbstractContextManager[Any]:
  """Lets JAX compute in 64 bits while it is entered, if a dtype has them.

  Files hold float64 whatever JAX's configuration is, and a result that was
  narrowed would not be what the parameter is.
  """
  if any(str(dtype) in ('float64', 'complex128') for dtype in dtypes):
    return jax.enable_x64(True)
  return contextlib.nullcontext()


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """Returns a shape and dtype to trace with, of 64 bits if it has them.

  JAX makes a narrower one, and warns, where its 64-bit mode is off.
  """
  with precise(dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def widened(value: Any) -> Any:
  """Returns an array for arithmetic; integers, such as counts, as they are."""
  return value.astype(arithmetic_dtype(value.dtype))


def arithmetic_dtype(dtype: Any) -> Any:
  """Returns the dtype in which weights of a dtype are used."""
  inexact = jnp.issubdtype(dtype, jnp.inexact)
  return wide(dtype) if inexact else jnp.dtype(dtype)


def canonical(spec: ParamSpec, value: Any) -> Any:
  """Brings stored axes into the order inputs, outputs."""
  order = spec.order
  return value if order == tuple(range(len(order))) else value.transpose(order)


def _stored(spec: ParamSpec, value: Any) -> Any:
  """The inverse of `canonical`."""
  order = spec.order
  if order == tuple(range(len(order))):
    return value
  return value.transpose(tuple(np.argsort(order)))


def stack_of(where: Path, shape: Sequence[int], core: Sequence[int]) -> int:
  """Returns how many axes are stacked in front of a parameter's own.

  Raises:
    SiteError: if the array does not end in the recorded shape.
  """
  # Records keep the shape without stacked axes, since a layer inside of scan
  # sees it so; what an array has in front of it is stacked.
  extra = len(shape) - len(core)
  if extra < 0 or tuple(shape[extra:]) != tuple(core):
    raise errors.SiteError(
      f'{paths.show(where)}: the adapter was attached to a parameter of shape '
      f'{tuple(core)}, found {tuple(shape)}. Attach again after changing the '
      'shape of a parameter.'
    )
  return extra


def _checked(
  who: Interceptor, name: str, value: Any, shape: tuple[int, ...], base: Any
) -> Any:
  """Returns what `apply` returned as an array.

  Raises:
    PluginError: if it is no array of the parameter's shape, and of numbers of
      its kind.
  """
  if isinstance(value, LowRank):
    value = value.dense()
  found = getattr(value, 'shape', None)
  if found is None or tuple(found) != shape:
    shown = type(value).__name__ if found is None else f'shape {tuple(found)}'
    raise errors.PluginError(
      f'apply of {called(who)} for parameter {name!r} returned {shown}, '
      f'expected an array of shape {shape}.'
    )
  kind = jnp.complexfloating if _is_complex(base) else jnp.floating
  if not jnp.issubdtype(value.dtype, kind):
    raise errors.PluginError(
      f'apply of {called(who)} for parameter {name!r} returned '
      f'{jnp.dtype(value.dtype).name}, expected a {kind.__name__} dtype, as '
      'that of the base.'
    )
  return value


def _check_counter(who: Interceptor, value: Any, weights: Arrays) -> None:
  """Raises if dropout has no weight that counts calls.

  Its masks would be the same at each step, and nothing would show it.

  Raises:
    PluginError: saying what `counters` should name.
  """
  named = getattr(who, 'counters', None)
  if not isinstance(value, LowRank) or not value.dropout or named is None:
    return
  whole = [n for n, w in weights.items() if jnp.issubdtype(w.dtype, np.integer)]
  if not any(n in whole and weights[n].ndim for n in named):
    raise errors.PluginError(
      f'apply of {called(who)} returned a LowRank with dropout, and '
      f'`counters`, {tuple(named)!r}, names no vector of integers, so its mask '
      'would be the same at each step. Weights of integers: '
      f'{", ".join(whole) or "none"}.'
    )


def _is_complex(value: Any) -> bool:
  return bool(jnp.issubdtype(value.dtype, jnp.complexfloating))


def answered(
  who: Interceptor, site: Site, name: str, base: Any, weights: Arrays
) -> Any:
  """Returns what `apply` answers.

  Raises:
    PluginError: if it asks for a weight that is not there.
  """
  try:
    return who.apply(site, name, base, weights)
  except KeyError as error:
    if error.args[0] in weights:
      raise
    raise errors.PluginError(
      f'apply of {called(who)} failed: KeyError: {error}. The weights are '
      f'{", ".join(weights) or "none"}.'
    ) from error


def called(who: Any) -> str:
  """Returns an adapter type, or another interceptor's class, for messages.

  `'ia3' of surgery-ia3 1.0`, where another distribution offers the type.
  """
  name = repr(getattr(who, 'name', type(who).__name__))
  cls: Any = type(who)
  where = origin.origin(cls)
  return f'{name} of {where}' if where else name


# What a layer gets.


def _whole_shape(spec: ParamSpec) -> tuple[int, ...]:
  return spec.in_shape + spec.out_shape


def _applied(
  who: Interceptor, site: Site, name: str, bases: Arrays, weights: Arrays
) -> Any:
  """Returns one answer for one site without stacked axes, as stored."""
  specs = {spec.name: spec for spec in site.params}
  # Formulas see inputs first and outputs last, whatever the stored layout is.
  whole = {n: canonical(specs[n], b) for n, b in bases.items()}
  bound = site.bind(whole.__getitem__)
  value = answered(who, bound, name, whole[name], weights)
  value = _checked(who, name, value, _whole_shape(specs[name]), whole[name])
  return _stored(specs[name], value)


@functools.lru_cache(maxsize=8192)
def uses(
  who: Interceptor, site: Site, name: str, weights: Any
) -> frozenset[str]:
  """Returns the parameters whose base `apply` asks for, beside its own."""
  # `apply` is traced on shapes: nothing is computed, but what it reads is
  # seen.
  used = set()

  def probe(bases: Arrays, weights: Arrays) -> Any:
    def base(asked: str) -> Any:
      used.add(asked)
      return bases[asked]

    value = answered(who, site.bind(base), name, bases[name], weights)
    _check_counter(who, value, weights)
    shape = _whole_shape(site.param(name))
    return _checked(who, name, value, shape, bases[name])

  bases = {p.name: struct(_whole_shape(p), wide(p.dtype)) for p in site.params}
  structs = {
    n: struct(shape, arithmetic_dtype(dtype)) for n, shape, dtype in weights
  }
  dtypes = [v.dtype for v in (*bases.values(), *structs.values())]
  with precise(*dtypes), as_written(dtypes):
    jax.eval_shape(probe, bases, structs)
  return frozenset(used - {name})


@functools.lru_cache(maxsize=1024)
def program(
  who: Interceptor,
  site: Site,
  name: str,
  stack: int,
  shared: frozenset[str],
  dtype: Any,
) -> Callable[[Arrays, Arrays], Any]:
  """Returns the function that answers for one kind of site, to be traced.

  It is a call in the caller's program. A compiler takes calls apart; whoever
  runs such a program operation by operation, as `jax.checkpoint` does without
  `jit`, compiles each call as a whole, and so rounds as a merge does.
  """
  return jax.jit(_answering(who, site, name, stack, shared, dtype))


def _answering(
  who: Interceptor,
  site: Site,
  name: str,
  stack: int,
  shared: frozenset[str],
  dtype: Any,
) -> Callable[[Arrays, Arrays], Any]:
  def answer(bases: Arrays, weights: Arrays) -> Any:
    with as_written(v.dtype for v in (*bases.values(), *weights.values())):
      bases = {n: b.astype(wide(b.dtype)) for n, b in bases.items()}
      weights = {n: widened(w) for n, w in weights.items()}
      # The formula is written for one layer without stacked axes; each stacked
      # axis is one `vmap` around it, in which shared weights are not mapped.
      one = functools.partial(_applied, who, site, name)
      axes = (
        dict.fromkeys(bases, 0),
        {n: None if n in shared else 0 for n in weights},
      )
      for _ in range(stack):
        one = jax.vmap(one, axes)
      return one(bases, weights).astype(dtype)

  return answer


# Compiled programs that are kept, of up to a few MB each.
_PROGRAMS = programs.Programs(256)


def _run(
  who: Interceptor,
  site: Site,
  name: str,
  stack: int,
  shared: frozenset[str],
  dtype: Any,
  bases: Arrays,
  weights: Arrays,
) -> Any:
  """Returns the answer for one site, by the program of all that are alike."""
  key = (who, site, name, stack, shared, dtype)
  if any(map(jaxcompat.is_traced, (*bases.values(), *weights.values()))):
    return program(*key)(bases, weights)
  # Sites and adapters that differ in what `apply` does not read share one.
  run = _PROGRAMS.get(key, _answering(*key), bases, weights)
  return run(bases, weights)


def anonymously(compute: Callable[[Site], Any], site: Site) -> Any:
  """Computes for all sites that look alike, or for this one if it must be."""
  try:
    return compute(site.anonymous)
  except PathNeeded:
    return compute(site)


class calling:  # noqa: N801 - it is used as a function is.
  """Says of errors in a plugin's code whose it was, and at which site.

  No generator, and no text before there is an error: layers ask at each call.

  Args:
    what: the function: `init`, `apply`.
    who: the adapter, or what a hook returned in its place.
    site: the site.

  Raises:
    PluginError: for anything that is no `SurgeryError`.
  """

  __slots__ = ('_printing', '_site', '_what', '_who')

  def __init__(self, what: str, who: Any, site: Site) -> None:
    self._what, self._who, self._site = what, who, site
    self._printing = foreign.printing()

  def __enter__(self) -> None:
    self._printing.__enter__()

  def __exit__(
    self, kind: Any, error: BaseException | None, traceback: Any
  ) -> None:
    self._printing.__exit__()
    if error is None or isinstance(error, PathNeeded):
      return
    where = paths.show(self._site.path)
    whose = f'{self._what} of {called(self._who)}'
    with errors.within(where), foreign.code(whose):
      raise error


Kinds = tuple[tuple[str, tuple[int, ...], str], ...]


def kinds_of(record: SiteRecord, shared: Mapping[str, WeightSpec]) -> Kinds:
  """Returns name, shape and dtype of each weight that `apply` gets."""
  return tuple(
    (n, s.shape, s.dtype) for n, s in {**record.weights, **shared}.items()
  )


def weights_of(
  record: SiteRecord,
  shared: Mapping[str, WeightSpec],
  where: Path,
  stack: int,
  fetch: Fetch,
) -> dict[str, Any]:
  """Returns the weights that `apply` gets, by name.

  Args:
    record: the site.
    shared: weights that the adapter's sites share.
    where: path of the parameter, for messages.
    stack: number of axes stacked in front of it.
    fetch: returns a stored weight by its path.

  Raises:
    SiteError: if weights and parameter do not fit together.
  """
  weights = {}
  for weight, spec in record.weights.items():
    value = fetch(spec.path)
    found = stack_of(spec.path, value.shape, spec.shape)
    if found != stack:
      many = (
        'If they are many adapters (surgery.stack_adapters), say by '
        'surgery.route which row of an input has which, and call '
        'surgery.factored(model). Otherwise map'
        if found > stack
        else 'Map'
      )
      raise errors.SiteError(
        f'{paths.show(spec.path)} has {found} stacked axes, '
        f"{paths.show(where)} has {stack}. {many}, scan or stack an adapter's "
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
  return weights


def exact(value: Any) -> Any:
  """Returns an array that JAX would narrow as one of numpy."""
  if jaxcompat.is_traced(value):
    return value
  narrow = jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype
  return np.asarray(value) if narrow else value


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
  # From here on all sites with the same shapes run the same program.
  stack = stack_of(where, own.shape, site.param(name).shape)
  weights = weights_of(record, shared, where, stack, fetch)
  kinds = kinds_of(record, shared)
  shared_names = frozenset(shared)

  def compute(site: Site) -> Any:
    bases = {name: own}
    if len(site.params) > 1:
      # Only those that `apply` reads, since each of them may be a chain of
      # adapters of its own.
      for other in uses(who, site, name, kinds):
        bases[other] = base(other)
    with precise(*(base.dtype for base in bases.values())):
      to = wide(own.dtype) if dtype is None else dtype
      value = _run(
        who, site, name, stack, shared_names, jnp.dtype(to), bases, weights
      )
    return exact(value)

  with calling('apply', who, site):
    return anonymously(compute, site)


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
    # All adapters but the last one answer in float32 or wider, so that the
    # result is rounded once.
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
      return inner_answer(adapter.name, other, fetch, chains)

    value = step(
      record,
      adapter.shared,
      path[-1],
      base,
      fetch,
      dtype if last and rounded else None,
    )
  return value


def inner_answer(
  name: str, path: Path, fetch: Fetch, chains: Mapping[Path, Chain]
) -> Any:
  """Returns what the adapters inside of one answer for a parameter."""
  before = inside(chains.get(path, ()), name)
  return answer(before, path, fetch, chains, rounded=False)


def inside(chain: Chain, name: str) -> Chain:
  """Returns the enabled part of a chain that lies inside of an adapter."""
  found = []
  for link in chain:
    # The chain is in the order of attaching, innermost first.
    if link[0].name == name:
      break
    found.append(link)
  return enabled(tuple(found))


def enabled(chain: Chain) -> Chain:
  """Returns the links of a chain whose adapters are enabled."""
  return tuple(link for link in chain if link[0].enabled)


def finite(value: Any) -> bool:
  """Whether an array has no NaN and no infinity; True for tracers."""
  if jaxcompat.is_traced(value) or not jnp.issubdtype(value.dtype, jnp.inexact):
    return True
  alone = isinstance(value, np.ndarray) or len(value.sharding.device_set) == 1
  if alone and devices.is_of_host(value):
    # It is there already; JAX would compile a program for each shape, and
    # narrow 64 bits.
    with devices.transfers():
      array = np.asarray(value)
    return nonfinite.within(array, array.dtype.name)
  with devices.beside(value):
    return bool(jnp.isfinite(value).all())
