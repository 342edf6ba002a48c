"""An adapter for each row of a batch, against one adapter for all of it.

  python benchmarks/routing.py [--width 1024] [--layers 4] [--adapters 1000]
    [--rounds 20]

A multilayer perceptron, LoRA of rank 8 on each layer, a compiled forward pass.
Each round runs every task once; ratios are medians of the ratios within a
round, to one adapter for all rows, kept factored too. The index is drawn anew
in each round. Bytes are the compiler's temporary + output bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

import surgery


class MLP(bx.Module):
  """Layers of one width."""

  def __init__(self, graph: bx.Graph, width: int, count: int, rng: Any) -> None:
    super().__init__(graph)
    self.layers = [
      bx.Linear(graph.child(f'h{k}'), width, rng) for k in range(count)
    ]

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns outputs and params."""
    for layer in self.layers:
      x, params = layer(params, jax.nn.relu(x))
    return x, params


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--width', type=int, default=1024)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--adapters', type=int, default=1000)
  parser.add_argument('--rounds', type=int, default=20)
  given = parser.parse_args()
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = MLP(graph.child('mlp'), given.width, given.layers, rng)
  numbers = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(numbers.normal(size=shape), 'float32')
  _, base = model(rng.seed(bx.Params(), seed=0), draw(1, given.width))
  one = surgery.attach(base.locked(), surgery.LoRA(rank=8), to='**')
  weights, rest = one.split(lambda path, p: 'adapter' in p.metadata)
  many = jax.tree.map(lambda w: draw(given.adapters, *w.shape) * 0.03, weights)
  stacked = many.merge(rest)
  fast = surgery.factored(model)

  @jax.jit
  def alone(params: bx.Params, x: Any) -> Any:
    return fast(params, x)[0]

  @jax.jit
  def routed(params: bx.Params, index: Any, x: Any) -> Any:
    return fast(surgery.route(params, index), x)[0]

  print(
    f'{given.layers} layers of {given.width}, {given.adapters} adapters of '
    f'rank 8; medians of {given.rounds} rounds\n\n'
    '| rows | no adapter, ms | one adapter, ms | each its own, ms | / one | '
    'µs more a row | MiB / one |\n| --- | --- | --- | --- | --- | --- | --- |'
  )
  for rows in (1, 8, 64, 256):
    x = draw(rows, given.width)
    tasks = {
      'none': lambda index, x=x: alone(base.locked(), x),
      'one': lambda index, x=x: alone(one, x),
      'each': lambda index, x=x: routed(stacked, index, x),
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(given.rounds + 1):
      index = jnp.asarray(numbers.integers(given.adapters, size=rows), 'int32')
      for name, task in tasks.items():
        start = time.perf_counter()
        jax.block_until_ready(task(index))
        if number:  # The first one compiles.
          times[name].append(time.perf_counter() - start)
    middle = {n: 1e3 * statistics.median(t) for n, t in times.items()}
    ratio = statistics.median(
      a / b for a, b in zip(times['each'], times['one'], strict=True)
    )
    sizes = []
    for program in (
      alone.lower(one, x).compile(),
      routed.lower(stacked, jnp.zeros(rows, 'int32'), x).compile(),
    ):
      known = program.memory_analysis()
      sizes.append(known.temp_size_in_bytes + known.output_size_in_bytes)
    more = 1e3 * (middle['each'] - middle['one']) / rows
    print(
      f'| {rows} | {middle["none"]:.2f} | {middle["one"]:.2f} | '
      f'{middle["each"]:.2f} | {ratio:.2f} | {more:.0f} | '
      f'{sizes[1] / 2**20:.1f} / {sizes[0] / 2**20:.1f} |'
    )


if __name__ == '__main__':
  main()
