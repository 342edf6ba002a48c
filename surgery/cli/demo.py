"""`surgery demo`: the library's main job, on real data, start to end.

A small network learns the handwritten digits 0 to 4 and is saved. An adapter is
attached to the saved file, trained on 5 to 9, merged and saved. It reads as an
example of the library; the command line is at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from surgery import errors
from surgery.cli import demo_trees
from surgery.cli.command import Command

SIZES = (128, 64, 10)
RANK = 8
BATCH = 128
PRETRAIN_STEPS, ADAPT_STEPS = 400, 900

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Digits:
  """Images of digits, split for training and testing.

  Attributes:
    images: float32 `(n, 64)` in 0 to 1, for training.
    labels: int `(n,)`.
    test_images: the same, held out.
    test_labels: the same, held out.
  """

  images: Any
  labels: Any
  test_images: Any
  test_labels: Any

  def only(self, digits: Sequence[int]) -> Digits:
    """Returns the images of some digits."""
    import numpy as np

    train = np.isin(self.labels, digits)
    test = np.isin(self.test_labels, digits)
    return Digits(
      self.images[train],
      self.labels[train],
      self.test_images[test],
      self.test_labels[test],
    )


def load_digits() -> Digits:
  """Returns scikit-learn's handwritten digits (UCI ML, 1,797 images of 8×8).

  Raises:
    SurgeryError: if scikit-learn or optax is not installed.
  """
  try:
    import optax  # noqa: F401
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
  except ImportError as error:
    raise errors.SurgeryError(
      f"the demo needs {error.name}: pip install 'blox-surgery[demo]'."
    ) from None
  images, labels = load_digits(return_X_y=True)
  images = (images / 16).astype('float32')
  train, test, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.25, random_state=0, stratify=labels
  )
  return Digits(train, train_labels, test, test_labels)


def network() -> tuple[Any, Any, Any]:
  """Returns graph, generator and model of a perceptron 64 → 128 → 64 → 10."""
  import blox as bx
  import jax

  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  mlp = graph.child('mlp')
  layers: list[Any] = []
  for i, size in enumerate(SIZES[:-1]):
    layers += [bx.Linear(mlp.child(f'hidden{i}'), size, rng=rng), jax.nn.relu]
  layers.append(bx.Linear(mlp.child('output'), SIZES[-1], rng=rng))
  return graph, rng, bx.Sequential(mlp, layers)


def train(
  model: Any,
  params: Any,
  digits: Digits,
  steps: int,
  rate: float,
  progress: Progress,
) -> Any:
  """Returns params whose trainable part was trained with Adam.

  Args:
    model: the model.
    params: its params; what is frozen stays.
    digits: the data.
    steps: number of batches.
    rate: learning rate.
    progress: told of each step.
  """
  import jax
  import numpy as np
  import optax

  optimizer = optax.adam(rate)
  trainable, rest = params.split()
  state = optimizer.init(trainable)

  def loss(trainable: Any, rest: Any, x: Any, y: Any) -> Any:
    logits, params = model(trainable.merge(rest), x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), params.split()[1]

  @jax.jit
  def step(trainable: Any, rest: Any, state: Any, x: Any, y: Any) -> Any:
    grads, rest = jax.grad(loss, has_aux=True)(trainable, rest, x, y)
    updates, state = optimizer.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), rest, state

  draw = np.random.default_rng(0)
  for i in range(steps):
    batch = draw.integers(len(digits.labels), size=BATCH)
    x, y = digits.images[batch], digits.labels[batch]
    trainable, rest, state = step(trainable, rest, state, x, y)
    progress(i + 1)
  return trainable.merge(rest)


def accuracy(model: Any, params: Any, digits: Digits) -> float:
  """Returns the share of held-out images that are classified right."""
  logits, _ = model(params, digits.test_images)
  return float((logits.argmax(axis=-1) == digits.test_labels).mean())


def run(
  folder: pathlib.Path,
  seed: int,
  progress: Callable[[str, int], contextlib.AbstractContextManager[Progress]],
) -> dict[str, Any]:
  """Does the whole job and returns its figures.

  Args:
    folder: where files go.
    seed: of the model and of the adapter.
    progress: gives a progress bar for a number of steps.

  Raises:
    SurgeryError: if a check fails.
  """
  import blox as bx
  import jax.numpy as jnp

  import surgery
  from surgery.adapting.attachment import attach

  files = {
    name: folder / f'{name}.msgpack'
    for name in ('base', 'adapted', 'trained', 'adapter', 'merged')
  }
  digits = load_digits()
  old, new = digits.only(range(5)), digits.only(range(5, 10))
  graph, rng, model = network()
  _, params = model(rng.seed(bx.Params(), seed=seed), digits.images[:1])

  # 1. Somebody else's work: a model of the digits 0 to 4, in a file.
  with progress('pretraining on 0-4', PRETRAIN_STEPS) as told:
    base = train(model, params.locked(), old, PRETRAIN_STEPS, 2e-3, told)
  surgery.save(files['base'], base, graph=graph)

  # 2. An adapter, attached to the file. No model code is needed for that.
  host = surgery.default_host()
  adapted = attach(
    surgery.open(files['base']),
    surgery.LoRA(rank=RANK),
    to='all',
    seed=seed,
    host=host,
  )
  adapted.write(files['adapted'], overwrite=True, host=host)

  # 3. Load, freeze, train.
  params = surgery.freeze(surgery.load(files['adapted']))
  with progress('adapting to 5-9', ADAPT_STEPS) as told:
    params = train(model, params, new, ADAPT_STEPS, 1e-2, told)
  surgery.save(files['trained'], params, graph=graph)
  surgery.save_adapter(files['adapter'], params)

  # 4. Merge, save, load again.
  surgery.save(files['merged'], surgery.merge(params), graph=graph)
  merged = surgery.load(files['merged'])
  off = surgery.disable(params)

  weights = surgery.adapters(params)[0].size
  total = weights + sum(
    p.value.size for path, p in base.items() if path[1] == 'mlp'
  )
  equal = lambda a, b: bool(
    jnp.array_equal(
      model(a, digits.test_images)[0], model(b, digits.test_images)[0]
    )
  )
  figures = {
    'accuracy': {
      name: {
        '0-4': accuracy(model, some, old),
        '5-9': accuracy(model, some, new),
      }
      for name, some in (
        ('base', base),
        ('adapted', params),
        ('adapter off', off),
        ('merged', merged),
      )
    },
    'trainable share': weights / total,
    'bytes': {name: path.stat().st_size for name, path in files.items()},
    'base bit-unchanged': all(
      jnp.array_equal(base[path].value, params[path].value)
      for path in base.keys()
      if path[1] == 'mlp'
    ),
    'off equals base': equal(off, base),
    'merged equals adapted': equal(merged, params),
  }
  return figures


def check(figures: dict[str, Any]) -> None:
  """Raises unless the demo found what must hold.

  Raises:
    SurgeryError: naming what does not.
  """
  for promise in (
    'base bit-unchanged',
    'off equals base',
    'merged equals adapted',
  ):
    if not figures[promise]:
      raise errors.SurgeryError(f'demo check failed: {promise}.')


# The command line.


@contextlib.contextmanager
def _bar(title: str, steps: int) -> Iterator[Progress]:
  """A progress bar on stderr; none where that is no terminal."""
  from rich import console, progress

  terminal = console.Console(stderr=True)
  with progress.Progress(
    console=terminal, disable=not terminal.is_terminal, transient=True
  ) as bars:
    task = bars.add_task(title, total=steps)
    yield lambda done: bars.update(task, completed=done)


def _show(figures: dict[str, Any]) -> None:
  from rich import console, table

  rows = table.Table(title='accuracy, held-out digits')
  for column in ('', '0-4', '5-9'):
    rows.add_column(column, justify='left' if not column else 'right')
  for name, scores in figures['accuracy'].items():
    rows.add_row(name, f'{scores["0-4"]:.3f}', f'{scores["5-9"]:.3f}')
  console.Console().print(rows)
  click.echo(f'trainable: {figures["trainable share"]:.1%} of the parameters')
  sizes = ', '.join(f'{n} {b:,} B' for n, b in figures['bytes'].items())
  click.echo(f'files: {sizes}')
  click.echo('the base is bit-unchanged: yes')
  click.echo('merged equals adapted, bit for bit: yes')


@click.command(cls=Command)
@click.option(
  '--keep',
  type=click.Path(path_type=pathlib.Path, file_okay=False),
  help='Keep the files in this folder.',
)
@click.option(
  '--framework',
  type=click.Choice(['blox', 'linen', 'nnx', 'equinox']),
  default='blox',
  show_default=True,
  help='What the model is written in.',
)
@click.option('--seed', type=int, default=0, show_default=True)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON.')
def command(
  keep: pathlib.Path | None, framework: str, seed: int, as_json: bool
) -> None:
  """Pretrain on the digits 0-4, adapt the saved file to 5-9, merge, save.

  Uses scikit-learn's handwritten digits; takes some ten seconds.
  """
  if keep is not None:
    keep.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    where = keep or pathlib.Path(folder)
    if framework == 'blox':
      figures = run(where, seed, _bar)
    else:
      figures = demo_trees.run(framework, where, seed, _bar)
  check(figures)
  if as_json:
    click.echo(json.dumps(figures))
  else:
    _show(figures)
    if keep is not None:
      click.echo(f'kept in {keep}')
