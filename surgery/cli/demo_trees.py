"""The demo's job on a model of linen, nnx or equinox.

The same as `surgery.cli.demo` does with blox, as an example of the library on
models of other frameworks.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

from surgery import errors

Progress = Callable[[int], None]
# What is called to make a model: its arrays, a function that makes the model of
# arrays, one that calls it, and types of layers where arrays know none.
Made = tuple[Any, Callable[[Any], Any], Callable[[Any, Any], Any], Any]


def linen(sizes: tuple[int, ...], seed: int, x: Any) -> Made:
  """Returns a perceptron of linen, whose params are dicts."""
  import flax.linen as nn
  import jax

  import surgery

  layers: list[Any] = []
  for size in sizes[:-1]:
    layers += [nn.Dense(size), nn.relu]
  module = nn.Sequential([*layers, nn.Dense(sizes[-1])])
  params = module.init(jax.random.key(seed), x)['params']
  call = lambda params, x: module.apply({'params': params}, x)
  return params, lambda params: params, call, surgery.layers(module, x)


def nnx(sizes: tuple[int, ...], seed: int, x: Any) -> Made:
  """Returns a perceptron of nnx, which is an object with Variables."""
  from flax import nnx

  rngs = nnx.Rngs(seed)
  layers: list[Any] = []
  for before, size in zip((x.shape[-1], *sizes), sizes, strict=False):
    layers += [nnx.Linear(before, size, rngs=rngs), nnx.relu]
  graph, arrays = nnx.split(nnx.Sequential(*layers[:-1]))
  rebuild = lambda arrays: nnx.merge(graph, arrays)
  return arrays, rebuild, lambda model, x: model(x), None


def equinox(sizes: tuple[int, ...], seed: int, x: Any) -> Made:
  """Returns a perceptron of equinox, which is a pytree."""
  import equinox as eqx
  import jax

  layers: list[Any] = []
  keys = jax.random.split(jax.random.key(seed), len(sizes))
  widths = (x.shape[-1], *sizes)
  for before, size, key in zip(widths, sizes, keys, strict=False):
    layers += [eqx.nn.Linear(before, size, key=key), eqx.nn.Lambda(jax.nn.relu)]
  model = eqx.nn.Sequential(layers[:-1])
  arrays, rest = eqx.partition(model, eqx.is_inexact_array)
  rebuild = lambda arrays: eqx.combine(arrays, rest)
  return arrays, rebuild, lambda model, x: jax.vmap(model)(x), None


FRAMEWORKS: dict[str, Callable[[tuple[int, ...], int, Any], Made]] = {
  'linen': linen,
  'nnx': nnx,
  'equinox': equinox,
}


def _train(
  half: Any,
  logits: Callable[[Any, Any], Any],
  digits: Any,
  steps: int,
  rate: float,
  batch: int,
  progress: Progress,
) -> Any:
  """Returns what trains, trained with Adam.

  Args:
    half: what trains: arrays, or the half of a tree.
    logits: returns what the model says of images, given that.
    digits: the data.
    steps: number of batches.
    rate: learning rate.
    batch: images a batch.
    progress: told of each step.
  """
  import jax
  import numpy as np
  import optax

  tx = optax.adam(rate)
  state = tx.init(half)

  def loss(half: Any, x: Any, y: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(half, x), y)
    return losses.mean()

  @jax.jit
  def step(half: Any, state: Any, x: Any, y: Any) -> Any:
    gradients = jax.grad(loss)(half, x, y)
    updates, state = tx.update(gradients, state, half)
    return optax.apply_updates(half, updates), state

  draw = np.random.default_rng(0)
  for i in range(steps):
    chosen = draw.integers(len(digits.labels), size=batch)
    half, state = step(
      half, state, digits.images[chosen], digits.labels[chosen]
    )
    progress(i + 1)
  return half


def run(
  framework: str,
  folder: pathlib.Path,
  seed: int,
  progress: Callable[[str, int], contextlib.AbstractContextManager[Progress]],
) -> dict[str, Any]:
  """Does the whole job and returns its figures, as `surgery.cli.demo.run`.

  Raises:
    SurgeryError: if the framework is not installed, or something that must hold
      does not.
  """
  import jax
  import numpy as np

  import surgery
  from surgery.cli import demo

  try:
    importlib.import_module('equinox' if framework == 'equinox' else 'flax')
  except ImportError:
    raise errors.SurgeryError(
      f'demo: {framework} is not installed: pip install {framework}.'
    ) from None
  names = ('base', 'adapted', 'trained', 'adapter', 'merged')
  files = {name: folder / f'{name}.msgpack' for name in names}
  digits = demo.load_digits()
  old, new = digits.only(range(5)), digits.only(range(5, 10))
  made = FRAMEWORKS[framework](demo.SIZES, seed, digits.images[:1])
  arrays, rebuild, call, known = made

  # 1. Somebody else's work: a model of the digits 0 to 4, in a file.
  with progress('pretraining on 0-4', demo.PRETRAIN_STEPS) as told:
    plain = lambda arrays, x: call(rebuild(arrays), x)
    steps, batch = demo.PRETRAIN_STEPS, demo.BATCH
    arrays = _train(arrays, plain, old, steps, 2e-3, batch, told)
  base = rebuild(arrays)
  layers = {} if known is None else {'layers': known}
  surgery.save(files['base'], base, **layers)

  # 2. An adapter, attached to the file. No model code is needed for that.
  adapted = surgery.attach(
    surgery.open(files['base']),
    surgery.LoRA(rank=demo.RANK),
    to='type:Dense' if framework == 'linen' else 'type:Linear',
    seed=seed,
  )
  adapted.write(files['adapted'], overwrite=True, host=surgery.default_host())

  # 3. Load it into the model's structure, freeze, train.
  tree = surgery.freeze(surgery.load(files['adapted'], like=base))
  half, rest = tree.split()
  fast = surgery.factored(call, strict=True)
  with progress('adapting to 5-9', demo.ADAPT_STEPS) as told:
    factored = lambda half, x: fast(half.merge(rest), x)
    half = _train(half, factored, new, demo.ADAPT_STEPS, 1e-2, batch, told)
  tree = half.merge(rest)
  surgery.save(files['trained'], tree)
  surgery.save_adapter(files['adapter'], tree)

  # 4. Merge, save, load again.
  surgery.save(files['merged'], surgery.merge(tree))
  merged = surgery.load(files['merged'], like=base)
  off = surgery.disable(tree)

  def equal(a: Any, b: Any) -> bool:
    return np.array_equal(
      call(a, digits.test_images), call(b, digits.test_images)
    )

  def accuracy(model: Any, some: Any) -> float:
    found = call(model, some.test_images).argmax(axis=-1)
    return float((found == some.test_labels).mean())

  models = {
    'base': base,
    'adapted': tree.resolve(),
    'adapter off': off.resolve(),
    'merged': merged,
  }
  size = lambda tree: sum(v.size for v in jax.tree.leaves(tree))
  bare = [surgery.stats(one) for one in (base, surgery.detach(tree))]
  weights = surgery.adapters(tree)[0].size
  return {
    'accuracy': {
      name: {'0-4': accuracy(model, old), '5-9': accuracy(model, new)}
      for name, model in models.items()
    },
    'trainable share': weights / (weights + size(arrays)),
    'bytes': {name: path.stat().st_size for name, path in files.items()},
    'base bit-unchanged': all(
      first == second for first, second in zip(*bare, strict=True)
    )
    and equal(base, surgery.detach(tree)),
    'off equals base': equal(off.resolve(), base),
    'merged equals adapted': equal(merged, tree.resolve()),
  }
