"""What `factored` takes from jax that jax may change.

If one of these fails, jax has moved. The rules know primitives by name and
parameters, and the walk binds equations again; look at what the message names,
change it there, then record here what is new.
"""

from __future__ import annotations

import ast
import contextlib
import pathlib

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import surgery
from surgery.live.rules import RULES
from surgery.live.walking import _CALLS, _INLINED

# What each primitive that a rule knows is told, as of jax 0.10.
PARAMETERS = {
  'add': '',
  'add_any': '',
  'broadcast_in_dim': 'broadcast_dimensions shape sharding',
  'concatenate': 'dimension',
  'cond': 'branches',
  'conv_general_dilated': 'batch_group_count dimension_numbers '
  'feature_group_count lhs_dilation out_sharding padding precision '
  'preferred_element_type rhs_dilation window_strides',
  'convert_element_type': 'new_dtype sharding weak_type',
  'copy': '',
  'div': '',
  'dot_general': 'dimension_numbers out_sharding precision '
  'preferred_element_type',
  'dynamic_slice': 'slice_sizes',
  'gather': 'dimension_numbers fill_value indices_are_sorted mode slice_sizes '
  'unique_indices',
  'integer_pow': 'y',
  'jit': 'compiler_options_kvs ctx_mesh donated_invars in_layouts in_shardings '
  'inline jaxpr keep_unused name out_layouts out_shardings',
  'low_rank': 'axes dropout scale',
  'mul': 'out_dtype',
  'name': 'name',
  'neg': '',
  'pvary': 'axes',
  'reduce_sum': 'axes out_sharding',
  'remat2': 'differentiated jaxpr policy prevent_cse',
  'reshape': 'dimensions new_sizes sharding',
  'rev': 'dimensions',
  'scan': 'jaxpr length num_carry num_consts reverse unroll',
  'shard_map': 'check_vma in_specs jaxpr mesh newly_manual_axes out_specs',
  'sharding_constraint': 'context_mesh layout sharding unconstrained_dims',
  'slice': 'limit_indices start_indices strides',
  'split': 'axis sizes',
  'square': '',
  'squeeze': 'dimensions',
  'stop_gradient': '',
  'sub': '',
  'transpose': 'permutation',
  'while': 'body_jaxpr body_nconsts cond_jaxpr cond_nconsts',
}
# Parameters that had other names in jax 0.10.0, which are known too.
BEFORE = {'manual_axes': 'newly_manual_axes'}
# Names that other versions of jax have for some of them.
ELSEWHERE = {
  *('checkpoint', 'remat', 'closed_call', 'core_call', 'pjit'),
  *('copy_p', 'pbroadcast'),
}


def _examples():
  """Yields small functions of a matrix, which together use all primitives."""
  lax = jax.lax
  yield lambda k: [k.T, k.reshape(24), k[:2], jnp.split(k, 2), k[::-1]]
  yield lambda k: lax.dynamic_slice(k, (jnp.argmax(k), 0), (1, 6))
  yield lambda k: [jnp.concatenate([k, k]), k[None].squeeze(0), jnp.copy(k)]
  yield lambda k: jnp.take(k, jnp.array([1, 2]), 0)
  yield lambda k: jnp.broadcast_to(k, (2, 4, 6))
  yield lambda k: k @ k.T
  yield lambda k: lax.conv_general_dilated(k[None], k[None], (1,), 'SAME')
  yield lambda k: [k.astype('bfloat16'), -k, k * 2, k / 2, k + k, k - k, k**2]
  yield lambda k: [jnp.square(k), k.sum(0), lax.stop_gradient(k)]
  yield lambda k: lax.scan(lambda c, x: (c, x), 0, k)
  yield lambda k: lax.fori_loop(0, jnp.argmax(k), lambda i, k: k, k)
  yield lambda k: lax.cond(k.sum() > 0, lambda k: k, lambda k: 2 * k, k)
  yield lambda k: [jax.jit(jnp.sin)(k), jax.checkpoint(jnp.sin)(k)]
  yield jax.grad(lambda k: (k @ k.T).sum() + (2 * k).sum())
  yield lambda k: surgery.LowRank(k, k[:, :2], k[:2]).dense()
  yield lambda k: checkpoint_name(k, 'kernel')
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  placed = NamedSharding(mesh, PartitionSpec('d'))
  yield lambda k: lax.with_sharding_constraint(k, placed)
  specs = (PartitionSpec('d'), PartitionSpec())
  yield lambda k: jax.shard_map(
    jnp.multiply, mesh=mesh, in_specs=specs, out_specs=specs[0]
  )(k, 2.0)


def _met(jaxpr, found):
  for eqn in jaxpr.eqns:
    found.setdefault(eqn.primitive.name, set()).update(eqn.params)
    for inner in jex.jaxprs_in_params(eqn.params):
      _met(inner, found)


@pytest.fixture(scope='module')
def met():
  """The parameters of the primitives that small examples are traced to."""
  found: dict[str, set[str]] = {}
  for example in _examples():
    _met(jax.make_jaxpr(example)(jnp.ones((4, 6))).jaxpr, found)
  return found


def changed(name, recorded, found):
  """Returns what to do about a primitive whose parameters are others."""
  if name in RULES:
    rule = RULES[name]
    where = f'{rule.__name__!r} in {rule.__module__.replace(".", "/")}.py'
  else:
    where = f'{name!r} in surgery/live/walking.py'
  return (
    f'jax {jax.__version__} gives the primitive {name!r} other parameters: '
    f'new {sorted(found - recorded)}, gone {sorted(recorded - found)}. See '
    f'whether they change what is computed, update {where} (a parameter that '
    'it does not know should raise Decline), then PARAMETERS in this test.'
  )


@pytest.mark.parametrize('name', PARAMETERS)
def test_primitives_have_the_parameters_that_their_rules_know(met, name):
  recorded = set(PARAMETERS[name].split())
  assert name in met, (
    f'jax {jax.__version__} no longer uses the primitive {name!r} for what it '
    'did: the examples of this test make none. Find its new name by printing '
    'their jaxprs, and register the rule for it in surgery/live/rules or '
    'surgery/live/walking.py.'
  )
  found = {BEFORE.get(parameter, parameter) for parameter in met[name]}
  assert recorded == found, changed(name, recorded, found)


def test_every_rule_is_on_record_here():
  known = {*PARAMETERS, *ELSEWHERE}
  assert {*RULES, *_CALLS, *_INLINED} == known, (
    'Add a rule to PARAMETERS in this test, with an example that uses it.'
  )


def test_the_message_says_what_to_update():
  message = changed('mul', {'out_dtype', 'old'}, {'out_dtype', 'new'})
  assert "'mul'" in message
  assert "new ['new'], gone ['old']" in message
  assert "'mul' in surgery/live/rules/arithmetic.py" in message
  assert 'surgery/live/walking.py' in changed('scan', set(), set())


# What is not promised, and where it is used.

NOT_PROMISED = {
  'surgery/core/lowrank.py': {
    'jax.extend.core.Primitive',
    'jax.interpreters.ad.Zero',
    'jax.interpreters.ad.primitive_jvps',
    'jax.interpreters.batching.primitive_batchers',
    'jax.interpreters.mlir.lower_fun',
    'jax.interpreters.mlir.register_lowering',
  },
  'surgery/live/factored.py': {
    'jax.core.Tracer',
    'jax.extend.core.valid_jaxtype',
  },
  'surgery/live/convert.py': {'jax.core.Tracer'},
  'surgery/live/routing.py': {'jax.core.Tracer'},
  'surgery/live/primitives.py': {
    'jax.extend.core.Primitive',
    'jax.interpreters.ad.deflinear2',
    'jax.interpreters.batching.defvectorized',
    'jax.interpreters.batching.primitive_batchers',
    'jax.interpreters.mlir.lower_fun',
    'jax.interpreters.mlir.register_lowering',
  },
  'surgery/live/stashed.py': {'jax.core.Tracer'},
  'surgery/live/walking.py': {
    'jax.extend.core.ClosedJaxpr',
    'jax.extend.core.Literal',
    'jax.extend.core.jaxprs_in_params',
  },
}
ROOT = pathlib.Path(surgery.__file__).parent.parent


def _used(path):
  """Returns the names of jax that a file uses and that jax may change."""
  tree = ast.parse(path.read_text(encoding='utf-8'))
  names = {'jax': 'jax'}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name.startswith('jax') and alias.asname:
          names[alias.asname] = alias.name
    elif isinstance(node, ast.ImportFrom) and str(node.module)[:3] == 'jax':
      for alias in node.names:
        names[alias.asname or alias.name] = f'{node.module}.{alias.name}'
  used = {n for n in names.values() if n.count('.') == 3}
  for node in ast.walk(tree):
    parts: list[str] = []
    below: ast.AST = node
    while isinstance(below, ast.Attribute):
      parts.insert(0, below.attr)
      below = below.value
    if parts and isinstance(below, ast.Name) and below.id in names:
      used.add('.'.join([names[below.id], *parts]))
  loose = ('jax.core.', 'jax.extend.', 'jax.interpreters.', 'jax._src')
  return {
    '.'.join(n.split('.')[:4])
    for n in used
    if n.startswith(loose) or n.endswith(('_p', '_p.bind'))
    if n.count('.') > 2 or n.startswith(('jax.core', 'jax._src'))
  }


FILES = sorted(
  path.relative_to(ROOT).as_posix()
  for path in [
    ROOT / 'surgery/core/lowrank.py',
    *(ROOT / 'surgery/live').rglob('*.py'),
  ]
)


@pytest.mark.parametrize('file', FILES)
def test_no_more_is_used_than_is_on_record(file):
  assert NOT_PROMISED.get(file, set()) == _used(ROOT / file), (
    f'{file}: record in NOT_PROMISED what of jax it uses that may change; '
    'prefer what docs.jax.dev lists under the public API.'
  )


@pytest.fixture(scope='module')
def eqn():
  return jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns[0]


MOVED = 'jax has changed {}, which `Walk` in surgery/live/walking.py rests on.'


def test_an_equation_can_be_bound_again(eqn):
  params = eqn.primitive.get_bind_params(eqn.params)
  assert isinstance(params, dict), MOVED.format('Primitive.get_bind_params')
  assert np.sin(2.0) == pytest.approx(eqn.primitive.bind(2.0, **params))


def test_an_equation_has_a_context(eqn):
  manager = eqn.ctx.manager
  assert isinstance(manager, contextlib.AbstractContextManager), MOVED.format(
    'JaxprEqn.ctx.manager'
  )


def test_an_equation_knows_its_names():
  with jax.named_scope('above'):
    closed = jax.make_jaxpr(jax.named_scope('here')(jnp.sin))(1.0)
  (eqn,) = closed.jaxpr.eqns
  assert 'here' == str(eqn.source_info.name_stack), MOVED.format(
    'JaxprEqn.source_info.name_stack'
  )


def test_a_jaxpr_tells_its_variables(eqn):
  closed = jax.make_jaxpr(lambda x: x @ np.ones((2, 2)))(jnp.ones(2))
  assert 1 == len(closed.consts) == len(closed.jaxpr.constvars)
  assert 1 == len(closed.jaxpr.invars) == len(closed.jaxpr.outvars)
  assert (2,) == closed.jaxpr.outvars[0].aval.shape
