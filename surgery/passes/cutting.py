"""Cuts a computation into blocks of its result.

Given a function and the axes along which its result is cut, `cut` finds out
which inputs can be cut along with it. It goes through the function's jaxpr from
the result to the inputs: an addition needs of its operands what is wanted of
its result, a product of matrices the same rows of the first one and all of the
second one, and so on. What it does not know needs its inputs whole, so that a
function that cannot be cut is found out, never computed wrongly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from surgery.core import lowrank

# For each axis of an array the axis of the result along with which it is cut.
Labels = tuple[int | None, ...]
Shape = tuple[int, ...]
# What a rule says: labels of each operand, or None if it does not know.
Needs = Sequence[Labels] | None

# Where the calls that are looked into keep what they call.
_CALLS = {
  'jit': 'jaxpr',
  'pjit': 'jaxpr',
  'closed_call': 'call_jaxpr',
  'core_call': 'call_jaxpr',
  'remat': 'jaxpr',
  'remat2': 'jaxpr',
  'checkpoint': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}

# fmt: off
_ELEMENTWISE = {
  'abs', 'acos', 'acosh', 'add', 'and', 'asin', 'asinh', 'atan', 'atan2',
  'atanh', 'cbrt', 'ceil', 'clamp', 'convert_element_type', 'copy',
  'copy_p', 'cos', 'cosh', 'div', 'eq', 'erf', 'erf_inv', 'erfc', 'exp',
  'exp2', 'expm1', 'floor', 'ge', 'gt', 'imag', 'integer_pow', 'is_finite',
  'le', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg',
  'nextafter', 'not', 'or', 'pow', 'real', 'reduce_precision', 'rem',
  'round', 'rsqrt', 'select_n', 'sign', 'sin', 'sinh', 'sqrt', 'square',
  'sub', 'tan', 'tanh', 'xor',
}
_REDUCTIONS = {
  'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and',
  'reduce_or',
}
_CUMULATIVE = {
  'cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp',
}
# fmt: on


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
  """Writes a jaxpr down as steps, with what it calls in the place of calls."""

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
    """Writes down a closed jaxpr; returns its results."""
    known: dict[Any, _Operand] = {}
    consts = [self.constant(c) for c in jaxpr.consts]
    known.update(zip(jaxpr.jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> _Operand:
      if isinstance(atom, jex.Literal):
        return _Operand(constant=atom.val)
      return known[atom]

    for eqn in jaxpr.jaxpr.eqns:
      inputs = [read(v) for v in eqn.invars]
      called = _called(eqn)
      if called is not None:
        if not hasattr(called, 'consts'):
          called = jex.ClosedJaxpr(called, ())
        outputs = self.run(called, inputs)
      else:
        numbers = tuple(self.new(v.aval.shape) for v in eqn.outvars)
        self.steps.append(
          _Step(eqn.primitive, eqn.params, tuple(inputs), numbers)
        )
        outputs = [_Operand(n) for n in numbers]
      known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _called(eqn: Any) -> Any:
  """Returns the jaxpr that stands for an equation; None if it has none."""
  if eqn.primitive is lowrank.primitive():
    dense = functools.partial(lowrank.dense, **eqn.params)
    return jax.make_jaxpr(dense)(*(v.aval for v in eqn.invars))
  return eqn.params.get(_CALLS.get(eqn.primitive.name, ''))


def _flat(closed: Any) -> _Program:
  flattener = _Flattener()
  inputs = [flattener.new(v.aval.shape) for v in closed.jaxpr.invars]
  (result,) = flattener.run(closed, [_Operand(n) for n in inputs])
  return _Program(
    flattener.steps, flattener.shapes, inputs, flattener.constants, result
  )


# What each primitive needs of its operands for a part of its result.


def _needs(step: _Step, shapes: list[Shape], labels: Labels, out: int) -> Needs:
  """Returns how operands are cut, where the result is cut as `labels` say."""
  name, params = step.primitive.name, step.params
  given = tuple(
    shapes[o.number] if o.number >= 0 else np.shape(o.constant)
    for o in step.inputs
  )
  if name in _ELEMENTWISE:
    return [labels if shape else () for shape in given]
  if name == 'transpose':
    inverse = np.argsort(params['permutation'])
    return [tuple(labels[i] for i in inverse)]
  if name == 'broadcast_in_dim':
    return [_broadcast(given[0], shapes[out], params, labels)]
  if name == 'reshape':
    return _reshape(given[0], shapes[out], params, labels)
  if name == 'squeeze':
    gone, rest = set(params['dimensions']), iter(labels)
    return [
      tuple(None if i in gone else next(rest) for i in range(len(given[0])))
    ]
  if name in _REDUCTIONS:
    axes, rest = set(params['axes']), iter(labels)
    return [
      tuple(None if i in axes else next(rest) for i in range(len(given[0])))
    ]
  if name in _CUMULATIVE:
    return None if labels[params['axis']] is not None else [labels]
  if name == 'rev':
    cut = any(labels[i] is not None for i in params['dimensions'])
    return None if cut else [labels]
  if name == 'concatenate':
    cut = labels[params['dimension']] is not None
    return None if cut else [labels] * len(given)
  if name == 'split':
    return None if labels[params['axis']] is not None else [labels]
  if name == 'slice':
    return _slice(given[0], params, labels)
  if name == 'pad':
    moved = [
      i for i, p in enumerate(params['padding_config']) if p != (0, 0, 0)
    ]
    return None if any(labels[i] is not None for i in moved) else [labels, ()]
  if name == 'dot_general':
    return _dot(given, params, labels)
  return None


def _broadcast(
  given: Shape, wanted: Shape, params: Mapping[str, Any], labels: Labels
) -> Labels:
  axes = params['broadcast_dimensions']
  return tuple(
    labels[axis] if size == wanted[axis] else None
    for size, axis in zip(given, axes, strict=True)
  )


def _reshape(
  given: Shape, wanted: Shape, params: Mapping[str, Any], labels: Labels
) -> Needs:
  """An axis stays what it is if as much lies before and behind it."""
  if params.get('dimensions') is not None:
    return None
  found: list[int | None] = [None] * len(given)
  for axis, label in enumerate(labels):
    if label is None:
      continue
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


def _slice(given: Shape, params: Mapping[str, Any], labels: Labels) -> Needs:
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


def _dot(
  given: Sequence[Shape], params: Mapping[str, Any], labels: Labels
) -> Needs:
  """The result's axes are those of the batch, then of left and right."""
  summed, batch = params['dimension_numbers']
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
  """A computation of which blocks can be computed."""

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
        continue  # Nobody wants its result.
      operands = map(fitted, step.inputs, needs)
      have = self._have[step.outputs[0]]
      params = _local(step, have, sizes)
      made = step.primitive.bind(*operands, **params)
      if not step.primitive.multiple_results:
        made = [made]
      values.update(zip(step.outputs, made, strict=True))
    return fitted(program.result, self._wanted)


def _local(
  step: _Step, labels: Labels, sizes: Sequence[int]
) -> Mapping[str, Any]:
  """Returns a primitive's parameters for a part of its result."""
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
    most: largest number of elements of what is computed on the way as a whole.

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
  needs: dict[int, tuple[Labels, ...]] = {}
  for index in reversed(range(len(program.steps))):
    step = program.steps[index]
    found = _step_needs(step, program.shapes, have)
    if found is None:
      continue
    needs[index] = found
    for operand, labels in zip(step.inputs, found, strict=True):
      _want(have, operand, labels)
  own, *others = program.inputs
  if have.get(own, wanted) != wanted or program.shapes[own] != shape:
    return None
  have[own] = wanted
  for number in (*others, *program.constants):
    have[number] = (None,) * len(program.shapes[number])
  for number in (n for step in program.steps for n in step.outputs):
    whole = all(label is None for label in have.get(number, (0,)))
    if whole and math.prod(program.shapes[number]) > most:
      return None
  return Cut(program, have, needs, wanted)


def _want(have: dict[int, Labels], operand: _Operand, labels: Labels) -> None:
  """Notes how a value is wanted; what users disagree on is kept whole."""
  if operand.number < 0:
    return
  known = have.get(operand.number, labels)
  have[operand.number] = tuple(
    a if a == b else None for a, b in zip(known, labels, strict=True)
  )


def _step_needs(
  step: _Step, shapes: list[Shape], have: dict[int, Labels]
) -> tuple[Labels, ...] | None:
  """Returns what a step needs; None if nobody wants its results."""
  wanted = [n for n in step.outputs if n in have]
  if not wanted:
    return None
  found: Needs = None
  if len(step.outputs) == 1 or step.primitive.name == 'split':
    # All results of a split are cut alike, or none is.
    if len({have[n] for n in wanted}) == 1:
      found = _needs(step, shapes, have[wanted[0]], wanted[0])
  elif step.primitive.name == 'optimization_barrier':
    found = tuple(have.get(n, (None,) * len(shapes[n])) for n in step.outputs)
  if found is None:
    found = tuple(
      (None,) * len(shapes[o.number] if o.number >= 0 else np.shape(o.constant))
      for o in step.inputs
    )
    for number in step.outputs:
      have[number] = (None,) * len(shapes[number])
  else:
    for number in step.outputs:
      have.setdefault(number, have[wanted[0]])
  return tuple(found)
