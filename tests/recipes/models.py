"""Checkpoints of plain arrays, in memory and in files, and steps on them."""

import functools
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

import surgery
from surgery.model import checkpoint as checkpoints
from surgery.model import grid as grids
from surgery.model.checkpoint import Checkpoint, Leaf

HOST = surgery.default_host()


def held(arrays: Mapping[str, Any]) -> Checkpoint:
  """A checkpoint of arrays in memory, by paths with slashes."""
  return Checkpoint(
    {
      tuple(path.split('/')): Leaf(
        functools.partial(lambda v: v, v), v.shape, v.dtype.name
      )
      for path, v in ((p, np.asarray(v)) for p, v in arrays.items())
    },
    origin='held',
  )


def saved(arrays: Mapping[str, Any], folder: Any, name: str = 'm') -> Any:
  """Writes arrays to a file, and returns that."""
  file = folder / f'{name}.msgpack'
  held(arrays).write(file, overwrite=True)
  return file


def values(ckpt: Mapping[Any, Leaf]) -> dict[str, np.ndarray]:
  """Arrays by paths with slashes, in order."""
  return {'/'.join(p): np.asarray(leaf.load()) for p, leaf in ckpt.items()}


def blocks(ckpt: Mapping[Any, Leaf]) -> dict[str, np.ndarray]:
  """The same, as a writer gets them: block by block."""
  found = {}
  for path, leaf in ckpt.items():
    assert leaf.shape is not None and leaf.dtype is not None
    parts = [np.asarray(p) for p in leaf.parts()]
    flat = np.concatenate([p.reshape(-1) for p in parts])
    assert {leaf.dtype} == {p.dtype.name for p in parts}
    found['/'.join(path)] = flat.reshape(leaf.shape)
  return found


def same(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
  """Raises unless arrays are equal to the bit, in order."""
  assert list(expected) == list(actual)
  for path, value in expected.items():
    a, b = np.asarray(value), np.asarray(actual[path])
    assert (a.dtype.name, a.shape) == (b.dtype.name, b.shape), path
    assert np.ascontiguousarray(a).tobytes() == b.tobytes(), path


def by_name(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """The same, sorted by path."""
  return dict(sorted(arrays.items()))


def close(
  expected: Mapping[str, Any], actual: Mapping[str, Any], eps: float = 1e-5
) -> None:
  """Raises unless arrays are equal to a relative `eps`, in order."""
  assert list(expected) == list(actual)
  for path, value in expected.items():
    a, b = np.asarray(value), np.asarray(actual[path])
    assert (a.dtype.name, a.shape) == (b.dtype.name, b.shape), path
    a, b = a.astype(np.float64), b.astype(np.float64)
    scale = max(float(np.abs(a).max(initial=0)), 1e-30)
    assert float(np.abs(a - b).max(initial=0)) <= eps * scale, path


def applied(arrays: Mapping[str, Any], *steps: Any) -> dict[str, np.ndarray]:
  """Does steps on arrays in memory and in a file; they have to agree."""
  from pathlib import Path

  recipe = surgery.Recipe(steps)
  live = recipe.apply(held(arrays))
  live.check()
  expected = values(live)
  with tempfile.TemporaryDirectory() as folder:
    file = saved(arrays, Path(folder))
    out = Path(folder) / 'out.msgpack'
    recipe.run(model=file, out=out)
    same(expected, values(surgery.open(out)))
    same(expected, blocks(recipe.apply(surgery.open(file))))
  return expected


class SmallBlocks:
  """Cuts tensors into blocks of few elements while it is entered."""

  def __init__(self, elements: int) -> None:
    self._elements = elements

  def __enter__(self) -> None:
    from unittest import mock

    grid = grids.grid

    def small(shape: Any, most: int = self._elements) -> Any:
      return grid(shape, most)

    from surgery.adapting import beneath
    from surgery.editing import regions
    from surgery.files import payload
    from surgery.looking import diff
    from surgery.passes import cast, fill

    modules = (checkpoints, payload, beneath, cast, diff, fill, regions)
    self._patches = [mock.patch.object(m, 'grid', small) for m in modules]
    for patch in self._patches:
      patch.start()

  def __exit__(self, *exc: Any) -> None:
    for patch in self._patches:
      patch.stop()
