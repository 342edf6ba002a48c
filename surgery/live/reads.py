"""Raw reads: where a model uses the base of an adapted parameter directly.

A layer that reads `params[…].value` gets the stored base without its adapters,
even if another layer asks for the same parameter by `get_param`. So in the
jaxpr of a call the base may reach results only through its adapter, which is
marked by a primitive. This is checked by data flow: code that moves, casts or
averages parameters before layers ask for them is no raw read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import blox as bx
import jax

from surgery import jaxcompat
from surgery.jaxcompat import ClosedJaxpr, Equation, Jaxpr
from surgery.live import params as live
from surgery.live.primitives import READ
from surgery.live.stashed import Stash
from surgery.naming.paths import Path

# Numbers of the bases that a value depends on.
_Bases = frozenset[int]
_NONE: _Bases = frozenset()
# Primitives of which each result depends on the operand in its place alone.
_EACH = frozenset(('optimization_barrier',))
# Primitives that call a jaxpr with their operands.
_TABLES: tuple[Mapping[str, str], ...] = (
  jaxcompat.CALLS,
  jaxcompat.CHECKPOINTS,
  jaxcompat.CUSTOM,
  {'shard_map': 'jaxpr'},
)


@dataclasses.dataclass(frozen=True)
class RawRead:
  """Where a base is used without its adapter.

  Attributes:
    primitive: the first primitive of JAX that uses it; empty if it is a result
      as it is.
  """

  primitive: str = ''

  def __str__(self) -> str:
    # No line: what jit has traced before has that of another call.
    return self.primitive or 'a result'


def raw_reads(
  model: Callable[..., Any],
  params: live.AdaptedParams,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> dict[Path, RawRead]:
  """Returns the adapted parameters whose base reaches a result by itself.

  Nothing is computed; the call is traced, with arguments as they are.

  Args:
    model: a module, or any function that takes params first.
    params: adapted params, whose records have a probe that marks reads.
    args: further arguments; a `jax.ShapeDtypeStruct` is traced.
    kwargs: further arguments.
  """
  leaves, tree = jax.tree.flatten((params, tuple(args), dict(kwargs)))
  own = len(jax.tree.leaves(params))
  where = [
    i
    for i, leaf in enumerate(leaves)
    if i < own or isinstance(leaf, jax.ShapeDtypeStruct)
  ]
  records = params.records
  adapted = tuple(dict.fromkeys((*records.chains, *records.standing)))
  bases = _numbers(params, adapted)
  # For each result the parameter whose base it may be.
  allowed: list[Path | None] = []
  stash = Stash([model, *leaves])

  def flat(*traced: Any) -> list[Any]:
    given = [*leaves]
    for i, value in zip(where, traced, strict=True):
      given[i] = value
    first, rest, named = jax.tree.unflatten(tree, given)
    found = _results(model(first, *rest, **named))
    allowed[:] = [path for path, _ in found]
    return [value for _, value in found]

  try:
    closed = jax.make_jaxpr(flat)(*(leaves[i] for i in where))
  finally:
    stash.restore()
  flow = _Flow()
  # A model may hold a base since before the call: then it is a constant.
  known = {id(leaves[number]): number for number in bases}
  constant = lambda c: frozenset((known[id(c)],)) if id(c) in known else _NONE
  operands = [frozenset((i,)) if i in bases else _NONE for i in where]
  reached = flow.run(closed, operands, constant)
  found: dict[Path, RawRead] = {}
  for path, numbers_ in zip(allowed, reached, strict=True):
    for number in numbers_:
      if bases[number] != path:
        found[bases[number]] = flow.uses.get(number, RawRead())
  return {path: found[path] for path in adapted if path in found}


def _numbers(
  params: live.AdaptedParams, adapted: Sequence[Path]
) -> dict[int, Path]:
  """Returns the adapted parameters by the numbers of their bases' leaves."""
  leaves, structure = jax.tree.flatten(params)
  numbered = jax.tree.unflatten(structure, range(len(leaves)))
  return {
    number: path
    for path in adapted
    if path in numbered
    for number in jax.tree.leaves(numbered[path].value)
  }


def influences(
  function: Callable[..., Any], values: Mapping[Path, Any]
) -> set[Path]:
  """Returns the arrays on which a result of a function depends.

  Nothing is computed.

  Args:
    function: takes arrays by path.
    values: the arrays.
  """
  arrays = {p: v for p, v in values.items() if hasattr(v, 'dtype')}
  flat = lambda *traced: [
    leaf
    for leaf in jax.tree.leaves(
      function({**values, **dict(zip(arrays, traced, strict=True))})
    )
    if jaxcompat.is_traced(leaf)
  ]
  closed = jax.make_jaxpr(flat)(*arrays.values())
  operands = [frozenset((i,)) for i in range(len(arrays))]
  reached = _union(_Flow().run(closed, operands))
  return {path for i, path in enumerate(arrays) if i in reached}


def copies(
  function: Callable[..., Any], values: Mapping[Path, Any]
) -> set[Path]:
  """Returns those of some arrays that a function gives back as they are.

  A loop that scans over an array and returns each row of it copies it, too.

  Args:
    function: takes arrays by path, and returns such by the same paths.
    values: the arrays.
  """
  flat = lambda *traced: list(
    function(dict(zip(values, traced, strict=True))).values()
  )
  closed = jax.make_jaxpr(flat)(*values.values())
  made = _copied(closed, range(len(values)))
  return {path for i, path in enumerate(values) if made[i] == i}


def _copied(jaxpr: ClosedJaxpr, operands: Sequence[Any]) -> list[Any]:
  """Returns which operand each result of a jaxpr is; None if it is none."""
  return jaxcompat.interpret(
    jaxpr, operands, _copying, lambda _: None, lambda _: None
  )


def _copying(eqn: Equation, inputs: Sequence[Any]) -> list[Any]:
  name, count = eqn.primitive.name, len(eqn.outvars)
  if name == 'copy':
    return list(inputs)
  if name in _EACH:
    return list(inputs)
  if name == 'scan':
    known = jaxcompat.scan(eqn)
    rows = known.consts + known.carry
    # Rows of an array come out as rows; what is carried is another each time.
    inner = [None] * known.consts + [
      None if i is None else (at, i)
      for at, i in enumerate(inputs[known.consts :])
    ]
    made = _copied(known.body, inner)
    carried = [
      one[1] if one is not None and one[0] == at else None
      for at, one in enumerate(made[: known.carry])
    ]
    stacked = [
      one[1] if one is not None and one[0] + known.consts >= rows else None
      for one in made[known.carry :]
    ]
    return [*carried, *stacked]
  called = jaxcompat.called(eqn, *_TABLES)
  if called is not None and len(called.jaxpr.invars) == len(inputs):
    return _copied(called, inputs)
  return [None] * count


def _results(tree: Any) -> list[tuple[Path | None, Any]]:
  """Returns the traced results of a call, each with its parameter or None.

  Params that are returned may hold a base in its own place.
  """
  is_params = lambda value: isinstance(value, bx.Params)
  found: list[tuple[Path | None, Any]] = []
  for leaf in jax.tree.leaves(tree, is_leaf=is_params):
    if not is_params(leaf):
      found.append((None, leaf))
      continue
    for path, param in leaf.items():
      found += ((path, value) for value in jax.tree.leaves(param.value))
  return [(p, v) for p, v in found if jaxcompat.is_traced(v)]


class _Flow:
  """Follows bases through a jaxpr.

  Attributes:
    uses: for each base the first primitive that uses it without its adapter.
  """

  def __init__(self) -> None:
    self.uses: dict[int, RawRead] = {}
    self._known: dict[Any, list[_Bases]] = {}

  def run(
    self,
    jaxpr: ClosedJaxpr,
    operands: Sequence[_Bases],
    constant: Callable[[Any], _Bases] = lambda _: _NONE,
  ) -> list[_Bases]:
    """Returns which bases each result of a closed jaxpr depends on."""
    key = (id(jaxpr.jaxpr), tuple(operands))
    if key not in self._known:
      self._known[key] = jaxcompat.interpret(
        jaxpr, operands, self._equation, constant, lambda _: _NONE
      )
    return self._known[key]

  def _equation(self, eqn: Equation, inputs: Sequence[_Bases]) -> list[_Bases]:
    name, count = eqn.primitive.name, len(eqn.outvars)
    if not any(inputs):
      return [_NONE] * count
    if name == READ:
      return [_NONE]  # An adapter reads it: its answer is no raw read.
    if name in _CALLS:
      return _CALLS[name](self, eqn, inputs)
    if name in _EACH:
      return list(inputs)
    jaxpr = jaxcompat.called(eqn, *_TABLES)
    if jaxpr is not None and len(jaxpr.jaxpr.invars) == len(inputs):
      return self.run(jaxpr, inputs)
    called = list(jaxcompat.inner(eqn))
    if any(map(_marks, called)):
      # A call of an unknown kind, in which adapters read bases: its data flow
      # is not known, and a false alarm would be an error.
      return [_NONE] * count
    reached = _union(inputs)
    if not called:
      for number in reached:
        self.uses.setdefault(number, RawRead(name))
    return [reached] * count

  # Loops: a carry depends on all earlier iterations, so they are repeated until
  # nothing new is found.

  def scan(self, eqn: Equation, inputs: Sequence[_Bases]) -> list[_Bases]:
    """Returns what the results of a scan depend on."""
    known = jaxcompat.scan(eqn)
    first, count = known.consts, known.carry
    consts, rest = inputs[:first], inputs[first + count :]
    carry = list(inputs[first : first + count])
    while True:
      made = self.run(known.body, [*consts, *carry, *rest])
      after = [a | b for a, b in zip(carry, made[:count], strict=True)]
      if after == carry:
        return [*carry, *made[count:]]
      carry = after

  def loop(self, eqn: Equation, inputs: Sequence[_Bases]) -> list[_Bases]:
    """Returns what the results of a while loop depend on."""
    split = eqn.params['cond_nconsts']
    rest = split + eqn.params['body_nconsts']
    carry = list(inputs[rest:])
    while True:
      made = self.run(eqn.params['body_jaxpr'], [*inputs[split:rest], *carry])
      # The number of iterations decides all results.
      (ends,) = self.run(eqn.params['cond_jaxpr'], [*inputs[:split], *carry])
      after = [a | b | ends for a, b in zip(carry, made, strict=True)]
      if after == carry:
        return carry
      carry = after

  def cond(self, eqn: Equation, inputs: Sequence[_Bases]) -> list[_Bases]:
    """Returns what the results of one of some branches depend on."""
    index, *operands = inputs
    made = [self.run(b, operands) for b in eqn.params['branches']]
    return [_union((index, *each)) for each in zip(*made, strict=True)]


_CALLS: Mapping[str, Callable[[_Flow, Any, Sequence[_Bases]], list[_Bases]]] = {
  'scan': _Flow.scan,
  'while': _Flow.loop,
  'cond': _Flow.cond,
}


def _union(parts: Sequence[_Bases]) -> _Bases:
  return _NONE.union(*parts)


def _marks(jaxpr: Jaxpr) -> bool:
  """Whether an adapter reads its base somewhere in a jaxpr."""
  return any(
    eqn.primitive.name == READ or any(map(_marks, jaxcompat.inner(eqn)))
    for eqn in jaxpr.eqns
  )
