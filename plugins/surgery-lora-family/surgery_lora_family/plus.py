"""LoRA+: `B` learns faster than `A`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import blox as bx
import jax

import surgery

__all__ = ['lora_plus', 'lora_plus_labels']

# Names that LoRA and its relatives give their weights, and labels for them.
# The branch's bias is a part of its second layer.
_LABELS = {'lora_a': 'a', 'lora_b': 'b', 'lora_bias': 'b'}


def lora_plus_labels(params: Any) -> Any:
  """Returns a label for each parameter: `a`, `b`, `other` or `frozen`.

  `a` is LoRA's `A`, `(in, rank)`; `b` its `B`, `(rank, out)`, and the bias of
  its branch; of adapters of any name, and of `surgery.LoraLinear`. `frozen` is
  what does not train, whatever it is. `other` is all else that trains: weights
  of other adapter types, magnitudes, biases and layers that were not frozen.

  Args:
    params: params, one half of them, gradients, or any pytree that holds some;
      what is in no params is `other`.

  Returns:
    A pytree of the same structure, with strings in the place of arrays, as
    `optax.multi_transform` takes it; this function itself can be given to it.
  """
  return jax.tree.map(
    lambda one: _labelled(one) if isinstance(one, bx.Params) else 'other',
    params,
    is_leaf=lambda one: isinstance(one, bx.Params),
  )


def _labelled(params: bx.Params) -> bx.Params:
  labels = params.unlocked()
  for path, param in params.items():
    label = _label(path[-1], param)
    # A parameter may hold no array, as in states of optimizers.
    value = jax.tree.map(lambda _, label=label: label, param.value)
    labels[path] = param.replace(value=value)
  return labels.locked() if params.is_locked else labels


def _label(name: str, param: bx.Param) -> str:
  if not param.trainable:
    return 'frozen'
  if 'adapter' not in param.metadata:
    return 'other'
  # `lora_a`, or `lora_a.<adapter>`, or `lora_a.<adapter>.<parameter>`.
  return _LABELS.get(name.split('.')[0], 'other')


def lora_plus(
  optimizer: Callable[[Any], Any],
  learning_rate: float | Callable[[Any], Any],
  ratio: float = 16.0,
) -> Any:
  """Returns an optimizer by which `B` learns faster (LoRA+).

  Hayou et al. 2024, arXiv 2402.12354: `A` learns with the rate `η`, `B` with
  `ratio·η`; with one rate for both, features of wide layers are not learnt
  efficiently. What is labelled `other` learns with `η` (the authors' code lets
  vectors learn as `B` does), what is `frozen` gets updates of zero. For more
  rates give `lora_plus_labels` to `optax.multi_transform` yourself.

  Args:
    optimizer: makes an optimizer from a rate, e.g. `optax.adam`, or
      `functools.partial(optax.adamw, weight_decay=0.01)`.
    learning_rate: the rate of `A`, or a schedule of it. The paper advises one
      somewhat smaller than for plain LoRA.
    ratio: the rate of `B` by that of `A`, at least one.

  Returns:
    An `optax.GradientTransformation`. Its `init` raises an AdapterError if no
    `B` is there to train.

  Raises:
    ConfigError: for a ratio below one.
    ImportError: if optax is not installed.

  Example:
    optimizer = lora_plus(optax.adam, 1e-4, ratio=16.0)
    state = optimizer.init(params.split()[0])
  """
  if not 1 <= ratio < math.inf:
    raise surgery.ConfigError(
      'lora_plus, ratio: expected a number of at least 1, by which B learns '
      f'faster than A, found {ratio!r}.'
    )
  try:
    import optax
  except ImportError as error:
    raise ImportError(
      'lora_plus makes an optimizer of optax, which is not installed: pip '
      "install 'surgery-lora-family[optax]'."
    ) from error
  faster: Any
  if callable(learning_rate):
    schedule = learning_rate
    faster = lambda count: ratio * schedule(count)
  else:
    faster = ratio * learning_rate
  slow = optimizer(learning_rate)
  rules = {
    'a': slow,
    'b': optimizer(faster),
    'other': slow,
    'frozen': optax.set_to_zero(),
  }
  return optax.multi_transform(rules, _with_b)


def _with_b(params: Any) -> Any:
  """Returns the labels.

  Raises:
    AdapterError: if there is no `b` among them.
  """
  labels = lora_plus_labels(params)
  found = jax.tree.leaves(labels)
  if 'b' not in found:
    counts = {label: found.count(label) for label in sorted(set(found))}
    raise surgery.AdapterError(
      'lora_plus: expected a trainable weight lora_b of an adapter, to learn '
      f'faster than the others, found only {counts or "nothing"}. Give init '
      'params, or the trainable half of them, with a LoRA attached and not '
      'frozen.'
    )
  return labels
