"""Parameters as layers get them, computed in blocks where they are large.

A parameter in memory and one in a file larger than memory are computed by the
same compiled functions over the same blocks, so that they have the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery import jaxcompat
from surgery.adapting import compute, cutting, programs
from surgery.adapting.compute import Fetch
from surgery.contract.adapter import Interceptor
from surgery.contract.site import Site
from surgery.editing import devices
from surgery.model.grid import BLOCK, Index, grid
from surgery.model.records import AdapterRecord, Chain, SiteRecord
from surgery.naming.paths import Path

Shape = tuple[int, ...]

# Most elements of an intermediate value that each block computes as a whole.
_WHOLE = 4 * BLOCK


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What decides how one adapter's answer is cut, and its compiled function.

  Attributes:
    who: computes the answer.
    site: a site, without its path if that does not matter.
    name: the parameter.
    stack: sizes of the axes stacked in front of it.
    weights: name, shape and dtype of each weight.
    shared: names of the weights without stacked axes.
    others: names and dtypes of the other parameters that are asked for.
    base: dtype of what the adapters inside answer.
    dtype: dtype of the result.
  """

  who: Interceptor
  site: Site
  name: str
  stack: Shape
  weights: compute.Kinds
  shared: frozenset[str]
  others: tuple[tuple[str, str], ...]
  base: str
  dtype: str

  @property
  def shape(self) -> Shape:
    """Shape of the parameter as it is stored."""
    return (*self.stack, *self.site.param(self.name).shape)

  def arguments(self) -> list[Any]:
    """Returns shape and dtype of what `function` takes."""
    sizes = lambda name: (*self.stack, *self.site.param(name).shape)
    return [
      compute.struct(self.shape, self.base),
      *(compute.struct(sizes(name), dtype) for name, dtype in self.others),
      *(
        compute.struct(
          shape if name in self.shared else (*self.stack, *shape), dtype
        )
        for name, shape, dtype in self.weights
      ),
    ]

  def function(self, own: Any, *rest: Any) -> Any:
    """Returns the whole answer for base, other bases and weights."""
    run = compute.program(
      self.who,
      self.site,
      self.name,
      len(self.stack),
      self.shared,
      jnp.dtype(self.dtype),
    )
    split = len(self.others)
    bases = dict(zip([n for n, _ in self.others], rest[:split], strict=True))
    names = [n for n, _, _ in self.weights]
    weights = dict(zip(names, rest[split:], strict=True))
    return run({self.name: own, **bases}, weights)


@functools.lru_cache(maxsize=512)
def _cut(kind: _Kind) -> cutting.Cut | None:
  """Returns how an answer is computed in blocks; None if it cannot be."""
  sizes = [
    math.prod(kind.site.param(name).shape) * math.prod(kind.stack)
    for name, _ in kind.others
  ]
  # Other parameters of the site are operands of each block, whole: they must
  # be small.
  if max(sizes, default=0) > BLOCK:
    return None
  # Blocks of the grid cut the first axes; the result is cut along these.
  axes = len(next(grid(kind.shape)))
  with compute.precise(kind.base, kind.dtype):
    return cutting.cut(kind.function, kind.arguments(), axes, _WHOLE)


# Compiled programs that are kept, of up to a few MB each.
_PROGRAMS = programs.Programs(128)


def _program(kind: _Kind, sizes: Shape, *arguments: Any) -> Callable[..., Any]:
  """Returns the compiled function that computes blocks of one size."""
  cut = _cut(kind)
  assert cut is not None

  def block(starts: Any, *arguments: Any) -> Any:
    return cut(sizes, starts, arguments)

  return _PROGRAMS.get((kind, sizes), block, *arguments)


def _kind(
  adapter: AdapterRecord,
  record: SiteRecord,
  path: Path,
  shape: Shape,
  base: str,
  dtype: str,
  chains: Mapping[Path, Chain],
) -> _Kind | None:
  """Returns what one adapter's answer is like; None if it cannot be cut."""
  site = record.site
  core = site.param(path[-1]).shape
  stack = shape[: len(shape) - len(core)]
  weights = compute.kinds_of(record, adapter.shared)

  def of(site: Site) -> _Kind:
    names: Sequence[str] = ()
    if len(site.params) > 1:
      used = compute.uses(record.interceptor, site, path[-1], weights)
      names = sorted(used)
    others = tuple(
      (n, _inner_dtype(adapter, record.site, n, chains)) for n in names
    )
    kind = _Kind(
      record.interceptor,
      site,
      path[-1],
      stack,
      weights,
      frozenset(adapter.shared),
      others,
      base,
      dtype,
    )
    # Cutting traces `apply`, which raises here if it reads its path; then the
    # site is tried that has one.
    _cut(kind)
    return kind

  kind = compute.anonymously(of, site)
  return None if _cut(kind) is None else kind


def _inner_dtype(
  adapter: AdapterRecord, site: Site, name: str, chains: Mapping[Path, Chain]
) -> str:
  """Returns the dtype of what the adapters inside of one answer."""
  dtype = site.param(name).dtype
  inner = compute.inside(chains.get((*site.layer, name), ()), adapter.name)
  return str(compute.wide(dtype)) if inner else dtype


class Blocks:
  """A parameter as a layer gets it, in blocks.

  Args:
    chain: the adapters that take part.
    kinds: how each of them is computed.
    path: the parameter.
    shape: its shape.
    part: returns a block of the stored parameter.
    fetch: returns a stored array by its path.
    chains: who rewrites which parameter.
  """

  def __init__(
    self,
    chain: Chain,
    kinds: Sequence[_Kind],
    path: Path,
    shape: Shape,
    part: Callable[[Index], Any],
    fetch: Fetch,
    chains: Mapping[Path, Chain],
  ) -> None:
    self._links = list(zip(chain, kinds, strict=True))
    self._path = path
    self._shape = shape
    self._part = part
    self._fetch = fetch
    self._chains = chains
    self._last = list(grid(shape))[-1]
    self._operands: list[list[Any]] | None = None

  def part(self, index: Index) -> Any:
    """Returns a block; see `Leaf.part`."""
    value = self._part(index)
    if self._operands is None:
      self._operands = [self._fetched(link, kind) for link, kind in self._links]
    # Operands beside the base are fetched once for all blocks of the
    # parameter.
    others = [v for operands in self._operands for v in operands]
    with devices.beside(value, *others):
      value = self._computed(index, value)
    # Blocks come in order, so that operands are released with the last.
    if index == self._last:
      self._operands = None
    return value

  def _computed(self, index: Index, value: Any) -> Any:
    """Returns what the adapters make of a block, one after another."""
    sizes = tuple(cut.stop - cut.start for cut in index)
    # An explicit transfer, which the caller's guard may allow alone.
    starts = jax.device_put(np.asarray([cut.start for cut in index], np.int32))
    assert self._operands is not None
    for ((_, record), kind), operands in zip(
      self._links, self._operands, strict=True
    ):
      with compute.calling('apply', kind.who, record.site):
        with compute.precise(kind.base, kind.dtype):
          run = _program(kind, sizes, starts, value, *operands)
          value = run(starts, value, *operands)
        value = compute.exact(value)
    return value

  def _fetched(
    self, link: tuple[AdapterRecord, SiteRecord], kind: _Kind
  ) -> list[Any]:
    """Returns the operands of an adapter beside the base, on the device."""
    adapter, record = link
    others = [
      inner_answer(
        adapter.name, (*record.site.layer, name), self._fetch, self._chains
      )
      for name, _ in kind.others
    ]
    weights = compute.weights_of(
      record, adapter.shared, self._path, len(kind.stack), self._fetch
    )
    found = [*others, *weights.values()]
    with devices.beside(*found):
      return [jnp.asarray(v) for v in found]


def of(
  chain: Chain,
  path: Path,
  shape: Shape,
  dtype: str,
  part: Callable[[Index], Any],
  fetch: Fetch,
  chains: Mapping[Path, Chain],
) -> Blocks | None:
  """Returns a parameter as a layer gets it, in blocks; reads nothing yet.

  Args:
    chain: the adapters that take part, innermost first.
    path: the parameter.
    shape: its shape as stored.
    dtype: its dtype.
    part: returns a block of the stored parameter.
    fetch: returns a stored array by its path.
    chains: who rewrites which parameter.

  Returns:
    None if it is small, or an adapter needs more than a block for a block.
  """
  if math.prod(shape) <= BLOCK:
    return None
  for _, record in chain:
    core = record.site.param(path[-1]).shape
    if shape[len(shape) - len(core) :] != core:
      # The shape is another than at attach, which `compute` reports with the
      # path.
      return None  # Computing it whole says what is wrong.
  kinds = []
  inner = dtype
  for index, (adapter, record) in enumerate(chain):
    last = index == len(chain) - 1
    # Between adapters values are float32 or wider; only the last one rounds.
    to = dtype if last else str(compute.wide(inner))
    kind = _kind(adapter, record, path, shape, inner, to, chains)
    if kind is None:
      return None
    kinds.append(kind)
    inner = to
  return Blocks(chain, kinds, path, shape, part, fetch, chains)


def answer(
  chain: Chain, path: Path, fetch: Fetch, chains: Mapping[Path, Chain]
) -> Any:
  """Returns what a layer gets when it asks for a parameter.

  See `compute.answer`; a large parameter is computed in blocks, unless it is
  traced or spread over devices.
  """
  value = fetch(path)
  # Values in memory are where JAX computes with them; nothing has to be moved.
  if not isinstance(value, np.ndarray) and devices.is_usual():
    return _answer(chain, path, value, fetch, chains)
  held: dict[Path, Any] = {path: value}

  # A value is read once, even if several adapters use it.
  def once(path: Path) -> Any:
    if path not in held:
      held[path] = fetch(path)
    return held[path]

  specs = [
    spec
    for adapter, record in chain
    for spec in (*record.weights.values(), *adapter.shared.values())
  ]
  with devices.beside(value, *(once(spec.path) for spec in specs)):
    return _answer(chain, path, value, once, chains)


def inner_answer(
  name: str, path: Path, fetch: Fetch, chains: Mapping[Path, Chain]
) -> Any:
  """Returns `compute.inner_answer`, in the scope of its operands."""
  before = compute.inside(chains.get(path, ()), name)
  if not before:
    return fetch(path)
  value = fetch(path)
  with devices.beside(value):
    return compute.inner_answer(name, path, fetch, chains)


def _answer(
  chain: Chain,
  path: Path,
  value: Any,
  fetch: Fetch,
  chains: Mapping[Path, Chain],
) -> Any:
  if chain and value.size > BLOCK and _here(chain, fetch, value):
    shape, dtype = tuple(value.shape), str(value.dtype)
    part = functools.partial(_sliced, value)
    blocks = of(chain, path, shape, dtype, part, fetch, chains)
    if blocks is not None:
      parts = [blocks.part(index).reshape(-1) for index in grid(shape)]
      # numpy where 64 bits would be narrowed by JAX.
      if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts).reshape(shape)
      return jnp.concatenate(parts).reshape(shape)
  return compute.answer(chain, path, fetch, chains)


def _here(chain: Chain, fetch: Fetch, value: Any) -> bool:
  """Whether all operands are values on one device."""
  weights = [
    fetch(spec.path)
    for adapter, record in chain
    for spec in (*record.weights.values(), *adapter.shared.values())
  ]
  return all(
    isinstance(v, np.ndarray)
    or (
      isinstance(v, jax.Array)
      and not jaxcompat.is_traced(v)
      and len(v.sharding.device_set) == 1
    )
    for v in (value, *weights)
  )


def _sliced(value: Any, index: Index) -> Any:
  """Returns a block of an array of numpy or JAX."""
  if isinstance(value, np.ndarray):
    return value[index]
  sizes = tuple(cut.stop - cut.start for cut in index)
  starts = np.asarray([cut.start for cut in index], np.int32)
  return _slice(value, jax.device_put(starts), sizes)


@functools.partial(jax.jit, static_argnums=2)
def _slice(value: Any, starts: Any, sizes: Shape) -> Any:
  front = len(sizes)
  starts = [*starts, *[0] * (value.ndim - front)]
  return jax.lax.dynamic_slice(value, starts, (*sizes, *value.shape[front:]))
