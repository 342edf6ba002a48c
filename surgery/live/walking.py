"""Goes through a model's jaxpr and keeps low-rank values factored.

Each equation is bound again as it stands, unless a view takes part in it; then
the table of rules says what becomes of it. Calls are gone into where they can
be traced again: `jit` is written out in place, `scan`, `while`, `cond`,
`checkpoint` and `shard_map` get the parts of a view as operands.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from surgery import jaxcompat
from surgery.core import lowrank
from surgery.core.paths import Path
from surgery.live.primitives import TAG
from surgery.live.rules import CONSUMERS, EACH, RULES, Rule, rule_for
from surgery.live.views import (
  Decline,
  Derived,
  Factor,
  Misrouted,
  Squared,
  View,
  cast,
  plain,
  widens,
)


class DropoutLost(Exception):  # noqa: N818 - becomes an error with advice.
  """A view with dropout would have been made dense."""

  def __init__(self, view: View, primitive: str) -> None:
    super().__init__(primitive)
    self.origin = view.origin
    self.primitive = primitive


@dataclasses.dataclass
class Walk:
  """One walk through a model.

  Attributes:
    training: whether dropout is on.
    notes: for each adapted parameter what became of its uses: `factored`, or
      the primitive that made it dense.
    ambient: the context (mesh, metadata) of equations that are made here;
      those of the model have the same, but for some.
  """

  training: bool = False
  notes: dict[Path, list[str]] = dataclasses.field(default_factory=dict)
  ambient: Any = dataclasses.field(default_factory=jaxcompat.ambient)

  # What is written down for `explain`.

  def note(self, view: View, what: str) -> None:
    """Writes down what became of a use of a view."""
    for path in view.origin:
      self.notes.setdefault(path, []).append(what)

  def dense(self, value: Any, because: str) -> Any:
    """Returns an array for a view, made dense because of a primitive.

    Raises:
      DropoutLost: if the view has dropout.
    """
    if not isinstance(value, View):
      return value
    if value.dropped:
      raise DropoutLost(value, because)
    if value.rows is not None:
      raise Misrouted(value, f'{because!r} needs the dense parameter')
    if value.origin:
      self.note(value, because)
    return value.dense()

  def whole(self, value: Any, because: str) -> Any:
    """Returns a value as it is, an array for what is derived of a view."""
    return self.dense(value, because) if isinstance(value, Derived) else value

  # The walk.

  def closed(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
    """Goes through a closed jaxpr; returns its results, views among them."""
    bases = _bases(jaxpr)
    # Whether there may be views among operands: few jaxprs have one.
    viewed = any(isinstance(o, View) for o in operands)

    def equation(eqn: Any, inputs: list[Any]) -> list[Any]:
      nonlocal viewed
      if bases and eqn.outvars[0] in bases and _widens(eqn, inputs):
        # The base of a low-rank value stays in the dtype that it is stored in.
        (value,) = inputs
        viewed = True
        return [plain(value, eqn.params['new_dtype'])]
      with jaxcompat.scope(eqn):
        outputs = self.equation(eqn, inputs, viewed)
      # It comes out of `low_rank`, or out of a call of what makes one.
      viewed = viewed or any(isinstance(o, View) for o in outputs)
      return outputs

    return jaxcompat.interpret(jaxpr, operands, equation)

  def equation(
    self, eqn: Any, inputs: Sequence[Any], viewed: bool
  ) -> list[Any]:
    """Does an equation.

    Args:
      eqn: the equation.
      inputs: its operands.
      viewed: whether there may be views among them.
    """
    if eqn.primitive is lowrank.primitive():
      return [self.low_rank(eqn, inputs)]
    if eqn.primitive.name == TAG:
      return [self.tagged(inputs[0], eqn.params['path'])]
    if viewed and any(isinstance(i, View) for i in inputs):
      return self.viewed(eqn, inputs)
    if _reaches(eqn):
      return self.call(eqn, inputs)
    return self.bound(eqn, inputs)

  def low_rank(self, eqn: Any, inputs: Sequence[Any]) -> Any:
    """Returns the view that a low-rank value is."""
    inputs = [self.whole(i, 'low_rank') for i in inputs]
    try:
      view = RULES['low_rank'](*inputs, training=self.training, **eqn.params)
      # A base may be narrower than what comes out.
      return view.like(view.terms, dtype=eqn.outvars[0].aval.dtype)
    except Decline:
      base, *rest = inputs
      rest = [self.dense(i, 'low_rank') for i in rest]
      if self.training and eqn.params['dropout']:
        raise DropoutLost(plain(rest[0]), 'vmap') from None
      return self.bound(eqn, [self.dense(base, 'low_rank'), *rest])[0]

  def bound(self, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Binds an equation's primitive as it stands."""
    return jaxcompat.bind_again(eqn, inputs, self.ambient)

  def viewed(self, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Does an equation of which an operand is a view."""
    name = eqn.primitive.name
    if name in jaxcompat.CALLS or name in RETRACED:
      return self.call(eqn, inputs)
    views = [i for i in inputs if isinstance(i, View)]
    rule = rule_for(name, views)
    if rule is not None:
      try:
        if name in CONSUMERS:
          result = _compiled(rule, *inputs, **eqn.params)
        elif name in EACH:
          result = rule(*inputs, primitive=eqn.primitive, **eqn.params)
        else:
          result = rule(*inputs, **eqn.params)
      except Decline:
        pass
      else:
        results = result if eqn.primitive.multiple_results else [result]
        if all(map(_fits, results, eqn.outvars)):
          if name in CONSUMERS:
            return [
              self.used(r, views, v)
              for r, v in zip(results, eqn.outvars, strict=True)
            ]
          return results
    return self.bound(eqn, [self.dense(i, name) for i in inputs])

  def used(self, result: Any, views: Sequence[View], var: Any) -> Any:
    """Returns what a rule made that uses views up, or only a part of one."""
    if isinstance(result, View):
      return result.named(views[0].origin)
    for view in views:
      self.note(view, FACTORED)
    return cast(result, var.aval.dtype)

  def tagged(self, value: Any, path: Path) -> Any:
    """Returns a view that knows which parameter it is."""
    if not isinstance(value, View) or isinstance(value, Squared):
      self.notes.setdefault(path, []).append(NOT_LOW_RANK)
      return value
    self.notes.setdefault(path, [])
    return value.named((path,))

  def call(self, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Does an equation that calls a jaxpr."""
    called = jaxcompat.called(eqn, jaxcompat.CALLS)
    if called is not None:
      return self.closed(called, inputs)
    name = eqn.primitive.name
    retraced = RETRACED.get(name)
    if retraced is None:
      return self.bound(eqn, [self.dense(i, name) for i in inputs])
    return retraced(self, eqn, [self.whole(i, name) for i in inputs])

  def inner(self, jaxpr: Any, because: str) -> Callable[..., list[Any]]:
    """Returns a function of arrays and views that gives arrays."""

    def function(*operands: Any) -> list[Any]:
      operands_ = [o.like(o.terms) if type(o) is View else o for o in operands]
      results = self.closed(jaxpr, operands_)
      return [
        _as_aval(self.dense(r, because), v.aval)
        for r, v in zip(results, jaxpr.jaxpr.outvars, strict=True)
      ]

    return function


FACTORED = 'factored'
NOT_LOW_RANK = 'not low-rank'


def _compiled(rule: Rule, *operands: Any, **params: Any) -> Any:
  """Returns what a rule makes, by a program for all operands that look alike.

  It is written out in the caller's program. What it is for is that a model's
  many layers are traced, and differentiated, once a kind.
  """
  anonymous = [o.named(()) if isinstance(o, View) else o for o in operands]
  return _program(rule, tuple(params.items()))(*anonymous)


@functools.lru_cache(maxsize=1024)
def _program(rule: Rule, params: Any) -> Callable[..., Any]:
  return jaxcompat.inlined(functools.partial(rule, **dict(params)))


def _fits(result: Any, var: Any) -> bool:
  """Whether a rule's result is of the kind that the primitive's would be.

  If not, the primitive does something that the rule does not know of.
  """
  if tuple(result.shape) != tuple(var.aval.shape):
    return False
  return not isinstance(result, View) or result.dtype == var.aval.dtype


def _as_aval(value: Any, aval: Any) -> Any:
  """Returns a value that has the dtype that a jaxpr says."""
  if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
    return value
  return cast(jnp.asarray(value), aval.dtype)


def _widens(eqn: Any, inputs: Sequence[Any]) -> bool:
  if eqn.primitive.name != 'convert_element_type':
    return False
  (value,) = inputs
  if isinstance(value, View):
    return False
  return widens(value.dtype, eqn.params['new_dtype'])


# What is known of a jaxpr, once for all walks.

_KNOWN: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _bases(jaxpr: Any) -> set[Any]:
  """Returns the variables that are the base of a low-rank value."""
  low_rank = lowrank.primitive()
  return {
    eqn.invars[0]
    for eqn in jaxpr.eqns
    if eqn.primitive is low_rank and not jaxcompat.is_literal(eqn.invars[0])
  }


def _reaches(eqn: Any) -> bool:
  """Whether a low-rank value is made somewhere inside of a call."""
  name = eqn.primitive.name
  if name not in jaxcompat.CALLS and name not in RETRACED:
    return False
  return any(map(makes, jaxcompat.inner(eqn)))


def makes(jaxpr: Any) -> bool:
  """Whether a low-rank value is made somewhere in a jaxpr."""
  known = _KNOWN.get(jaxpr)
  if known is None:
    low_rank = lowrank.primitive()
    known = any(
      eqn.primitive is low_rank or any(map(makes, jaxcompat.inner(eqn)))
      for eqn in jaxpr.eqns
    )
    _KNOWN[jaxpr] = known
  return known


# Calls that are traced again.


def _scan(walk: Walk, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  known = jaxcompat.scan(eqn)
  rows_at = known.consts + known.carry
  consts = inputs[: known.consts]
  carry = [
    walk.dense(i, 'scan (carry)') for i in inputs[known.consts : rows_at]
  ]
  xs, held = _stacked(walk, inputs[rows_at:])
  body = walk.inner(known.body, 'scan')

  def step(carry: Any, x: Any) -> Any:
    rows = [
      _row(one, kept) if kept is not None else one
      for one, kept in zip(x, held, strict=True)
    ]
    results = body(*consts, *carry, *rows)
    return results[: known.carry], results[known.carry :]

  carry, ys = jax.lax.scan(step, carry, xs, **known.options)
  return [*carry, *ys]


def _stacked(walk: Walk, xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """Returns operands that are scanned over, and what a view has beside them."""
  scanned: list[Any] = []
  held: list[Any] = []
  for x in xs:
    if not isinstance(x, View) or isinstance(x, Derived) or x.dropped:
      scanned.append(walk.dense(x, 'scan'))
      held.append(None)
      continue
    leaves: list[Any] = []
    for term in x.terms:
      for factor in (*term.factors, *term.spreads):
        if factor.owns(0):
          at = factor.axes.index(0)
          leaves.append(jnp.moveaxis(factor.value, at, 0))
        else:
          leaves.append(None)
    scanned.append(leaves)
    held.append(x)
  return scanned, held


def _row(leaves: Sequence[Any], stack: View) -> View:
  """Returns one view of a stack of them."""
  rows = iter(leaves)

  def change(factor: Any) -> Any:
    row = next(rows)
    axes = tuple(x for x in factor.axes if x != 0)
    value = factor.value if row is None else row
    names = {x: x - 1 for x in range(1, stack.ndim)}
    return type(factor)(value, axes).renamed(names)

  return stack.mapped(change, stack.shape[1:])


def _while(walk: Walk, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  params = eqn.params
  split = params['cond_nconsts']
  rest = split + params['body_nconsts']
  cond_consts, body_consts = inputs[:split], inputs[split:rest]
  init = [walk.dense(i, 'while (carry)') for i in inputs[rest:]]
  cond = walk.inner(params['cond_jaxpr'], 'while')
  body = walk.inner(params['body_jaxpr'], 'while')
  return list(
    jax.lax.while_loop(
      lambda carry: cond(*cond_consts, *carry)[0],
      lambda carry: body(*body_consts, *carry),
      init,
    )
  )


def _cond(walk: Walk, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  index, *operands = inputs
  branches = [walk.inner(b, 'cond') for b in eqn.params['branches']]
  return list(jax.lax.switch(index, branches, *operands))


def _remat(walk: Walk, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  params = eqn.params
  function = jax.checkpoint(
    walk.inner(jaxcompat.closed(params['jaxpr']), 'checkpoint'),
    prevent_cse=params['prevent_cse'],
    policy=params['policy'],
  )
  return list(function(*inputs))


def _shard_map(walk: Walk, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
  params = eqn.params
  jaxpr = jaxcompat.closed(params['jaxpr'])
  inner = walk.inner(jaxpr, 'shard_map')
  leaves: list[Any] = []
  specs: list[Any] = []
  trees: list[tuple[Any, int]] = []
  for one, spec in zip(inputs, params['in_specs'], strict=True):
    operand = _unshared(one)
    parts, tree = jax.tree.flatten(operand)
    leaves += parts
    specs += _specs(operand, spec, parts)
    trees.append((tree, len(parts)))

  def function(*leaves: Any) -> tuple[Any, ...]:
    rest = iter(leaves)
    operands = [
      jax.tree.unflatten(tree, list(itertools.islice(rest, count)))
      for tree, count in trees
    ]
    return tuple(inner(*map(_local, operands, jaxpr.jaxpr.invars)))

  mapped = jax.shard_map(
    function,
    mesh=params['mesh'],
    in_specs=tuple(specs),
    out_specs=tuple(params['out_specs']),
    check_vma=params['check_vma'],
    axis_names=jaxcompat.shard_map_axes(eqn),
  )
  return list(mapped(*leaves))


def _unshared(operand: Any) -> Any:
  """Returns a view none of whose arrays takes part along two sets of axes.

  As in `k + k.T`: it would have to lie on the mesh in two ways.
  """
  if not isinstance(operand, View):
    return operand
  known: dict[int, tuple[int, ...]] = {}

  def change(factor: Factor) -> Factor:
    if known.setdefault(id(factor.value), factor.axes) == factor.axes:
      return factor
    # Another array of the same numbers, by name.
    return Factor(jnp.array(factor.value), factor.axes)

  return operand.mapped(change)


def _specs(operand: Any, spec: Any, leaves: Sequence[Any]) -> list[Any]:
  """Returns how the arrays of a view lie on a mesh where the view lies so."""
  if not isinstance(operand, View):
    return [spec]
  names = (*spec, *[None] * (operand.ndim - len(spec)))
  part = jax.sharding.PartitionSpec
  known: dict[int, Any] = {}
  for term in operand.terms:
    for factor in (*term.factors, *term.spreads):
      where = [None if x < 0 else names[x] for x in factor.axes]
      known[id(factor.value)] = part(*where)
  return [known.get(id(v), part()) for v in leaves]


def _local(operand: Any, var: Any) -> Any:
  """Returns a view that has the shape that it has on one device."""
  if isinstance(operand, View):
    return operand.like(operand.terms, var.aval.shape)
  return operand


RETRACED: dict[str, Callable[[Walk, Any, Sequence[Any]], list[Any]]] = {
  'scan': _scan,
  'while': _while,
  'cond': _cond,
  'shard_map': _shard_map,
  **dict.fromkeys(jaxcompat.CHECKPOINTS, _remat),
}
