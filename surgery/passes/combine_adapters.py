"""Combine-adapters: several adapters become one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from surgery import errors
from surgery.adapting import attachment, compute, merged
from surgery.adapting.beneath import handles_adapters
from surgery.contract import config
from surgery.contract.lowrank import LowRank
from surgery.contract.method import Method
from surgery.editing import devices, following, nonfinite
from surgery.host.manager import Host
from surgery.methods import parameters, streaming
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.records import AdapterRecord, SiteRecord
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.passes import arithmetic, combine, detach, enable
from surgery.passes.fill import generator

# Beside the methods that combine whole models.
_OWN = ('cat', 'svd')
# Options that have another default here, which is that of PEFT.
_PEFT = {'majority': 'plain', 'normalize': 'count'}
_DEFAULTS: dict[str, dict[str, Any]] = {
  'dare_ties': _PEFT,
  'linear': {'normalize': False},
  'svd': {'normalize': False},
  'ties': _PEFT,
}
# A update as factors, (…, in, rank) and (…, rank, out), or as a whole.
_Update = tuple[np.ndarray, np.ndarray] | np.ndarray


@handles_adapters
def combine_adapters(
  checkpoint: Checkpoint,
  weights: Mapping[str, float],
  *,
  method: str = 'linear',
  name: str = 'combined',
  rank: int | None = None,
  density: float = 0.5,
  set: Mapping[str, Any] | None = None,
  seed: int = 0,
  keep: bool = False,
  host: Host,
) -> Checkpoint:
  """Makes one adapter, a LoRA, of several that add something to their base.

  It is the updates that are combined, with the scales that they have, so
  adapters of other ranks, scales and types can be; not the factors, of which
  sums have cross terms.

  Args:
    checkpoint: the model.
    weights: for each adapter what it counts.
    method: `linear` or `cat`, `Σ w·Δ`, exactly, of the sum of the ranks; `svd`,
      the nearest to that of rank `rank`; or any method that combines models
      (`ties`, `dare_linear`, `slerp`, …), of which the result is brought to
      `rank`. The updates are what it takes for models, or for what these differ
      in from a base.
    name: name of the new adapter.
    rank: its rank; of `linear` and `cat` the sum of the ranks by default, of
      others the largest rank.
    density: share of an update that is kept, of methods that have it.
    set: further options of the method, as `combine` takes them; those of `ties`
      and `dare_ties` are by default as in PEFT, and `linear` is a sum.
    seed: seed of what is dropped at random; with it adapter and path decide.
    keep: whether the others stay, disabled, since their updates are in the sum;
      otherwise they are detached.
    host: whose hooks are asked.

  Raises:
    AdapterError: for an unknown name, or a type that does not add.
    ConfigError: for a density or rank that cannot be.
    SiteError: for weights with NaN or infinity, when leaves are loaded.

  Example:
    combine-adapters: {weights: {a: 0.7, b: 0.3}, method: ties, density: 0.5}
  """
  records = following.settled(checkpoint, host)
  if not isinstance(weights, Mapping):
    raise errors.ConfigError(
      "expected weights by adapter, as {'a': 0.7, 'b': 0.3}, found "
      f'{type(weights).__name__}.'
    )
  chosen = [_checked(records.get(one)) for one in weights]
  for record in chosen:
    merged.check_whole(checkpoint, record, 'combined')
  _check(weights, method, rank, host)
  shapes: dict[Path, SiteRecord] = {}
  for record in chosen:
    for path, site in record.sites.items():
      shapes.setdefault(path, site)
  if not chosen:
    raise errors.AdapterError('expected adapters, found none.')
  options = _options(weights, method, density, set or {}, checkpoint, host)
  exact = method in ('linear', 'cat') and not set
  made = {
    path: _Combined(
      checkpoint, chosen, list(weights.values()), path, options.at(path), rank,
      seed, exact,
    )
    for path in shapes
  }  # fmt: skip
  # What is in the sum must not be added beside it.
  leave = enable.disable if keep else detach.detach
  after = leave(checkpoint, list(weights), host=host)
  ranks = {path: one.rank for path, one in made.items()}
  after = _attached(after, shapes, ranks, name, host)
  leaves = dict(after)
  for path, site in after.records(host).get(name).sites.items():
    for number, weight in enumerate(('lora_a', 'lora_b')):
      spec = site.weights[weight]
      leaves[spec.path] = made[path].leaf(number, leaves[spec.path])
  return after.replace(leaves=leaves)


def _checked(record: AdapterRecord) -> AdapterRecord:
  """Returns an adapter that can be combined.

  Raises:
    AdapterError: if it cannot be.
  """
  if not record.adapter.adds:
    raise errors.AdapterError(
      f"adapter {record.name!r} ('{record.adapter.name}') does not "
      'add something to its base that does not depend on it, so there is no '
      'update to combine. Merge it instead.'
    )
  if record.saved:
    shown = errors.listed(map(paths.show, record.saved))
    raise errors.AdapterError(
      f'adapter {record.name!r} was saved with values of its own for '
      f'{shown}, which are no update to combine. Merge it instead, or save it '
      'without them (modules_to_save).'
    )
  for path, site in record.sites.items():
    if len(site.site.params) > 1:
      raise errors.AdapterError(
        f'{paths.show(path)}: adapter {record.name!r} rewrites '
        'several parameters of a layer.'
      )
    if not site.site.in_shape or not site.site.out_shape:
      raise errors.AdapterError(
        f'{paths.show(path)}: adapter {record.name!r} adds to a '
        'vector, and what comes out is a LoRA, which needs a matrix. Merge it '
        'instead.'
      )
  return record


def _options(
  weights: Mapping[str, float],
  method: str,
  density: float,
  given: Mapping[str, Any],
  checkpoint: Checkpoint,
  host: Host,
) -> parameters.Parameters:
  """Returns the options of the method, for each parameter.

  Raises:
    ConfigError: for one that it has not, or that cannot be.
  """
  # Those of our own are a sum, of which the rank is another.
  cls, _ = combine.found('linear' if method in _OWN else method, host)
  combine.check_count(cls, len(weights), cls.base == 'required')
  if not 0 < density <= 1:
    raise errors.ConfigError(
      f'density: expected a share above 0 and at most 1, found {density}.'
    )
  known = config.options(cls)
  options = dict(_DEFAULTS.get('linear' if method == 'cat' else method, {}))
  if 'density' in known:
    options['density'] = float(density)
  options.update(given)
  if 'weight' in known:
    if 'weight' in given:
      raise errors.ConfigError(
        'set: weight: the weights are given for each adapter by name.'
      )
    options['weight'] = [float(w) for w in weights.values()]
  elif any(weight != 1 for weight in weights.values()):
    raise errors.ConfigError(
      f"method '{cls.name}' has no weights, found {dict(weights)}. Give 1 for "
      f'each adapter, and its options by set: {", ".join(known) or "none"}.'
    )
  return parameters.Parameters(cls, options, len(weights), checkpoint, host)


def _check(
  weights: Mapping[str, float], method: str, rank: int | None, host: Host
) -> None:
  known = (*_OWN, *host.methods)
  if method not in known:
    raise errors.ConfigError(
      f'no method is called {method!r}.{errors.suggest(method, known)}'
    )
  for name, weight in weights.items():
    if not math.isfinite(weight):
      raise errors.ConfigError(
        f'{name!r}: expected a finite weight, found {weight}.'
      )
  if rank is not None and rank < 1:
    raise errors.ConfigError(f'rank: expected 1 or more, found {rank}.')


def _attached(
  checkpoint: Checkpoint,
  sites: Mapping[Path, SiteRecord],
  ranks: Mapping[Path, int],
  name: str,
  host: Host,
) -> Checkpoint:
  """Returns the checkpoint with a LoRA of the ranks, whose scale is one."""
  cls: Any = host.adapter_type('lora')
  common = max(set(ranks.values()), key=list(ranks.values()).count)
  patterns = {
    paths.literal(path): {'rank': one, 'alpha': float(one)}
    for path, one in ranks.items()
    if one != common
  }
  layout = {
    paths.literal(path): site.site.primary.layout
    for path, site in sites.items()
  }
  stacked = {
    paths.literal(path): len(checkpoint[path].shape or ())
    - len(site.site.primary.shape)
    for path, site in sites.items()
  }
  return attachment.attach(
    checkpoint,
    cls(rank=common, alpha=float(common), patterns=patterns),
    to=[paths.literal(path) for path in sites],
    name=name,
    stacked=stacked,
    layout=layout,
    host=host,
  )


def _flat(array: np.ndarray) -> streaming.Flat:
  return lambda start, stop: array.reshape(-1)[start:stop]


class _Combined:
  """What several adapters add to a parameter, as two factors.

  Args:
    leaves: the model.
    adapters: the adapters.
    weights: what each counts.
    path: the parameter.
    method: how they are combined.
    rank: the rank, or None for what suits the method.
    seed: seed of what is dropped.
    exact: whether the factors are put side by side, of a sum.

  Attributes:
    rank: rank of the factors.
  """

  def __init__(
    self,
    leaves: Checkpoint,
    adapters: Sequence[AdapterRecord],
    weights: Sequence[float],
    path: Path,
    method: Method,
    rank: int | None,
    seed: int,
    exact: bool,
  ) -> None:
    pairs = zip(adapters, weights, strict=True)
    self._parts = [(a, w) for a, w in pairs if path in a.sites]
    self._adapters = adapters
    self._leaves = leaves
    self._path = path
    self._method = method
    self._seed = seed
    self._held: dict[int, np.ndarray] = {}
    site = self._parts[0][0].sites[path].site
    self._sizes = (site.in_size, site.out_size)
    ranks = [_rank(a.sites[path], a) for a, _ in self._parts]
    whole = min(sum(ranks) if exact else max(ranks), *self._sizes)
    self._exact = exact and rank is None and sum(ranks) == whole
    self.rank = whole if rank is None else min(rank, *self._sizes)

  def leaf(self, number: int, like: Leaf) -> Leaf:
    """Returns a factor in the place of one that was drawn."""

    def load() -> Any:
      if number not in self._held:
        self._held = dict(enumerate(self._factors()))
      wide = self._held.pop(number)
      with np.errstate(all='ignore'):
        factor = wide.astype(np.float32)
      nonfinite.checked(
        wide, factor, self._path, 'combine-adapters', option=False
      )
      return factor.reshape(like.shape or ())

    return like.replace(load=load, heavy=True)

  def _factors(self) -> tuple[np.ndarray, np.ndarray]:
    updates = {a.name: (self._update(a), w) for a, w in self._parts}
    if self._exact and all(isinstance(u, tuple) for u, _ in updates.values()):
      # A1·B1 + A2·B2 = [A1 A2]·[B1; B2]: the sum has the ranks' sum as rank,
      # and nothing is approximated.
      firsts = [u[0] for u, _ in updates.values()]
      seconds = [w * u[1] for u, w in updates.values()]
      return np.concatenate(firsts, -1), np.concatenate(seconds, -2)
    dense = {
      name: u[0] @ u[1] if isinstance(u, tuple) else u
      for name, (u, _) in updates.items()
    }
    some = next(iter(dense.values()))
    # An adapter without this site has an update of zero, which counts in means.
    full = [dense.get(a.name, np.zeros_like(some)) for a in self._adapters]
    # Each matrix of a stack is combined and approximated separately.
    front = some.shape[:-2]
    flat = [d.reshape(-1, *self._sizes) for d in full]
    found = [
      self._near(self._mixed([d[k] for d in flat], k))
      for k in range(len(flat[0]))
    ]
    return (
      np.stack([a for a, _ in found]).reshape(
        *front, self._sizes[0], self.rank
      ),
      np.stack([b for _, b in found]).reshape(
        *front, self.rank, self._sizes[1]
      ),
    )

  def _mixed(self, updates: Sequence[np.ndarray], number: int) -> Any:
    """Returns what the method makes of updates, one a matrix of a stack."""
    names = [a.name for a in self._adapters]
    sources = [
      streaming.Source(f'adapter {name!r}', _flat(update), wide=True)
      for name, update in zip(names, updates, strict=True)
    ]
    zero = streaming.Source('the base', lambda a, b: np.zeros(b - a), True)

    @functools.cache
    def drawn(model: int) -> np.ndarray:
      return self._uniform(names[model], self._sizes, number).reshape(-1)

    tensor = streaming.Tensor(
      self._path,
      self._sizes,
      sources,
      zero if self._method.base == 'required' else None,
      rows=self._method.rows,
      uniform=lambda model, at, count: drawn(model)[at : at + count],
      finite=True,
    )
    made = streaming.Combined(self._method, tensor, 'float64')
    return made.span(0, tensor.size).reshape(self._sizes)

  def _uniform(self, name: str, shape: tuple[int, ...], number: int) -> Any:
    """Returns what decides what is kept, by seed, adapter and path alone."""
    stream = generator(self._seed, (*self._path, name), number)
    return stream.random(shape)

  def _near(self, update: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors of the nearest matrix of the rank."""
    with arithmetic.steady():
      u, s, v = np.linalg.svd(update, full_matrices=False)
    root = np.sqrt(s[: self.rank])
    a = u[:, : self.rank] * root
    return a, root[:, None] * v[: self.rank]

  def _update(self, adapter: AdapterRecord) -> Any:
    """Returns what an adapter adds, in float64."""
    record = adapter.sites[self._path]
    shape = self._leaves[self._path].shape or ()
    stack = len(shape) - len(record.site.primary.shape)
    fetch = lambda path: self._leaves[path].load()
    found = compute.weights_of(record, adapter.shared, self._path, stack, fetch)
    one = _program(record, frozenset(adapter.shared), stack)
    with devices.beside(*found.values()):
      plain = {n: compute.widened(jnp.asarray(w)) for n, w in found.items()}
      result = one(plain)
    self._check_finite(adapter, found, result)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), result)

  def _check_finite(
    self, adapter: AdapterRecord, weights: Mapping[str, Any], update: Any
  ) -> None:
    """Raises if an update cannot be combined with others.

    Methods compare and decompose numbers, and NaN is lost or fails there.

    Raises:
      SiteError: naming the weight that is to blame.
    """
    specs = {**adapter.sites[self._path].weights, **adapter.shared}
    for name, value in weights.items():
      if not compute.finite(value):
        raise errors.SiteError(
          f'{paths.show(self._path)}: weight {paths.show(specs[name].path)} of '
          f'adapter {adapter.name!r} has NaN or infinity, so its update cannot '
          'be combined. Mend the adapter, or leave it out.'
        )
    if not all(map(compute.finite, jax.tree.leaves(update))):
      raise errors.SiteError(
        f'{paths.show(self._path)}: the weights of adapter {adapter.name!r} '
        'are finite, and the update that it makes of them is not. Leave it out.'
      )


def _rank(site: SiteRecord, adapter: AdapterRecord) -> int:
  """Returns the rank of what an adapter adds to a parameter."""
  kinds = compute.kinds_of(site, adapter.shared)
  structs = {
    n: compute.struct(shape, compute.arithmetic_dtype(dtype))
    for n, shape, dtype in kinds
  }
  dtypes = [one.dtype for one in structs.values()]
  with compute.precise(*dtypes), compute.as_written(dtypes):
    result = jax.eval_shape(functools.partial(_added, site), structs)
  if isinstance(result, tuple):
    return int(result[0].shape[-1])
  return min(site.site.in_size, site.site.out_size)


def _added(record: SiteRecord, weights: Mapping[str, Any]) -> Any:
  """Returns what an adapter adds to one parameter, factors or whole."""
  site = record.site
  zeros = jnp.zeros((*site.in_shape, *site.out_shape), jnp.float32)
  bound = site.bind(lambda name: zeros)
  value = record.interceptor.apply(bound, site.name, zeros, weights)
  if isinstance(value, LowRank):
    # Factors alone are the whole update only if nothing else was added.
    if value.a is None or not (value.base is zeros or value.base is None):
      return value.dense().reshape(site.in_size, site.out_size)
    rank = value.a.shape[-1]
    return (
      value.a.reshape(site.in_size, rank),
      (value.scale * value.b).reshape(rank, site.out_size),
    )
  return value.reshape(site.in_size, site.out_size)


def _program(
  record: SiteRecord, shared: frozenset[str], stack: int
) -> Callable[[Mapping[str, Any]], Any]:

  def run(weights: Mapping[str, Any]) -> Any:
    one = functools.partial(_added, record)
    for _ in range(stack):
      one = jax.vmap(one, ({n: None if n in shared else 0 for n in weights},))
    with compute.as_written(w.dtype for w in weights.values()):
      return one(dict(weights))

  return run
