"""Diff: what two checkpoints have in common, read block by block.

Only numpy is needed, and memory of a few blocks. Bytes are compared first;
figures are computed only of tensors in which some differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from surgery.editing import choosing
from surgery.files import arrays, source
from surgery.host.manager import Host
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  Index,
  grid,
)
from surgery.model.layers import LayerTypes
from surgery.model.manifest import Manifest
from surgery.model.sizes import (
  PACKED,
)
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

# Figures are computed of pieces that, as float64, a processor's cache holds,
# and for which memory is used again instead of asking the system.
_PIECE = 1 << 14

# Of an adapter's data these say how it came about, not what it is.
_PROVENANCE = {'name', 'seed', 'to', 'distribution'}


@dataclasses.dataclass(frozen=True)
class Difference:
  """Something that is said otherwise in the two checkpoints.

  Attributes:
    what: what it is, e.g. `trainable`, or `adapter 'default': config`.
    a: how the first has it; None if it has not.
    b: how the second has it; None if it has not.
  """

  what: str
  a: Any
  b: Any

  def __str__(self) -> str:
    if self.b is None:
      return f'{self.what}: only in a ({self.a})'
    if self.a is None:
      return f'{self.what}: only in b ({self.b})'
    return f'{self.what}: {self.a} → {self.b}'


@dataclasses.dataclass(frozen=True)
class Figures:
  """How far the values of two tensors a and b are apart.

  Elements that are NaN or infinite in both alike count as equal and take no
  part in norms. Others of which one is not finite are `nonfinite`.

  Attributes:
    changed: number of elements that differ: in their bits if the dtypes are
      the same, else in their values.
    size: number of elements.
    max_abs: the largest |a - b|; infinite if `nonfinite` is not 0.
    relative: ‖a - b‖₂ / ‖a‖₂; infinite if `nonfinite` is not 0, or only a is
      zero.
    cosine: ⟨a, b⟩ / (‖a‖₂ ‖b‖₂); None if one of them is zero.
    nonfinite: number of elements of which one is NaN or infinite, and the
      other is something else.
  """

  changed: int = 0
  size: int = 0
  max_abs: float = 0.0
  relative: float = 0.0
  cosine: float | None = None
  nonfinite: int = 0

  @property
  def share(self) -> float:
    """Share of the elements that differ, 0 to 1."""
    return self.changed / self.size if self.size else 0.0


@dataclasses.dataclass(frozen=True)
class TensorDiff:
  """What is different in one tensor or plain value.

  Attributes:
    path: its path.
    a: the first's leaf; None if only the second has it.
    b: the second's leaf; None if only the first has it.
    notes: what differs beside the values: flags, metadata, kinds of keys.
    figures: how far the values are apart; None if they cannot be compared, or
      are codes of a quantised weight.
    equal: whether shapes and values are equal, to the bit if the dtypes are.
  """

  path: Path
  a: Leaf | None
  b: Leaf | None
  notes: tuple[Difference, ...] = ()
  figures: Figures | None = None
  equal: bool = False

  @property
  def comparable(self) -> bool:
    """Whether both have it, as a tensor of one shape or as a plain value."""
    return (
      self.a is not None and self.b is not None and self.a.shape == self.b.shape
    )

  def differs(self, tolerance: float | None = None) -> bool:
    """Whether it is different in the two.

    Args:
      tolerance: the largest relative error that is let pass; dtypes may differ
        and values decide. 0 asks for equal values. None, the default, compares
        bits and dtypes.
    """
    if not self.comparable or self.notes:
      return True
    assert self.a is not None and self.b is not None
    if tolerance is None:
      return not self.equal or self.a.dtype != self.b.dtype
    if self.figures is None:
      return not self.equal
    if tolerance == 0:
      # A relative error may be too small for a number, and its square is.
      return self.figures.max_abs > 0
    return not self.figures.relative <= tolerance


def diff(
  a: Checkpoint,
  b: Checkpoint,
  select: selectors.Text | Selection | None = None,
  *,
  host: Host,
) -> Iterator[TensorDiff]:
  """Compares two checkpoints, a tensor at a time.

  Args:
    a: the first.
    b: the second.
    select: which tensors; all that one of them has by default.
    host: whose hooks answer terms of selectors.

  Returns:
    For each path of either, in the order of `a` and then of `b`, what differs;
    also if nothing does.

  Raises:
    SelectorError: for a selector that matches nothing in either.
    FormatError: if a file is damaged.
  """
  both: dict[Path, Leaf] = {**a, **b}
  chosen = set(both)
  if select is not None:
    types: LayerTypes = {**b.manifest.layer_types, **a.manifest.layer_types}
    chosen = set(choosing.chosen(Checkpoint(both), select, types, host))
  order = [*a, *(path for path in b if path not in a)]
  return (
    _compared(path, a.get(path), b.get(path))
    for path in order
    if path in chosen
  )


def _compared(path: Path, a: Leaf | None, b: Leaf | None) -> TensorDiff:
  if a is None or b is None:
    return TensorDiff(path, a, b)
  notes = tuple(_notes(a, b))
  if a.shape != b.shape:
    return TensorDiff(path, a, b, notes)
  if a.shape is None:
    return TensorDiff(path, a, b, notes, equal=_same(a.load(), b.load()))
  # What differs is to be seen, damaged or not.
  raw_a, raw_b = source.unchecked(a), source.unchecked(b)
  if a.dtype == b.dtype and _same_bytes(raw_a, raw_b):
    # Norms would have to be read for the cosine; of equals it is 1, or none.
    return TensorDiff(path, a, b, notes, Figures(size=a.size), equal=True)
  if a.codes or b.codes or {a.dtype, b.dtype} & PACKED.keys():
    return TensorDiff(path, a, b, notes)  # How far codes are apart is nothing.
  figures = _figures(raw_a, raw_b)
  return TensorDiff(path, a, b, notes, figures, figures.changed == 0)


def _notes(a: Leaf, b: Leaf) -> Iterator[Difference]:
  """Yields what two leaves say otherwise beside shape, dtype and values."""
  for name in ('trainable', 'key'):
    one, other = getattr(a, name), getattr(b, name)
    if one != other:
      yield Difference(name, one, other)
  for name in {**a.metadata, **b.metadata}:
    one, other = a.metadata.get(name), b.metadata.get(name)
    if not _same(one, other) or (name in a.metadata) != (name in b.metadata):
      yield Difference(f'metadata {name!r}', one, other)


def _same(a: Any, b: Any) -> bool:
  """Whether plain values are equal; a NaN equals a NaN."""
  if isinstance(a, Mapping) and isinstance(b, Mapping):
    return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
  if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
    return (
      isinstance(a, tuple) == isinstance(b, tuple)
      and len(a) == len(b)
      and all(map(_same, a, b))
    )
  if hasattr(a, 'shape') or hasattr(b, 'shape'):
    return np.array_equal(np.asarray(a), np.asarray(b))
  return bool(a == b) or (a != a and b != b)


def _reader(leaf: Leaf) -> Callable[[Index], np.ndarray]:
  """Returns what reads a block of a leaf as an array of one axis."""
  part = leaf.part
  if part is None:
    whole = arrays.little(leaf.load())
    part = lambda index: whole[index]
  return lambda index: arrays.little(part(index)).reshape(-1)


def _same_bytes(a: Leaf, b: Leaf) -> bool:
  """Whether two tensors of one shape are equal to the bit."""
  assert a.shape is not None
  if a.dtype != b.dtype:
    return False
  read_a, read_b = _reader(a), _reader(b)
  return all(
    np.array_equal(one, other)
    for index in grid(a.shape)
    for one, other in zip(
      _pieces(read_a(index).view(np.uint8), arrays.BLOCK),
      _pieces(read_b(index).view(np.uint8), arrays.BLOCK),
      strict=True,
    )
  )


def _pieces(flat: np.ndarray, length: int) -> Iterator[np.ndarray]:
  for start in range(0, len(flat), length):
    yield flat[start : start + length]


def _figures(a: Leaf, b: Leaf) -> Figures:
  """Returns how far two tensors of one shape are apart."""
  assert a.shape is not None
  read_a, read_b = _reader(a), _reader(b)
  sums = _Sums()
  for index in grid(a.shape):
    for one, other in zip(
      _pieces(read_a(index), _PIECE),
      _pieces(read_b(index), _PIECE),
      strict=True,
    ):
      sums.add(one, other)
  return sums.figures(a.size)


def _wide(array: np.ndarray) -> np.ndarray:
  """Returns values as float64, or as complex128."""
  # Signalling NaNs, and what is too large, raise warnings.
  with np.errstate(all='ignore'):
    return array.astype('complex128' if array.dtype.kind == 'c' else 'float64')


def _equal(
  a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
  """Returns which elements are equal: in bits, or in values if dtypes differ.

  Args:
    a: elements `(n,)`.
    b: elements `(n,)`.
    x: `a`, as `_wide` returned it.
    y: `b`, likewise.
  """
  if a.dtype != b.dtype:
    exact = a == b if a.dtype.kind in 'iu' and b.dtype.kind in 'iu' else x == y
    return exact | (np.isnan(x) & np.isnan(y))
  size = a.dtype.itemsize
  if size > 8:
    bits = [v.view(np.uint64).reshape(len(v), -1) for v in (a, b)]
    return (bits[0] == bits[1]).all(axis=1)
  return a.view(f'u{size}') == b.view(f'u{size}')


def _apart(
  a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
  """Returns a - b, or its absolute value, as float64 or complex128."""
  if a.dtype.kind in 'iu' and b.dtype.kind in 'iu':
    # Exact beyond 2⁵³: unsigned numbers wrap around to the distance.
    one, other = a.astype(np.uint64), b.astype(np.uint64)
    return np.where(a > b, one - other, other - one).astype(np.float64)
  return x - y


def _dot(x: np.ndarray, y: np.ndarray) -> float:
  """Returns the sum of products of two vectors.

  Not by BLAS, whose result depends on the number of its threads.
  """
  return float(np.einsum('i,i->', x, y))


class _Sums:
  """Accumulates in float64 what figures are made of.

  Sums of squares are kept with a scale, so that float64 does not overflow.
  """

  def __init__(self) -> None:
    self.changed = self.nonfinite = 0
    self.max_abs = 0.0
    self.aa = self.bb = self.ab = self.dd = 0.0
    self.scale = 1.0

  def add(self, a: np.ndarray, b: np.ndarray) -> None:
    """Takes in further elements of both, `(n,)`."""
    x, y = _wide(a), _wide(b)
    with np.errstate(all='ignore'):
      equal = _equal(a, b, x, y)
      apart = _apart(a, b, x, y)
      self.changed += len(a) - int(np.count_nonzero(equal))
      finite = np.isfinite(x) & np.isfinite(y)
      if not finite.all():
        alike = (x == y) | (np.isnan(x) & np.isnan(y)) | equal
        self.nonfinite += int(np.count_nonzero(~finite & ~alike))
        x, y, apart = x[finite], y[finite], apart[finite]
      if not len(x):
        return
      self.max_abs = max(self.max_abs, float(np.abs(apart).max()))
      # Re⟨x, y⟩ of complex vectors is that of their parts as real ones.
      x, y, apart = (v.view(np.float64) for v in (x, y, apart))
      self._rescale(float(max(np.abs(x).max(), np.abs(y).max())))
      if self.scale != 1:
        x, y, apart = (v / self.scale for v in (x, y, apart))
    self.aa += _dot(x, x)
    self.bb += _dot(y, y)
    self.ab += _dot(x, y)
    self.dd += _dot(apart, apart)

  def _rescale(self, largest: float) -> None:
    """Makes squares of numbers up to `largest` fit."""
    if largest < 1e140 * self.scale:
      return
    scale = 2.0 ** min(math.frexp(largest)[1], 1000)
    factor = (self.scale / scale) ** 2
    self.aa, self.bb = self.aa * factor, self.bb * factor
    self.ab, self.dd = self.ab * factor, self.dd * factor
    self.scale = scale

  def figures(self, size: int) -> Figures:
    """Returns the figures of all elements so far."""
    relative = 0.0
    if self.nonfinite or (self.dd and not self.aa):
      relative = math.inf
    elif self.dd:
      relative = math.sqrt(self.dd / self.aa)
    cosine = None
    if self.aa and self.bb:
      cosine = self.ab / (math.sqrt(self.aa) * math.sqrt(self.bb))
      cosine = min(1.0, max(-1.0, cosine))
    return Figures(
      self.changed,
      size,
      math.inf if self.nonfinite else self.max_abs,
      relative,
      cosine,
      self.nonfinite,
    )


def manifests(a: Manifest, b: Manifest) -> list[Difference]:
  """Returns what two manifests say otherwise beside their tensors.

  Histories differ always and are left out. Types of layers are compared where
  both know a layer.

  Args:
    a: the first; its adapters are JSON data, see `Checkpoint.resolved`.
    b: the second.
  """
  found = list(_adapters(a, b))
  for field in dataclasses.fields(Manifest):
    one, other = getattr(a, field.name), getattr(b, field.name)
    if field.name in ('adapters', 'history'):
      continue
    if field.name == 'layer_types':
      found += [
        Difference(
          f'type of layer {paths.show(layer)}', one[layer].names, known.names
        )
        for layer, known in other.items()
        if layer in one and one[layer] != known
      ]
    elif isinstance(one, Mapping):
      found += [
        Difference(f'{field.name} {_shown(key)}', one.get(key), other.get(key))
        for key in {**one, **other}
        if not _same(one.get(key), other.get(key))
      ]
    elif one != other:
      found.append(Difference(field.name, one, other))
  return found


def _shown(key: Any) -> str:
  return paths.show(key) if isinstance(key, tuple) else repr(key)


def _adapters(a: Manifest, b: Manifest) -> Iterator[Difference]:
  ours = {one['name']: one for one in a.adapters}
  theirs = {one['name']: one for one in b.adapters}
  for name in {**ours, **theirs}:
    one, other = ours.get(name), theirs.get(name)
    if one is None or other is None:
      kinds = [None if x is None else x.get('type') for x in (one, other)]
      yield Difference(f'adapter {name!r}', *kinds)
      continue
    for key in {**one, **other}:
      if key not in _PROVENANCE and not _same(one.get(key), other.get(key)):
        yield from _option(f'adapter {name!r}', key, one, other)
  if ours.keys() == theirs.keys() and [*ours] != [*theirs]:
    yield Difference('order of adapters', [*ours], [*theirs])


def _option(
  where: str, key: str, a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterator[Difference]:
  """Yields what differs in one entry of an adapter's data."""
  one, other = a.get(key), b.get(key)
  if (
    key == 'config' and isinstance(one, Mapping) and isinstance(other, Mapping)
  ):
    for option in {**one, **other}:
      if not _same(one.get(option), other.get(option)):
        what = f'{where}: {option}'
        yield Difference(what, one.get(option), other.get(option))
  elif key in ('sites', 'shared', 'base'):
    sizes = [f'{len(x)}' if x is not None else None for x in (one, other)]
    if sizes[0] == sizes[1]:
      sizes = [f'{sizes[0]}, others', f'{sizes[1]}']
    yield Difference(f'{where}: {key}', *sizes)
  else:
    yield Difference(f'{where}: {key}', one, other)
