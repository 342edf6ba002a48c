"""Damages saved models at random and opens them.

  python -m tests.files.fuzzing [--count 300000] [--seed 0] [KIND …]

Whatever is opened is a model or a `FormatError` that names the file and an
offset within it; it costs little memory, and no open takes long.
"""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import random
import resource
import signal
import tempfile
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import surgery
from surgery import errors
from surgery.files.msgpack import chunks
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import Manifest
from surgery.naming.paths import Path

KINDS = ('msgpack', 'safetensors', 'index')
# Seconds that opening one small file may take on a slow machine.
LIMIT = 20

# First bytes of everything in msgpack, and lengths that lie.
_BYTES = bytes(
  (0, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xFF)
)
# What means something in JSON.
_TEXTS = b'{}[],:"\\-+.eE0123456789 tfnu\n\x00\xff'


def model() -> Checkpoint:
  """A small model with everything in it."""
  values: dict[Path, Any] = {
    ('net', 'layer_0', 'kernel'): np.arange(12, dtype=np.float32).reshape(3, 4),
    ('net', 'layer_0', 'bias'): np.ones(4, ml_dtypes.bfloat16),
    ('net', 'layer_1', 'kernel'): np.ones((3, 7), np.float32),
    ('net', 'mask'): np.array([True, False]),
    ('net', 'empty'): np.zeros((0, 3), np.int8),
    ('net', 'a.b'): np.zeros(2, ml_dtypes.int4),
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
  return Checkpoint(leaves, Manifest(metadata={'format': 'flax'}))


def write(kind: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes the model; returns the file that is to be damaged."""
  with mock.patch.object(chunks, 'MAX_CHUNK_SIZE', 64):
    if kind != 'index':
      path = folder / f'm.{kind}'
      model().write(path)
      return path
    model().write(folder / 'm.msgpack', shard_size=400)
    return folder / 'm.msgpack.index.json'


def mutated(data: bytes, rng: random.Random, telling: bytes) -> bytes:
  """A file with one to three kinds of damage."""
  found = bytearray(data)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(found) or 1)
    length = rng.randint(1, 16)
    kind = rng.randrange(7)
    if kind == 0 and found:
      found[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and found:
      found[at] = rng.choice(telling)
    elif kind == 2:
      del found[at : at + length]
    elif kind == 3:
      found[at:at] = rng.randbytes(length)
    elif kind == 4:
      found[at : at + length] = b'\xff' * length
    elif kind == 5:
      found[at:at] = bytes(rng.choice(telling) for _ in range(length))
    else:
      other = rng.randrange(len(found) or 1)
      found[at:at] = found[other : other + length]
  return bytes(found)


def run(kind: str, folder: pathlib.Path, seed: int, count: int) -> int:
  """Opens damaged files.

  Args:
    kind: one of `KINDS`.
    folder: an empty folder.
    seed: of the damage.
    count: number of files.

  Returns:
    How many were refused.

  Raises:
    AssertionError: if one was neither opened nor refused as it should be.
  """
  rng = random.Random(seed)
  path = write(kind, folder)
  data = path.read_bytes()
  telling = _BYTES if kind == 'msgpack' else _TEXTS
  refused = 0
  before = _memory()
  signal.signal(signal.SIGALRM, _hangs)
  for number in range(count):
    damaged = mutated(data, rng, telling)
    path.write_bytes(damaged)
    signal.alarm(LIMIT)
    try:
      refused += _refused(path)
    except BaseException:
      print(f'{kind}: seed {seed}, number {number}: {damaged!r}')
      raise
    finally:
      signal.alarm(0)
  assert _memory() - before < 50_000, _memory() - before
  return refused


def _memory() -> int:
  """Most memory that this process ever had, in kilobytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _hangs(*_: Any) -> None:
  raise AssertionError(f'took more than {LIMIT} s')


def _refused(path: pathlib.Path) -> bool:
  """Opens a file and reads all; returns whether it was refused."""
  try:
    for leaf in surgery.open(path).values():
      value = leaf.load()
      if leaf.shape is not None:
        assert (leaf.shape, leaf.nbytes) == (value.shape, value.nbytes)
  except errors.FormatError as error:
    # Of a set it may be another file that does not fit.
    folder = str(path.parent)
    assert str(error).startswith(folder if '.index' in path.name else str(path))
    assert error.offset is not None
    assert 0 <= error.offset <= path.stat().st_size
    return True
  return False


def main() -> None:
  """Runs as a script."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('kinds', nargs='*', default=KINDS, metavar='KIND')
  parser.add_argument('--count', type=int, default=300_000)
  parser.add_argument('--seed', type=int, default=0)
  given = parser.parse_args()
  for kind in given.kinds:
    with tempfile.TemporaryDirectory(dir='/dev/shm') as folder:
      refused = run(kind, pathlib.Path(folder), given.seed, given.count)
    print(f'{kind}: {refused} of {given.count} refused, the rest opened')


if __name__ == '__main__':
  main()
