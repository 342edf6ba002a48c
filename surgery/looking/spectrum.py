"""The largest singular values of a matrix, and how many directions it has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from surgery.editing import regions
from surgery.editing.regions import Reader
from surgery.files import arrays, checking
from surgery.model.checkpoint import Leaf
from surgery.model.grid import BLOCK
from surgery.passes import arithmetic

# Matrices of at most so many elements are decomposed as a whole, 32 MB.
_WHOLE = 1 << 22
# Up to that many rows or columns, whichever are fewer, the product of a matrix
# with itself is made; it takes 128 MB.
_SIDE = 4096
# Of the randomised way: columns beyond those asked for, and passes.
_OVERSAMPLING, _ITERATIONS = 16, 4


@dataclasses.dataclass(frozen=True)
class Spectrum:
  """Singular values σ₁ ≥ σ₂ ≥ … of a matrix.

  Attributes:
    values: the largest of them, as many as were asked for.
    stable_rank: Σσ² / σ₁² (Rudelson & Vershynin 2007), between 1 and the rank;
      0 if all are zero.
    effective_rank: exp(-Σ p ln p) with p = σ / Σσ (Roy & Vetterli 2007); 0 if
      all are zero, None if not all values could be had.
    exact: whether they come of a full decomposition; otherwise of a randomised
      one, which takes them for slightly too small.
  """

  values: tuple[float, ...]
  stable_rank: float
  effective_rank: float | None
  exact: bool


def spectrum(leaf: Leaf, count: int) -> Spectrum:
  """Returns the largest singular values of a tensor, in float64.

  Of a tensor of more than two axes it is those of the matrix of its last axis
  against all others. A matrix that is larger than memory is read in blocks: its
  values are the roots of the eigenvalues of `AᵀA`, or where that is too large
  those of its randomised range (Halko, Martinsson & Tropp 2011), drawn with a
  fixed seed.

  Args:
    leaf: a tensor of two axes or more, all of whose elements are finite.
    count: how many of them.
  """
  matrix = _Matrix(leaf)
  with arithmetic.steady():
    values, exact = _values(matrix, count)
  largest = float(values[0])
  if not largest:
    return Spectrum((0.0,) * min(count, len(values)), 0.0, 0.0, exact)
  shares = values / largest
  norm = matrix.norm / largest
  effective = None
  if exact:
    p = shares[shares > 0] / shares.sum()
    effective = math.exp(-float((p * np.log(p)).sum()))
  found = tuple(float(v) for v in values[:count] * matrix.scale)
  return Spectrum(found, norm**2, effective, exact)


def _values(matrix: _Matrix, count: int) -> tuple[np.ndarray, bool]:
  """Returns singular values, largest first, and whether they are all."""
  rows, columns = matrix.shape
  if rows * columns <= _WHOLE:
    whole = np.concatenate(list(matrix.blocks()))
    return np.linalg.svd(whole, compute_uv=False), True
  if min(rows, columns) <= _SIDE:
    squares = np.linalg.eigvalsh(matrix.gram())[::-1]
    # What rounding leaves of zeros is no direction.
    noise = np.finfo(float).eps * len(squares) * squares[0]
    return np.sqrt(np.where(squares > noise, squares, 0)), True
  stream = np.random.Generator(np.random.Philox(key=0))
  width = min(count + _OVERSAMPLING, rows, columns)
  basis = stream.standard_normal((columns, width))
  for _ in range(_ITERATIONS):
    basis, _ = np.linalg.qr(matrix.squared(basis))
  small = np.linalg.eigvalsh(basis.T @ matrix.squared(basis))[::-1]
  return np.sqrt(np.maximum(small, 0)), False


class _Matrix:
  """A tensor as a matrix whose rows come in blocks.

  Args:
    leaf: the tensor.

  Attributes:
    shape: rows and columns.
    scale: what its elements are divided by, the largest of them.
    norm: ‖A‖ of what is left.
  """

  def __init__(self, leaf: Leaf) -> None:
    assert leaf.shape is not None
    self._leaf = leaf
    columns = leaf.shape[-1]
    self.shape = (leaf.size // columns, columns)
    self.scale = 1.0
    most = max(float(np.abs(b).max()) for b in self.blocks())
    self.scale = most or 1.0
    self.norm = math.sqrt(
      sum(float(np.einsum('ij,ij->', b, b)) for b in self.blocks())
    )

  def blocks(self) -> Iterator[np.ndarray]:
    """Yields blocks of rows, or a row in several blocks of columns."""
    since = checking.mark()
    rest: list[np.ndarray] = []
    for block in self._leaf.parts():
      flat = arrays.little(block).astype('float64').reshape(-1)
      flat = flat if self.scale == 1 else flat / self.scale
      rest.append(flat)
      held = sum(map(len, rest))
      if held >= self.shape[1]:
        joined = np.concatenate(rest) if len(rest) > 1 else flat
        whole = held // self.shape[1] * self.shape[1]
        yield joined[:whole].reshape(-1, self.shape[1])
        rest = [joined[whole:]] if whole < held else []
    checking.settle(since)

  def gram(self) -> np.ndarray:
    """Returns `AᵀA`, or `AAᵀ` if that is smaller."""
    rows, columns = self.shape
    if columns <= rows:
      total = np.zeros((columns, columns))
      for block in self.blocks():
        total += block.T @ block
      return total
    total = np.zeros((rows, rows))
    read, front = Reader(self._leaf), regions.whole(self._leaf.shape or ())[:-1]
    step = max(1, BLOCK // rows)
    for start in range(0, columns, step):
      # Of a row only a piece, so that all rows of these columns fit.
      cut = slice(start, min(start + step, columns))
      part = arrays.little(read((*front, cut))).astype('float64')
      part = part.reshape(rows, -1) / self.scale
      total += part @ part.T
    return total

  def squared(self, vectors: np.ndarray) -> np.ndarray:
    """Returns `AᵀA` times some vectors, `(columns, n)`."""
    total = np.zeros_like(vectors)
    for block in self.blocks():
      total += block.T @ (block @ vectors)
    return total
