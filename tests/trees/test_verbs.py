"""Each public function on a model of each framework: a table of both."""

from __future__ import annotations

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import surgery
from tests.trees.cases import CASES, Case, X

LORA = surgery.LoRA(rank=2)


@pytest.fixture(scope='module', params=CASES)
def case(request) -> Case:
  return CASES[request.param]


def attached(case: Case, **options: Any) -> Any:
  tree = surgery.attach(case.make(), LORA, to=case.kernels, **options)
  name = options.get('name', 'default')
  grown = jax.tree.map(lambda w: w + 0.1, surgery.weights(tree, name))
  return surgery.with_weights(tree, name, grown)


def called(case: Case, model: Any) -> np.ndarray:
  """Calls a model, plain or adapted, without its adapters being factored."""
  if isinstance(model, surgery.AdaptedTree):
    model = model.resolve()
  return np.asarray(case.call(model, X))


def arrays(tree: Any) -> list[np.ndarray]:
  leaves = [v for v in jax.tree.leaves(tree) if eqx.is_array(v)]
  is_key = lambda v: jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
  return [
    np.asarray(jax.random.key_data(v) if is_key(v) else v) for v in leaves
  ]


def same(a: Any, b: Any) -> bool:
  """Whether two models have one structure, and the same bits."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  pairs = zip(arrays(a), arrays(b), strict=True)
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def raises(case: Case, call: Any, error: Any, match: str) -> None:
  with pytest.raises(error, match=match):
    call()


# What each verb must do; the model of the case is made anew for each.


def attach(case, tree, tmp_path):
  assert isinstance(tree, surgery.AdaptedTree)
  base = case.make()
  assert same(base, tree.base)
  assert not np.array_equal(called(case, base), called(case, tree))


def detach(case, tree, tmp_path):
  plain = surgery.detach(tree)
  assert same(case.make(), plain)
  assert type(plain) is type(case.make())


def merge(case, tree, tmp_path):
  plain = surgery.merge(tree)
  assert jax.tree.structure(plain) == jax.tree.structure(case.make())
  # The very bits that the model would get of the adapted tree.
  assert same(plain, tree.resolve())


def factored(case, tree, tmp_path):
  fast = surgery.factored(case.call, strict=True)
  made = eqx.filter_jit(fast)(tree, X)
  np.testing.assert_allclose(called(case, tree), made, rtol=2e-5, atol=2e-6)


def freeze(case, tree, tmp_path):
  half, rest = surgery.freeze(tree).split()
  assert 4 == len(jax.tree.leaves(half))
  assert same(surgery.freeze(tree), half.merge(rest))
  # Flags without an adapter, too.
  alone = surgery.freeze(case.make(), case.kernels)
  assert isinstance(alone, surgery.AdaptedTree)
  assert 2 == sum(v.ndim == 1 for v in arrays(alone.split()[0].base)) - (
    2 * (case.name in ('variables', 'nnx'))
  )


def unfreeze(case, tree, tmp_path):
  frozen = surgery.freeze(tree)
  again = surgery.unfreeze(frozen, case.kernels)
  assert 6 == len(jax.tree.leaves(again.split()[0]))
  assert same(tree, surgery.unfreeze(frozen))


def trainable_mask(case, tree, tmp_path):
  frozen = surgery.freeze(tree)
  mask = surgery.trainable_mask(frozen)
  assert jax.tree.structure(frozen) == jax.tree.structure(mask)
  assert {bool} == {type(v) for v in jax.tree.leaves(mask)}
  assert 4 == sum(jax.tree.leaves(mask))
  plain = surgery.trainable_mask(case.make())
  assert jax.tree.structure(case.make()) == jax.tree.structure(plain)


def optimizer(case, tree, tmp_path):
  frozen = surgery.freeze(tree)
  tx = surgery.optimizer(optax.adam(1e-2), frozen)
  half, rest = frozen.split()
  state = tx.init(half)
  assert 9 == len(jax.tree.leaves(state))  # A count, and two moments of four.
  fast = surgery.factored(case.call, strict=True)
  loss = lambda half: (fast(half.merge(rest), X) ** 2).mean()
  before, gradients = jax.value_and_grad(loss)(half)
  updates, state = tx.update(gradients, state, half)
  after = optax.apply_updates(half, updates)
  assert loss(after) < before
  assert same(rest, after.merge(rest).split()[1])


def disable(case, tree, tmp_path):
  off = surgery.disable(tree)
  np.testing.assert_array_equal(called(case, case.make()), called(case, off))


def enable(case, tree, tmp_path):
  again = surgery.enable(surgery.disable(tree, 'default'))
  assert same(tree, again)


def adapters(case, tree, tmp_path):
  (info,) = surgery.adapters(tree)
  assert ('default', 'lora', 2) == (info.name, info.type, len(info.sites))
  assert [] == surgery.adapters(case.make())


def weights(case, tree, tmp_path):
  sites = surgery.weights(tree)
  assert {(8, 2), (2, 16), (16, 2), (2, 4)} == {
    w.shape for site in sites.values() for w in site.values()
  }


def with_weights(case, tree, tmp_path):
  zeros = jax.tree.map(jnp.zeros_like, surgery.weights(tree))
  off = surgery.with_weights(tree, 'default', zeros)
  np.testing.assert_array_equal(called(case, case.make()), called(case, off))


def regulariser(case, tree, tmp_path):
  assert 0 == surgery.regulariser(tree)


def check(case, tree, tmp_path):
  assert 2 == len(surgery.check(case.call, tree, X))
  with pytest.raises(surgery.UnreachedError, match='change no result'):
    surgery.check(lambda model, x: x, tree, X)


def explain(case, tree, tmp_path):
  states = {use.state for use in surgery.explain(case.call, tree, X).values()}
  assert {'factored'} == states


def select(case, tree, tmp_path):
  assert 2 == len(surgery.select(tree, case.kernels))
  assert 2 == len(surgery.select(case.make(), case.kernels))


def stats(case, tree, tmp_path):
  found = {one.path for one in surgery.stats(tree, case.kernels)}
  assert 2 == len(found)


def cast(case, tree, tmp_path):
  low = surgery.cast(case.make(), 'bf16')
  assert jax.tree.structure(case.make()) == jax.tree.structure(low)
  assert 'bfloat16' == case.kernel(low).dtype
  assert isinstance(surgery.cast(tree, 'bf16'), surgery.AdaptedTree)


def save(case, tree, tmp_path):
  surgery.save(tmp_path / 'm.msgpack', surgery.freeze(tree))
  found = surgery.load(tmp_path / 'm.msgpack', like=case.make())
  assert same(surgery.freeze(tree), found)
  surgery.save(tmp_path / 'plain.msgpack', case.make())
  assert same(case.make(), surgery.load(tmp_path / 'plain.msgpack', like=tree))


def save_adapter(case, tree, tmp_path):
  surgery.save_adapter(tmp_path / 'a.msgpack', tree)
  found = surgery.load_adapter(tmp_path / 'a.msgpack', case.make())
  assert same(tree, found)


def combine_adapters(case, tree, tmp_path):
  both = attached(case, name='other')
  both = surgery.attach(tree, LORA, to=case.kernels, name='other')
  one = surgery.combine_adapters(both, {'default': 1.0, 'other': 1.0})
  np.testing.assert_allclose(
    called(case, both), called(case, one), rtol=1e-4, atol=1e-5
  )


def prune_ranks(case, tree, tmp_path):
  sites = surgery.weights(tree)
  less = surgery.prune_ranks(tree, {site: [0] for site in sites})
  assert {1} == {
    min(w.shape) for s in surgery.weights(less).values() for w in s.values()
  }


def migrate(case, tree, tmp_path):
  tree = surgery.freeze(tree)
  less = surgery.prune_ranks(tree, {s: [0] for s in surgery.weights(tree)})
  state = optax.adam(1e-2).init(tree.split()[0])
  moved = surgery.migrate(state, tree, less)
  expected = optax.adam(1e-2).init(less.split()[0])
  assert jax.tree.structure(expected) == jax.tree.structure(moved)
  assert same(expected, moved)


def stack_adapters(case, tree, tmp_path):
  other = surgery.with_weights(
    tree,
    'default',
    jax.tree.map(lambda w: w * 2, surgery.weights(tree)),
  )
  many = surgery.route(
    surgery.stack_adapters([tree, other]), jnp.array([1, -1, 0])
  )
  made = surgery.factored(case.call)(many, X)
  rows = [called(case, t) for t in (other, case.make(), tree)]
  expected = [rows[i][i] for i in range(3)]
  np.testing.assert_allclose(expected, made, rtol=1e-4, atol=1e-5)


def apply(case, tree, tmp_path):
  low = surgery.apply(case.make(), {'cast': {'to': 'bf16'}})
  assert 'bfloat16' == case.kernel(low).dtype
  assert jax.tree.structure(case.make()) == jax.tree.structure(low)


def combine(case, tree, tmp_path):
  mean = surgery.combine([case.make(), surgery.merge(tree)], method='linear')
  assert jax.tree.structure(case.make()) == jax.tree.structure(mean)
  expected = (case.kernel(case.make()) + case.kernel(surgery.merge(tree))) / 2
  np.testing.assert_allclose(expected, case.kernel(mean), rtol=1e-6)


def extract_lora(case, tree, tmp_path):
  alone = surgery.extract_lora(case.make(), surgery.merge(tree), rank=2)
  alone.write(tmp_path / 'a.msgpack')
  found = surgery.load_adapter(tmp_path / 'a.msgpack', case.make())
  np.testing.assert_allclose(
    called(case, tree), called(case, found), rtol=1e-3, atol=1e-4
  )


def rename(case, tree, tmp_path):
  rules = '<*>/kernel -> <*>/other'
  del rules
  call = lambda: surgery.rename(tree, '** -> new/**')
  if case.is_module or case.name in ('plain', 'dataclass'):
    with pytest.raises(surgery.SurgeryError, match='surgery.save'):
      call()
  else:
    moved = call()
    assert isinstance(moved, surgery.AdaptedTree)
    assert 'new' == surgery.adapters(moved)[0].sites[0][0]


def drop(case, tree, tmp_path):
  if case.is_module or case.name in ('plain', 'dataclass'):
    with pytest.raises(surgery.SurgeryError, match='its code makes'):
      surgery.drop(case.make(), case.bias)
    return
  less = surgery.drop(case.make(), case.bias)
  assert type(less) is type(case.make())
  assert len(arrays(case.make())) - 2 == len(arrays(less))


def keep(case, tree, tmp_path):
  if case.is_module or case.name in ('plain', 'dataclass'):
    with pytest.raises(surgery.SurgeryError, match='its code makes'):
      surgery.keep(case.make(), case.kernels)
    return
  assert 2 == len(arrays(surgery.keep(case.make(), case.kernels)))


def layers(case, tree, tmp_path):
  if case.is_module:
    names = {
      t.names[0] for t in surgery.layers(case.make()).values() if t.names
    }
    assert 'Linear' in names
  else:
    with pytest.raises(surgery.SurgeryError, match='Give the module'):
      surgery.layers(case.make())


ALSO = {
  'load': save,
  'load_adapter': save_adapter,
  'route': stack_adapters,
}
# Functions that take no model: files and what plugins are made of.
NO_MODEL = {
  'apply_patch',
  'default_host',
  'field',
  'handles_adapters',
  'hookimpl',
  'make_patch',
  'named_key',
  'open',
}
PUBLIC = sorted(
  name
  for name in surgery.__all__
  if not inspect.isclass(getattr(surgery, name)) and name not in NO_MODEL
)


@pytest.mark.parametrize('verb', PUBLIC)
def test_each_verb_works_on_a_model_of_each_framework(verb, case, tmp_path):
  # A verb that is new is an error here: it needs a function of its name.
  run = ALSO.get(verb) or globals()[verb]
  before = case.make()
  tree = attached(case)
  copied = arrays(tree)
  run(case, tree, tmp_path)
  # Nothing that the caller holds is changed.
  assert all(map(np.array_equal, copied, arrays(tree)))
  assert same(before, case.make())
