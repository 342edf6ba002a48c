"""Factorise: matrices as products of two of low rank."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery import errors
from surgery.adapting import finding
from surgery.editing import regions
from surgery.editing.regions import Reader, Shape
from surgery.host.manager import Host
from surgery.model import layouts
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.passes import arithmetic, concat
from surgery.passes.fill import generator

# Of the randomised decomposition: columns beyond the rank, and passes over the
# matrix that sharpen small gaps between singular values.
OVERSAMPLING, ITERATIONS = 16, 4


def factorise(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  rank: int,
  *,
  exact: bool = False,
  seed: int = 0,
  keep: bool = False,
  layout: str | Mapping[str, str] | None = None,
  host: Host,
) -> Checkpoint:
  """Replaces matrices by two factors, whose product is the nearest of a rank.

  `W ≈ A·B` with `A = U·√S` (rows, rank) and `B = √S·Vᵀ` (rank, columns) of the
  singular value decomposition. By default it is a randomised one with
  subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061), drawn
  by the seed and the path alone. Axes in front of the last two are stacked
  matrices.

  The first name is that of the factor that takes the inputs, so that two layers
  take the place of one. Of a kernel of PyTorch, (out, in), that is B, and A is
  the second: `y = A·(B·x)`.

  Args:
    checkpoint: the model.
    rules: `ONE -> MANY` with two names in the braces: what takes the inputs,
      and what gives the outputs.
    rank: columns of A and rows of B.
    exact: whether the decomposition is a full one, which takes far longer.
    seed: the seed.
    keep: whether the matrix stays, too.
    layout: a letter an axis (`s` stacked, `i` input, `o` output), or such
      letters by selector; by default what is known of a checkpoint that
      PyTorch wrote, otherwise the last axis is the output.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: for a tensor that is not a matrix, or too large a rank.

  Example:
    factorise: {rules: '**/mlp/kernel -> **/mlp/kernel_{a,b}', rank: 64}
  """
  given = finding.layout_pairs(layout)
  detected = layouts.found(checkpoint, checkpoint.manifest)
  taken: dict[layouts.Layout, list[Path]] = {}

  def roles(path: Path) -> str | None:
    for selector, letters in given:
      if selectors.parse(selector).matches(path, ()):
        return letters
    known = checkpoint.manifest.layer_types.get(path[:-1])
    if known is not None and path[-1] in known.layouts:
      return known.layouts[path[-1]]
    one = detected.get(path)
    if one is not None:
      taken.setdefault(one, []).append(path)
    return None if one is None else one.letters

  def cut(path: Path, leaf: Leaf, count: int | None) -> list[Leaf]:
    arithmetic.check_number(leaf, path, 'factorise')
    shape = leaf.shape or ()
    where = f'factorise: {paths.show(path)}'
    if count != 2:
      raise errors.SurgeryError(
        f'{where}: expected two names on the right, found {count or "numbers"}.'
      )
    if len(shape) < 2:
      raise errors.SurgeryError(f'{where}: expected a matrix, found {shape}.')
    if not 1 <= rank <= min(shape[-2:]):
      raise errors.SurgeryError(
        f'{where}: a matrix of {shape} has a rank from 1 to {min(shape[-2:])}, '
        f'found {rank}.'
      )
    letters = roles(path)
    if letters is not None and letters[-2:] not in ('io', 'oi'):
      raise errors.SurgeryError(
        f'{where}: the last two of its axes {shape}, {letters!r}, are not a '
        'matrix: it is the kernel of a convolution. Reshape it first, or give '
        'its layout.'
      )
    both = _Factors(leaf, path, rank, exact, seed)
    # The first name gets the factor that takes the inputs, also where the
    # matrix has its outputs first.
    turned = letters is not None and letters.endswith('oi')
    return [both.leaf(int(turned)), both.leaf(int(not turned))]

  after = concat.parted(checkpoint, rules, 'factorise', cut, keep, host)
  said = layouts.remarks(taken, 'factorise')
  return after.replace(remarks=(*checkpoint.remarks, *said))


class _Factors:
  """Two factors of a matrix, computed when the first one is loaded.

  They are released once both have been loaded.

  Args:
    leaf: the matrix.
    path: its path.
    rank: the rank.
    exact: whether the decomposition is a full one.
    seed: the seed.
  """

  def __init__(
    self, leaf: Leaf, path: Path, rank: int, exact: bool, seed: int
  ) -> None:
    self._leaf = leaf
    self._path = path
    self._rank = rank
    self._exact = exact
    self._seed = seed
    self._lock = threading.Lock()
    self._held: dict[int, np.ndarray] = {}

  def leaf(self, number: int) -> Leaf:
    """Returns one of the factors."""
    shape = self._leaf.shape or ()
    sizes: Shape = (*shape[:-1], self._rank)
    if number:
      sizes = (*shape[:-2], self._rank, shape[-1])
    # In float64: the matrix, its decomposition, and what that takes.
    memory = 8 * self._leaf.size * (5 if self._exact else 2)
    return self._leaf.replace(
      load=lambda: self._given(number), shape=sizes, memory=memory, heavy=True
    )

  def _given(self, number: int) -> Any:
    with self._lock:
      # A writer computes the next tensor in a thread, so both may be asked for
      # at once.
      if number not in self._held:
        self._held = dict(enumerate(self._computed()))
      return self._held.pop(number)

  def _computed(self) -> tuple[Any, Any]:
    shape = self._leaf.shape or ()
    dtype = str(self._leaf.dtype)
    value = Reader(self._leaf)(regions.whole(shape))
    wide = 'complex128' if dtype.startswith('complex') else 'float64'
    matrix = arithmetic.plain(value, self._path, 'factorise').astype(wide)
    if not np.isfinite(matrix).all():
      raise errors.SurgeryError(
        f'factorise: {paths.show(self._path)}: has NaN or infinity, so it '
        'cannot be factorised.'
      )
    flat = matrix.reshape(-1, *shape[-2:])
    with arithmetic.steady():
      found = [self._decomposed(one, k) for k, one in enumerate(flat)]
    factors = []
    for which, sizes in enumerate(
      ((*shape[:-1], self._rank), (*shape[:-2], self._rank, shape[-1]))
    ):
      values = np.stack([one[which] for one in found]).reshape(sizes)
      factors.append(
        arithmetic.narrowed(values, dtype, self._path, 'factorise')
      )
    return factors[0], factors[1]

  def _decomposed(self, matrix: Any, number: int) -> tuple[Any, Any]:
    stream = generator(self._seed, self._path, number)
    u, s, v = decomposed(matrix, self._rank, self._exact, stream)
    # Both factors get the root of the singular values, so that neither is much
    # larger than the other.
    root = np.sqrt(s)
    return u * root, root[:, None] * v


def decomposed(
  matrix: Any, rank: int, exact: bool, stream: np.random.Generator
) -> tuple[Any, Any, Any]:
  """Returns the largest singular values of a matrix, and their vectors.

  By default by subspace iteration from a random start (Halko, Martinsson and
  Tropp 2011); a small matrix is decomposed as a whole.

  Args:
    matrix: `(rows, columns)`, of float64 or complex128.
    rank: how many, at most the smaller side.
    exact: whether the decomposition is a full one.
    stream: gives the random start.

  Returns:
    `u` (rows, rank), `s` (rank,), `v` (rank, columns) with `u·s·v ≈ matrix`.
  """
  if exact or rank + OVERSAMPLING >= min(matrix.shape):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
  else:
    u, s, v = _randomised(matrix, rank, stream)
  # A decomposition is unique up to signs; the largest element of each column is
  # made positive, so that LAPACK's choice does not matter.
  largest = np.take_along_axis(u, np.argmax(np.abs(u), axis=0)[None], axis=0)
  signs = np.where(largest == 0, 1, largest / np.abs(largest))[0, :rank]
  return u[:, :rank] / signs, s[:rank], signs[:, None] * v[:rank]


def _randomised(
  matrix: Any, rank: int, stream: np.random.Generator
) -> tuple[Any, Any, Any]:
  # The basis is of the longer side, so that the matrix that is decomposed in
  # full at the end is small.
  wide = matrix.shape[0] < matrix.shape[1]
  tall = matrix.conj().T if wide else matrix
  basis = tall @ stream.standard_normal((tall.shape[1], rank + OVERSAMPLING))
  # Algorithm 4.4 of Halko et al.: each iteration separates large from small
  # singular values further; the QR decompositions keep the basis from losing
  # the small ones.
  for _ in range(ITERATIONS):
    basis, _ = np.linalg.qr(basis)
    basis, _ = np.linalg.qr(tall.conj().T @ basis)
    basis = tall @ basis
  basis, _ = np.linalg.qr(basis)
  # Projected on the basis the matrix has few rows, and its singular values are
  # nearly the largest ones.
  u, s, v = np.linalg.svd(basis.conj().T @ tall, full_matrices=False)
  u = basis @ u
  if wide:
    return v.conj().T, s, u.conj().T
  return u, s, v
