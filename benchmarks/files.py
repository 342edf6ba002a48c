"""Passes over a saved model, against copying the file.

  python benchmarks/files.py [--gigabytes 2.5] [--rounds 5] [--folder DIR]

Each round runs every task once, each in a process of its own, so that tasks
share what noise there is. A process imports what it needs and touches JAX
first; that start-up is printed apart and not counted. Memory is the peak of
the process's anonymous memory (what is not a file's pages) beyond what it had
after the start-up. Ratios are medians of the ratios within a round, in which
the file is in the system's memory; what is read is counted in one more round,
in which it is not.
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


def diff_equal(source: str, target: str) -> None:
  """Compares the file with a copy of it."""
  del target
  _diff(source, '-copy')


def diff_other(source: str, target: str) -> None:
  """Compares the file with one in which every number is another."""
  del target
  _diff(source, '-other')


def _diff(source: str, suffix: str) -> None:
  import surgery
  from surgery.looking.diff import diff

  other = source.replace('.msgpack', f'{suffix}.msgpack')
  host = surgery.default_host()
  list(diff(surgery.open(source), surgery.open(other), host=host))


def verify(source: str, target: str) -> None:
  """Computes all digests."""
  import surgery
  from surgery.looking.verify import verify

  del target
  list(verify(surgery.open(source)))


def listing(source: str, target: str) -> None:
  """Opens the file and looks at every leaf."""
  import surgery

  del target
  for leaf in surgery.open(source).values():
    _ = leaf.shape, leaf.dtype, leaf.digest


# Name → (function, whether it uses JAX, whether it writes).
TASKS = {
  'cp + fsync': (copy, False, True),
  'merge': (merge, True, True),
  'flax load, merge, save': (flax_merge, False, True),
  'rename': (rename, False, True),
  'cast': (cast, False, True),
  'diff, all equal': (diff_equal, False, False),
  'diff, all different': (diff_other, False, False),
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
    """Returns bytes of anonymous memory of this process."""
    for line in pathlib.Path('/proc/self/status').read_text().splitlines():
      if line.startswith('RssAnon'):
        return int(line.split()[1]) * 1024
    raise OSError('no RssAnon in /proc/self/status')

  def run(self) -> None:
    """Takes notice until `used` is asked for."""
    while not self.done.wait(0.005):
      self.peak = max(self.peak, self.now())

  @property
  def used(self) -> int:
    """Most bytes that there were beyond those at the start; ends the watch."""
    self.done.set()
    self.join()
    return max(self.peak, self.now()) - self.before


def bytes_read() -> int:
  """Returns what this process and its children fetched from the disk."""
  for line in pathlib.Path('/proc/self/io').read_text().splitlines():
    if line.startswith('read_bytes'):
      return int(line.split()[1])
  raise OSError('no read_bytes in /proc/self/io')


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
  if name == 'open and list':
    import surgery.files.msgpack
    import surgery.files.sharding
  memory = Memory()
  startup = time.perf_counter() - start
  memory.start()
  read = bytes_read()
  start = time.perf_counter()
  function(source, target)
  took = time.perf_counter() - start
  return {
    'seconds': took,
    'startup': startup,
    'startup memory': memory.before,
    'read': bytes_read() - read,
    'memory': memory.used,
  }


# The files.


def make(path: pathlib.Path, dtype: str, size: float, seed: int = 0) -> None:
  """Writes a model of about `size` bytes with an adapter attached."""
  import numpy as np

  import surgery
  from surgery.adapting.attachment import attach
  from surgery.files import arrays
  from surgery.model import checkpoint, sizes

  host = surgery.default_host()
  itemsize = sizes.itemsize(dtype)
  rng = np.random.default_rng(seed)
  scale = size / 2.5e9
  noise = rng.normal(0, 0.02, 1 << 22).astype(np.float32)

  def leaf(rows: int, columns: int) -> Any:
    rows = max(1, int(rows))

    def load() -> Any:
      shift = int(rng.integers(1 << 20))
      flat = np.resize(np.roll(noise, shift), rows * columns)
      return flat.reshape(rows, columns).astype(arrays.DTYPES[dtype])

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
  name: str,
  source: pathlib.Path,
  target: pathlib.Path,
  script: str = __file__,
) -> dict[str, Any]:
  """Runs one task of a script in a process of its own."""
  target.unlink(missing_ok=True)
  os.sync()
  out = subprocess.run(
    [sys.executable, script, '--worker', name, str(source), str(target)],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
  result['written'] = target.stat().st_size if target.exists() else 0
  return result


def forget(path: pathlib.Path) -> None:
  """Drops a file from the system's memory, so that it is read from the disk."""
  with path.open('rb') as file:
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(
  dtype: str,
  size: int,
  runs: dict[str, list[dict[str, Any]]],
  read: dict[str, int],
) -> None:
  """Prints a table."""
  copies = [r['seconds'] for r in runs['cp + fsync']]
  print(
    f'\n{dtype}, {size / 1e9:.2f} GB, {TENSORS} tensors, {SITES} sites of LoRA '
    f'rank {RANK}; medians of {len(copies)} rounds'
  )
  print(
    'task                     seconds  / cp    memory MB  read GB  written GB  '
    'start-up s, MB'
  )
  for name, results in runs.items():
    median = lambda key, of=results: statistics.median(r[key] for r in of)
    ratio = statistics.median(
      r['seconds'] / c for r, c in zip(results, copies, strict=True)
    )
    print(
      f'{name:<23}  {median("seconds"):7.3f}  {ratio:5.2f}  '
      f'{median("memory") / 1e6:9.0f}  {read[name] / 1e9:7.2f}  '
      f'{median("written") / 1e9:10.2f}  '
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
      other = str(source).replace('.msgpack', '-other.msgpack')
      make(pathlib.Path(other), dtype, given.gigabytes * 1e9, seed=1)
      names = [n for n in TASKS if given.only is None or n in given.only]
      names = ['cp + fsync', *(n for n in names if n != 'cp + fsync')]
      runs: dict[str, list[dict[str, Any]]] = {n: [] for n in names}
      for _ in range(given.rounds):
        for name in names:
          runs[name].append(run(name, source, target))
      read = {}
      for name in names:
        for path in pathlib.Path(folder).glob(f'{dtype}*'):
          forget(path)
        read[name] = run(name, source, target)['read']
      report(dtype, source.stat().st_size, runs, read)
      for path in pathlib.Path(folder).iterdir():
        path.unlink()


if __name__ == '__main__':
  main()
