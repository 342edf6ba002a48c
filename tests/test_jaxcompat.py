"""What the library uses of JAX that JAX does not promise to keep.

If one of these fails, JAX has moved. All that is used of it that it does not
promise is in `surgery/jaxcompat.py`: the message says what to mend there.
docs/compatibility.md says how to go about it.
"""

from __future__ import annotations

import ast
import contextlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import surgery
from surgery import jaxcompat
from surgery.adapting import cutting
from surgery.factoring.rules import RULES
from surgery.factoring.walking import RETRACED

lax = jax.lax
ROOT = pathlib.Path(surgery.__file__).parents[1]
MOVED = (
  f'JAX {jax.__version__} has changed {{}}. Mend {{}} in surgery/jaxcompat.py.'
)

# Names that other releases of JAX have for some primitives.
ELSEWHERE = {
  *('checkpoint', 'closed_call', 'copy_p', 'core_call', 'pbroadcast', 'pjit'),
  'remat',
}
UNARY = (
  *('abs', 'acos', 'acosh', 'asin', 'asinh', 'atan', 'atanh', 'cbrt', 'ceil'),
  *('cos', 'cosh', 'cumlogsumexp', 'cummax', 'cummin', 'cumprod', 'cumsum'),
  *('erf', 'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor', 'is_finite'),
  *('log', 'log1p', 'logistic', 'neg', 'optimization_barrier', 'round'),
  *('rsqrt', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'stop_gradient', 'tan'),
  'tanh',
)
BINARY = (
  *('add', 'atan2', 'div', 'eq', 'ge', 'gt', 'le', 'lt', 'max', 'min', 'mul'),
  *('ne', 'nextafter', 'pow', 'rem', 'sub'),
)


def _examples():
  """Yields small functions of a matrix, which together use all primitives."""
  whole = lambda k: k.astype('int32')
  yield lambda k: [getattr(lax, name)(k) for name in UNARY]
  yield lambda k: [getattr(lax, name)(k, k) for name in BINARY]
  yield lambda k: [whole(k) & 1, whole(k) | 1, whole(k) ^ 1, ~whole(k)]
  yield lambda k: [lax.real(k + 1j), lax.imag(k + 1j), lax.clamp(0.0, k, 1.0)]
  yield lambda k: [jnp.where(k > 0, k, 1), lax.reduce_precision(k, 5, 3)]
  yield lambda k: [k.sum(0), k.max(0), k.min(0), k.prod(0)]
  yield lambda k: [(k > 0).all(0), (k > 0).any(0), jnp.pad(k, 1)]
  yield lambda k: [k.T, k.reshape(24), k[:2], jnp.split(k, 2), k[::-1]]
  yield lambda k: lax.dynamic_slice(k, (jnp.argmax(k), 0), (1, 6))
  yield lambda k: [jnp.concatenate([k, k]), k[None].squeeze(0), jnp.copy(k)]
  yield lambda k: jnp.take(k, jnp.array([1, 2]), 0)
  yield lambda k: jnp.broadcast_to(k, (2, 4, 6))
  yield lambda k: [k @ k.T, k**2]
  yield lambda k: lax.conv_general_dilated(k[None], k[None], (1,), 'SAME')
  yield lambda k: lax.scan(lambda c, x: (c, x), 0, k)
  yield lambda k: lax.fori_loop(0, jnp.argmax(k), lambda i, k: k, k)
  yield lambda k: lax.cond(k.sum() > 0, lambda k: k, lambda k: 2 * k, k)
  yield lambda k: [jax.jit(jnp.sin)(k), jax.checkpoint(jnp.sin)(k)]
  yield lambda k: [jax.nn.relu(k), _custom_vjp(k)]
  yield jax.grad(lambda k: (k @ k.T).sum() + (2 * k).sum())
  yield lambda k: checkpoint_name(k, 'kernel')
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  placed = NamedSharding(mesh, PartitionSpec('d'))
  yield lambda k: lax.with_sharding_constraint(k, placed)
  yield lambda k: _sharded(k, mesh)


@jax.custom_vjp
def _custom_vjp(k):
  return jnp.sin(k)


_custom_vjp.defvjp(lambda k: (k, k), lambda _, t: (t,))


def _sharded(k, mesh):
  specs = (PartitionSpec('d'), PartitionSpec())
  mapped = jax.shard_map(
    jnp.multiply, mesh=mesh, in_specs=specs, out_specs=specs[0]
  )
  return mapped(k, 2.0)


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jaxcompat.inner(eqn):
      yield from _equations(inner)


@pytest.fixture(scope='module')
def met():
  """Equations of small examples, by the names of their primitives."""
  return {
    eqn.primitive.name: eqn
    for example in _examples()
    for eqn in _equations(jax.make_jaxpr(example)(jnp.ones((4, 6))).jaxpr)
  }


# Primitives.


@pytest.mark.parametrize('name', jaxcompat.PRIMITIVES)
def test_each_primitive_is_as_it_is_known(met, name):
  if name in ELSEWHERE:
    pytest.skip('a name of other releases') if name not in met else None
  assert name in met, (
    f'JAX {jax.__version__} no longer uses the primitive {name!r} for what it '
    'did: the examples of this test make none. Find its new name by printing '
    'their jaxprs, and add it to PRIMITIVES in surgery/jaxcompat.py and to the '
    'rules that name the old one.'
  )
  listed = jaxcompat.PRIMITIVES[name].split()
  new = met[name].params.keys() - {one.removesuffix('?') for one in listed}
  gone = {one for one in listed if one[-1] != '?'} - met[name].params.keys()
  where = [str(path) for path in _readers(name)]
  assert not new | gone, (
    f'JAX {jax.__version__} gives the primitive {name!r} other parameters: new '
    f'{sorted(new)}, gone {sorted(gone)}. See whether they change what is '
    f'computed in {", ".join(where)}; a rule must look at what does. Then list '
    'them in PRIMITIVES in surgery/jaxcompat.py.'
  )


def _readers(name):
  """Yields the files that read a primitive."""
  for path in sorted((ROOT / 'surgery').rglob('*.py')):
    if re.search(rf"'{name}'", path.read_text(encoding='utf-8')):
      yield path.relative_to(ROOT)


@pytest.mark.parametrize(
  ('table', 'where'),
  [
    (RULES, 'surgery/live/rules'),
    (RETRACED, 'surgery/factoring/walking.py'),
    (cutting._NEEDS, 'surgery/adapting/cutting.py'),
  ],
)
def test_no_primitive_is_read_that_is_not_listed(table, where):
  assert not table.keys() - jaxcompat.PRIMITIVES.keys() - {'low_rank'}, (
    f'{where} reads a primitive that PRIMITIVES in surgery/jaxcompat.py lacks; '
    'add it there, and an example here that uses it.'
  )


def test_a_parameter_that_is_new_is_refused():
  with pytest.raises(jaxcompat.Unfamiliar, match=r"'squeeze'.*new 'twice'"):
    jaxcompat.check('squeeze', {'dimensions': (0,), 'twice': True})


@pytest.mark.parametrize('value', [None, False, ()])
def test_a_parameter_that_is_new_and_off_is_ignored(value):
  jaxcompat.check('squeeze', {'dimensions': (0,), 'twice': value})


def test_a_parameter_that_is_gone_is_refused():
  with pytest.raises(jaxcompat.Unfamiliar, match=r"'squeeze'.*gone 'dimens"):
    jaxcompat.check('squeeze', {})


# Jaxprs.


@pytest.fixture(scope='module')
def sine():
  (eqn,) = jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns
  return eqn


def test_an_equation_can_be_bound_again(sine):
  (found,) = jaxcompat.bind_again(sine, [2.0], jaxcompat.ambient())
  assert np.sin(2.0) == pytest.approx(found), MOVED.format(
    'Primitive.get_bind_params or Primitive.bind', 'bind'
  )


def test_a_call_with_a_jaxpr_can_be_bound_again():
  closed = jax.make_jaxpr(jax.nn.relu)(1.0)
  (eqn,) = closed.jaxpr.eqns
  (found,) = jaxcompat.bind_again(eqn, [-2.0], jaxcompat.ambient())
  assert 0.0 == found, MOVED.format('Primitive.get_bind_params', 'bind')


def test_an_equation_has_the_context_of_where_it_was_made(sine):
  assert sine.ctx is jaxcompat.ambient(), MOVED.format(
    'JaxprEqn.ctx', 'ambient'
  )
  assert isinstance(sine.ctx.manager, contextlib.AbstractContextManager), (
    MOVED.format('JaxprEqn.ctx.manager', 'bind_again')
  )
  with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
    assert sine.ctx is not jaxcompat.ambient()


def test_random_bits_are_those_of_the_context_of_an_equation():
  key = jax.random.key(0)
  draw = lambda: jax.random.normal(key, (4,))
  other = not jax.config.jax_threefry_partitionable
  with jax.threefry_partitionable(other):
    expected, closed = draw(), jax.make_jaxpr(draw)()
  ambient = jaxcompat.ambient()
  (found,) = jaxcompat.interpret(
    closed, [], lambda eqn, inputs: jaxcompat.bind_again(eqn, inputs, ambient)
  )
  assert expected.tolist() == found.tolist(), MOVED.format(
    'JaxprEqn.ctx', 'bind_again'
  )


def test_an_equation_knows_its_names():
  with jax.named_scope('above'):
    closed = jax.make_jaxpr(jax.named_scope('here')(jnp.sin))(1.0)
  with jaxcompat.scope(closed.jaxpr.eqns[0]):
    (again,) = jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns
    assert 'here' in str(closed.jaxpr.eqns[0].source_info.name_stack), (
      MOVED.format('JaxprEqn.source_info.name_stack', 'scope')
    )


def test_a_jaxpr_is_gone_through():
  kernel = np.arange(4.0).reshape(2, 2)
  closed = jax.make_jaxpr(lambda x: [2 * (x @ kernel), x])(jnp.ones(2))
  ambient = jaxcompat.ambient()
  product, same = jaxcompat.interpret(
    closed,
    [jnp.array([3.0, 5.0])],
    lambda eqn, inputs: jaxcompat.bind_again(eqn, inputs, ambient),
  )
  what = MOVED.format('how a jaxpr tells its variables', 'interpret')
  assert [20.0, 36.0] == product.tolist(), what
  assert [3.0, 5.0] == same.tolist(), what


def test_what_stands_for_constants_is_said_apart():
  closed = jax.make_jaxpr(lambda x: 2 * (x @ np.ones((2, 2))))(jnp.ones(2))
  seen = []
  jaxcompat.interpret(
    closed,
    ['input'],
    lambda eqn, inputs: seen.append(inputs) or ['made'],
    constant=lambda value: 'constant',
    literal=lambda value: value.item(),
  )
  assert ['input', 'constant'] == seen[0]
  assert {2.0, 'made'} == set(seen[-1])


@pytest.mark.parametrize(
  ('function', 'table'),
  [
    (jax.jit(jnp.sin), jaxcompat.CALLS),
    (jax.checkpoint(jnp.sin), jaxcompat.CHECKPOINTS),
    (jax.nn.relu, jaxcompat.CUSTOM),
    (_custom_vjp, jaxcompat.CUSTOM),
  ],
)
def test_calls_tell_what_they_call(function, table):
  (eqn,) = jax.make_jaxpr(function)(1.0).jaxpr.eqns
  called = jaxcompat.called(eqn, table)
  assert called is not None, MOVED.format(f'{eqn.primitive.name!r}', 'called')
  (result,) = jaxcompat.interpret(called, ['input'], lambda *_: ['result'])
  assert 'result' == result
  assert jaxcompat.called(eqn) is None
  assert 1 == len([*jaxcompat.inner(eqn)]), MOVED.format(
    'jaxprs_in_params', 'inner'
  )


# Control flow.


def test_a_scan_tells_its_constants_and_its_carry():
  one = jnp.ones(())
  body = lambda c, x: ((c[0] + x * one, c[1] * x), (x, x, x))
  closed = jax.make_jaxpr(
    lambda y, xs: lax.scan(lambda c, x: body(c, x * y), (y, y), xs, unroll=2)
  )(1.0, jnp.ones(4))
  eqn = next(e for e in closed.jaxpr.eqns if e.primitive.name == 'scan')
  found = jaxcompat.scan(eqn)
  what = MOVED.format("the parameters of 'scan'", 'scan')
  assert 2 == found.carry, what
  assert len(eqn.invars) - 2 - 1 == found.consts, what
  assert 4 == found.options['length'], what
  assert 2 == found.options['unroll'], what
  assert found.options['reverse'] is False, what
  assert len(eqn.invars) == len(found.body.jaxpr.invars), what


def test_a_scan_that_does_not_tell_is_refused(met):
  class Equation:
    params = {
      k: v for k, v in met['scan'].params.items() if k[:3] not in ('ft_', 'num')
    }

  with pytest.raises(jaxcompat.Unfamiliar, match="'scan'"):
    jaxcompat.scan(Equation)


def test_a_shard_map_tells_its_axes(met):
  assert {'d'} == jaxcompat.shard_map_axes(met['shard_map']), MOVED.format(
    "the parameters of 'shard_map'", 'shard_map_axes'
  )


# Compiling.


def test_what_is_inlined_leaves_no_equation():
  double = jaxcompat.inlined(lambda x: 2 * x)
  closed = jax.make_jaxpr(lambda x: jnp.sin(double(x)))(1.0)
  names = [eqn.primitive.name for eqn in closed.jaxpr.eqns]
  assert ['mul', 'sin'] == names, MOVED.format(
    'how `jit(inline=True)` is written out', '`inlined`'
  )


# Values.


def test_traced_values_are_told_from_arrays():
  found = []
  jax.make_jaxpr(lambda x: found.append(jaxcompat.is_traced(x)) or x)(1.0)
  assert [True] == found, MOVED.format('Tracer', 'is_traced')
  assert not jaxcompat.is_traced(jnp.ones(2))


def test_operands_are_told_from_objects():
  what = MOVED.format('valid_jaxtype', 'is_array_like')
  assert jaxcompat.is_array_like(jnp.ones(2)), what
  assert not jaxcompat.is_array_like(object()), what


# Primitives of our own.


@pytest.fixture(scope='module')
def triple():
  """A linear primitive."""
  made = jaxcompat.primitive(
    'triple',
    lambda x: 3 * x,
    compute=lambda x: 3 * x,
    abstract=lambda x: x,
    batch=lambda values, axes: (made.bind(*values), *axes),
    transpose=lambda cotangent, _: [made.bind(cotangent)],
  )
  return made.bind


@pytest.mark.parametrize(
  'transform',
  [
    lambda f: f,
    jax.jit,
    jax.vmap,
    lambda f: jax.grad(lambda x: (f(x) * x / 2).sum()),
    lambda f: jax.jit(jax.grad(lambda x: (jax.vmap(f)(x) * x / 2).sum())),
    lambda f: lambda x: jax.jvp(f, [x], [x])[1],
  ],
)
def test_a_primitive_of_our_own_can_be_transformed(triple, transform):
  found = transform(triple)(jnp.array([1.0, 2.0]))
  assert [3.0, 6.0] == found.tolist(), MOVED.format(
    'the tables of jax.interpreters', 'primitive'
  )


def test_a_tangent_that_is_zero_is_known():
  seen = []

  def jvp(primals, tangents):
    seen.extend(map(jaxcompat.is_zero, tangents))
    return made.bind(*primals), tangents[0]

  made = jaxcompat.primitive(
    'first',
    lambda x, y: x,
    compute=lambda x, y: x,
    abstract=lambda x, y: x,
    batch=lambda values, axes: (values[0], axes[0]),
    jvp=jvp,
  )
  jax.jvp(lambda x: made.bind(x, 2.0), [1.0], [1.0])
  assert [False, True] == seen, MOVED.format('ad.Zero', 'is_zero')


# Nothing of this is used elsewhere.

# Attributes and parameters that only JAX's own objects have.
_ATTRIBUTES = {
  *('ctx', 'get_bind_params', 'jaxprs_in_params', 'source_info', 'name_stack'),
  *('def_impl', 'def_abstract_eval', 'primitive_jvps', 'primitive_batchers'),
  *('Tracer', 'constvars', '_src'),
}
_STRINGS = {
  *('num_consts', 'num_carry', 'ft_in', 'ft_out', 'newly_manual_axes'),
  'manual_axes',
}
_MODULES = ('jax._src', 'jax.core', 'jax.extend', 'jax.interpreters', 'jaxlib')


def _not_promised(path):
  """Yields what a file uses of JAX that is for `jaxcompat` alone."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Attribute):
      if node.attr in _ATTRIBUTES:
        yield node.attr
      names = [ast.unparse(node)]
    elif isinstance(node, ast.Constant) and node.value in _STRINGS:
      names = []
      yield node.value
    elif isinstance(node, ast.keyword) and node.arg == 'inline':
      names = []
      yield node.arg
    else:
      continue
    yield from (n for n in names if f'{n}.'.startswith(_DOTTED))


_DOTTED = tuple(f'{module}.' for module in _MODULES)


@pytest.mark.parametrize(
  'file',
  sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'surgery').rglob('*.py')
    if path.name != 'jaxcompat.py'
  ),
)
def test_nothing_else_rests_on_what_jax_does_not_promise(file):
  assert [] == [*_not_promised(ROOT / file)], (
    f'{file}: take it from surgery/jaxcompat.py, with a test here that says '
    'what to mend when JAX moves.'
  )


def test_what_is_looked_for_is_found(tmp_path):
  file = tmp_path / 'module.py'
  file.write_text(
    'import jax\nfrom jax.interpreters import ad\n'
    "def f(eqn):\n  return eqn.ctx, eqn.params['num_consts'], jax.core.Tracer\n"
    'g = jax.jit(f, inline=True)\n'
  )
  assert {
    'jax.interpreters.ad',
    'ctx',
    'num_consts',
    'Tracer',
    'jax.core.Tracer',
  } <= {*_not_promised(file)}
