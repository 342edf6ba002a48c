"""Combining models: each method against a copy of one of them.

Writes models of the size, and a base; each round copies one (cp and fsync) and
combines them in a process of its own by each method. Printed are the wall time,
its ratio to the copy of the same round, and the private memory of the process.

    python benchmarks/combine.py [--size 1e9] [--models 2] [METHOD…]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import surgery

OPTIONS = {
  'linear': ['weight=0.7'],
  'mean': [],
  'slerp': ['t=0.3'],
  'task_arithmetic': ['weight=0.5'],
  'ties': ['weight=0.5', 'density=0.5'],
  'dare_ties': ['weight=0.5', 'density=0.5'],
  'breadcrumbs': ['weight=0.5', 'density=0.5'],
  'model_stock': [],
  'della': ['weight=0.5', 'density=0.5'],
}
# Prints the most private memory that the process had, in MB.
CHILD = """
import sys, threading, time
from surgery.cli import main
most = [0]
def look():
  while True:
    for line in open('/proc/self/smaps_rollup'):
      if line.startswith(('Private_Dirty', 'Private_Clean')):
        kind, size = line.split()[:2]
        if kind == 'Private_Dirty:':
          most[0] = max(most[0], int(size))
    time.sleep(0.05)
threading.Thread(target=look, daemon=True).start()
code = main.run(sys.argv[1:], own=True)
print(most[0] // 1000)
sys.exit(code)
"""


def write(path: pathlib.Path, size: float, seed: int) -> None:
  rng = np.random.default_rng(seed)
  count = max(1, int(size / 4 / (4096 * 2048)))
  leaves = {}
  for k in range(count):
    value = rng.standard_normal((4096, 2048), np.float32) * 0.02
    leaves['layers', str(k), 'kernel'] = surgery.Leaf(
      lambda value=value: value, value.shape, 'float32'
    )
  surgery.Checkpoint(leaves).write(path)


def copied(source: pathlib.Path, target: pathlib.Path) -> float:
  start = time.perf_counter()
  subprocess.run(['cp', '--reflink=never', source, target], check=True)
  with target.open('rb+') as file:
    os.fsync(file.fileno())
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('methods', nargs='*')
  parser.add_argument('--size', type=float, default=1e9)
  parser.add_argument('--models', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--folder', default=None)
  given = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(dir=given.folder))
  try:
    names = [folder / f'{k}.safetensors' for k in range(given.models)]
    base = folder / 'base.safetensors'
    for k, path in enumerate([*names, base]):
      write(path, given.size, k)
    known = surgery.default_host().methods
    for method in given.methods or OPTIONS:
      walls, ratios, memory = [], [], 0
      cls = known[method]
      if cls.most is not None and given.models > cls.most:
        continue
      for _ in range(given.rounds):
        copy = copied(names[0], folder / 'copy')
        words = ['combine', *names, '--method', method, '-q', '--force']
        if cls.base == 'required':
          words += ['--base', base]
        for option in OPTIONS.get(method, []):
          words += ['--set', option]
        words += ['-o', folder / 'out.safetensors']
        start = time.perf_counter()
        done = subprocess.run(
          [sys.executable, '-c', CHILD, *map(str, words)],
          check=True,
          stdout=subprocess.PIPE,
          text=True,
        )
        wall = time.perf_counter() - start
        walls.append(wall)
        ratios.append(wall / copy)
        memory = max(memory, int(done.stdout.split()[-1]))
      print(
        f'{method:<18} {statistics.median(walls):6.2f} s  '
        f'{statistics.median(ratios):5.1f} × cp  {memory:5} MB',
        flush=True,
      )
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  main()
