"""Goes through a model's jaxpr and keeps low-rank values factored.

Each equation is bound again as it stands, unless a view is among its operands;
then the table of rules decides. Calls are entered where they can be traced
again: `jit` is written out in place, and `scan`, `while`, `cond`, `checkpoint`
and `shard_map` get the parts of a view as operands.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from surgery import jaxcompat
from surgery.aliases import Array
from surgery.contract import lowrank
from surgery.factoring.rules import CONSUMERS, EACH, RULES, Rule, rule_for
from surgery.factoring.views import (
  Decline,
  Derived,
  DType,
  Factor,
  Looked,
  Misrouted,
  Operand,
  Squared,
  View,
  cast,
  plain,
  widens,
)
from surgery.jaxcompat import ClosedJaxpr, Equation, Jaxpr
from surgery.live.primitives import TAG
from surgery.naming.paths import Path

Inputs = Sequence[Operand]


class DropoutLost(Exception):  # noqa: N818 - becomes an error with advice.
  """A view with dropout would have been made dense.

  Attributes:
    origin: paths of the parameters, where known.
    because: what needs the dense array.
  """

  def __init__(self, origin: Sequence[Path], because: Note) -> None:
    super().__init__(str(because))
    self.origin = tuple(origin)
    self.because = because


class Kind(enum.Enum):
  """What a note about an adapted parameter is about."""

  FACTORED = 'a use that kept its factors'
  PLAIN = 'a type that gives no low-rank value'
  USE = 'a use by the model that needs the dense array'
  APPLY = 'an operation inside of apply that needs the dense array'
  CALL = 'a call that cannot be followed as a whole'
  FAILURE = 'a failure of the walk itself'


@dataclasses.dataclass(frozen=True)
class Note:
  """What became of a use of an adapted parameter.

  Attributes:
    what: `factored`, or a primitive, or what else needs the dense array.
    kind: what it is about.
  """

  what: str
  kind: Kind = Kind.USE

  def __str__(self) -> str:
    """Returns it as `explain` shows it."""
    if self.kind is Kind.APPLY:
      return f'{self.what} inside apply'
    if self.kind is Kind.FAILURE:
      return f'failure of surgery: {self.what}'
    return self.what

  @property
  def is_loss(self) -> bool:
    """Whether factors that were there are lost."""
    return self.kind not in (Kind.FACTORED, Kind.PLAIN)


KEPT = Note('factored', Kind.FACTORED)
NOT_LOW_RANK = Note('not low-rank', Kind.PLAIN)


def _failure(name: str, error: Exception) -> Note:
  """Returns the note for what went wrong in code of ours."""
  if isinstance(error, jaxcompat.Unfamiliar):
    return Note(str(error), Kind.FAILURE)
  line = str(error).split('\n', 1)[0]
  return Note(f'{name!r} raised {type(error).__name__}: {line}', Kind.FAILURE)


@dataclasses.dataclass
class Walk:
  """One walk through a model.

  Attributes:
    training: whether dropout is on.
    notes: for each adapted parameter what became of its uses.
    lost: arrays that a view was made into before it was known which parameter
      it is, inside of `apply`, and what was made of them; by their ids.
    dtypes: for each of them the dtypes in which its factors are used.
    ambient: the context (mesh, metadata) of equations that are made here;
      those of the model have the same, but for some.
  """

  training: bool = False
  notes: dict[Path, list[Note]] = dataclasses.field(default_factory=dict)
  lost: dict[int, tuple[Any, Note]] = dataclasses.field(default_factory=dict)
  dtypes: dict[Path, set[str]] = dataclasses.field(default_factory=dict)
  ambient: Any = dataclasses.field(default_factory=jaxcompat.ambient)

  # What is written down for `explain`.

  def note(self, paths: Sequence[Path], note: Note) -> None:
    """Writes down what became of a use of parameters."""
    for path in paths:
      self.notes.setdefault(path, []).append(note)

  def computed(self, view: View, dtype: DType) -> None:
    """Writes down in which dtype the factors of a view are used."""
    for path in view.origin:
      self.dtypes.setdefault(path, set()).add(str(dtype))

  def losses(self) -> dict[Path, list[Note]]:
    """Returns parameters whose factors were lost, and by what, each once."""
    found = {
      path: [*dict.fromkeys(n for n in notes if n.is_loss)]
      for path, notes in self.notes.items()
    }
    return {path: notes for path, notes in found.items() if notes}

  def dense(self, value: Operand, because: Note | str) -> Array:
    """Returns an array for a view, made dense because of a primitive.

    Raises:
      DropoutLost: if the view has dropout.
    """
    if not isinstance(value, View):
      return value
    if isinstance(value, Looked):
      self.computed(value, value.arithmetic)
      return value.dense()
    because = Note(because) if isinstance(because, str) else because
    if value.dropped:
      raise DropoutLost(value.origin, because)
    if value.rows is not None:
      raise Misrouted(value, f'{str(because)!r} needs the dense parameter')
    self.note(value.origin, because)
    made = value.dense()
    if not value.origin:
      self.lose([made], because)
    return made

  def lose(self, values: Inputs, because: Note) -> None:
    """Remembers arrays in which factors are lost, until they are tagged."""
    if because.kind is Kind.USE:
      because = Note(because.what, Kind.APPLY)
    self.lost.update((id(value), (value, because)) for value in values)

  def lost_in(self, inputs: Inputs) -> Note | None:
    """Returns why factors were lost in an operand, if they were."""
    if not self.lost:
      return None
    found = (self.lost[id(i)] for i in inputs if id(i) in self.lost)
    return next((note for _, note in found), None)

  def whole(self, value: Operand, because: Note | str) -> Operand:
    """Returns a value as it is, and an array for a `Derived` view."""
    return self.dense(value, because) if isinstance(value, Derived) else value

  # The walk.

  def closed(self, jaxpr: ClosedJaxpr, operands: Inputs) -> list[Operand]:
    """Goes through a closed jaxpr; returns its results, views among them."""
    bases = _bases(jaxpr)
    # Whether there may be views among operands: few jaxprs have one.
    viewed = any(isinstance(o, View) for o in operands)

    def equation(eqn: Equation, inputs: list[Operand]) -> list[Operand]:
      nonlocal viewed
      if bases.intersection(eqn.outvars) and _widens(eqn, inputs):
        # The base of a low-rank value stays in the dtype that it is stored in.
        (value,) = inputs
        assert not isinstance(value, View)
        viewed = True
        return [plain(value, eqn.params['new_dtype'])]
      with jaxcompat.scope(eqn):
        outputs = self.equation(eqn, inputs, viewed)
      # It comes out of `low_rank`, or out of a call of what makes one.
      viewed = viewed or any(isinstance(o, View) for o in outputs)
      return outputs

    return jaxcompat.interpret(jaxpr, operands, equation)

  def equation(
    self, eqn: Equation, inputs: Inputs, viewed: bool
  ) -> list[Operand]:
    """Returns the results of an equation.

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
    if any(map(makes, jaxcompat.inner(eqn))):
      return self.call(eqn, inputs)
    return self.bound(eqn, inputs)

  def low_rank(self, eqn: Equation, inputs: Inputs) -> Operand:
    """Returns the view that a low-rank value is."""
    inputs = [self.whole(i, 'low_rank') for i in inputs]
    try:
      view = RULES['low_rank'](*inputs, training=self.training, **eqn.params)
      # A base may be narrower than what comes out.
      made_as: Any = eqn.outvars[0].aval
      return view.like(view.terms, dtype=made_as.dtype)
    except Decline:
      if self.training and eqn.params['dropout']:
        raise DropoutLost((), Note('vmap')) from None
      made = self.bound(eqn, [self.dense(i, 'low_rank') for i in inputs])
      self.lose(made, Note('low_rank'))
      return made[0]

  def bound(self, eqn: Equation, inputs: Inputs) -> list[Operand]:
    """Binds an equation's primitive as it stands."""
    made = jaxcompat.bind_again(eqn, inputs, self.ambient)
    because = self.lost_in(inputs)
    if because is not None:
      self.lose(made, because)
    return made

  def left(self, eqn: Equation, inputs: Inputs, because: Note) -> list[Operand]:
    """Binds an equation as it stands whose operands or calls have views.

    Raises:
      DropoutLost: if a low-rank value that is made inside has dropout.
    """
    paths, drops = _inside(eqn)
    if self.training and drops:
      raise DropoutLost(paths, because)
    made = self.bound(eqn, [self.dense(i, because) for i in inputs])
    self.note(paths, because)
    loses = any(isinstance(i, View) and not i.origin for i in inputs)
    if loses or (not paths and any(map(makes, jaxcompat.inner(eqn)))):
      self.lose(made, because)
    return made

  def viewed(self, eqn: Equation, inputs: Inputs) -> list[Operand]:
    """Returns the results of an equation of which an operand is a view."""
    name = eqn.primitive.name
    if name in jaxcompat.CALLS or name in RETRACED:
      return self.call(eqn, inputs)
    views = [i for i in inputs if isinstance(i, View)]
    rule = rule_for(name, views)
    if rule is None:
      return self.left(eqn, inputs, Note(name))
    try:
      results = _by_rule(rule, eqn, inputs)
    except Decline:
      return self.left(eqn, inputs, Note(name))
    except Misrouted:
      raise
    except Exception as error:  # Of ours: the dense way is still right.
      return self.left(eqn, inputs, _failure(name, error))
    if not all(map(_fits, results, eqn.outvars)):
      return self.left(eqn, inputs, Note(name))
    if name in CONSUMERS:
      return [
        self.used(r, views, v)
        for r, v in zip(results, eqn.outvars, strict=True)
      ]
    for view in views:
      if isinstance(view, Looked):
        self.computed(view, results[0].dtype)
    return results

  def used(self, result: Operand, views: Sequence[View], var: Any) -> Operand:
    """Returns what a rule made that uses views up, or only a part of one."""
    if isinstance(result, View):
      if isinstance(result, Looked):
        self.note(views[0].origin, KEPT)
      return result.named(views[0].origin)
    for view in views:
      self.note(view.origin, KEPT)
      self.computed(view, view.arithmetic)
    return cast(result, var.aval.dtype)

  def tagged(self, value: Operand, path: Path) -> Operand:
    """Returns a view that knows which parameter it is."""
    because = self.lost_in([value])
    self.lost.clear()  # What follows is not inside of this `apply`.
    if isinstance(value, Squared):
      because = Note('square', Kind.APPLY)
    if because is not None or not isinstance(value, View):
      self.note([path], because or NOT_LOW_RANK)
      return value
    self.notes.setdefault(path, [])
    return value.named((path,))

  def call(self, eqn: Equation, inputs: Inputs) -> list[Operand]:
    """Returns the results of an equation that calls a jaxpr."""
    name = eqn.primitive.name
    if name not in jaxcompat.CALLS and name not in RETRACED:
      return self.left(eqn, inputs, Note(name))
    before = {path: len(notes) for path, notes in self.notes.items()}
    try:
      jaxcompat.check(name, eqn.params)
      called = jaxcompat.called(eqn, jaxcompat.CALLS)
      if called is not None:
        return self.closed(called, inputs)
      made = RETRACED[name](self, eqn, [self.whole(i, name) for i in inputs])
    except (DropoutLost, Misrouted):
      raise
    except Exception as error:  # Of ours: the dense way is still right.
      # Nothing holds of what was written down inside.
      for path, notes in self.notes.items():
        del notes[before.get(path, 0) :]
      return self.left(eqn, inputs, _failure(name, error))
    because = self.lost_in(inputs)
    if because is not None:
      self.lose(made, because)
    return made

  def inner(
    self, jaxpr: ClosedJaxpr, because: str
  ) -> Callable[..., list[Array]]:
    """Returns a function of arrays and views that gives arrays."""

    def function(*operands: Operand) -> list[Array]:
      # JAX may trace it again: a view keeps no array of an earlier trace.
      operands_ = [o.like(o.terms) if type(o) is View else o for o in operands]
      results = self.closed(jaxpr, operands_)
      return [
        _as_aval(self.dense(r, because), v.aval)
        for r, v in zip(results, jaxpr.jaxpr.outvars, strict=True)
      ]

    return function


def _by_rule(rule: Rule, eqn: Equation, inputs: Inputs) -> list[Operand]:
  """Returns what a rule makes of an equation.

  Raises:
    Decline: if the rule has nothing for this case.
  """
  name = eqn.primitive.name
  jaxcompat.check(name, eqn.params)
  if name in CONSUMERS:
    made = _compiled(rule, *inputs, **eqn.params)
  elif name in EACH:
    made = rule(*inputs, primitive=eqn.primitive, **eqn.params)
  else:
    made = rule(*inputs, **eqn.params)
  return made if eqn.primitive.multiple_results else [made]


def _compiled(rule: Rule, *operands: Operand, **params: Any) -> Any:
  """Returns what a rule makes, by a program for all operands that look alike.

  It is written out in the caller's program. So the many layers of a model are
  traced and differentiated once for each kind.
  """
  # Without paths, which would make each layer another kind.
  anonymous = [o.named(()) if isinstance(o, View) else o for o in operands]
  return _program(rule, tuple(params.items()))(*anonymous)


@functools.lru_cache(maxsize=1024)
def _program(rule: Rule, params: Any) -> Callable[..., Any]:
  return jaxcompat.inlined(functools.partial(rule, **dict(params)))


def _fits(result: Operand, var: Any) -> bool:
  """Whether a rule's result is of the kind that the primitive's would be.

  If not, the primitive does something that the rule does not know of.
  """
  if tuple(result.shape) != tuple(var.aval.shape):
    return False
  return not isinstance(result, View) or result.dtype == var.aval.dtype


def _as_aval(value: Array, aval: Any) -> Array:
  """Returns a value in the dtype that a jaxpr declares."""
  if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
    return value
  return cast(jnp.asarray(value), aval.dtype)


def _widens(eqn: Equation, inputs: Inputs) -> bool:
  """Whether an equation casts an array to a wider floating dtype."""
  if eqn.primitive.name != 'convert_element_type':
    return False
  (value,) = inputs
  if isinstance(value, View):
    return False
  return widens(value.dtype, eqn.params['new_dtype'])


# What is known of a jaxpr, once for all walks.

_KNOWN: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _bases(jaxpr: ClosedJaxpr) -> set[Any]:
  """Returns the variables that are the base of a low-rank value."""
  low_rank = lowrank.primitive()
  return {
    eqn.invars[0]
    for eqn in jaxpr.eqns
    if eqn.primitive is low_rank and not jaxcompat.is_literal(eqn.invars[0])
  }


def _inside(eqn: Equation) -> tuple[list[Path], bool]:
  """Returns which parameters are answered inside of an equation's jaxprs.

  Returns:
    Their paths, and whether a low-rank value there has dropout.
  """
  paths: list[Path] = []
  drops = False
  for inner in jaxcompat.inner(eqn):
    for one in inner.eqns:
      if one.primitive.name == TAG:
        paths.append(one.params['path'])
      if one.primitive is lowrank.primitive():
        drops = drops or one.params['dropout'] > 0
      below, dropped = _inside(one)
      paths += below
      drops = drops or dropped
  return paths, drops


def makes(jaxpr: Jaxpr) -> bool:
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


def _scan(walk: Walk, eqn: Equation, inputs: Inputs) -> list[Operand]:
  """Scans again with a body that keeps views factored."""
  known = jaxcompat.scan(eqn)
  rows_at = known.consts + known.carry
  # What the body closes over may be a view. A carry goes round as arrays, since
  # one step need not return the terms that it was given.
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


def _stacked(
  walk: Walk, xs: Inputs
) -> tuple[list[list[Array | None] | Array], list[View | None]]:
  """Returns what is scanned over of each operand, and the views among them.

  Of a view these are its factors that own the leading axis, along which scan
  slices. Of others there is None: `_row` takes them whole from the view.
  """
  scanned: list[list[Array | None] | Array] = []
  held: list[View | None] = []
  for x in xs:
    if not isinstance(x, View) or isinstance(x, Derived) or _one_key(x):
      scanned.append(walk.dense(x, 'scan'))
      held.append(None)
      continue
    # Scan slices the first axis of arrays, wherever a factor has the layers'.
    scanned.append(
      [
        jnp.moveaxis(f.value, f.axes.index(0), 0) if f.owns(0) else None
        for term in x.terms
        for f in term.parts()
      ]
    )
    held.append(x)
  return scanned, held


def _one_key(view: View) -> bool:
  """Whether all rows of a view would drop the same elements."""
  return any(
    not term.dropout.key.owns(0)
    for term in view.terms
    if term.dropout is not None
  )


def _row(leaves: Sequence[Array | None], stack: View) -> View:
  """Returns one layer's view of a stack of them.

  Args:
    leaves: what scan made of the arrays of `_stacked`, in its order.
    stack: the view of all layers.
  """
  # `mapped` goes through terms and factors in the order of `parts`, in which
  # `_stacked` listed them.
  rows = iter(leaves)
  # The leading axis is gone, so all others move one to the front.
  names = {x: x - 1 for x in range(1, stack.ndim)}

  def change(factor: Factor) -> Factor:
    row = next(rows)
    axes = tuple(x for x in factor.axes if x != 0)
    value = factor.value if row is None else row
    return Factor(value, axes).renamed(names)

  return stack.mapped(change, stack.shape[1:])


def _while(walk: Walk, eqn: Equation, inputs: Inputs) -> list[Operand]:
  """Loops again with a body that keeps views factored; a carry is dense."""
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


def _cond(walk: Walk, eqn: Equation, inputs: Inputs) -> list[Operand]:
  """Branches again; each branch may keep views factored in its own way."""
  index, *operands = inputs
  branches = [walk.inner(b, 'cond') for b in eqn.params['branches']]
  return list(jax.lax.switch(index, branches, *operands))


def _remat(walk: Walk, eqn: Equation, inputs: Inputs) -> list[Operand]:
  """Checkpoints again: what is recomputed are the products of factors."""
  params = eqn.params
  function = jax.checkpoint(
    walk.inner(jaxcompat.closed(params['jaxpr']), 'checkpoint'),
    prevent_cse=params['prevent_cse'],
    policy=params['policy'],
  )
  return list(function(*inputs))


def _shard_map(walk: Walk, eqn: Equation, inputs: Inputs) -> list[Operand]:
  """Maps over the mesh again, with the arrays of views as operands."""
  params = eqn.params
  jaxpr = jaxcompat.closed(params['jaxpr'])
  inner = walk.inner(jaxpr, 'shard_map')
  leaves: list[Any] = []
  specs: list[Any] = []
  trees: list[tuple[Any, int]] = []
  # A view is many operands of the mapped function, each with its own spec, and
  # is put together again on each device.
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


def _unshared(operand: Operand) -> Operand:
  """Returns a view in which no array stands for two different sets of axes.

  In `k + k.T` one does, and would have to lie on the mesh in two ways.
  """
  if not isinstance(operand, View):
    return operand
  known: dict[int, tuple[int, ...]] = {}

  def change(factor: Factor) -> Factor:
    if known.setdefault(id(factor.value), factor.axes) == factor.axes:
      return factor
    # A copy is another array to JAX, and may have another spec.
    return Factor(jnp.array(factor.value), factor.axes)

  return operand.mapped(change)


def _specs(operand: Operand, spec: Any, leaves: Sequence[Array]) -> list[Any]:
  """Returns the partition specs of a view's arrays, given the view's own."""
  if not isinstance(operand, View):
    return [spec]
  names = (*spec, *[None] * (operand.ndim - len(spec)))
  part = jax.sharding.PartitionSpec
  known: dict[int, Any] = {}
  for term in operand.terms:
    for factor in term.parts():
      where = [None if x < 0 else names[x] for x in factor.axes]
      known[id(factor.value)] = part(*where)
  return [known.get(id(v), part()) for v in leaves]


def _local(operand: Operand, var: Any) -> Operand:
  """Returns a view with the shape that it has on one device."""
  if isinstance(operand, View):
    return operand.like(operand.terms, var.aval.shape)
  return operand


RETRACED: dict[str, Callable[[Walk, Equation, Inputs], list[Operand]]] = {
  'scan': _scan,
  'while': _while,
  'cond': _cond,
  'shard_map': _shard_map,
  **dict.fromkeys(jaxcompat.CHECKPOINTS, _remat),
}
