"""Parameters, training steps and merges of every adapter type on one model.

  python benchmarks/adapters.py [--width 512] [--layers 8] [--rounds 20]

A multilayer perceptron with norms and a batch of 256 rows. Each round runs one
step of every type, interleaved; a step is loss, gradients of what trains, and
an update, compiled. Ratios are medians of the ratios within a round, to a step
that trains all of the base. Merging is that of all layers, eagerly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import blox as bx
import jax
import surgery_lora_family
import surgery_orthogonal
import surgery_products
import surgery_scaling
import surgery_shared

import surgery

TYPES: dict[str, surgery.Adapter | None] = {
  'full fine-tuning': None,
  'lora': surgery.LoRA(rank=8),
  'dora': surgery_lora_family.DoRA(rank=8),
  'pissa': surgery_lora_family.PiSSA(rank=8),
  'olora': surgery_lora_family.OLoRA(rank=8),
  'lora-orthogonal': surgery_lora_family.OrthogonalLoRA(rank=8),
  'lora-bias': surgery_lora_family.BiasLoRA(rank=8),
  'loha': surgery_products.LoHa(rank=8),
  'lokr': surgery_products.LoKr(rank=8),
  'oft': surgery_orthogonal.OFT(block_size=8),
  'boft': surgery_orthogonal.BOFT(block_size=8, factors=3),
  'hra': surgery_orthogonal.HRA(rank=8),
  'ia3': surgery_scaling.IA3(),
  'bitfit': surgery_scaling.BitFit(),
  'ln-tuning': surgery_scaling.LNTuning(),
  'vera': surgery_shared.VeRA(rank=64),
  'vb-lora': surgery_shared.VBLoRA(rank=8, vector_length=64),
}


# Where types go that do not serve linear layers.
PLACES = {'ln-tuning': '**/n*'}


class MLP(bx.Module):
  """Layers of one width, each after a norm."""

  def __init__(self, graph: bx.Graph, width: int, count: int, rng: Any) -> None:
    super().__init__(graph)
    self.layers = [
      bx.Linear(graph.child(f'h{k}'), width, rng) for k in range(count)
    ]
    self.norms = [bx.LayerNorm(graph.child(f'n{k}')) for k in range(count)]

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns outputs and params."""
    for norm, layer in zip(self.norms, self.layers, strict=True):
      x, params = norm(params, x)
      x, params = layer(params, jax.nn.relu(x))
    return x, params


def step_of(model: MLP) -> Any:
  """Returns a compiled training step, in which low-rank stays low-rank."""
  fast = surgery.factored(model)

  def loss(trainable: bx.Params, rest: bx.Params, x: Any) -> Any:
    y, _ = fast(trainable.merge(rest), x)
    return (y**2).mean()

  def step(trainable: bx.Params, rest: bx.Params, x: Any) -> Any:
    gradients = jax.grad(loss)(trainable, rest, x)
    return jax.tree.map(lambda w, g: w - 1e-3 * g, trainable, gradients)

  return jax.jit(step)


def timed(function: Any, *arguments: Any) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--width', type=int, default=512)
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=20)
  given = parser.parse_args()
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = MLP(graph.child('mlp'), given.width, given.layers, rng)
  x = jax.random.normal(jax.random.key(0), (256, given.width))
  _, base = model(rng.seed(bx.Params(), seed=0), x)
  base = base.locked()
  step = step_of(model)
  halves, adapted, counts = {}, {}, {}
  for name, adapter in TYPES.items():
    params = base
    if adapter is not None:
      params = surgery.attach(base, adapter, to=PLACES.get(name, '**/h*'))
      adapted[name] = params
      params = surgery.freeze(params)
    trainable, rest = params.split()
    halves[name] = (trainable, rest)
    counts[name] = sum(v.size for v in jax.tree.leaves(trainable))
    timed(step, trainable, rest, x)
  steps: dict[str, list[float]] = {name: [] for name in TYPES}
  merges: dict[str, list[float]] = {name: [] for name in adapted}
  values = lambda params: [p.value for p in surgery.merge(params).values()]
  for number in range(given.rounds):
    for name, (trainable, rest) in halves.items():
      steps[name].append(timed(step, trainable, rest, x))
    if number % 4 == 0:
      for name, params in adapted.items():
        merges[name].append(timed(values, params))
  print(
    f'{given.layers} layers of {given.width}×{given.width}, 256 rows; medians '
    f'of {given.rounds} rounds'
  )
  print('type               trains       step, ms  / full   merge, ms')
  for name in TYPES:
    ratio = statistics.median(
      a / b for a, b in zip(steps[name], steps['full fine-tuning'], strict=True)
    )
    # The first merge compiles.
    merge = statistics.median(merges[name][1:]) if name in merges else None
    shown = '' if merge is None else f'{1e3 * merge:9.1f}'
    took = 1e3 * statistics.median(steps[name])
    print(f'{name:<17} {counts[name]:9,}  {took:9.2f}  {ratio:6.2f}  {shown}')


if __name__ == '__main__':
  main()
