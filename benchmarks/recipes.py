"""A recipe of ten steps on a saved model, against a copy and ten commands.

  python benchmarks/recipes.py [--gigabytes 2.5] [--rounds 5] [--folder DIR]

Each round runs every task once, each in a process of its own; start-up (Python,
numpy) is not counted, but of the ten commands, each of which has its own, it is
printed apart. Memory is the peak of the process's anonymous memory beyond what
it had after the start-up. Ratios are medians of the ratios within a round, in
which the file is in the system's memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

from files import Memory, copy, run

LAYERS = 20

STEPS: list[Any] = [
  {'assert': {'count': {'of': 'model/h/*/q/kernel', 'is': LAYERS}}},
  {'drop': '**/mask'},
  {'drop': 'model/h/7'},
  {'renumber': 'model/h/<i>'},
  {'rename': 'model/h/<i>/** -> decoder/block<i>/**'},
  {
    'concat': {
      'rules': 'decoder/block<i>/{q,k,v}/kernel -> decoder/block<i>/qkv/kernel',
      'axis': -1,
    }
  },
  {'transpose': '**/up/kernel'},
  {'scale': {'select': '**/o/kernel', 'by': 0.5}},
  {'resize-vocab': {'select': 'model/embed/embedding', 'size': 8256}},
  {'cast': {'to': 'bf16', 'keep': '**/norm*'}},
]


def recipe(source: str, target: str) -> None:
  """All steps in one pass."""
  import surgery

  surgery.Recipe(STEPS).run(model=source, out=target)


def one_by_one(source: str, target: str) -> None:
  """A file after each step, as ten commands do it."""
  import surgery

  before = source
  for number, step in enumerate(STEPS):
    after = f'{target}.{number}.msgpack'
    if number == len(STEPS) - 1:
      after = target
    surgery.Recipe([step]).run(model=before, out=after)
    if before != source:
      pathlib.Path(before).unlink()
    before = after


def planning(source: str, target: str) -> None:
  """The plan alone."""
  import surgery

  surgery.Recipe(STEPS).plan(model=source, out=target).report()


TASKS = {
  'cp + fsync': copy,
  'recipe of ten steps': recipe,
  'its plan alone': planning,
  'ten recipes of one step': one_by_one,
}


def worker(name: str, source: str, target: str) -> dict[str, float]:
  """Runs one task in this process; returns what it took."""
  start = time.perf_counter()
  if name != 'cp + fsync':
    import yaml  # noqa: F401

    import surgery

    _ = surgery.default_host().passes, surgery.Recipe
    import surgery.files.plugin
    import surgery.passes.arithmetic
    import surgery.passes.cast
  memory = Memory()
  startup = time.perf_counter() - start
  memory.start()
  start = time.perf_counter()
  TASKS[name](source, target)
  took = time.perf_counter() - start
  return {'seconds': took, 'startup': startup, 'memory': memory.used}


def make(path: pathlib.Path, size: float) -> None:
  """Writes a model of about `size` bytes in float32."""
  import numpy as np

  from surgery.model import checkpoint

  rng = np.random.default_rng(0)
  noise = rng.normal(0, 0.02, 1 << 22).astype(np.float32)
  # A layer has 12 matrices of that width, more or less.
  width = round((size / 4 / LAYERS / 12.2) ** 0.5 / 64) * 64

  def leaf(*shape: int) -> Any:
    count = int(np.prod(shape))

    def load() -> Any:
      shift = int(rng.integers(1 << 20))
      return np.resize(np.roll(noise, shift), count).reshape(shape)

    return checkpoint.Leaf(load, shape, 'float32')

  leaves = {('model', 'embed', 'embedding'): leaf(8192, width)}
  for i in range(LAYERS):
    at = ('model', 'h', str(i))
    for name in 'qkvo':
      leaves[*at, name, 'kernel'] = leaf(width, width)
    leaves[*at, 'up', 'kernel'] = leaf(width, 4 * width)
    leaves[*at, 'down', 'kernel'] = leaf(4 * width, width)
    leaves[*at, 'norm1', 'scale'] = leaf(width)
    leaves[*at, 'norm2', 'scale'] = leaf(width)
    leaves[*at, 'mask'] = leaf(64, 64)
  checkpoint.Checkpoint(leaves).write(path, overwrite=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gigabytes', type=float, default=2.5)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--folder')
  parser.add_argument('--worker', nargs=3)
  given = parser.parse_args()
  if given.worker:
    print(json.dumps(worker(*given.worker)))
    return
  with tempfile.TemporaryDirectory(dir=given.folder) as folder:
    source = pathlib.Path(folder, 'm.msgpack')
    target = pathlib.Path(folder, 'out.msgpack')
    make(source, given.gigabytes * 1e9)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for _ in range(given.rounds):
      for name in TASKS:
        runs[name].append(run(name, source, target, __file__))
    size = source.stat().st_size
    print(f'float32, {size / 1e9:.2f} GB; medians of {given.rounds} rounds')
    print('task                     seconds  / cp    memory MB  written GB')
    copies = [r['seconds'] for r in runs['cp + fsync']]
    for name, results in runs.items():
      median = lambda key, of=results: statistics.median(r[key] for r in of)
      ratio = statistics.median(
        r['seconds'] / c for r, c in zip(results, copies, strict=True)
      )
      print(
        f'{name:<23}  {median("seconds"):7.3f}  {ratio:5.2f}  '
        f'{median("memory") / 1e6:9.0f}  {median("written") / 1e9:10.2f}'
      )
    one = statistics.median(r['startup'] for r in runs['recipe of ten steps'])
    print(f'start-up of one command, beside Python: {one:.2f} s')


if __name__ == '__main__':
  main()
