"""Each rule by itself gives what its primitive makes of the dense array."""

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import surgery
from surgery.contract.lowrank import RANK
from surgery.factoring.rules import CONSUMERS, EACH, RULES, folded, rule_for
from surgery.factoring.views import Decline, Factor, Folded, Squared, Term, View
from tests.live.models import close, normal

lax = jax.lax


def view(shape, outer=1, seed=1):
  """Returns a view of a base and of a product of rank 2."""
  axes = tuple(range(len(shape)))
  a = normal(seed, (*shape[:outer], 2))
  b = normal(seed + 1, (2, *shape[outer:]))
  base = Factor(normal(seed + 2, shape), axes)
  product = (
    Factor(a, (*axes[:outer], RANK)),
    Factor(b, (RANK, *axes[outer:])),
  )
  return View(shape, jnp.float32, [Term((base,)), Term(product, 0.5)])


def turned(shape):
  """Returns a view of a kernel whose axes of inputs and outputs changed."""
  *taps, ins, outs = range(len(shape))
  a = normal(1, (*shape[:-2], shape[-1], 2))
  b = normal(2, (2, shape[-2]))
  base = Factor(normal(3, shape), (*taps, ins, outs))
  product = (Factor(a, (*taps, outs, RANK)), Factor(b, (RANK, ins)))
  return View(shape, jnp.float32, [Term((base,)), Term(product, 0.5)])


def kronecker():
  """Returns a sum of two Kronecker products, (2, 3) times (3, 4)."""
  c, d = normal(1, (2, 3, 2)), normal(2, (2, 3, 4))
  term = Term((Factor(c, (0, 2, RANK)), Factor(d, (RANK, 1, 3))), 0.5)
  fine = View((2, 3, 3, 4), jnp.float32, [term])
  return Folded(fine, ((0, 1), (2, 3)))


def diagonal():
  """Returns blocks along a diagonal, times a matrix: (2, 3) by (2, 3, 4)."""
  blocks, matrix = normal(1, (2, 3, 3)), normal(2, (2, 3, 4))
  term = Term((Factor(blocks, (0, 1, RANK)), Factor(matrix, (0, RANK, 2))))
  return Folded(View((2, 3, 4), jnp.float32, [term]), ((0, 1), (2,)))


def over(one):
  """Returns the view before axes were joined."""
  return one.view


K, OTHER = view((4, 6)), view((4, 6), seed=9)
HEADS = view((4, 2, 3))
KERNEL = view((3, 2, 4, 6), outer=3)
KRONECKER, BLOCKS = kronecker(), diagonal()
X, IMAGE = normal(4, (5, 4)), normal(5, (2, 5, 5, 4))
ROWS, COLUMNS = normal(6, (4, 1)), normal(7, (1, 6))
WHOLE = normal(8, (4, 6))


def conv(x, k, **options):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(
    x, k, (1, 2), 'SAME', dimension_numbers=numbers, **options
  )


def placed(k):
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  spec = PartitionSpec(None, 'd')
  return lax.with_sharding_constraint(k, NamedSharding(mesh, spec))


def taken(axis, mode='clip'):
  indices = jnp.array([[3, 0], [1, 3]])
  return lambda k: jnp.take(k, indices, axis, mode=mode)


# Primitive, what is traced to it, and its operands.
CASES: list[tuple[str, Any, tuple[Any, ...]]] = [
  ('convert_element_type', lambda k: k.astype('bfloat16'), (K,)),
  ('neg', lax.neg, (K,)),
  ('mul', lambda k: k * 3, (K,)),
  ('mul', lambda k: 3 * k, (K,)),
  ('mul', lambda k, s: k * s, (K, jnp.float32(2))),
  ('mul', lambda k, s: k * s, (K, np.ones((1, 1), np.float32))),
  ('mul', lambda s, k: s * k, (ROWS, K)),
  ('mul', lambda k, s: k * s, (HEADS, normal(6, (1, 2, 3)))),
  ('div', lambda k: k / 4, (K,)),
  ('div', lambda k, s: k / s, (K, COLUMNS)),
  ('add', lambda k, y: k + y, (K, WHOLE)),
  ('add', lambda x, k: x + k, (WHOLE, K)),
  ('add', lax.add, (K, OTHER)),
  ('sub', lambda k, y: k - y, (K, WHOLE)),
  ('sub', lambda x, k: x - k, (WHOLE, K)),
  ('sub', lax.sub, (K, OTHER)),
  ('square', lax.square, (K,)),
  ('integer_pow', lambda k: lax.integer_pow(k, 2), (K,)),
  ('mul', lambda k: k * k, (K,)),
  ('reduce_sum', lambda s: s.sum(0), (Squared(K),)),
  ('reduce_sum', lambda s: s.sum(1), (Squared(K),)),
  ('reduce_sum', lambda s: s.sum((1, 2)), (Squared(HEADS),)),
  ('reduce_sum', lambda s: s.sum((0, 1, 2)), (Squared(KERNEL),)),
  ('transpose', jnp.transpose, (K,)),
  ('transpose', lambda k: k.transpose(2, 0, 1), (HEADS,)),
  ('copy', jnp.copy, (K,)),
  ('name', lambda k: checkpoint_name(k, 'kernel'), (K,)),
  ('sharding_constraint', placed, (K,)),
  ('sharding_constraint', placed, (HEADS,)),
  ('squeeze', lambda k: lax.squeeze(k, (1, 3)), (view((4, 1, 6, 1)),)),
  ('broadcast_in_dim', lambda k: jnp.broadcast_to(k, (3, 4, 6)), (K,)),
  (
    'broadcast_in_dim',
    lambda k: lax.broadcast_in_dim(k, (4, 2, 6), (0, 1, 2)),
    (view((4, 1, 6)),),
  ),
  ('reshape', lambda k: k.reshape(2, 2, 3, 2), (K,)),
  ('reshape', lambda k: k.reshape(4, 6), (HEADS,)),
  ('reshape', lambda k: k.reshape(1, 4, 1, 3, 2), (HEADS,)),
  ('slice', lambda k: lax.slice(k, (1, 0), (4, 5), (2, 3)), (K,)),
  ('slice', lambda k: lax.slice(k, (2, 3), (2, 6)), (K,)),
  (
    'dynamic_slice',
    lambda k, i, j: lax.dynamic_slice(k, (i, j), (2, 3)),
    (K, jnp.int32(3), jnp.int32(-1)),
  ),
  ('split', lambda k: lax.split(k, (1, 3, 2), 1), (K,)),
  ('rev', lambda k: lax.rev(k, (0, 1)), (K,)),
  ('concatenate', lambda k, y: lax.concatenate([k, y], 1), (K, WHOLE)),
  ('concatenate', lambda k, o: lax.concatenate([k, o, k], 0), (K, OTHER)),
  ('dot_general', lambda x, k: x @ k, (X, K)),
  ('dot_general', lax.dot, (K, normal(4, (6, 3)))),
  (
    'dot_general',
    lambda x, k: lax.dot_general(x, k, (((0,), (1,)), ((1,), (0,)))),
    (normal(4, (6, 4)), K),
  ),
  (
    'dot_general',
    lambda x, k: lax.dot_general(x, k, (((1, 2), (2, 0)), ((), ()))),
    (normal(4, (5, 3, 4)), HEADS),
  ),
  ('conv_general_dilated', conv, (IMAGE, KERNEL)),
  # The other factor owns the axis of inputs alone: as where it is turned.
  ('conv_general_dilated', conv, (IMAGE, turned((3, 2, 4, 6)))),
  (
    'conv_general_dilated',
    lambda x, k: conv(x, k, feature_group_count=2, rhs_dilation=(1, 2)),
    (IMAGE, view((3, 2, 2, 6), outer=3)),
  ),
  ('gather', taken(0), (K,)),
  ('gather', taken(1), (K,)),
  ('gather', taken(1, 'wrap'), (HEADS,)),
  ('reshape', lambda k: k.reshape(6, 12), (over(KRONECKER),)),
  ('reshape', lambda k: k.reshape(2, 36), (over(KRONECKER),)),
  ('reshape', lambda k: k.reshape(24), (K,)),
  ('reshape', lambda k: k.reshape(8, 3), (HEADS,)),
  ('reshape', lambda k: k.reshape(6, 2, 2), (over(BLOCKS),)),
  ('neg', lax.neg, (KRONECKER,)),
  ('copy', jnp.copy, (KRONECKER,)),
  ('convert_element_type', lambda k: k.astype('bfloat16'), (KRONECKER,)),
  ('mul', lambda k: 3 * k, (KRONECKER,)),
  ('mul', lambda k, s: k * s, (KRONECKER, normal(6, (6, 1)))),
  ('mul', lambda s, k: s * k, (normal(6, (1, 12)), KRONECKER)),
  ('div', lambda k, s: k / s, (KRONECKER, normal(6, (1, 12)))),
  ('add', lambda w, k: w + k, (normal(3, (6, 12)), KRONECKER)),
  ('add', lax.add, (view((6, 12)), KRONECKER)),
  ('sub', lax.sub, (KRONECKER, view((6, 12)))),
  ('add', lax.add, (KRONECKER, KRONECKER)),
  ('transpose', jnp.transpose, (KRONECKER,)),
  ('transpose', jnp.transpose, (BLOCKS,)),
  ('dot_general', lambda x, k: x @ k, (normal(4, (5, 6)), KRONECKER)),
  ('dot_general', lax.dot, (KRONECKER, normal(4, (12, 5)))),
  ('dot_general', lambda x, k: x @ k, (normal(4, (2, 5, 6)), BLOCKS)),
  ('dot_general', lax.dot, (BLOCKS, normal(4, (4,)))),
  (
    'dot_general',
    lambda x, k: lax.dot_general(x, k, (((0,), (1,)), ((1,), (0,)))),
    (normal(4, (12, 6)), KRONECKER),
  ),
]  # fmt: skip


def dense(value):
  return value.dense() if isinstance(value, View) else value


def equation(name, function, operands):
  """Returns the equation of a primitive, and its operands."""
  closed = jax.make_jaxpr(function)(*map(dense, operands))
  return _find(name, closed, operands)


def _find(name, closed, operands):
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values.update(zip(jaxpr.invars, operands, strict=True))
  for eqn in jaxpr.eqns:
    inputs = [
      v.val if isinstance(v, jex.Literal) else values[v] for v in eqn.invars
    ]
    if eqn.primitive.name == name:
      return eqn, inputs
    if eqn.primitive.name in ('jit', 'pjit') and any(
      isinstance(i, View) for i in inputs
    ):
      return _find(name, eqn.params['jaxpr'], inputs)
    # What prepares an operand.
    outputs = eqn.primitive.bind(
      *inputs, **eqn.primitive.get_bind_params(eqn.params)
    )
    outputs = outputs if eqn.primitive.multiple_results else [outputs]
    values.update(zip(eqn.outvars, outputs, strict=True))
  raise AssertionError(f'no {name}')


def applied(eqn, inputs):
  """Returns what the rule makes of operands, and what the primitive does."""
  name = eqn.primitive.name
  params = dict(eqn.params)
  if name in EACH:
    params['primitive'] = eqn.primitive
  made = rule_for(name, [i for i in inputs if isinstance(i, View)])(
    *inputs, **params
  )
  plain = eqn.primitive.bind(
    *map(dense, inputs), **eqn.primitive.get_bind_params(eqn.params)
  )
  if not eqn.primitive.multiple_results:
    made, plain = [made], [plain]
  return list(made), list(plain)


def named(case):
  return f'{CASES.index(case)}-{case[0]}'


@pytest.mark.parametrize('case', CASES, ids=named)
def test_a_rule_gives_what_its_primitive_does(case):
  name, function, operands = case
  made, plain = applied(*equation(name, function, operands))
  assert len(made) == len(plain)
  for ours, theirs in zip(made, plain, strict=True):
    # A view again; or what it is used up for, an array.
    assert isinstance(ours, View) == (name not in CONSUMERS)
    assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
    large = np.abs(np.asarray(theirs, 'float32')).max(initial=0)
    size = max(1.0, float(large))
    tolerance = 1e-2 if theirs.dtype == jnp.bfloat16 else 2e-6
    close(dense(ours) / size, theirs / size, tolerance)


def test_one_row_that_is_looked_up_is_a_view_still():
  eqn, inputs = equation(
    'gather', lambda k, i: jnp.take(k, i, 0), (K, jnp.int32(2))
  )
  (made,), (plain,) = applied(eqn, inputs)
  assert isinstance(made, View)
  close(made.dense(), plain, 2e-6)


DECLINED: list[tuple[str, Any, tuple[Any, ...]]] = [
  ('convert_element_type', lambda k: k.astype('int32'), (K,)),
  ('mul', lambda k, y: k * y, (K, WHOLE)),
  ('mul', lax.mul, (K, OTHER)),
  ('div', lambda k: 1 / k, (K,)),
  ('div', lax.div, (K, OTHER)),
  ('integer_pow', lambda k: lax.integer_pow(k, 3), (K,)),
  ('reduce_sum', lambda s: s.sum(), (Squared(K),)),
  ('mul', lambda k, y: k * y, (KRONECKER, normal(3, (6, 12)))),
  ('mul', lax.mul, (KRONECKER, KRONECKER)),
  ('dot_general', lambda k, o: k @ o, (BLOCKS, view((4, 2)))),
  ('reshape', lambda k: k.reshape(8, 3), (K,)),
  ('dot_general', lambda k, o: k @ o, (K, view((6, 4)))),
  ('gather', lambda k: k[jnp.array([1, 2]), jnp.array([0, 5])], (K,)),
  (
    'gather',
    lambda k: k.at[jnp.array([9])].get(mode='fill', fill_value=7),
    (K,),
  ),
]  # fmt: skip


@pytest.mark.parametrize('case', DECLINED, ids=lambda c: c[0])
def test_a_rule_declines_what_it_does_not_know(case):
  name, function, operands = case
  eqn, inputs = equation(name, function, operands)
  with pytest.raises(Decline):
    applied(eqn, inputs)


def test_the_value_itself():
  value = surgery.LowRank(WHOLE, normal(1, (4, 2)), normal(2, (2, 6)), 3.0)
  (eqn,) = jax.make_jaxpr(value.dense)().jaxpr.eqns
  made = RULES['low_rank'](value.base, value.a, value.b, **eqn.params)
  assert [1, 2] == [len(t.factors) for t in made.terms]
  close(made.dense(), value.base + 3 * value.a @ value.b, 2e-6)


def test_what_is_joined_has_rules_for_some_of_the_primitives():
  known = {name for name, _, operands in CASES if of(operands, Folded)}
  assert folded.RULES.keys() - {*EACH, 'add_any'} | {'copy'} == known
  for name in ('reshape', 'slice', 'gather', 'conv_general_dilated'):
    assert rule_for(name, [KRONECKER]) is None


def of(operands, kind):
  """Whether one of some operands is of a kind."""
  return any(isinstance(o, kind) for o in operands)


def test_every_rule_has_a_case():
  known = {name for name, *_ in CASES} | {'low_rank'}
  # The same functions by other names; and what only a mesh makes.
  for name in ('add_any', *EACH):
    assert RULES[name] is RULES['add'] or name in EACH
    known.add(name)
  assert RULES.keys() == known
