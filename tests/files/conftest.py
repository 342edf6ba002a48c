import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from surgery.files.plugin import Msgpack
from surgery.model.checkpoint import Checkpoint, Leaf


def leaf_of(value: Any) -> Leaf:
  """A leaf in memory, as a pass would make it."""
  if isinstance(value, (np.ndarray, np.generic)):
    scalar = isinstance(value, np.generic)
    return Leaf(lambda: value, value.shape, str(value.dtype), scalar=scalar)
  return Leaf(lambda: value)


@pytest.fixture
def leaf() -> Callable[[Any], Leaf]:
  return leaf_of


@pytest.fixture
def checkpoint() -> Callable[[Mapping[tuple[str, ...], Any]], Checkpoint]:
  """Makes a checkpoint of values by path."""
  return lambda values: Checkpoint({p: leaf_of(v) for p, v in values.items()})


@pytest.fixture
def msgpack() -> Msgpack:
  return Msgpack()


@pytest.fixture
def put(tmp_path: pathlib.Path) -> Callable[[bytes], pathlib.Path]:
  """Puts bytes into a file."""

  def write(data: bytes) -> pathlib.Path:
    path = tmp_path / 'm.msgpack'
    path.write_bytes(data)
    return path

  return write
