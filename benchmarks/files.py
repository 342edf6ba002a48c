"""Passes over a saved model, against copying the file.

  python benchmarks/files.py [--gigabytes 2.5] [--rounds 5] [--folder DIR]

Each round runs every task once, each in a process of its own, so that tasks
share what noise there is. A process imports what it needs and touches JAX
first; that start-up is printed apart and not counted. Memory is the peak of
the process's anonymous memory (what is not a file's pages) beyond what it had
after the start-up. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

SITES, RANK, TENSORS, LARGE = 48, 16, 200, 400_000_000
DTYPES = ('float32', 'bfloat16')


# What is measured, each in a process of its own.


def copy(source: str, target: str) -> None:
  """`cp` and `fsync`."""
  subprocess.run(['cp', source, target], check=True)
  with pathlib.Path(target).open('rb') as file:
    os.fsync(file.fileno())


def merge(source: str, target: str) -> None:
  """Folds the adapter in."""
  import surgery
  from surgery.passes.merge import merge

  merge(surgery.open(source), host=surgery.default_host()).write(target)


def flax_merge(source: str, target: str) -> None:
  """The same with flax: load all, compute each, save all."""
  import ml_dtypes  # noqa: F401
  import numpy as np
  from flax import serialization

  tree = serialization.msgpack_restore(pathlib.Path(source).read_bytes())
  tree.pop('__surgery__', None)
  for layer in tree['model'].values():
    if 'lora_a' in layer:
      a, b = layer.pop('lora_a'), layer.pop('lora_b')
      base = layer['kernel']
      wide = np.asarray(base, np.float32) + 2.0 * (a @ b)
      layer['kernel'] = wide.astype(base.dtype)
  with pathlib.Path(target).open('wb') as file:
    file.write(serialization.to_bytes(tree))
    file.flush()
    os.fsync(file.fileno())


def rename(source: str, target: str) -> None:
  """Gives every tensor another name."""
  import surgery

  host = surgery.default_host()
  rules = ['model/** -> decoder/**']
  host.passes['rename'](surgery.open(source), rules, host=host).write(target)


def cast(source: str, target: str) -> None:
  """Casts to bfloat16, or back to float32."""
  import surgery

  host = surgery.default_host()
  opened = surgery.open(source)
  to = 'float32' if 'bfloat16' in source else 'bfloat16'
  host.passes['cast'](opened, to, host=host).write(target)


def diff(source: str, target: str) -> None:
  """Compares the file with a copy of it."""
  from surgery.core.checkpoint import open_checkpoint
  from surgery.passes.diff import diff

  del target
  other = source.replace('.msgpack', '-copy.msgpack')
  list(diff(open_checkpoint(source), open_checkpoint(other)).tensors)


def verify(source: str, target: str) -> None:
  """Computes all digests."""
  from surgery.core.checkpoint import open_checkpoint
  from surgery.passes.verify import verify

  del target
  list(verify(open_checkpoint(source)))


def listing(source: str, target: str) -> None:
  """Opens the file and looks at every leaf."""
  from surgery.core.checkpoint import open_checkpoint

  del target
  for leaf in open_checkpoint(source).values():
    _ = leaf.shape, leaf.dtype, leaf.digest


# Name → (function, whether it uses JAX, whether it writes).
TASKS = {
  'cp + fsync': (copy, False, True),
  'merge': (merge, True, True),
  'flax load, merge, save': (flax_merge, False, True),
  'rename': (rename, False, True),
  'cast': (cast, False, True),
  'diff': (diff, False, False),
  'verify': (verify, False, False),
  'open and list': (listing, False, False),
}


class Memory(threading.Thread):
  """Watches the anonymous memory of this process."""

  def __init__(self) -> None:
    super().__init__(daemon=True)
    self.before = self.peak = self.now()
    self.done = threading.Event()

  @staticmethod
  def now() -> int:
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
      if line.startswith('RssAnon'):
        return int(line.split()[1]) * 1024
    raise OSError('no RssAnon in /proc/self/status')

  def run(self) -> None:
    while not self.done.wait(0.005):
      self.peak = max(self.peak, self.now())

  @property
  def used(self) -> int:
    self.done.set()
    self.join()
    return max(self.peak, self.now()) - self.before


def worker(name: str, source: str, target: str) -> dict[str, Any]:
  """Runs one task in this process; returns what it took."""
  start = time.perf_counter()
  function, uses_jax, _ = TASKS[name]
  if name != 'cp + fsync':
    import surgery

    _ = surgery.default_host().formats
    if name.startswith('flax'):
      import flax.serialization  # noqa: F401
  if uses_jax:
    import jax
    import jax.numpy as jnp

    import surgery.passes.merge

    jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
  memory = Memory()
  startup = time.perf_counter() - start
  memory.start()
  start = time.perf_counter()
  function(source, target)
  took = time.perf_counter() - start
  return {
    'seconds': took,
    'startup': startup,
    'startup memory': memory.before,
    'memory': memory.used,
  }


# The files.


def make(path: pathlib.Path, dtype: str, size: float) -> None:
  """Writes a model of about `size` bytes with an adapter attached."""
  import numpy as np

  import surgery
  from surgery.core import checkpoint
  from surgery.passes.attach import attach

  host = surgery.default_host()
  itemsize = checkpoint.itemsize(dtype)
  from surgery.files.arrays import DTYPES as known

  rng = np.random.default_rng(0)
  scale = size / 2.5e9
  noise = rng.normal(0, 0.02, 1 << 22).astype(np.float32)

  def leaf(rows: int, columns: int) -> Any:
    rows = max(1, int(rows))

    def load() -> Any:
      shift = int(rng.integers(1 << 20))
      flat = np.resize(np.roll(noise, shift), rows * columns)
      return flat.reshape(rows, columns).astype(known[dtype])

    return checkpoint.Leaf(load, (rows, columns), dtype)

  width = 2048
  rest = (size - LARGE * scale) / (TENSORS - 1) / itemsize / width
  leaves = {
    ('model', 'embed', 'embedding'): leaf(
      int(LARGE * scale / itemsize / width), width
    )
  }
  for i in range(TENSORS - 1):
    leaves['model', f'layer_{i:03}', 'kernel'] = leaf(int(rest), width)
  every = (TENSORS - 1) // SITES
  sites = [f'model/layer_{i * every:03}' for i in range(SITES)]
  model = attach(
    checkpoint.Checkpoint(leaves),
    surgery.LoRA(rank=RANK),
    to=sites,
    host=host,
  )
  # B is zero at first; a trained one is not.
  trained = {
    path: leaf.replace(
      load=lambda leaf=leaf: rng.normal(0, 0.02, leaf.shape).astype('float32')
    )
    if path[-1] == 'lora_b'
    else leaf
    for path, leaf in model.items()
  }
  model.replace(leaves=trained).write(path, overwrite=True)


def run(
  name: str, source: pathlib.Path, target: pathlib.Path
) -> dict[str, Any]:
  """Runs one task in a process of its own."""
  target.unlink(missing_ok=True)
  os.sync()
  out = subprocess.run(
    [sys.executable, __file__, '--worker', name, str(source), str(target)],
    check=True,
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
  result['written'] = target.stat().st_size if target.exists() else 0
  return result


def report(
  dtype: str, size: int, runs: dict[str, list[dict[str, Any]]]
) -> None:
  copies = [r['seconds'] for r in runs['cp + fsync']]
  print(
    f'\n{dtype}, {size / 1e9:.2f} GB, {TENSORS} tensors, {SITES} sites of LoRA '
    f'rank {RANK}; medians of {len(copies)} rounds'
  )
  print(
    'task                     seconds  / cp    memory MB  written GB  '
    'start-up s, MB'
  )
  for name, results in runs.items():
    median = lambda key, of=results: statistics.median(r[key] for r in of)
    ratio = statistics.median(
      r['seconds'] / c for r, c in zip(results, copies, strict=True)
    )
    print(
      f'{name:<23}  {median("seconds"):7.3f}  {ratio:5.2f}  '
      f'{median("memory") / 1e6:9.0f}  {median("written") / 1e9:10.2f}  '
      f'{median("startup"):9.2f}, {median("startup memory") / 1e6:4.0f}',
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--gigabytes', type=float, default=2.5)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--folder')
  parser.add_argument('--only', nargs='*')
  parser.add_argument('--dtypes', nargs='*', default=DTYPES)
  parser.add_argument('--worker', nargs=3)
  given = parser.parse_args()
  if given.worker:
    print(json.dumps(worker(*given.worker)))
    return
  with tempfile.TemporaryDirectory(dir=given.folder) as folder:
    for dtype in given.dtypes:
      source = pathlib.Path(folder, f'{dtype}.msgpack')
      target = pathlib.Path(folder, 'out.msgpack')
      make(source, dtype, given.gigabytes * 1e9)
      shutil.copy(source, str(source).replace('.msgpack', '-copy.msgpack'))
      names = [n for n in TASKS if given.only is None or n in given.only]
      names = ['cp + fsync', *(n for n in names if n != 'cp + fsync')]
      runs: dict[str, list[dict[str, Any]]] = {n: [] for n in names}
      for _ in range(given.rounds):
        for name in names:
          runs[name].append(run(name, source, target))
      report(dtype, source.stat().st_size, runs)
      for path in pathlib.Path(folder).iterdir():
        path.unlink()


if __name__ == '__main__':
  main()
