"""Time to open files and list their tensors, beyond imports.

  python benchmarks/open.py

For comparison, to take all payloads through msgpack, as flax does, without
making arrays of them. Medians of interleaved runs.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import msgpack  # type: ignore[import-untyped]
import numpy as np

from surgery.files.plugin import Msgpack
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming.paths import Path

RUNS = 7
# Number of tensors, and float32 elements in each.
SIZES = ((200, 1 << 18), (50_000, 256))


def checkpoint(count: int, elements: int) -> Checkpoint:
  """Returns a model of that many tensors, four in a layer."""
  value = np.ones(elements, np.float32)
  leaf = Leaf(lambda: value, value.shape, 'float32')
  names = ('query', 'key', 'value', 'output')
  leaves: dict[Path, Leaf] = {
    ('model', f'layer_{i // 4}', names[i % 4], 'kernel'): leaf
    for i in range(count)
  }
  return Checkpoint(leaves)


def list_all(path: pathlib.Path) -> None:
  """Opens a file and looks at what it says of each tensor."""
  for leaf in Msgpack().open(path).values():
    _ = leaf.shape, leaf.dtype, leaf.digest


def unpack(path: pathlib.Path) -> None:
  """Reads a file through msgpack."""
  msgpack.unpackb(path.read_bytes(), ext_hook=lambda code, data: len(data))


def seconds(call: Callable[[pathlib.Path], None], path: pathlib.Path) -> float:
  start = time.perf_counter()
  call(path)
  return time.perf_counter() - start


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    files = []
    for count, elements in SIZES:
      model = checkpoint(count, elements)
      for manifest in (False, True):
        path = pathlib.Path(folder, f'{count}-{manifest}.msgpack')
        Msgpack().write(model, path, manifest=manifest)
        files.append((count, 'a digest each' if manifest else 'as flax', path))
    kinds = {'open and list': list_all, 'msgpack.unpackb': unpack}
    took: dict[tuple[str, int, str], list[float]] = {}
    for _ in range(RUNS):
      for count, what, path in files:
        for kind, call in kinds.items():
          times = took.setdefault((kind, count, what), [])
          times.append(seconds(call, path))
    print('tensors  file           by               median s  fastest s')
    for (kind, count, what), times in took.items():
      print(
        f'{count:7,}  {what:13}  {kind:15}  {statistics.median(times):8.4f}  '
        f'{min(times):9.4f}'
      )


if __name__ == '__main__':
  main()
