"""Combining models: each method against a copy of one of them.

Writes models of the size, and a base; each round copies one (cp and fsync) and
combines them in a process of its own by each method. Printed are the wall time,
its ratio to the copy of the same round, the CPU time of both, which says more
on a machine that others use, and the private memory of the process.

    python benchmarks/combine.py [--size 1e9] [--models 2] [METHOD…]

With `--mergekit BIN/mergekit-pytorch` that combines the same files, too.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import resource
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


def timed(words: list[str], script: str = CHILD) -> tuple[float, float, int]:
  """Returns seconds, CPU seconds and private memory in MB of a command."""
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  start = time.perf_counter()
  done = subprocess.run(
    [sys.executable, '-c', script, *words],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  wall = time.perf_counter() - start
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = sum(after[:2]) - sum(before[:2])
  return wall, cpu, int(done.stdout.split()[-1])


# Runs another program and prints the most private memory that it had, in MB.
OTHER = """
import subprocess, sys, time
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
most = 0
while process.poll() is None:
  try:
    for line in open(f'/proc/{process.pid}/smaps_rollup'):
      if line.startswith('Private_Dirty:'):
        most = max(most, int(line.split()[1]))
  except OSError:
    pass
  time.sleep(0.05)
print(most // 1000)
sys.exit(process.returncode)
"""


def mergekit(
  program: str,
  method: str,
  names: list[pathlib.Path],
  base: pathlib.Path | None,
  folder: pathlib.Path,
) -> tuple[float, float, int]:
  """Returns what `timed` does, of mergekit with the same files and options."""
  options = dict(text.split('=') for text in OPTIONS.get(method, []))
  lines = [f'merge_method: {method}', 'models:']
  for name in names:
    lines.append(f'  - model: {name}')
    own = {k: v for k, v in options.items() if k != 't'}
    if own:
      lines.append('    parameters:')
      lines += [f'      {k}: {v}' for k, v in own.items()]
  if base is not None:
    lines.append(f'base_model: {base}')
  if 't' in options:
    lines += ['parameters:', f'  t: {options["t"]}']
  recipe = folder / 'recipe.yaml'
  recipe.write_text('\n'.join(lines))
  out = folder / 'mergekit'
  shutil.rmtree(out, ignore_errors=True)
  try:
    return timed([program, str(recipe), str(out)], OTHER)
  finally:
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('methods', nargs='*')
  parser.add_argument('--size', type=float, default=1e9)
  parser.add_argument('--models', type=int, default=2)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--folder', default=None)
  parser.add_argument('--mergekit', help='the program mergekit-pytorch')
  given = parser.parse_args()
  folder = pathlib.Path(tempfile.mkdtemp(dir=given.folder))
  try:
    names = [folder / f'{k}.safetensors' for k in range(given.models)]
    base = folder / 'base.safetensors'
    for k, path in enumerate([*names, base]):
      write(path, given.size, k)
    known = surgery.default_host().methods
    for method in given.methods or OPTIONS:
      cls = known[method]
      if cls.most is not None and given.models > cls.most:
        continue
      based = base if cls.base == 'required' else None
      words = ['combine', *names, '--method', method, '-q', '--force']
      if based is not None:
        words += ['--base', based]
      for option in OPTIONS.get(method, []):
        words += ['--set', option]
      words += ['-o', folder / 'out.safetensors']
      runs: dict[str, list[tuple[float, float, int]]] = {'surgery': []}
      copies = []
      for _ in range(given.rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = copied(names[0], folder / 'copy')
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        (folder / 'copy').unlink()
        copies.append((wall, sum(after[:2]) - sum(before[:2])))
        runs['surgery'].append(timed([*map(str, words)]))
        (folder / 'out.safetensors').unlink()
        if given.mergekit:
          start = based if method != 'slerp' else names[0]
          found = mergekit(given.mergekit, method, names, start, folder)
          runs.setdefault('mergekit', []).append(found)
      for name, found in runs.items():
        wall, cpu, _ = (statistics.median(x) for x in zip(*found, strict=True))
        ratio = statistics.median(
          one[0] / copy[0] for one, copy in zip(found, copies, strict=True)
        )
        copy, copy_cpu = (
          statistics.median(x) for x in zip(*copies, strict=True)
        )
        print(
          f'{method:<16} {name:<8} {wall:6.2f} s  {ratio:5.1f} × cp '
          f'({copy:.2f} s)  cpu {cpu:6.2f} s (cp {copy_cpu:.2f})  '
          f'{max(one[2] for one in found):5} MB',
          flush=True,
        )
  finally:
    shutil.rmtree(folder)


if __name__ == '__main__':
  main()
