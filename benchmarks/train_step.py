"""Training steps: full, LoRA made dense, LoRA kept factored, and by others.

  python benchmarks/train_step.py [--models mlp64,mlp512,transformer,conv,lstm]
    [--rounds 20] [--width …] [--tokens …] [--to …] [--sweep] [--tracing]

A step is the loss (mean of squared outputs), gradients of what trains, and one
update of SGD, compiled; nothing is donated. Rank 8. All columns of a model run
in one process, once a round, in an order that rotates; ratios are medians of
the ratios within a round. Of the compiler come FLOPs and temporary + output
bytes; the body of a loop counts once. `cpu` is the time of all threads of the
process, which other work on the machine hardly changes.

Before anything is timed, losses and the adapter's gradients of all columns that
compute the same are compared, with the same weights and a random B.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
from training import by_hand, models

import surgery

RATE = 1e-3
# Of a norm. Rounding alone can turn a unit of relu on, which is all of it.
TOLERANCE = 1e-3

Weights = dict[tuple[str, ...], Any]


@dataclasses.dataclass
class Task:
  """A model to train.

  Attributes:
    title: what it is, for the reader.
    make: makes the model from a graph, an Rng and layer classes.
    x: inputs.
    to: which layers are adapted.
    others: makes the same model, given the module of another library.
  """

  title: str
  make: Callable[..., Any]
  x: Any
  to: str
  others: Callable[[Any], Any] | None = None


@dataclasses.dataclass
class Column:
  """A way to train it.

  Attributes:
    step: runs one step and waits.
    trains: number of trained values.
    loss: before the step.
    gradients: of the adapter's weights, by path; none for full fine-tuning.
    flops: of a step, or none if unknown.
    size: temporary and output bytes of a step, or none if unknown.
  """

  step: Callable[[], Any]
  trains: int
  loss: float
  gradients: Mapping[tuple[str, ...], Any] | None = None
  flops: float | None = None
  size: int | None = None


def update_of(loss: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a training step of a loss of what trains, the rest and inputs."""

  def step(trains: Any, rest: Any, x: Any) -> Any:
    value, gradients = jax.value_and_grad(loss)(trains, rest, x)
    return value, jax.tree.map(lambda w, g: w - RATE * g, trains, gradients)

  return step


def compiled(
  loss: Callable[..., Any], trains: Any, rest: Any, x: Any, named: Any = None
) -> Column:
  """Returns a column of a loss.

  Args:
    loss: of what trains, the rest and inputs.
    trains: what trains.
    rest: what does not.
    x: inputs.
    named: makes gradients by path of a tree like `trains`.
  """
  step = jax.jit(update_of(loss)).lower(trains, rest, x).compile()
  memory = step.memory_analysis()
  value, _ = step(trains, rest, x)
  return Column(
    lambda: jax.block_until_ready(step(trains, rest, x)),
    sum(w.size for w in jax.tree.leaves(trains)),
    float(value),
    named and named(jax.jit(jax.grad(loss))(trains, rest, x)),
    step.cost_analysis()['flops'],
    memory.temp_size_in_bytes + memory.output_size_in_bytes,
  )


def loss_of(model: Callable[..., Any]) -> Callable[..., Any]:
  def loss(trains: bx.Params, rest: bx.Params, x: Any) -> Any:
    y, _ = model(trains.merge(rest), x)
    return (y**2).mean()

  return loss


def built(task: Task, layers: models.Layers = models.BLOX) -> Any:
  """Returns a model and its root."""
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  return task.make(graph.child('model'), rng, layers=layers), rng


def initial(task: Task) -> tuple[Any, bx.Params, surgery.AdaptedParams]:
  """Returns a model, its params, and those with LoRA and a random B."""
  model, rng = built(task)
  _, base = model(rng.seed(bx.Params(), seed=0), task.x)
  base = base.locked()
  lora = surgery.LoRA(rank=by_hand.RANK)
  params = surgery.attach(base, lora, to=task.to)
  params = surgery.freeze(params)
  weights, rest = params.split()
  numbers = np.random.default_rng(0)
  weights = jax.tree.map(
    lambda w: jnp.asarray(numbers.normal(size=w.shape) * 0.02, w.dtype), weights
  )
  return model, base, weights.merge(rest)


def by_path(params: bx.Params) -> Weights:
  return {p[2:]: q.value for p, q in params.items() if q.trainable}


def plain(params: bx.Params) -> bx.Params:
  """Returns the same as params that know of no adapter."""
  result = bx.Params()
  for path, param in params.items():
    result[path] = param
  return result.locked()


def columns_of(task: Task, others: bool = True) -> dict[str, Column]:
  """Returns the ways to train a model, compiled and not yet compared."""
  model, base, params = initial(task)
  halves = params.split()
  columns = {
    'full fine-tuning': compiled(loss_of(model), *base.split(), task.x),
  }
  if task.x.ndim == 3:
    flat, _ = built(task, by_hand.FLAT)
    columns['full, 2-D'] = compiled(loss_of(flat), *base.split(), task.x)
  columns['dense'] = compiled(loss_of(model), *halves, task.x, by_path)
  if hasattr(surgery, 'factored'):
    loss = loss_of(surgery.factored(model))
    columns['factored'] = compiled(loss, *halves, task.x, by_path)
  else:
    print('factored: left out, there is no surgery.factored')
  halves = plain(params).split()
  hand, _ = built(task, by_hand.LAYERS)
  columns['by hand'] = compiled(loss_of(hand), *halves, task.x, by_path)
  if task.x.ndim == 3:
    hand, _ = built(task, by_hand.FLAT)
    columns['by hand, 2-D'] = compiled(loss_of(hand), *halves, task.x, by_path)
  if not others:
    return columns
  if task.others is None:
    print('flax nnx and PEFT: left out, nnx has no LoRA for such layers')
    return columns
  values = {p[2:]: q.value for p, q in params.items()}
  module = importlib.import_module('training.in_flax')
  loss, trains, rest, named = module.column(task.others(module), values)
  columns['flax nnx'] = compiled(loss, trains, rest, task.x, named)
  # Threads of OpenMP that wait by spinning slow all other columns, and torch
  # itself where other work runs.
  os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
  try:
    module = importlib.import_module('training.in_torch')
  except ImportError as error:
    print(f'PEFT: left out, {error}')
  else:
    step, value, gradients = module.column(
      task.others(module), values, task.x, RATE
    )
    trains = sum(g.size for g in gradients.values())
    columns['PEFT, torch'] = Column(step, trains, value, gradients)
  return columns


def compare(columns: Mapping[str, Column]) -> None:
  """Stops unless all columns with an adapter agree with the dense one."""
  expected = columns['dense']
  for name, column in columns.items():
    if column.gradients is None:
      continue
    errors = {'the loss': _difference(expected.loss, column.loss)}
    if column.gradients.keys() != expected.gradients.keys():
      raise SystemExit(f'{name}: trains other weights than dense does')
    for path, gradient in expected.gradients.items():
      where = '/'.join(path)
      errors[where] = _difference(gradient, column.gradients[path])
    worst = max(errors, key=errors.__getitem__)
    # Not-a-number must not pass.
    if not errors[worst] <= TOLERANCE:
      raise SystemExit(
        f'{name} and dense differ in {worst}: by {errors[worst]:.2g} of its '
        f'norm, and {TOLERANCE:.0e} is allowed'
      )


def _difference(expected: Any, actual: Any) -> float:
  a, b = np.asarray(expected, np.float64), np.asarray(actual, np.float64)
  if a.shape != b.shape:
    return float('inf')
  return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@dataclasses.dataclass
class Times:
  """Seconds of each round, by name: of the clock, and of all threads."""

  wall: dict[str, list[float]]
  cpu: dict[str, list[float]]

  def ratio(self, name: str, to: str, of: str = 'wall') -> float:
    """Returns the median of ratios within a round."""
    times = getattr(self, of)
    return statistics.median(
      a / b for a, b in zip(times[name], times[to], strict=True)
    )


def timed(
  runs: Mapping[str, Callable[[], Any]],
  rounds: int,
  before: Callable[[], Any] = lambda: None,
) -> Times:
  """Runs everything once a round, in an order that rotates.

  Args:
    runs: what to run.
    rounds: how often.
    before: called before each, not timed.
  """
  names = list(runs)
  times = Times({n: [] for n in names}, {n: [] for n in names})
  for number in range(-1, rounds):
    shift = number % len(names)
    for name in names[shift:] + names[:shift]:
      before()
      cpu, wall = time.process_time(), time.perf_counter()
      runs[name]()
      wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
      if number >= 0:  # The first round warms up.
        times.wall[name].append(wall)
        times.cpu[name].append(cpu)
  return times


def show(rows: Iterable[Iterable[str]], head: str) -> None:
  names = head.split(', ')
  print(f'| {" | ".join(names)} |')
  print(f'| {" | ".join("---" for _ in names)} |')
  for row in rows:
    print(f'| {" | ".join(row)} |')
  print(flush=True)


def report(columns: Mapping[str, Column], rounds: int) -> None:
  times = timed({n: c.step for n, c in columns.items()}, rounds)
  hand = columns['by hand']
  rows = []
  for name, column in columns.items():
    flops = size = ''
    if column.flops is not None:
      flops = f'{column.flops / 1e9:.2f} ({column.flops / hand.flops:.2f})'
    if column.size is not None:
      size = f'{column.size / 2**20:.1f} ({column.size / hand.size:.2f})'
    rows.append(
      [
        name,
        f'{column.trains:,}',
        flops,
        size,
        f'{1e3 * statistics.median(times.wall[name]):.1f}',
        f'{times.ratio(name, "full fine-tuning"):.2f}',
        f'{times.ratio(name, "by hand"):.2f}',
        f'{times.ratio(name, "full fine-tuning", "cpu"):.2f}',
        f'{times.ratio(name, "by hand", "cpu"):.2f}',
      ]
    )
  show(
    rows,
    ', trains, GFLOP (/ hand), temp + out MiB (/ hand), step ms, / full, '
    '/ hand, cpu / full, cpu / hand',
  )


def mlp(tokens: int, width: int, depth: int) -> Task:
  return Task(
    f'MLP of {depth}×{width}, {tokens} tokens',
    functools.partial(models.MLP, width=width, depth=depth),
    jax.random.normal(jax.random.key(1), (tokens, width)),
    '**/linear*',
    lambda library: library.MLP(width, depth),
  )


def transformer(batch: int, width: int, depth: int, to: str) -> Task:
  return Task(
    f'Transformer of {depth} layers of {width}, {batch}×256 tokens, LoRA on '
    f'{to}',
    functools.partial(models.Transformer, width=width, depth=depth),
    jax.random.normal(jax.random.key(1), (batch, 256, width)),
    f'**/{{{to}}}' if ',' in to else f'**/{to}',
    lambda library: library.Transformer(width, depth),
  )


def conv() -> Task:
  return Task(
    'Five 3×3 convolutions of 32 to 128 channels, 32 images of 32×32',
    models.ConvNet,
    jax.random.normal(jax.random.key(1), (32, 32, 32, 3)),
    '**/{conv*,head}',
  )


def lstm(width: int) -> Task:
  return Task(
    f'LSTM of {width} and a linear layer, 32 sequences of 64',
    functools.partial(models.Recurrent, width=width),
    jax.random.normal(jax.random.key(1), (32, 64, width)),
    '**/{gates,readout}',
  )


def tasks(given: argparse.Namespace) -> dict[str, Callable[[], Task]]:
  width = given.width
  tokens = given.tokens
  return {
    'mlp64': lambda: mlp(tokens or 64, width or 1024, 12),
    'mlp512': lambda: mlp(tokens or 512, width or 1024, 12),
    'transformer': lambda: transformer(
      max(1, (tokens or 1024) // 256), width or 512, 4, given.to
    ),
    'conv': conv,
    'lstm': lambda: lstm(width or 256),
  }


def sweep(given: argparse.Namespace) -> None:
  """Prints LoRA's step relative to the others', by width and tokens."""
  print('## Width and tokens: an MLP of 4 layers\n')
  rows = []
  for width in given.widths:
    for tokens in given.token_counts:
      columns = columns_of(mlp(tokens, width, 4), others=False)
      compare(columns)
      times = timed({n: c.step for n, c in columns.items()}, given.rounds)
      lora = 'factored' if 'factored' in columns else 'by hand'
      others = [
        n for n in ('full fine-tuning', 'dense', 'by hand') if n != lora
      ]
      row = [str(width), str(tokens), lora]
      for name in ('full fine-tuning', 'dense', 'by hand'):
        shown = ''
        if name in others:
          shown = f'{times.ratio(lora, name):.2f}'
          shown += f' ({times.ratio(lora, name, "cpu"):.2f})'
        row.append(shown)
      full = columns['full fine-tuning']
      row.append(f'{columns[lora].flops / full.flops:.2f}')
      row.append(f'{columns[lora].size / full.size:.2f}')
      rows.append(row)
      gc.collect()
  show(
    rows,
    'width, tokens, LoRA, / full (cpu), / dense (cpu), / hand (cpu), '
    'FLOPs / full, bytes / full',
  )


def tracing(given: argparse.Namespace) -> None:
  """Prints what tracing a model of many layers and an eager call take."""
  depth = given.layers
  task = mlp(4, 8, depth)
  model, base, params = initial(task)
  hand, _ = built(task, by_hand.LAYERS)
  cases = {
    'no adapter': (model, base),
    'dense': (model, params),
    'by hand': (hand, plain(params)),
  }
  if hasattr(surgery, 'factored'):
    cases['factored'] = (surgery.factored(model), params)
  else:
    print('factored: left out, there is no surgery.factored')

  def trace(model: Any, params: bx.Params) -> Any:
    return jax.jit(update_of(loss_of(model))).trace(*params.split(), task.x)

  traces = timed(
    {n: functools.partial(trace, *case) for n, case in cases.items()},
    given.rounds,
    jax.clear_caches,
  )
  calls = timed(
    {
      n: functools.partial(
        lambda model, params: jax.block_until_ready(model(params, task.x)[0]),
        *case,
      )
      for n, case in cases.items()
    },
    given.rounds,
  )
  print(f'## Tracing a step of {depth} layers of 8×8, and an eager call\n')
  show(
    [
      [
        name,
        f'{statistics.median(traces.wall[name]):.2f}',
        f'{traces.ratio(name, "dense"):.2f}',
        f'{traces.ratio(name, "dense", "cpu"):.2f}',
        f'{1e3 * statistics.median(calls.wall[name]):.0f}',
        f'{calls.ratio(name, "dense"):.2f}',
        f'{calls.ratio(name, "dense", "cpu"):.2f}',
      ]
      for name in cases
    ],
    ', trace s, / dense, cpu / dense, eager call ms, / dense, cpu / dense',
  )


def numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  option = parser.add_argument
  option('--models', default='mlp64,mlp512,transformer,conv,lstm')
  option('--rounds', type=int, default=20)
  option('--width', type=int, help='instead of 1024, 512 and 256')
  option('--tokens', type=int, help='instead of 64, 512 and 1024')
  option(
    '--to',
    default='query,key,value,out,up,down',
    help='layers of the transformer to adapt; query,value is usual too',
  )
  option('--no-others', action='store_true', help='without flax and PEFT')
  option('--sweep', action='store_true', help='only widths and tokens')
  option('--widths', type=numbers, default='256,512,1024,2048')
  option('--token-counts', type=numbers, default='64,256,1024,2048')
  option('--tracing', action='store_true', help='only tracing and eager calls')
  option('--layers', type=int, default=1000, help='to trace')
  given = parser.parse_args()
  if given.sweep:
    return sweep(given)
  if given.tracing:
    return tracing(given)
  known = tasks(given)
  for name in given.models.split(','):
    if name not in known:
      parser.error(f'no model {name!r}; there are {", ".join(known)}')
    task = known[name]()
    print(f'## {task.title}\n')
    columns = columns_of(task, not given.no_others)
    compare(columns)
    print(f'\nLosses and gradients agree. Medians of {given.rounds} rounds.\n')
    report(columns, given.rounds)
    del columns
    gc.collect()
    jax.clear_caches()
  tracing(given)


if __name__ == '__main__':
  main()
