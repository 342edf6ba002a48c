"""Interpolate: tables of positions get other numbers of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, selectors
from surgery.naming.paths import Path
from surgery.naming.selection import Selection
from surgery.passes import arithmetic, rows

Method = Literal['linear', 'cubic']

# The parameter a of the cubic kernel (Keys 1981), as in PyTorch.
_SHARPNESS = -0.75


def interpolate(
  checkpoint: Checkpoint,
  select: selectors.Text | Selection,
  to: int | Sequence[int],
  *,
  axis: int | Sequence[int] = 0,
  grid: Sequence[int] | None = None,
  prefix: int = 0,
  method: Method = 'linear',
  host: Host,
) -> Checkpoint:
  """Gives tables of positions another number of positions, by interpolation.

  With one number it is along one axis. With two it is a grid, of two axes, or
  of one that has the grid's rows one behind the other. Places are the middles
  of their cells, and beyond the first and last these are repeated, as in
  `torch.nn.functional.interpolate` with `align_corners=False` and without
  antialiasing. It is computed in float64 and rounded once.

  Args:
    checkpoint: the model.
    select: the tables.
    to: number of positions, or rows and columns of the grid.
    axis: the axis of positions, or two, of rows and of columns.
    grid: rows and columns that one axis has; by default those of a square.
    prefix: so many places in front of the positions, such as that of a class
      token, stay as they are.
    method: `linear`, or `cubic` (Keys 1981, with a = -0.75).
    host: knows the adapters' types.

  Raises:
    SurgeryError: if there is no such axis, or numbers do not fit.
    AdapterError: for a tensor with an adapter.

  Example:
    interpolate: {select: '**/wpe/embedding', to: 2048}
    interpolate: {select: '**/pos_embed', to: [24, 24], axis: 1, prefix: 1}
  """
  sizes = [to] if isinstance(to, int) else list(to)
  axes = [axis] if isinstance(axis, int) else list(axis)
  _check_numbers(sizes, axes, grid, prefix)
  if method not in ('linear', 'cubic') or prefix < 0:
    raise errors.SurgeryError(
      'expected method linear or cubic and a prefix of 0 or more, found '
      f'{method!r} and {prefix}.'
    )
  changed = {}
  chosen = tensors.chosen(checkpoint, select, 'interpolate', host)
  for path, leaf in chosen.items():
    with errors.within(paths.show(path)):
      changed[path] = _table(leaf, path, axes, sizes, grid, prefix, method)
  return tensors.edited(
    checkpoint, 'interpolate', changed=changed, rearranged=True, host=host
  )


def _check_numbers(
  sizes: Sequence[int],
  axes: Sequence[int],
  grid: Sequence[int] | None,
  prefix: int,
) -> None:
  """Raises unless numbers of positions and axes fit together.

  Raises:
    SurgeryError: naming the option.
  """
  for what, some in (('to', sizes), ('grid', grid or ())):
    if any(type(n) is not int or n < 1 for n in some):
      raise errors.SurgeryError(
        f'{what}: expected numbers of positions, of 1 or more, found {some!r}.'
      )
  if len(sizes) not in (1, 2) or len(axes) not in (1, len(sizes)):
    raise errors.SurgeryError(
      'expected one or two numbers (to), and as many axes, or one, found '
      f'{list(sizes)} and {list(axes)}.'
    )
  # A grid in one axis has its rows one behind the other, and only there can a
  # class token stand in front.
  if (grid is not None or prefix) and len(axes) == 2:
    raise errors.SurgeryError(
      'grid and prefix need positions along one axis, found two axes.'
    )
  if grid is not None and (len(sizes) != 2 or len(grid) != 2):
    raise errors.SurgeryError('grid: expected two numbers in it, and in to.')


def _table(
  leaf: Leaf,
  path: Path,
  axes: Sequence[int],
  to: Sequence[int],
  grid: Sequence[int] | None,
  prefix: int,
  method: Method,
) -> Leaf:
  """Returns a table with other numbers of positions."""
  dtype = arithmetic.check_number(leaf, path, 'interpolate')
  shape = leaf.shape or ()
  axes = [regions.axis_of(one, shape, path) for one in axes]
  if len(set(axes)) < len(axes):
    raise errors.SurgeryError(f'expected two axes, found {axes[0]} twice.')
  new = list(shape)
  if len(axes) == len(to):
    old = [shape[one] for one in axes]
    # Positions in front, as that of a class token, are no part of the table.
    old[0] -= prefix
    for one, size in zip(axes, to, strict=True):
      new[one] = size
    new[axes[0]] += prefix
  else:
    old = _grid(shape[axes[0]] - prefix, grid)
    new[axes[0]] = prefix + math.prod(to)
  if min(old) < 1:
    raise errors.SurgeryError(
      f'{shape} has no positions there behind a prefix of {prefix}.'
    )
  # One small matrix for each axis: interpolation in two dimensions is that in
  # one, applied twice.
  weights = [_weights(*sizes, method) for sizes in zip(old, to, strict=True)]
  reader = Reader(leaf)
  wide = arithmetic.wide(dtype)

  def block(region: Region) -> Any:
    # Each new position may depend on all old ones, so a block reads the whole
    # table along these axes; along the others it reads its own part.
    cut = list(region)
    for one in axes:
      cut[one] = slice(0, shape[one])
    value = arithmetic.plain(reader(tuple(cut)), path, 'interpolate')
    rows.check_spread(value, path, cut)
    found = np.moveaxis(value.astype(wide), axes, range(len(axes)))
    # Axes of positions go to the front, where each is multiplied by its
    # matrix.
    kept, found = found[:prefix], found[prefix:]
    rest = found.shape[len(axes) :]
    found = found.reshape(*old, *rest)
    with arithmetic.steady(), np.errstate(all='ignore'):
      for k, matrix in enumerate(weights):
        found = np.moveaxis(np.tensordot(matrix, found, (1, k)), 0, k)
    if len(axes) < len(to):
      found = found.reshape(-1, *rest)
    if prefix:
      found = np.concatenate([kept, found])
    found = np.moveaxis(found, range(len(axes)), axes)
    # Only now the block's own positions are taken.
    within = [slice(None)] * len(shape)
    for one in axes:
      within[one] = region[one]
    return arithmetic.narrowed(
      found[tuple(within)], dtype, path, 'interpolate', inputs=[value],
      region=region,
    )  # fmt: skip

  return regions.computed(leaf, tuple(new), block, [leaf])


def _grid(places: int, grid: Sequence[int] | None) -> list[int]:
  """Returns the rows and columns of a number of positions.

  Raises:
    SurgeryError: if they have none.
  """
  side = math.isqrt(max(places, 0))
  found = [side, side] if grid is None else list(grid)
  if math.prod(found) != places:
    raise errors.SurgeryError(
      f'{places} positions do not make a grid of {found[0]} × {found[1]}. Give '
      'grid, or the number of places in front (prefix).'
    )
  return found


def _weights(old: int, new: int, method: Method) -> np.ndarray:
  """Returns the weight of each old position in each new one, `(new, old)`."""
  # `align_corners=False`: old and new cells cover the same length, and each
  # position is the middle of its cell.
  places = (np.arange(new) + 0.5) * (old / new) - 0.5
  if method == 'linear':
    places = np.clip(places, 0, old - 1)
  # The old positions nearby: two for a line, four for a cubic curve.
  low = np.floor(places).astype(int)
  part = places - low
  matrix = np.zeros((new, old))
  taps = (0, 1) if method == 'linear' else (-1, 0, 1, 2)
  for tap in taps:
    apart = np.abs(part - tap)
    counts = 1 - apart if method == 'linear' else _cubic(apart)
    # Beyond the ends the first and last positions are repeated.
    np.add.at(matrix, (np.arange(new), np.clip(low + tap, 0, old - 1)), counts)
  return matrix


def _cubic(x: np.ndarray) -> np.ndarray:
  """Returns Keys' kernel at distances of 0 to 2."""
  a = _SHARPNESS
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * (x**3 - 5 * x**2 + 8 * x - 4)
  return np.where(x <= 1, near, far)
