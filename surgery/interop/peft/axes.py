"""Which axes of a parameter are its inputs, and which its outputs.

PEFT's weights say how many inputs and outputs a module has, and the name of a
parameter whose habits it follows: torch's `weight` is `(out, in)`, or `(in,
out)` in the Conv1D of GPT-2; JAX's `kernel` has its outputs last. A matrix that
is square tells nothing by its shape; then the configuration or the other
modules must.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract.peft import CONV, EMBEDDING
from surgery.interop.peft import experts
from surgery.model.checkpoint import Leaf
from surgery.naming.paths import Path

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sought:
  """A parameter whose axes are to be told.

  Attributes:
    shown: its path, for messages.
    module: the module's name in PEFT.
    kind: `linear`, `conv` or `embedding`.
    shape: its shape.
    inputs: number of inputs, of a convolution channels; None if unknown.
    outputs: number of outputs; None if unknown.
    known: its layout where the model has it on record.
    name: the parameter's name.
    alone: whether it is adapted by itself, as those of experts; its shape is
      that of one expert.
  """

  shown: str
  module: str
  kind: str
  shape: Shape
  inputs: int | None
  outputs: int | None
  known: str | None
  name: str
  alone: bool = False

  def candidates(self) -> list[str]:
    """Returns the layouts that it may have, the most likely first."""
    count = len(self.shape)
    if self.known is not None and len(self.known) == count:
      return [self.known]
    if self.alone:
      return ['oi', 'io'] if count == 2 else []
    torch = self.name in ('weight', 'in_proj_weight')
    if self.kind == EMBEDDING:
      return ['i' + 'o' * (count - 1)]
    if self.kind == CONV:
      return ['o' + 'i' * (count - 1) if torch else 'i' * (count - 1) + 'o']
    if torch:
      return ['oi', 'io'] if count == 2 else []
    # The outputs of a layer with heads may be two axes, and so may its inputs.
    return ['i' * (count - n) + 'o' * n for n in range(1, count)]

  def fits(self, letters: str) -> bool:
    """Whether a layout gives the numbers of inputs and outputs."""
    sizes = dict(zip('io', (self.inputs, self.outputs), strict=True))
    if self.kind == CONV:
      pairs = zip(self.shape, letters, strict=True)
      axes = [size for size, letter in pairs if letter == 'i']
      channels = axes[0] if letters.startswith('o') else axes[-1]
      # Some types take the channels and the kernel together.
      ours = (None, channels, math.prod(axes))
      outputs = self.shape[letters.index('o')]
      return self.inputs in ours and self.outputs in (None, outputs)
    for letter, size in sizes.items():
      axes = [
        n for n, c in zip(self.shape, letters, strict=True) if c == letter
      ]
      if size is not None and math.prod(axes) != size:
        return False
    return True


def found(
  sought: Mapping[Path, Sought], fan_in_fan_out: bool, origin: str
) -> dict[Path, str]:
  """Returns a letter an axis, `i` or `o`, for each parameter.

  Args:
    sought: the parameters, by path.
    fan_in_fan_out: what the configuration says of linear layers.
    origin: the folder, for messages.

  Raises:
    FormatError: listing parameters of which no layout fits, or several do and
      nothing decides between them.
  """
  letters: dict[Path, str] = {}
  open_: dict[Path, list[str]] = {}
  wrong = []
  for path, one in sought.items():
    fitting = [c for c in one.candidates() if one.fits(c)]
    if len(fitting) == 1:
      letters[path] = fitting[0]
    elif fitting:
      open_[path] = fitting
    else:
      wrong.append(
        f'{one.module}: its tensors are for {_count(one.inputs)} inputs and '
        f'{_count(one.outputs)} outputs, and {one.shown} has the shape '
        f'{one.shape}'
      )
  if wrong:
    raise errors.FormatError(
      f'{origin}: the adapter is for another base. {"; ".join(wrong[:8])}. A '
      'grouped convolution has no update of its shape; otherwise take the base '
      'that it was trained on.'
    )
  certain = {
    letters[p] for p, one in sought.items() if p in letters and _is_torch(one)
  }
  told = [letters[p] for p, one in sought.items() if p in letters and one.alone]
  for path, fitting in open_.items():
    one = sought[path]
    if one.alone:
      some = [sought[p] for p in open_ if sought[p].alone]
      letters[path] = experts.letters(some, told, origin)
    elif not _is_torch(one):
      letters[path] = fitting[0]
    elif fan_in_fan_out:
      letters[path] = 'io'
    elif 'io' in certain:
      raise errors.FormatError(
        f'{origin}: {one.shown} of shape {one.shape} is square, and other '
        'modules are (in, out), as the Conv1D of GPT-2 is, although '
        'fan_in_fan_out is false. Set fan_in_fan_out to true in '
        'adapter_config.json if this one is a Conv1D too.'
      )
    else:
      letters[path] = 'oi'
  return letters


def _is_torch(one: Sought) -> bool:
  matrix = one.kind not in (EMBEDDING, CONV) and one.name == 'weight'
  return matrix and not one.alone


def _count(number: int | None) -> str:
  return 'any number of' if number is None else str(number)


def as_stored(leaf: Leaf, shape: Shape, name: str, called: str) -> Leaf:
  """Returns a parameter that torch wrote as a base of that shape stores it.

  Args:
    leaf: the parameter.
    shape: its shape in the base.
    name: its name in the base; a `kernel` has its outputs last.
    called: its name in the folder, for messages.

  Raises:
    FormatError: if the shapes are not those of one parameter.
  """
  there = leaf.shape or ()
  order = tuple(range(len(there)))
  if name == 'kernel' and len(there) > 1:
    order = (*order[2:], 1, 0)
  if tuple(there[a] for a in order) != shape:
    raise errors.FormatError(
      f'{called}: expected shape {shape}, which the base has, found {there}. '
      'If the vocabulary was resized, resize that of the base first '
      '(resize-vocab).'
    )
  if order == tuple(range(len(there))):
    return leaf
  return leaf.replace(
    load=functools.partial(_transposed, leaf, order), shape=shape
  )


def _transposed(leaf: Leaf, order: tuple[int, ...]) -> Any:
  return np.ascontiguousarray(np.asarray(leaf.load()).transpose(order))
