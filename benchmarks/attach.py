"""Attaching LoRA to 1,000 to 10,000 layers: is it linear?

Prints the median of interleaved runs; the first run, which compiles, apart.
"""

import argparse
import resource
import statistics
import time

import blox as bx
import jax
import jax.numpy as jnp

import surgery

SIZES = (1000, 2000, 5000, 10000)


def model(layers: int) -> bx.Params:
  """Returns params of that many linear layers of 16×16."""
  params = bx.Params()
  kernel = jnp.ones((16, 16))
  for i in range(layers):
    params[('net', f'layer{i}', 'kernel')] = bx.Param(kernel)
    params[('net', f'layer{i}', 'bias')] = bx.Param(kernel[0])
  return params.locked()


def run(params: bx.Params) -> float:
  """Returns the seconds that one attach takes."""
  start = time.perf_counter()
  adapted = surgery.attach(params, surgery.LoRA(rank=4), to='**')
  jax.block_until_ready(jax.tree.leaves(adapted))
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--runs', type=int, default=5)
  runs = parser.parse_args().runs
  models = {n: model(n) for n in SIZES}
  first = {n: run(models[n]) for n in SIZES}
  seconds: dict[int, list[float]] = {n: [] for n in SIZES}
  for _ in range(runs):
    for n in SIZES:
      seconds[n].append(run(models[n]))
  print(f'{"layers":>8} {"first s":>9} {"median s":>9} {"µs/layer":>9}')
  for n in SIZES:
    middle = statistics.median(seconds[n])
    print(f'{n:>8} {first[n]:>9.2f} {middle:>9.2f} {middle / n * 1e6:>9.0f}')
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  print(f'peak memory {peak:.0f} MB')


if __name__ == '__main__':
  main()
