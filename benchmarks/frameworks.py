"""Training steps of models in other frameworks, adapted in each way.

  python benchmarks/frameworks.py [--models mlp,transformer,scanned]
    [--frameworks raw,linen,nnx,equinox] [--rounds 20]

A step is the loss (mean of squared outputs), its gradients with respect to what
trains, and one update of Adam, compiled. LoRA of rank 8 on all kernels. Of the
compiler come FLOPs and temporary bytes; the body of a loop counts once. All
columns of a model run in one process, once a round, in an order that rotates;
times are medians. `trace` is the time until the program is lowered. Columns:

  full        all parameters train
  by hand     x·W + s·(x·A)·B written by hand, in plain JAX
  dense       surgery.attach, and tree.resolve() inside of the loss
  factored    surgery.attach and surgery.factored
  nnx.LoRA    nnx.LoRALinear (nnx alone)
  qwix        qwix's LoRA (linen alone), where it is installed
"""

# ruff: noqa: D101, D102 - models, which their names say.

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import surgery

RANK, WIDTH, HEADS, LAYERS = 8, 256, 4, 2


@dataclasses.dataclass
class Task:
  """A model in one framework.

  Attributes:
    params: the model, or its params.
    call: calls it.
    x: inputs.
    to: what is adapted.
    layers: types of layers, where the params do not know them.
    options: of `surgery.attach`.
    module: a module of linen, for qwix.
    hand: params and function of LoRA by hand.
    lora: params and function with layers that have LoRA built in.
  """

  params: Any
  call: Callable[[Any, Any], Any]
  x: Any
  to: Any
  layers: Any = None
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  module: Any = None
  hand: Callable[[], tuple[Any, Any, Callable[..., Any]]] | None = None
  lora: Any = None


# Multi-layer perceptrons, 3 × 512, batch 64.


MLP = (512, 512, 512, 512)


def raw_mlp() -> dict[str, Any]:
  draw = np.random.default_rng(0)
  pairs = itertools.pairwise(MLP)
  return {
    f'layer{i}': {
      'kernel': jnp.asarray(draw.normal(size=s) / s[0] ** 0.5, 'float32'),
      'bias': jnp.zeros(s[1]),
    }
    for i, s in enumerate(pairs)
  }


def call_mlp(params: Any, x: Any) -> Any:
  for i, layer in enumerate(params.values()):
    x = x @ layer['kernel'] + layer['bias']
    x = jax.nn.relu(x) if i + 1 < len(params) else x
  return x


def hand_mlp() -> tuple[Any, Any, Callable[..., Any]]:
  draw = np.random.default_rng(1)
  normal = lambda *s: jnp.asarray(draw.normal(size=s) / 8, 'float32')
  base = raw_mlp()
  pairs = [layer['kernel'].shape for layer in base.values()]
  adapter = {
    name: (normal(i, RANK), normal(RANK, o))
    for name, (i, o) in zip(base, pairs, strict=True)
  }

  def call(adapter: Any, base: Any, x: Any) -> Any:
    for i, (name, layer) in enumerate(base.items()):
      a, b = adapter[name]
      x = x @ layer['kernel'] + (x @ a) @ b + layer['bias']
      x = jax.nn.relu(x) if i + 1 < len(base) else x
    return x

  return adapter, base, call


class LinenMlp(nn.Module):
  @nn.compact
  def __call__(self, x: Any) -> Any:
    for i, size in enumerate(MLP[1:]):
      x = nn.Dense(size, name=f'layer{i}')(x)
      x = nn.relu(x) if i + 2 < len(MLP) else x
    return x


class NnxMlp(nnx.Module):
  def __init__(self, make: Any) -> None:
    pairs = itertools.pairwise(MLP)
    self.layers = nnx.List([make(i, o) for i, o in pairs])

  def __call__(self, x: Any) -> Any:
    for i, layer in enumerate(self.layers):
      x = layer(x)
      x = nnx.relu(x) if i + 1 < len(self.layers) else x
    return x


def mlps() -> Iterator[tuple[str, Task]]:
  x = np.random.default_rng(2).normal(size=(64, MLP[0])).astype('float32')
  yield 'raw', Task(raw_mlp(), call_mlp, x, '**/kernel', hand=hand_mlp)
  module = LinenMlp()
  params = module.init(jax.random.key(0), x)['params']
  apply = lambda params, x: module.apply({'params': params}, x)
  known = surgery.layers(module, x)
  yield 'linen', Task(params, apply, x, 'type:Dense', known, module=module)
  rngs = nnx.Rngs(0)
  call = lambda model, x: model(x)
  linear = lambda i, o: nnx.Linear(i, o, rngs=rngs)
  lora = lambda i, o: nnx.LoRALinear(i, o, lora_rank=RANK, rngs=rngs)
  yield (
    'nnx',
    Task(NnxMlp(linear), call, x, 'type:Linear', lora=NnxMlp(lora)),
  )
  model = eqx.nn.MLP(512, 512, 512, 2, key=jax.random.key(0))
  batched = lambda model, x: jax.vmap(model)(x)
  yield 'equinox', Task(model, batched, x, 'type:Linear')


# Transformers, 2 layers of 256, 4 heads, 4 × 64 tokens.


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x: Any, _: Any = None) -> Any:
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(HEADS, name='attention')(h)
    h = nn.Dense(4 * WIDTH, name='up')(nn.LayerNorm()(x))
    return x + nn.Dense(WIDTH, name='down')(nn.gelu(h)), None


class LinenTransformer(nn.Module):
  scan: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    if self.scan:
      block = nn.scan(
        nn.remat(LinenBlock, prevent_cse=False),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=LAYERS,
      )
      return block(name='blocks')(x, None)[0]
    for i in range(LAYERS):
      x, _ = LinenBlock(name=f'block{i}')(x)
    return x


class NnxBlock(nnx.Module):
  def __init__(self, rngs: nnx.Rngs) -> None:
    self.first = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.second = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      HEADS, WIDTH, decode=False, rngs=rngs
    )
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

  def __call__(self, x: Any) -> Any:
    x = x + self.attention(self.first(x))
    return x + self.down(nnx.gelu(self.up(self.second(x))))


class NnxTransformer(nnx.Module):
  def __init__(self, rngs: nnx.Rngs) -> None:
    self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

  def __call__(self, x: Any) -> Any:
    for block in self.blocks:
      x = block(x)
    return x


def nnx_scanned() -> tuple[Any, Callable[[Any, Any], Any]]:
  make = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)), in_axes=0, out_axes=0)

  def call(model: Any, x: Any) -> Any:
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def run(block: Any, x: Any) -> Any:
      return block(x)

    return run(model, x)

  return make(jax.random.split(jax.random.key(0), LAYERS)), call


class EqxBlock(eqx.Module):
  first: eqx.nn.LayerNorm
  second: eqx.nn.LayerNorm
  attention: eqx.nn.MultiheadAttention
  up: eqx.nn.Linear
  down: eqx.nn.Linear

  def __init__(self, key: Any) -> None:
    keys = jax.random.split(key, 3)
    self.first = eqx.nn.LayerNorm(WIDTH)
    self.second = eqx.nn.LayerNorm(WIDTH)
    self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
    self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, key=keys[1])
    self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, key=keys[2])

  def __call__(self, x: Any) -> Any:
    h = jax.vmap(self.first)(x)
    x = x + self.attention(h, h, h)
    h = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.second)(x)))
    return x + jax.vmap(self.down)(h)


class EqxTransformer(eqx.Module):
  blocks: list[EqxBlock]

  def __call__(self, x: Any) -> Any:
    for block in self.blocks:
      x = block(x)
    return x


def raw_block(seed: int, lora: bool = False) -> Any:
  draw = np.random.default_rng(seed)
  normal = lambda *s: jnp.asarray(draw.normal(size=s) / s[0] ** 0.5, 'float32')
  shapes = {
    **dict.fromkeys(('query', 'key', 'value', 'out'), (WIDTH, WIDTH)),
    'up': (WIDTH, 4 * WIDTH),
    'down': (4 * WIDTH, WIDTH),
  }
  if lora:
    return {
      n: (normal(i, RANK), normal(RANK, o)) for n, (i, o) in shapes.items()
    }
  return {
    n: {'kernel': normal(*s), 'bias': jnp.zeros(s[1])}
    for n, s in shapes.items()
  }


def call_block(params: Any, x: Any, lora: Any = None) -> Any:
  def linear(name: str, x: Any) -> Any:
    y = x @ params[name]['kernel'] + params[name]['bias']
    if lora is not None:
      y = y + (x @ lora[name][0]) @ lora[name][1]
    return y

  norm = lambda x: jax.nn.standardize(x, epsilon=1e-6)
  heads = lambda x: x.reshape(*x.shape[:-1], HEADS, -1)
  h = norm(x)
  q, k, v = (heads(linear(n, h)) for n in ('query', 'key', 'value'))
  h = jax.nn.dot_product_attention(q, k, v)
  x = x + linear('out', h.reshape(x.shape))
  return x + linear('down', jax.nn.gelu(linear('up', norm(x))))


def call_raw(params: Any, x: Any) -> Any:
  for block in params:
    x = call_block(block, x)
  return x


def call_raw_scanned(params: Any, x: Any) -> Any:
  step = jax.checkpoint(lambda x, block: (call_block(block, x), None))
  return jax.lax.scan(step, x, params)[0]


def hand_transformer() -> tuple[Any, Any, Callable[..., Any]]:
  base = [raw_block(i) for i in range(LAYERS)]
  lora = [raw_block(10 + i, lora=True) for i in range(LAYERS)]

  def call(lora: Any, base: Any, x: Any) -> Any:
    for one, block in zip(lora, base, strict=True):
      x = call_block(block, x, one)
    return x

  return lora, base, call


def hand_scanned() -> tuple[Any, Any, Callable[..., Any]]:
  lora, base, _ = hand_transformer()
  stack = lambda blocks: jax.tree.map(lambda *v: jnp.stack(v), *blocks)

  def call(lora: Any, base: Any, x: Any) -> Any:
    step = lambda x, both: (call_block(both[0], x, both[1]), None)
    return jax.lax.scan(jax.checkpoint(step), x, (base, lora))[0]

  return stack(lora), stack(base), call


def tokens() -> Any:
  return np.random.default_rng(2).normal(size=(4, 64, WIDTH)).astype('float32')


def transformers() -> Iterator[tuple[str, Task]]:
  x = tokens()
  _, base, _ = hand_transformer()
  yield 'raw', Task(base, call_raw, x, '**/kernel', hand=hand_transformer)
  module = LinenTransformer()
  params = module.init(jax.random.key(0), x)['params']
  apply = lambda params, x: module.apply({'params': params}, x)
  known = surgery.layers(module, x)
  yield 'linen', Task(params, apply, x, '**/kernel', known, module=module)
  model = NnxTransformer(nnx.Rngs(0))
  yield 'nnx', Task(model, lambda model, x: model(x), x, '**/kernel')
  keys = jax.random.split(jax.random.key(0), LAYERS)
  model = EqxTransformer([EqxBlock(key) for key in keys])
  batched = lambda model, x: jax.vmap(model)(x)
  yield 'equinox', Task(model, batched, x, 'type:Linear')


def scanned() -> Iterator[tuple[str, Task]]:
  x, stacked = tokens(), {'stacked': 1}
  _, base, _ = hand_scanned()
  yield (
    'raw',
    Task(
      base, call_raw_scanned, x, '**/kernel', options=stacked, hand=hand_scanned
    ),
  )
  module = LinenTransformer(scan=True)
  params = module.init(jax.random.key(0), x)['params']
  apply = lambda params, x: module.apply({'params': params}, x)
  known = surgery.layers(module, x)
  yield (
    'linen',
    Task(params, apply, x, '**/kernel', known, stacked, module=module),
  )
  model, call = nnx_scanned()
  yield 'nnx', Task(model, call, x, '**/kernel', options=stacked)
  keys = jax.random.split(jax.random.key(0), LAYERS)
  model = eqx.filter_vmap(EqxBlock)(keys)

  def scan(model: Any, x: Any) -> Any:
    arrays, rest = eqx.partition(model, eqx.is_array)

    @jax.checkpoint
    def step(x: Any, arrays: Any) -> Any:
      return jax.vmap(eqx.combine(arrays, rest))(x), None

    return jax.lax.scan(step, x, arrays)[0]

  yield 'equinox', Task(model, scan, x, 'type:Linear', options=stacked)


MODELS = {'mlp': mlps, 'transformer': transformers, 'scanned': scanned}


# Ways to train them. Each is what trains, the rest, and a function of both.

Way = tuple[Any, Any, Callable[..., Any]]


def ways(framework: str, task: Task) -> Iterator[tuple[str, Way]]:
  is_array = eqx.is_inexact_array
  arrays, rest = eqx.partition(_pure(task.params), is_array)
  whole = lambda a, r, x: task.call(_impure(eqx.combine(a, r)), x)
  yield 'full', (arrays, rest, whole)
  if task.hand is not None:
    yield 'by hand', task.hand()
  given = {} if task.layers is None else {'layers': task.layers}
  tree = surgery.attach(
    task.params, surgery.LoRA(rank=RANK), to=task.to, **given, **task.options
  )
  half, rest = surgery.freeze(tree).split()
  dense = lambda h, r, x: task.call(h.merge(r).resolve(), x)
  yield 'dense', (half, rest, dense)
  fast = surgery.factored(task.call, strict=True)
  yield 'factored', (half, rest, lambda h, r, x: fast(h.merge(r), x))
  if task.lora is not None:
    graph, lora, rest = nnx.split(task.lora, nnx.LoRAParam, ...)
    merged = lambda h, r, x: nnx.merge(graph, h, r)(x)
    yield 'nnx.LoRA', (lora, rest, merged)
  if task.module is not None and importlib.util.find_spec('qwix'):
    yield 'qwix', _qwix(task)


def _pure(model: Any) -> Any:
  return nnx.split(model) if isinstance(model, nnx.Module) else model


def _impure(model: Any) -> Any:
  is_split = isinstance(model, tuple) and isinstance(model[0], nnx.GraphDef)
  return nnx.merge(*model) if is_split else model


def _qwix(task: Task) -> Way:
  import qwix

  provider = qwix.LoraProvider(module_path='.*', rank=RANK, alpha=RANK)
  module = qwix.apply_lora_to_model(task.module, provider)
  variables = module.init(jax.random.key(0), task.x)['params']
  is_lora = jax.tree_util.tree_map_with_path(
    lambda keys, _: 'lora' in jax.tree_util.keystr(keys), variables
  )
  half, rest = eqx.partition(variables, is_lora)
  call = lambda h, r, x: module.apply({'params': eqx.combine(h, r)}, x)
  return half, rest, call


@dataclasses.dataclass
class Column:
  """One way, compiled."""

  name: str
  run: Callable[[], Any]
  flops: float
  temporary: float
  trains: int
  trace: float
  times: list[float] = dataclasses.field(default_factory=list)


def column(name: str, way: Way, x: Any) -> Column:
  half, rest, call = way
  tx = optax.adam(1e-3)
  state = tx.init(half)
  # Functions and the like are no arguments of a compiled function.
  arrays, static = eqx.partition(rest, eqx.is_array)

  def loss(half: Any, arrays: Any) -> Any:
    return (call(half, eqx.combine(arrays, static), x) ** 2).mean()

  def step(half: Any, arrays: Any, state: Any) -> Any:
    value, gradients = jax.value_and_grad(loss)(half, arrays)
    updates, state = tx.update(gradients, state, half)
    return value, optax.apply_updates(half, updates), state

  begin = time.perf_counter()
  lowered = jax.jit(step).lower(half, arrays, state)
  trace = time.perf_counter() - begin
  program = lowered.compile()
  run = lambda: jax.block_until_ready(program(half, arrays, state))
  run()
  return Column(
    name,
    run,
    float(program.cost_analysis()['flops']),
    float(program.memory_analysis().temp_size_in_bytes),
    sum(v.size for v in jax.tree.leaves(half)),
    trace,
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--models', default=','.join(MODELS))
  parser.add_argument('--frameworks', default='raw,linen,nnx,equinox')
  parser.add_argument('--rounds', type=int, default=20)
  asked = parser.parse_args()
  print(f'jax {jax.__version__}, {jax.devices()[0].platform}')
  for name in asked.models.split(','):
    columns: list[Column] = []
    for framework, task in MODELS[name]():
      if framework not in asked.frameworks.split(','):
        continue
      columns += (
        column(f'{framework} {what}', way, task.x)
        for what, way in ways(framework, task)
      )
    for i in range(asked.rounds):
      for one in columns[i % len(columns) :] + columns[: i % len(columns)]:
        begin = time.perf_counter()
        one.run()
        one.times.append(time.perf_counter() - begin)
    print(f'\n{name:24}   GFLOP  temp MiB   trained  trace ms  step ms')
    for one in columns:
      took = 1e3 * statistics.median(one.times) if one.times else 0.0
      print(
        f'{one.name:24} {one.flops / 1e9:7.3f} {one.temporary / 2**20:9.2f}'
        f' {one.trains:9,} {1e3 * one.trace:9.0f} {took:8.2f}'
      )


if __name__ == '__main__':
  main()
