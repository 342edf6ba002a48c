"""Stats: norms, moments, and what is not finite, read block by block.

Only numpy is needed, and memory of a few blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from surgery import errors
from surgery.editing import choosing
from surgery.files import arrays, checking
from surgery.host.manager import Host, default_host
from surgery.looking import spectrum
from surgery.looking.spectrum import Spectrum
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.sizes import PACKED
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection

# So many elements, as float64, a processor's cache holds.
_PIECE = 1 << 14
# Beyond these the square of a number is no number, or has lost its digits.
_LARGE, _SMALL = 1e140, 1e-140

CODES = 'codes of a quantised weight'
KEY = 'a PRNG key'


@dataclasses.dataclass(frozen=True)
class TensorStats:
  """What one tensor holds.

  Norm, mean, deviation and extremes are those of its finite elements, computed
  in float64. Elements of booleans count as 0 and 1.

  Attributes:
    path: its path, as files and selectors write it.
    shape: its shape; `()` for a number that is no array.
    dtype: name of its dtype; None for a number that is no array.
    size: number of elements.
    norm: ‖x‖₂; None where the elements are no numbers (see `note`).
    mean: their mean; None if there is none, or they are complex.
    std: their standard deviation √(Σ(x - mean)² / n); None as the mean is.
    min: the smallest; an exact int for integers. None as the mean is.
    max: the largest, likewise.
    zeros: number of elements that are zero.
    nan: number of elements that are NaN.
    inf: number of elements that are infinite.
    first: index of the first element, in C order, that is NaN or infinite;
      None if all are finite.
    spectrum: singular values, where they were asked for and it has any.
    note: why there are no figures; else empty.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str | None
  size: int
  norm: float | None = None
  mean: float | None = None
  std: float | None = None
  min: float | int | None = None
  max: float | int | None = None
  zeros: int = 0
  nan: int = 0
  inf: int = 0
  first: tuple[int, ...] | None = None
  spectrum: Spectrum | None = None
  note: str = ''

  @property
  def finite(self) -> bool:
    """Whether no element is NaN or infinite."""
    return not self.nan and not self.inf

  @property
  def zero_share(self) -> float:
    """Share of the elements that are zero, 0 to 1."""
    return self.zeros / self.size if self.size else 0.0


def stats(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection | None = None,
  *,
  singular: int = 0,
  host: Host | None = None,
) -> Iterator[TensorStats]:
  """Describes tensors, one at a time: norm, moments, zeros, NaN and infinity.

  Tensors are described as they are stored: of an adapted model the base and the
  adapter's weights apart. Text and other values that are no numbers are passed
  over.

  Args:
    checkpoint: the model or adapter, as `surgery.open` gives it.
    select: which tensors; all by default.
    singular: how many of the largest singular values are computed of each
      tensor of two axes or more, and its stable and effective rank; none by
      default. That takes far longer than the rest.
    host: whose hooks answer terms of selectors.

  Returns:
    Their `TensorStats`, in the order of the checkpoint.

  Raises:
    SelectorError: for a selector that matches nothing.
    ConfigError: for a negative number of singular values.
    FormatError: if a tensor is not what its digest says.

  Example:
    for one in surgery.stats(surgery.open('m.safetensors'), '**/kernel'):
      print(one.path, one.norm, one.finite)
  """
  if not isinstance(checkpoint, Checkpoint):
    raise errors.SurgeryError(
      'stats: expected a surgery.Checkpoint, found '
      f'{type(checkpoint).__name__}. Open a file with surgery.open.'
    )
  if isinstance(singular, bool) or not isinstance(singular, int):
    raise errors.ConfigError(
      f'singular: expected a whole number, found {singular!r}.'
    )
  if singular < 0:
    raise errors.ConfigError(f'singular: expected 0 or more, found {singular}.')
  return (
    found
    for path, leaf in selected(checkpoint, select, host).items()
    if (found := of_leaf(path, leaf, singular)) is not None
  )


def selected(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection | None,
  host: Host | None = None,
) -> dict[Path, Leaf]:
  """Returns the leaves that a selector means; all by default."""
  if select is None:
    return dict(checkpoint)
  types = checkpoint.manifest.layer_types
  host = host or default_host()
  found = choosing.chosen(checkpoint, select, types, host)
  return {path: checkpoint[path] for path in found}


def of_leaf(path: Path, leaf: Leaf, singular: int = 0) -> TensorStats | None:
  """Describes one tensor; None for a value that is no number.

  Raises:
    FormatError: if it is not what its digest says.
  """
  shown = paths.show(path)
  if leaf.shape is None:
    number = _number(leaf.load())
    if number is None:
      return None
    sums = _Sums(())
    sums.add(number.reshape(-1))
    return sums.stats(shown, None)
  blank = TensorStats(shown, leaf.shape, leaf.dtype, leaf.size)
  if leaf.key is not None:
    return dataclasses.replace(blank, note=KEY)
  if leaf.dtype in PACKED:
    # Such numbers are of 4 or 6 bits, of which none means NaN or infinity.
    return dataclasses.replace(blank, note=CODES)
  since = checking.mark()
  sums = _Sums(leaf.shape)
  for block in leaf.parts():
    sums.add(arrays.little(block).reshape(-1))
  checking.settle(since)
  found = sums.stats(shown, leaf.dtype)
  if leaf.codes is not None:
    # What they stand for is not what they are, but for NaN and infinity: in
    # scales and 8-bit floats these become those of the weight.
    return dataclasses.replace(
      blank, nan=found.nan, inf=found.inf, first=found.first, note=CODES
    )
  if not singular or len(leaf.shape) < 2 or not leaf.size or not found.finite:
    return found
  values = spectrum.spectrum(leaf, singular)
  return dataclasses.replace(found, spectrum=values)


def _number(value: Any) -> np.ndarray | None:
  """Returns a plain number as an array; None for anything else."""
  if not isinstance(value, (bool, int, float, complex, np.generic)):
    return None
  array = np.asarray(value)
  # Of whole numbers beyond 64 bits numpy makes objects.
  return array if array.dtype.name in arrays.DTYPES else None


class _Sums:
  """Accumulates in float64 what figures are made of.

  Args:
    shape: shape of the tensor.
  """

  def __init__(self, shape: tuple[int, ...]) -> None:
    self._shape = shape
    self._seen = 0
    # The finite ones: their number, their mean, and the roots of the sums of
    # squares of them and of their distances from the mean.
    self._count = 0
    self._mean = 0.0
    self._norm = self._away = 0.0
    self._least: Any = None
    self._most: Any = None
    self._zeros = self._nan = self._inf = 0
    self._first: int | None = None
    self._complex = False

  def add(self, flat: np.ndarray) -> None:
    """Takes in further elements, `(n,)`, in C order."""
    for start in range(0, len(flat), _PIECE):
      self._take(flat[start : start + _PIECE])

  def _take(self, piece: np.ndarray) -> None:
    self._complex = piece.dtype.kind == 'c'
    with np.errstate(all='ignore'):  # Signalling NaNs, and large numbers.
      wide = piece.astype('complex128' if self._complex else 'float64')
      self._zeros += len(wide) - int(np.count_nonzero(wide))
      seen, self._seen = self._seen, self._seen + len(wide)
      # Cheap, and true of most: with NaN or infinity no sum is finite.
      if not np.isfinite(wide.sum()):
        finite = np.isfinite(wide)
        self._count_others(wide, finite, seen)
        wide, piece = wide[finite], piece[finite]
      if len(wide):
        self._merge(wide, piece)

  def _count_others(
    self, wide: np.ndarray, finite: np.ndarray, seen: int
  ) -> None:
    """Counts what is not finite, of which there may be none.

    Args:
      wide: elements `(n,)`.
      finite: which of them are finite.
      seen: how many elements lie before them.
    """
    if finite.all():
      return  # Only their sum is too large.
    nan = int(np.count_nonzero(np.isnan(wide)))
    self._nan += nan
    self._inf += int(np.count_nonzero(~finite)) - nan
    if self._first is None:
      self._first = seen + int(np.argmin(finite))

  def _merge(self, wide: np.ndarray, piece: np.ndarray) -> None:
    """Joins the moments of two sets of numbers (Chan et al. 1983)."""
    self._norm = math.hypot(self._norm, _root(wide))
    if self._complex:
      self._count += len(wide)
      return
    # Of integers the extremes are exact.
    exact = piece if piece.dtype.kind in 'iu' else wide
    least, most = exact.min(), exact.max()
    self._least = least if self._least is None else min(self._least, least)
    self._most = most if self._most is None else max(self._most, most)
    count, other = self._count, len(wide)
    total = count + other
    mean = float(wide.mean())
    if not math.isfinite(mean):
      mean = float((wide / other).sum())
    apart = mean - self._mean if count else 0.0
    between = abs(apart) * math.sqrt(count / total * other)
    self._away = math.hypot(self._away, _root(wide - mean), between)
    # As a weighted mean, since a difference of large numbers may be too large.
    self._mean = self._mean * (count / total) + mean * (other / total)
    self._count = total

  def stats(self, path: str, dtype: str | None) -> TensorStats:
    """Returns the figures of all elements so far."""
    size = math.prod(self._shape)
    first = None
    if self._first is not None:
      first = tuple(map(int, np.unravel_index(self._first, self._shape)))
    found = TensorStats(
      path,
      self._shape,
      dtype,
      size,
      norm=self._norm,
      zeros=self._zeros,
      nan=self._nan,
      inf=self._inf,
      first=first,
    )
    if self._complex or not self._count:
      return found
    return dataclasses.replace(
      found,
      mean=self._mean,
      std=self._away / math.sqrt(self._count),
      min=self._least.item(),
      max=self._most.item(),
    )


def _root(values: np.ndarray) -> float:
  """Returns the root of the sum of squares, whatever the size of numbers."""
  parts = values.view(np.float64)
  most = max(float(parts.max()), -float(parts.min()))
  if not math.isfinite(most) or not most:
    return most
  # Not by BLAS, whose result depends on the number of its threads.
  if _SMALL < most < _LARGE:
    return math.sqrt(float(np.einsum('i,i->', parts, parts)))
  scaled = parts / most
  return most * math.sqrt(float(np.einsum('i,i->', scaled, scaled)))
