"""Cuts a computation into blocks of its result.

Given a function and the axes along which its result is cut, `cut` finds the
inputs that can be cut along with it. It goes through the function's jaxpr from
the result to the inputs: to compute some rows of a sum, the same rows of both
operands are needed; for some rows of a product of matrices, the same rows of
the first one and all of the second one; and so on. A primitive without a rule
needs its inputs whole, so that a function that cannot be cut is recognised,
never computed wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from surgery import jaxcompat
from surgery.contract import lowrank

# For each axis of an array the axis of the result that it is cut with, or None.
Labels = tuple[int | None, ...]
Shape = tuple[int, ...]
# The answer of a rule: labels of each operand, or None if it cannot be cut.
Needs = Sequence[Labels] | None


@dataclasses.dataclass(frozen=True)
class _Operand:
  """A value of the program by number, or a constant."""

  number: int = -1
  constant: Any = None


@dataclasses.dataclass(frozen=True)
class _Step:
  """One primitive of the program."""

  primitive: Any
  params: Mapping[str, Any]
  inputs: tuple[_Operand, ...]
  outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Program:
  """A jaxpr without calls: steps, one after another.

  Attributes:
    steps: the steps.
    shapes: shape of each value, by its number.
    inputs: numbers of the arguments.
    constants: values that are known, by number.
    result: the result.
  """

  steps: list[_Step]
  shapes: list[Shape]
  inputs: list[int]
  constants: dict[int, Any]
  result: _Operand


class _Flattener:
  """Lists a jaxpr's equations as steps, with calls replaced by their bodies."""

  def __init__(self) -> None:
    self.steps: list[_Step] = []
    self.shapes: list[Shape] = []
    self.constants: dict[int, Any] = {}

  def new(self, shape: Shape) -> int:
    self.shapes.append(tuple(shape))
    return len(self.shapes) - 1

  def constant(self, value: Any) -> _Operand:
    number = self.new(np.shape(value))
    self.constants[number] = value
    return _Operand(number)

  def run(self, jaxpr: Any, operands: Sequence[_Operand]) -> list[_Operand]:
    """Adds the steps of a closed jaxpr; returns its results."""
    return jaxcompat.interpret(
      jaxpr,
      operands,
      self.equation,
      self.constant,
      lambda value: _Operand(constant=value),
    )

  def equation(self, eqn: Any, inputs: list[_Operand]) -> list[_Operand]:
    """Adds the steps of an equation; returns its results."""
    called = _called(eqn)
    if called is not None:
      return self.run(called, inputs)
    numbers = tuple(self.new(v.aval.shape) for v in eqn.outvars)
    self.steps.append(_Step(eqn.primitive, eqn.params, tuple(inputs), numbers))
    return [_Operand(n) for n in numbers]


def _called(eqn: Any) -> Any:
  """Returns the jaxpr that an equation calls; None if it calls none."""
  if eqn.primitive is lowrank.primitive():
    dense = functools.partial(lowrank.dense, **eqn.params)
    return jax.make_jaxpr(dense)(*(v.aval for v in eqn.invars))
  # Only values are computed here, so that rules of derivatives are left out.
  return jaxcompat.called(
    eqn, jaxcompat.CALLS, jaxcompat.CHECKPOINTS, jaxcompat.CUSTOM
  )


def _flat(closed: Any) -> _Program:
  flattener = _Flattener()
  inputs = [flattener.new(v.aval.shape) for v in closed.jaxpr.invars]
  (result,) = flattener.run(closed, [_Operand(n) for n in inputs])
  return _Program(
    flattener.steps, flattener.shapes, inputs, flattener.constants, result
  )


# Rules: the parts of operands that a part of a primitive's result needs.


def _needs(step: _Step, shapes: list[Shape], labels: Labels, out: int) -> Needs:
  """Returns how operands are cut if the result is cut as `labels` say."""
  need = _NEEDS.get(step.primitive.name)
  if need is None:
    return None
  try:
    jaxcompat.check(step.primitive.name, step.params)
  except jaxcompat.Unfamiliar:
    # A release of JAX has given it a parameter that may mean something else.
    return None
  given = [_shape(o, shapes) for o in step.inputs]
  return need(given, shapes[out], step.params, labels)


# From shapes of operands, shape of the result, parameters and labels.
_Need = Callable[[Sequence[Shape], Shape, Mapping[str, Any], Labels], Needs]
_NEEDS: dict[str, _Need] = {}


def _need(*names: str) -> Callable[[_Need], _Need]:
  """Registers what some primitives need."""

  def add(function: _Need) -> _Need:
    _NEEDS.update(dict.fromkeys(names, function))
    return function

  return add


@_need(*jaxcompat.ELEMENTWISE)
def _elementwise(
  given: Sequence[Shape], _: Shape, __: Mapping[str, Any], labels: Labels
) -> Needs:
  # Each element of the result needs the same element of each operand; scalars
  # among them have no axes.
  return [labels if shape else () for shape in given]


@_need('transpose')
def _transpose(
  _: Sequence[Shape], __: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  # Axis i of the result is axis permutation[i] of the operand.
  inverse = np.argsort(params['permutation'])
  return [tuple(labels[i] for i in inverse)]


def _with_gone(ndim: int, gone: Sequence[int], labels: Labels) -> Labels:
  """Returns labels of an operand some of whose axes the result lacks."""
  rest = iter(labels)
  return tuple(None if i in gone else next(rest) for i in range(ndim))


@_need('squeeze')
def _squeeze(
  given: Sequence[Shape], _: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  return [_with_gone(len(given[0]), params['dimensions'], labels)]


@_need(*jaxcompat.REDUCTIONS)
def _reduction(
  given: Sequence[Shape], _: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  # The axes that are summed are needed whole.
  return [_with_gone(len(given[0]), params['axes'], labels)]


@_need(*jaxcompat.CUMULATIVE, 'split')
def _along_axis(
  _: Sequence[Shape], __: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  # An element needs all before it along this axis, so it must not be cut there.
  return None if labels[params['axis']] is not None else [labels]


@_need('rev')
def _rev(
  _: Sequence[Shape], __: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  # The first block needs the last elements along a reversed axis.
  cut = any(labels[i] is not None for i in params['dimensions'])
  return None if cut else [labels]


@_need('concatenate')
def _concatenate(
  given: Sequence[Shape], _: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  # A block would come from one operand or another, depending on where it lies.
  cut = labels[params['dimension']] is not None
  return None if cut else [labels] * len(given)


@_need('pad')
def _pad(
  _: Sequence[Shape], __: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  # Along a padded axis elements are shifted, and blocks would not correspond.
  padded = [i for i, p in enumerate(params['padding_config']) if p != (0, 0, 0)]
  return None if any(labels[i] is not None for i in padded) else [labels, ()]


@_need('broadcast_in_dim')
def _broadcast(
  shapes: Sequence[Shape],
  wanted: Shape,
  params: Mapping[str, Any],
  labels: Labels,
) -> Needs:
  # An axis of size one that is repeated is needed whole for each block.
  axes = params['broadcast_dimensions']
  return [
    tuple(
      labels[axis] if size == wanted[axis] else None
      for size, axis in zip(shapes[0], axes, strict=True)
    )
  ]


@_need('reshape')
def _reshape(
  shapes: Sequence[Shape],
  wanted: Shape,
  params: Mapping[str, Any],
  labels: Labels,
) -> Needs:
  """An axis is kept if its size and the number of elements before it are."""
  given = shapes[0]
  if params.get('dimensions') is not None:
    return None
  found: list[int | None] = [None] * len(given)
  for axis, label in enumerate(labels):
    if label is None:
      continue
    # Then the same number lies behind it, too, and a block of one array is the
    # same elements of the other, in the same order.
    before = math.prod(wanted[:axis])
    same = [
      i
      for i, size in enumerate(given)
      if size == wanted[axis] and math.prod(given[:i]) == before
    ]
    if not same:
      return None
    found[same[0]] = label
  return [tuple(found)]


@_need('slice')
def _slice(
  shapes: Sequence[Shape], _: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  given = shapes[0]
  # A slice moves elements to other places: only axes that it leaves whole can
  # be cut.
  for axis, label in enumerate(labels):
    strides = params['strides']
    whole = (
      params['start_indices'][axis] == 0
      and params['limit_indices'][axis] == given[axis]
      and (strides is None or strides[axis] == 1)
    )
    if label is not None and not whole:
      return None
  return [labels]


@_need('dot_general')
def _dot(
  given: Sequence[Shape], _: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  """The result's axes are those of the batch, then of left and right."""
  summed, batch = params['dimension_numbers']
  # Labels are handed out in the order of the result: those of batch axes to
  # both operands, the rest to the left one first. Summed axes get none, and are
  # needed whole.
  rest = iter(labels[len(batch[0]) :])
  needs = []
  for side, shape in enumerate(given):
    own: list[int | None] = [None] * len(shape)
    for axis, label in zip(batch[side], labels, strict=False):
      own[axis] = label
    for axis in range(len(shape)):
      if axis not in batch[side] and axis not in summed[side]:
        own[axis] = next(rest)
    needs.append(tuple(own))
  return needs


# The cut computation.


@dataclasses.dataclass(frozen=True)
class Cut:
  """A computation whose result can be computed block by block."""

  _program: _Program
  _have: Mapping[int, Labels]
  _needs: Mapping[int, tuple[Labels, ...]]
  _wanted: Labels

  def __call__(
    self, sizes: Sequence[int], starts: Any, arguments: Sequence[Any]
  ) -> Any:
    """Returns a block of the result.

    Args:
      sizes: sizes of the block along the axes that are cut, by label.
      starts: where the block starts along these; numbers or tracers.
      arguments: its arguments, the first cut like the result, the others
        whole.
    """
    program = self._program
    values = dict(program.constants)
    values.update(zip(program.inputs, arguments, strict=True))

    def fitted(operand: _Operand, wanted: Labels) -> Any:
      if operand.number < 0:
        return operand.constant
      # What several steps use is computed as whole as any of them needs it, so
      # the others take their part of it here.
      value = values[operand.number]
      have = self._have[operand.number]
      for axis, (old, new) in enumerate(zip(have, wanted, strict=True)):
        if old is None and new is not None:
          value = jax.lax.dynamic_slice_in_dim(
            value, starts[new], sizes[new], axis
          )
      return value

    for index, step in enumerate(program.steps):
      needs = self._needs.get(index)
      if needs is None:
        continue  # Its result is not used.
      operands = map(fitted, step.inputs, needs)
      have = self._have[step.outputs[0]]
      params = _local(step, have, sizes)
      made = jaxcompat.bind(step.primitive, [*operands], params)
      values.update(zip(step.outputs, made, strict=True))
    return fitted(program.result, self._wanted)


def _local(
  step: _Step, labels: Labels, sizes: Sequence[int]
) -> Mapping[str, Any]:
  """Returns a primitive's parameters, with shapes of a part of its result."""
  names = {
    'broadcast_in_dim': 'shape',
    'reshape': 'new_sizes',
    'slice': 'limit_indices',
  }
  name = names.get(step.primitive.name)
  if name is None:
    return step.params
  whole = step.params[name]
  local = tuple(
    size if label is None else sizes[label]
    for size, label in zip(whole, labels, strict=True)
  )
  return {**step.params, name: local}


def cut(
  function: Callable[..., Any],
  arguments: Sequence[Any],
  axes: int,
  most: int,
) -> Cut | None:
  """Returns how blocks of a function's result can be computed.

  Args:
    function: takes arrays, returns one array.
    arguments: `jax.ShapeDtypeStruct` of its arguments.
    axes: the number of leading axes of the result along which it is cut.
    most: largest number of elements of an intermediate value that is computed
      as a whole for each block.

  Returns:
    The cut computation, whose first argument is cut like the result; None if
    more of it is needed, or an intermediate value would be too large.
  """
  program = _flat(jax.make_jaxpr(function)(*arguments))
  if program.result.number < 0:
    return None
  shape = program.shapes[program.result.number]
  wanted = tuple(
    axis if axis < axes and size > 1 else None
    for axis, size in enumerate(shape)
  )
  have: dict[int, Labels] = {}
  _want(have, program.result, wanted)
  needs = _propagated(program, have)
  own, *others = program.inputs
  # The first argument comes in blocks, so that no step may need more of it.
  if have.get(own, wanted) != wanted or program.shapes[own] != shape:
    return None
  have[own] = wanted
  for number in (*others, *program.constants):
    have[number] = (None,) * len(program.shapes[number])
  if any(_is_large(program, have, number, most) for number in _made(program)):
    return None
  return Cut(program, have, needs, wanted)


def _propagated(
  program: _Program, have: dict[int, Labels]
) -> dict[int, tuple[Labels, ...]]:
  """Returns how the operands of each step are cut, by the step's number.

  Args:
    program: the program.
    have: how values are cut; the result's on entry, filled in for all others.
  """
  needs: dict[int, tuple[Labels, ...]] = {}
  # Backwards: when a step is reached, all that uses its results has been seen.
  for index in reversed(range(len(program.steps))):
    step = program.steps[index]
    found = _step_needs(step, program.shapes, have)
    if found is None:
      continue
    needs[index] = found
    for operand, labels in zip(step.inputs, found, strict=True):
      _want(have, operand, labels)
  return needs


def _made(program: _Program) -> list[int]:
  """Returns the numbers of all values that steps compute."""
  return [number for step in program.steps for number in step.outputs]


def _is_large(
  program: _Program, have: Mapping[int, Labels], number: int, most: int
) -> bool:
  """Whether a value is computed whole, and has more than `most` elements.

  It would be computed again for each block, and take memory that cutting is
  there to save.
  """
  if number not in have:
    return False  # It is not used.
  whole = all(label is None for label in have[number])
  return whole and math.prod(program.shapes[number]) > most


def _want(have: dict[int, Labels], operand: _Operand, labels: Labels) -> None:
  """Notes how a value is used; axes on which uses disagree are kept whole."""
  if operand.number < 0:
    return
  known = have.get(operand.number, labels)
  have[operand.number] = tuple(
    a if a == b else None for a, b in zip(known, labels, strict=True)
  )


def _step_needs(
  step: _Step, shapes: list[Shape], have: dict[int, Labels]
) -> tuple[Labels, ...] | None:
  """Returns how a step's operands are cut; None if its results are not used.

  Args:
    step: the step.
    shapes: shape of each value.
    have: how values are cut; entries of the step's results are completed.
  """
  wanted = [n for n in step.outputs if n in have]
  if not wanted:
    return None
  found = _rule(step, shapes, have, wanted)
  if found is not None:
    # Results that are not used are computed all the same, cut like the others.
    for number in step.outputs:
      have.setdefault(number, have[wanted[0]])
    return tuple(found)
  # It cannot be cut: its operands are needed whole, and its results are whole.
  for number in step.outputs:
    have[number] = (None,) * len(shapes[number])
  return tuple((None,) * len(_shape(o, shapes)) for o in step.inputs)


def _shape(operand: _Operand, shapes: Sequence[Shape]) -> Shape:
  """Returns the shape of an operand."""
  if operand.number < 0:
    return np.shape(operand.constant)
  return shapes[operand.number]


def _rule(
  step: _Step,
  shapes: list[Shape],
  have: Mapping[int, Labels],
  wanted: Sequence[int],
) -> Needs:
  """Returns how a step's operands are cut by its rule; None if they cannot be.

  Args:
    step: the step.
    shapes: shape of each value.
    have: how values are cut.
    wanted: the step's results that are used.
  """
  if len(step.outputs) == 1 or step.primitive.name == 'split':
    # One rule answers for all results of a split, so they must be cut alike.
    alike = len({have[n] for n in wanted}) == 1
    return _needs(step, shapes, have[wanted[0]], wanted[0]) if alike else None
  if step.primitive.name == 'optimization_barrier':
    # It hands each operand on as one result, cut in whatever way that is.
    return [have.get(n, (None,) * len(shapes[n])) for n in step.outputs]
  return None
