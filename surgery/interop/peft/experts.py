"""Parameters that PEFT adapts by themselves, as those of experts.

PEFT wraps a module once for each of its parameters, and calls the weights by
the wrappers alone: `experts.lora_A`, `experts.base_layer.lora_A`. Which is
which follows from the order in which the model's class declares them, that no
file tells; so shapes have to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.naming import paths
from surgery.naming.paths import Path

Shape = tuple[int, ...]

# How modules of experts in transformers declare their parameters, first first.
_DECLARED = ('gate_up_proj', 'gate_proj', 'up_proj', 'down_proj')
_INNER = '.base_layer'
# More than any module has; all orders of its parameters are tried.
_MOST = 6


def assigned(
  module: str,
  sizes: Mapping[str, tuple[int | None, int | None]],
  params: Mapping[Path, Shape],
  origin: str,
) -> dict[Path, str]:
  """Returns which parameter each wrapper of a module is for.

  Args:
    module: the module, for messages.
    sizes: numbers of inputs and outputs of the weights, by wrapper.
    params: shapes of the module's parameters that are meant, by path.
    origin: the folder, for messages.

  Raises:
    FormatError: if no order fits, or several do.
  """
  shown = ', '.join(
    f'{paths.show(p)} {shape}' for p, shape in sorted(params.items())
  )
  if len(sizes) > min(len(params), _MOST):
    raise errors.FormatError(
      f'{origin}: {module}: expected weights of {len(params)} parameters, that '
      f'target_parameters means ({shown}), found weights of {len(sizes)}: '
      f'{", ".join(sizes)}.'
    )
  found = [
    dict(zip(some, sizes, strict=True))
    for some in itertools.permutations(params, len(sizes))
    if all(
      _fits(params[path], *sizes[name])
      for path, name in zip(some, sizes, strict=True)
    )
  ]
  if len(found) == 1:
    return found[0]
  told = ', '.join(
    f'{n} ({i} inputs, {o} outputs)' for n, (i, o) in sizes.items()
  )
  if not found:
    raise errors.FormatError(
      f'{origin}: the adapter is for another base. Its weights {told} are for '
      f'none of {shown}.'
    )
  raise errors.FormatError(
    f'{origin}: {module}: the shapes do not tell which parameter its weights '
    f'are for: {told} may be for any of {shown}, as the model declares them. '
    'Merge it with PEFT.'
  )


def _fits(shape: Shape, inputs: int | None, outputs: int | None) -> bool:
  return len(shape) in (2, 3) and sorted(shape[-2:]) == sorted(
    (inputs or 0, outputs or 0)
  )


def nested(layer: str, params: Sequence[Path], origin: str) -> dict[Path, str]:
  """Returns what PEFT calls the wrappers of a module's parameters.

  Args:
    layer: the module's name.
    params: the parameters.
    origin: the adapter, for messages.

  Raises:
    FormatError: if it is not known which of them the model declares first.
  """
  names = [path[-1] for path in params]
  if len(names) > 1 and not set(names) <= set(_DECLARED):
    raise errors.FormatError(
      f'{origin}: PEFT calls the weights of several parameters of one module '
      'in the order in which the class of the model declares them, which is '
      f'not known of {layer} ({", ".join(names)}). Merge it instead, or adapt '
      'one of them.'
    )
  order = sorted(params, key=lambda p: (_index(p[-1]), p))
  # What is declared first is wrapped first, and lies innermost.
  return {
    path: layer + _INNER * (len(order) - 1 - at)
    for at, path in enumerate(order)
  }


def _index(name: str) -> int:
  return _DECLARED.index(name) if name in _DECLARED else 0


def letters(open_: Iterable[Any], certain: Iterable[str], origin: str) -> str:
  """Returns the order of axes of square matrices of experts.

  Args:
    open_: them.
    certain: the orders of others, whose shapes tell.
    origin: the folder, for messages.

  Raises:
    FormatError: if the others do not tell.
  """
  told = set(certain)
  if len(told) == 1:
    return told.pop()
  shown = errors.listed(f'{one.shown} {one.shape}' for one in open_)
  raise errors.FormatError(
    f'{origin}: the matrices of {shown} are square, and nothing tells whether '
    'they are (out, in) or (in, out), of which PEFT makes different updates. '
    'Merge it with PEFT.'
  )
