"""Damaged files give a `FormatError` or a model, and cost little."""

import copy
import functools
import random
import resource
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from surgery.core import errors
from surgery.core.checkpoint import Checkpoint, Leaf
from surgery.core.paths import Path
from surgery.files.msgpack import chunks

MUTATIONS = 2500

# First bytes of everything in msgpack, and lengths that lie.
TELLING = bytes(
  (0, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xFF)
)


@pytest.fixture
def data(msgpack, tmp_path, monkeypatch):
  """A small file with everything in it."""
  monkeypatch.setattr(chunks, 'MAX_CHUNK_SIZE', 64)
  values: dict[Path, Any] = {
    ('net', 'layer_0', 'kernel'): np.arange(12, dtype=np.float32).reshape(3, 4),
    ('net', 'layer_0', 'bias'): np.ones(4, ml_dtypes.bfloat16),
    ('net', 'layer_1', 'kernel'): np.ones((3, 7), np.float32),
    ('net', 'mask'): np.array([True, False]),
    ('net', 'empty'): np.zeros((0, 3), np.int8),
    ('step',): np.int32(3),
  }
  leaves = {
    path: Leaf(
      functools.partial(copy.copy, value),
      value.shape,
      value.dtype.name,
      scalar=isinstance(value, np.generic),
      trainable='bias' not in path,
      metadata={'tag': ('x', 1)} if 'kernel' in path else {},
    )
    for path, value in values.items()
  }
  for name, value in (('z', 1 + 2j), ('t', 'text'), ('n', None), ('d', {})):
    leaves['more', name] = Leaf(functools.partial(copy.copy, value))
  path = tmp_path / 'whole.msgpack'
  msgpack.write(Checkpoint(leaves), path)
  return path.read_bytes()


def mutated(data: bytes, rng: random.Random) -> bytes:
  """The file with one to three kinds of damage."""
  found = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(found))
    length = rng.randint(1, 16)
    kind = rng.randrange(6)
    if kind == 0:
      found[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      found[at] = rng.choice(TELLING)
    elif kind == 2:
      del found[at : at + length]
    elif kind == 3:
      found[at:at] = rng.randbytes(length)
    elif kind == 4:
      found[at : at + length] = b'\xff' * length
    else:
      other = rng.randrange(len(found))
      found[at:at] = found[other : other + length]
  return bytes(found)


@pytest.mark.parametrize('seed', [0, 1])
def test_damage_is_noticed_or_harmless(msgpack, tmp_path, data, seed):
  rng = random.Random(seed)
  path = tmp_path / 'm.msgpack'
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  refused = 0
  for _ in range(MUTATIONS // 2):
    path.write_bytes(mutated(data, rng))
    try:
      for leaf in msgpack.open(path).values():
        value = leaf.load()
        if leaf.shape is not None:
          assert (leaf.shape, leaf.nbytes) == (value.shape, value.nbytes)
    except errors.FormatError as error:
      refused += 1
      assert str(error).startswith(str(path))
      assert error.offset is not None
      assert 0 <= error.offset <= path.stat().st_size
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 50_000  # Kilobytes.
  # Most of the file is not payload, so most damage is noticed.
  assert refused > MUTATIONS // 4
