"""Fill and random: tensors with one value, or with random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.editing import nonfinite, regions, rounding, tensors
from surgery.editing.regions import Region, Shape
from surgery.files import arrays
from surgery.files.digest import Digester
from surgery.host.manager import Host
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  grid,
)
from surgery.naming import paths, renaming
from surgery.naming.paths import Path
from surgery.passes.reshape import scalar

_Make = Callable[[Path, Shape, str], Leaf]


def _made(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  verb: str,
  make: _Make,
  shape: Sequence[int] | None,
  dtype: str | None,
  overwrite: bool,
  host: Host,
) -> Checkpoint:
  """Returns the checkpoint with tensors that are made anew.

  Args:
    checkpoint: the model.
    rules: selectors of existing tensors, `OLD -> NEW` for new ones beside
      others, or `-> NEW`.
    verb: the pass.
    make: returns a tensor of some path, shape and dtype.
    shape: shape of new ones; that of the old by default.
    dtype: dtype of new ones; that of the old by default.
    overwrite: whether a new name may be taken.
    host: knows the adapters' types.
  """
  changed: dict[Path, Leaf] = {}
  fresh: dict[Path, Leaf] = {}
  behind: dict[Path, Path] = {}
  for text in tensors.texts(rules):
    if not renaming.has_arrow(text):
      if shape is not None or dtype is not None:
        raise errors.SurgeryError(
          f'{text!r} matches existing tensors, whose shape and dtype cannot '
          "change. Write 'OLD -> NEW', or '-> NEW', for new ones."
        )
      for path, leaf in tensors.chosen(checkpoint, text, verb, host).items():
        assert leaf.shape is not None and leaf.dtype is not None
        changed[path] = _with(leaf, make(path, leaf.shape, leaf.dtype))
      continue
    for new, source, old in _news(checkpoint, text, verb):
      sizes, name = _form(text, shape, dtype, source)
      # Several old names may lead to one new one, if they agree about it.
      if new in fresh and fresh[new].shape != sizes:
        raise errors.RenameError(
          f'{text!r}: {paths.show(new)} would have two shapes. Give shape.'
        )
      made = make(new, sizes, _dtype(name))
      fresh[new] = made if source is None else _with(source, made)
      if old is not None:
        behind[new] = old
  return tensors.edited(
    checkpoint,
    verb,
    changed=changed,
    fresh=fresh,
    behind=behind,
    overwrite=overwrite,
    host=host,
  )


def _form(
  text: str, shape: Sequence[int] | None, dtype: str | None, source: Leaf | None
) -> tuple[Shape, str]:
  """Returns shape and dtype of a new tensor; by default its source's.

  Args:
    text: the rule, for messages.
    shape: the shape that was given.
    dtype: the dtype that was given.
    source: the tensor that it is made beside, if there is one.

  Raises:
    SurgeryError: if one of them is unknown, or the shape is negative.
  """
  if source is not None:
    shape = source.shape if shape is None else shape
    dtype = dtype or source.dtype
  if shape is None or dtype is None:
    raise errors.SurgeryError(
      f'{text!r}: give shape and dtype of the new tensor.'
    )
  if any(n < 0 for n in shape):
    raise errors.SurgeryError(
      f'{text!r}: expected a shape of sizes >= 0, found {shape}.'
    )
  return tuple(shape), dtype


def _news(
  checkpoint: Checkpoint, text: str, verb: str
) -> list[tuple[Path, Leaf | None, Path | None]]:
  """Returns new paths, each with the tensor that it is made beside."""
  left, _, right = text.partition('->')
  if not left.strip():
    return [(renaming.name(right, text), None, None)]
  found = tensors.pairs(checkpoint, [text], None)
  for old, leaf, _, _ in found:
    regions.array(leaf, old, verb)
  return [(new, leaf, old) for old, leaf, new, _ in found]


def _with(like: Leaf, made: Leaf) -> Leaf:
  """Returns a made tensor with the flags and metadata of another."""
  return made.replace(trainable=like.trainable, metadata=like.metadata)


def _dtype(name: str) -> str:
  full = rounding.SHORT.get(name, name)
  if full not in arrays.DTYPES:
    known = (*rounding.SHORT, *arrays.DTYPES)
    raise errors.ConfigError(
      f'no dtype is called {name!r}.{errors.suggest(name, known)}'
    )
  return full


def fill(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  value: float = 0,
  *,
  shape: Sequence[int] | None = None,
  dtype: str | None = None,
  overwrite: bool = False,
  host: Host,
) -> Checkpoint:
  """Sets tensors to one value, or makes new ones of it.

  Args:
    checkpoint: the model.
    rules: a selector of tensors that there are; `OLD -> NEW` for new ones, one
      for each name that comes out; or `-> NEW` for one.
    value: the value.
    shape: shape of new ones; that of OLD by default.
    dtype: dtype of new ones; that of OLD by default.
    overwrite: whether a new name may be that of a tensor that is there.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: if the dtype cannot hold the value.

  Example:
    fill: '**/bias'
    fill: {rules: '**/mlp/up/kernel -> **/gate/kernel', shape: [768, 2]}
  """

  def make(path: Path, sizes: Shape, name: str) -> Leaf:
    number = scalar(value, name, f'fill: {paths.show(path)}')
    to = regions.dtype_of(name)

    def block(region: Region) -> Any:
      return np.full(regions.sizes(region), number, to)

    return regions.computed(Leaf(lambda: None, sizes, name), sizes, block, [])

  return _made(checkpoint, rules, 'fill', make, shape, dtype, overwrite, host)


def random(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  seed: int = 0,
  distribution: Literal['normal', 'uniform'] = 'normal',
  scale: float = 0.02,
  mean: float = 0,
  shape: Sequence[int] | None = None,
  dtype: str | None = None,
  overwrite: bool = False,
  host: Host,
) -> Checkpoint:
  """Draws tensors at random; each by the seed and its path alone.

  So what is drawn does not depend on other tensors, on their order, or on the
  number of threads.

  Args:
    checkpoint: the model.
    rules: a selector of tensors that there are; `OLD -> NEW` for new ones, one
      for each name that comes out; or `-> NEW` for one.
    seed: the seed.
    distribution: `normal`, with standard deviation `scale`; or `uniform`
      between `mean - scale` and `mean + scale`.
    scale: the width.
    mean: the mean.
    shape: shape of new ones; that of OLD by default.
    dtype: dtype of new ones; that of OLD by default.
    overwrite: whether a new name may be that of a tensor that is there.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule that matches nothing, or a name that is taken.
    SurgeryError: for a dtype that is not floating-point.
    CastError: when it is written, for a number that is too large for the dtype.

  Example:
    random: {rules: 'head/kernel', seed: 1, scale: 0.01}
  """
  if not (math.isfinite(scale) and math.isfinite(mean) and scale >= 0):
    raise errors.SurgeryError(
      f'expected finite numbers, found the scale {scale} and the mean {mean}.'
    )

  def make(path: Path, sizes: Shape, name: str) -> Leaf:
    if not rounding.is_float(name):
      raise errors.SurgeryError(
        f'{paths.show(path)} is {name}; expected a floating-point dtype.'
      )

    def block(region: Region) -> Any:
      values = drawn(seed, path, sizes, region, distribution)
      with np.errstate(all='ignore'):
        values = values * np.float32(scale) + np.float32(mean)
      after = rounding.rounded(values, name)
      start = [cut.start for cut in region]
      return nonfinite.checked(
        values, after, path, 'random', start=start, option=False
      )

    return regions.computed(
      Leaf(lambda: None, sizes, name), sizes, block, [], anywhere=False
    )

  return _made(checkpoint, rules, 'random', make, shape, dtype, overwrite, host)


def generator(seed: int, path: Path, number: int = 0) -> np.random.Generator:
  """Returns a generator for a path: Philox, keyed by a digest of both.

  Args:
    seed: the seed.
    path: the path.
    number: of several for one path, which.
  """
  digester = Digester()
  digester.update(repr((int(seed), path)).encode())
  key = int(digester.digest().partition(':')[2], 16)
  return np.random.Generator(
    np.random.Philox(key=key, counter=[0, 0, 0, number])
  )


def drawn(
  seed: int, path: Path, shape: Shape, region: Region, distribution: str
) -> np.ndarray:
  """Returns random float32 numbers, of one block of `grid(shape)` or of all.

  Each block has a stream of its own, so that blocks can be drawn alone.
  """
  result = np.empty(regions.sizes(region), np.float32)
  for number, index in enumerate(grid(shape)):
    cell = regions.full(index, shape)
    if region not in (cell, regions.whole(shape)):
      continue
    stream = generator(seed, path, number)
    count = regions.sizes(cell)
    if distribution == 'normal':
      values = stream.standard_normal(count, np.float32)
    else:
      values = stream.random(count, np.float32) * 2 - 1
    if region == cell:
      return values
    result[index] = values
  return result
