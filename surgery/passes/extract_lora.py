"""Extract LoRA: what was trained of a whole model, as an adapter."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import attachment, finding
from surgery.adapting.beneath import handles_adapters
from surgery.editing import choosing, following, regions
from surgery.editing.regions import Reader
from surgery.files import arrays
from surgery.host.manager import Host
from surgery.model import manifest, quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.records import SiteRecord
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.passes import arithmetic, extract, factorise
from surgery.passes.fill import generator

_SHOWN = 5
# Matrices that are decomposed at a time, each on one thread.
_THREADS = 2


@handles_adapters
def extract_lora(
  checkpoint: Checkpoint,
  tuned: Checkpoint,
  *,
  rank: int | Mapping[str, int] = 16,
  energy: float | Mapping[str, float] | None = None,
  max_rank: int = 64,
  to: selectors.Text = 'all',
  keep_whole: selectors.Text | None = None,
  exact: bool = False,
  seed: int = 0,
  stacked: finding.Stacked = None,
  layout: finding.Layouts = None,
  name: str = 'default',
  host: Host,
) -> Checkpoint:
  """Makes a LoRA of the difference of two models, the nearest of its rank.

  `tuned - base ≈ A·B`, by a singular value decomposition of each matrix, as
  `factorise` computes it: with a random start that seed and path decide, or in
  full. What comes out is the file of an adapter with scale one, bound to the
  base. All of it is computed when the step is done, for its error to be known.

  Args:
    checkpoint: the base.
    tuned: the model that was trained from it.
    rank: rank of the update, or ranks by selector, of which the first that
      matches decides; at most the smaller side of a matrix.
    energy: instead of `rank` the share of the difference's squared norm that is
      kept at least, if `max_rank` allows it; or such shares by selector.
    max_rank: the largest rank that `energy` leads to.
    to: which layers or parameters become factors, as in `attach`.
    keep_whole: parameters whose tuned values are kept in the adapter's file as
      they are, e.g. norms, biases, embeddings and heads; `all` for all that
      differ and are no factors.
    exact: whether decompositions are full ones, which takes far longer.
    seed: the seed.
    stacked: number of axes stacked in front of parameters, or such numbers by
      selector; by default what types of layers say.
    layout: a letter an axis (`s` stacked, `i` input, `o` output), or such
      letters by selector; by default what types of layers say, or what is known
      of a checkpoint that PyTorch wrote.
    name: the adapter's name.
    host: knows the adapters' types.

  Raises:
    AdapterError: if a model has adapters, or has tensors that the other lacks,
      or no matrix differs.
    SiteError: for tensors of other shapes or dtypes.
    ConfigError: for a rank or an energy that cannot be.

  Example:
    extract-lora: {tuned: tuned, rank: 16, keep-whole: '**/{norm,bias}'}
    extract-lora: {tuned: tuned, energy: 0.95, max-rank: 64}
  """
  # One file, one formula: the update of LoRA with scale one is A·B.
  asked = _Asked(rank, energy, max_rank)
  _check_models(checkpoint, tuned, host)
  differing = _differing(checkpoint, tuned)
  cls: Any = host.adapter_type('lora')
  options: dict[str, Any] = {
    'stacked': stacked, 'layout': layout, 'name': name, 'host': host,
  }  # fmt: skip
  # A matrix without elements has no rank, and nothing that could differ.
  empty = [
    f'!{paths.literal(p)}'
    for p, x in checkpoint.items()
    if x.shape and not x.size
  ]
  where = [to] if isinstance(to, str) else list(to)
  # Attached with rank one first: finding decides what is a site, and which
  # axes are inputs.
  found = attachment.attach(
    checkpoint, cls(rank=1), to=[*where, *empty], **options
  )
  sites = found.records(host).get(name).sites
  whole = _whole(checkpoint, keep_whole, differing, sites, host)
  chosen = {
    path: site
    for path, site in sites.items()
    if path in differing and path not in whole
  }
  if not chosen:
    raise errors.AdapterError(
      'no matrix that is selected differs in the two models, so there is '
      'nothing to extract. Select others (to), or see surgery diff.'
    )
  asked.check(chosen)
  # All matrices are decomposed now, since ranks by energy and the error are
  # part of the plan.
  works = [
    _Work(path, site, checkpoint[path], tuned[path], asked, exact, seed)
    for path, site in chosen.items()
  ]
  with (
    arithmetic.steady(),
    concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
  ):
    made = dict(zip(chosen, pool.map(_Work.factors, works), strict=True))
  after = _attached(checkpoint, cls, made, options)
  leaves = {**after, **{path: tuned[path] for path in whole}}
  for path, site in after.records(host).get(name).sites.items():
    for weight, value in (('lora_a', made[path].a), ('lora_b', made[path].b)):
      spec = site.weights[weight]
      leaves[spec.path] = _of(value, leaves[spec.path])
  alone = extract.extract(
    after.replace(leaves=leaves),
    name,
    modules_to_save=[paths.literal(path) for path in whole],
    host=host,
  )
  entry = {**alone.manifest.adapters[0], manifest.EXTRACTED: _errors(made)}
  said = alone.manifest.replace(adapters=(entry,))
  left = [p for p in differing if p not in chosen and p not in whole]
  remarks = (*after.remarks, *_left(left))
  return alone.replace(manifest=said, remarks=remarks)


@dataclasses.dataclass(frozen=True)
class _Asked:
  """Which rank is asked for.

  Attributes:
    rank: rank, or ranks by selector.
    energy: share that is kept, or shares by selector; or None.
    most: largest rank that `energy` leads to.
  """

  rank: int | Mapping[str, int]
  energy: float | Mapping[str, float] | None
  most: int

  def __post_init__(self) -> None:
    for one in (*_values(self.rank), self.most):
      if isinstance(one, bool) or not isinstance(one, int) or one < 1:
        raise errors.ConfigError(f'rank: expected 1 or more, found {one!r}.')
    for share in _values(self.energy):
      if not 0 < share <= 1:
        raise errors.ConfigError(
          f'energy: expected a share from 0 to 1, found {share!r}.'
        )

  def check(self, sites: Mapping[Path, SiteRecord]) -> None:
    """Raises for a selector of ranks that matches no matrix."""
    universe = {p: one.site.types for p, one in sites.items()}
    for what, given in (('rank', self.rank), ('energy', self.energy)):
      if isinstance(given, Mapping):
        selectors.check_deciding(list(given), universe, what)

  def of(self, path: Path, site: SiteRecord) -> tuple[int, float | None]:
    """Returns the largest rank of a matrix, and the share that is kept."""
    energy = _decided(self.energy, path, site)
    if energy is not None:
      return self.most, energy
    rank = _decided(self.rank, path, site)
    return (self.most if rank is None else rank), None


def _values(given: Any) -> Sequence[Any]:
  if given is None:
    return ()
  return list(given.values()) if isinstance(given, Mapping) else [given]


def _decided(given: Any, path: Path, site: SiteRecord) -> Any:
  """Returns what the first selector that matches says.

  Raises:
    ConfigError: if none does.
  """
  if not isinstance(given, Mapping):
    return given
  for text, value in given.items():
    if selectors.parse(text).matches(path, site.site.types):
      return value
  raise errors.ConfigError(
    f'{paths.show(path)}: no selector says which rank, or energy, it has. Add '
    "one for all others, 'all', at the end."
  )


def _check_models(base: Checkpoint, tuned: Checkpoint, host: Host) -> None:
  """Raises unless the models have the same tensors, and no adapters.

  Raises:
    AdapterError: for adapters, and for tensors that one lacks.
    SiteError: for other shapes or dtypes.
  """
  for one in (base, tuned):
    following.check_model(one)
    if names := one.records(host).names:
      raise errors.AdapterError(
        f'{one.origin or "a model"}: has adapters: {", ".join(names)}. Merge '
        'or detach them first.'
      )
  for some, others, which in ((base, tuned, 'base'), (tuned, base, 'tuned')):
    if lone := [paths.show(p) for p in some if p not in others]:
      raise errors.AdapterError(
        f'{", ".join(lone[:_SHOWN])}{_more(lone)}: only the {which} model has '
        'it, of which an adapter can say nothing. Rename or drop it first.'
      )
  for path, leaf in base.items():
    other = tuned[path]
    if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
      raise errors.SiteError(
        f'{paths.show(path)}: {leaf} in the base model and {other} in the '
        'tuned one; they have to be alike. Cast or reshape one of them first.'
      )


def _more(some: Sequence[Any]) -> str:
  return f' and {len(some) - _SHOWN} more' if len(some) > _SHOWN else ''


def _differing(base: Checkpoint, tuned: Checkpoint) -> list[Path]:
  """Returns the tensors whose bytes differ, and values that do.

  Raises:
    QuantisedError: for codes of a quantised weight that do.
  """
  found = [p for p in base if not _same(base[p], tuned[p])]
  for path in found:
    quantised.refuse(base[path], 'extract-lora')
  return found


def _same(one: Leaf, other: Leaf) -> bool:
  if one.shape is None:
    a, b = one.load(), other.load()
    return bool(type(a) is type(b) and (a == b or (a != a and b != b)))
  # Equal digests need no reading; different ones may be of other hash
  # functions.
  if one.digest is not None and one.digest == other.digest:
    return True
  return all(
    arrays.payload(arrays.little(a)) == arrays.payload(arrays.little(b))
    for a, b in zip(one.parts(), other.parts(), strict=True)
  )


def _whole(
  base: Checkpoint,
  select: selectors.Text | None,
  differing: Sequence[Path],
  sites: Mapping[Path, SiteRecord],
  host: Host,
) -> list[Path]:
  """Returns the differing parameters that are kept whole."""
  if select is None:
    return []
  differing = [path for path in differing if _can_be_kept(base[path])]
  if select == 'all':
    return [path for path in differing if path not in sites]
  types = base.manifest.layer_types
  chosen = set(choosing.chosen(base, select, types, host))
  return [p for p in differing if p in chosen]


def _can_be_kept(leaf: Leaf) -> bool:
  """Whether the file of an adapter can hold a parameter.

  Counts and the states of generators are left out, and a remark names them.
  """
  if leaf.shape is None or leaf.key is not None:
    return False
  return not str(leaf.metadata.get('tag', '')).startswith('rng')


def _left(left: Sequence[Path]) -> list[str]:
  """Returns a remark about tensors that differ and are not extracted."""
  if not left:
    return []
  shown = ', '.join(map(paths.show, left[:_SHOWN]))
  one = len(left) == 1
  what = 'tensor that differs is' if one else 'tensors that differ are'
  said = (
    f'{len(left)} {what} not in the adapter, which gives what the base has: '
    f'{shown}{_more(left)}; keep-whole (--keep-whole) puts it there'
  )
  warnings.warn(errors.SiteWarning(f'{said}.'), stacklevel=2)
  return [said]


@dataclasses.dataclass(frozen=True)
class _Factors:
  """What was made of a matrix.

  Attributes:
    a: `(…, in, rank)`, float32.
    b: `(…, rank, out)`, float32.
    norm: ‖Δ‖ of the difference.
    error: ‖Δ - A·B‖.
  """

  a: np.ndarray
  b: np.ndarray
  norm: float
  error: float

  @property
  def rank(self) -> int:
    """The rank."""
    return int(self.a.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Work:
  """A matrix that is to be decomposed, or several that are stacked."""

  path: Path
  site: SiteRecord
  base: Leaf
  tuned: Leaf
  asked: _Asked
  exact: bool
  seed: int

  def factors(self) -> _Factors:
    """Returns its factors.

    Raises:
      SurgeryError: for NaN or infinity.
    """
    flat = self._difference()
    least = min(flat.shape[1:])
    most, energy = self.asked.of(self.path, self.site)
    most = min(most, least)
    parts = [
      factorise.decomposed(
        one, most, self.exact, generator(self.seed, self.path, k)
      )
      for k, one in enumerate(flat)
    ]
    rank = most
    if energy is not None:
      rank = max(
        _enough(s, float(np.einsum('ij,ij->', one, one)), energy)
        for one, (_, s, _) in zip(flat, parts, strict=True)
      )
    a = np.stack([u[:, :rank] * np.sqrt(s[:rank]) for u, s, _ in parts])
    b = np.stack([np.sqrt(s[:rank])[:, None] * v[:rank] for _, s, v in parts])
    a, b = a.astype('float32'), b.astype('float32')
    away = flat - a.astype('float64') @ b
    return _Factors(a, b, _norm(flat), _norm(away))

  def _difference(self) -> np.ndarray:
    """Returns tuned - base, `(stack, in, out)`, in float64."""
    one, other = (self._read(leaf) for leaf in (self.base, self.tuned))
    with np.errstate(all='ignore'):
      apart = other - one
    if not np.isfinite(apart).all():
      raise errors.SurgeryError(
        f'{paths.show(self.path)}: the difference has NaN or infinity, and so '
        'no factors. See surgery stats --finite, or select others (to).'
      )
    return apart

  def _read(self, leaf: Leaf) -> np.ndarray:
    shape = leaf.shape or ()
    spec = self.site.site.primary
    stack = len(shape) - len(spec.shape)
    value = Reader(leaf)(regions.whole(shape))
    array = arithmetic.plain(value, self.path, 'extract-lora').astype('float64')
    order = (*range(stack), *(stack + axis for axis in spec.order))
    sizes = self.site.site.in_size, self.site.site.out_size
    return array.transpose(order).reshape(-1, *sizes)


def _enough(values: np.ndarray, total: float, energy: float) -> int:
  """Returns how many singular values have that share of the squared norm."""
  sums = np.cumsum(values**2)
  # What rounding takes from a share of one is no rank.
  met = np.flatnonzero(sums >= energy * total * (1 - 1e-12))
  return int(met[0]) + 1 if len(met) else len(values)


def _norm(array: np.ndarray) -> float:
  return math.sqrt(float(np.einsum('sij,sij->', array, array)))


def _attached(
  base: Checkpoint,
  cls: Any,
  made: Mapping[Path, _Factors],
  options: Mapping[str, Any],
) -> Checkpoint:
  """Returns the base with a LoRA of the ranks, whose scale is one."""
  ranks = collections.Counter(one.rank for one in made.values())
  [(common, _)] = ranks.most_common(1)
  patterns = {
    paths.literal(path): {'rank': one.rank, 'alpha': float(one.rank)}
    for path, one in made.items()
    if one.rank != common
  }
  adapter = cls(rank=common, alpha=float(common), patterns=patterns)
  where = [paths.literal(path) for path in made]
  return attachment.attach(base, adapter, to=where, **options)


def _of(value: np.ndarray, like: Leaf) -> Leaf:
  shaped = value.reshape(like.shape or ())
  return like.replace(load=lambda: shaped)


def _errors(made: Mapping[Path, _Factors]) -> dict[str, Any]:
  """Returns ranks and errors, ‖Δ - A·B‖ / ‖Δ‖, by site and in total."""
  total = math.hypot(*(one.norm for one in made.values()))
  away = math.hypot(*(one.error for one in made.values()))
  return {
    'error': away / total if total else 0.0,
    'sites': {
      paths.show(path): {
        'rank': one.rank,
        'norm': one.norm,
        'error': one.error / one.norm if one.norm else 0.0,
      }
      for path, one in made.items()
    },
  }
