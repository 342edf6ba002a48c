"""Trees of any values, as hypothesis makes them, and looking at them."""

import contextlib
import pathlib
import tempfile
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
from flax import serialization

from surgery.files import arrays
from surgery.files.msgpack import chunks
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import KEY

laws = hypothesis.settings(deadline=None, max_examples=120)

names = st.text(st.characters(exclude_categories=['Cs']), max_size=6)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
  """Arrays of any dtype, shape, bits and memory layout."""
  dtype = arrays.DTYPES[draw(st.sampled_from(list(arrays.DTYPES)))]
  shape = draw(shapes)
  size = int(np.prod(shape)) * dtype.itemsize
  data = draw(st.binary(min_size=size, max_size=size))
  flat = np.frombuffer(data, np.uint8)
  if dtype == np.bool_:
    flat = np.bitwise_and(flat, 1, dtype=np.uint8)
  array = flat.view(dtype).reshape(shape)
  return array.T if draw(st.booleans()) else array


scalars = tensors().filter(lambda a: a.size > 0).map(lambda a: a.reshape(-1)[0])
plain = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(2**63), 2**64 - 1),
  st.floats(),
  st.complex_numbers(),
  st.text(st.characters(exclude_categories=['Cs']), max_size=40),
  st.just({}),
)
reserved = {KEY, chunks.MARK}
keys = names.filter(lambda name: name not in reserved)
values = st.one_of(tensors(), tensors(), scalars, plain)
trees = st.dictionaries(
  keys,
  st.recursive(
    values, lambda inner: st.dictionaries(keys, inner, max_size=4), max_leaves=8
  ),
  max_size=5,
)
metadata = st.dictionaries(
  names, st.one_of(st.booleans(), names, st.tuples(names)), max_size=2
)


def flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
  if isinstance(tree, dict) and (tree or not path):
    found = {}
    for key, value in tree.items():
      found.update(flat(value, (*path, key)))
    return found
  return {path: tree}


def leaf_of(value: Any) -> Leaf:
  if isinstance(value, (np.ndarray, np.generic)):
    scalar = isinstance(value, np.generic)
    return Leaf(lambda: value, value.shape, str(value.dtype), scalar=scalar)
  return Leaf(lambda: value)


def checkpoint_of(tree: dict[str, Any]) -> Checkpoint:
  return Checkpoint({p: leaf_of(v) for p, v in flat(tree).items()})


def copied(tree: Any) -> Any:
  """flax puts chunks into the dicts that it is given."""
  if isinstance(tree, dict):
    return {key: copied(value) for key, value in tree.items()}
  return tree


def bits(value: Any) -> Any:
  """Something that is equal for equal bits and types only."""
  if isinstance(value, (np.ndarray, np.generic)):
    return type(value), value.shape, value.dtype.name, value.tobytes()
  return type(value), repr(value)


@contextlib.contextmanager
def folder():
  with tempfile.TemporaryDirectory() as path:
    yield pathlib.Path(path)


@contextlib.contextmanager
def chunks_of(size: int):
  with (
    mock.patch.object(serialization, 'MAX_CHUNK_SIZE', size),
    mock.patch.object(chunks, 'MAX_CHUNK_SIZE', size),
  ):
    yield
