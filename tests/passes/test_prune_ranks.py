"""Ranks that shrink: the function stays, and optimizer states follow."""

import re

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import surgery
from tests.live import models

KEEP = [1, 3]
PATH = ('net', 'mlp', 'hidden0', 'kernel')
OTHER = ('net', 'mlp', 'hidden1', 'kernel')
SITE = '/'.join(PATH)


def adapted(adapter=None, **kwargs):
  """A model whose adapter's weights are no zeros."""
  model, params, x = models.mlp()
  adapter = adapter or surgery.LoRA(rank=4, alpha=3.0)
  params = surgery.attach(params, adapter, to='**/hidden*', **kwargs)
  return model, stirred(params), x


def stirred(params, name='default'):
  found = surgery.weights(params, name)
  moved = {
    path: {
      n: w + models.normal(7, w.shape) if w.dtype == 'float32' else w
      for n, w in site.items()
    }
    for path, site in found.items()
  }
  return surgery.with_weights(params, name, moved)


def without(params, gone, name='default'):
  """The oracle: ranks at one site are zero instead of gone."""
  b = surgery.weights(params, name)[PATH]['lora_b']
  zero = {PATH: {'lora_b': b.at[jnp.array(gone)].set(0)}}
  return surgery.with_weights(params, name, zero)


@pytest.mark.parametrize(
  'adapter',
  [
    surgery.LoRA(rank=4, alpha=3.0),
    surgery.LoRA(rank=4, alpha=3.0, rslora=True),
    surgery.LoRA(rank=4, patterns={'**/hidden0': {'alpha': 5.0}}),
  ],
)
@pytest.mark.parametrize('through', [lambda m: m, surgery.factored])
def test_what_stays_counts_as_it_did(adapter, through):
  model, params, x = adapted(adapter)
  after = surgery.prune_ranks(params, {SITE: KEEP})
  expected, _ = through(model)(without(params, [0, 2]), x)
  found, _ = through(model)(after, x)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  shapes = {n: w.shape for n, w in surgery.weights(after)[PATH].items()}
  assert {'lora_a': (4, 2), 'lora_b': (2, 6)} == shapes
  assert (6, 4) == surgery.weights(after)[OTHER]['lora_a'].shape


@pytest.mark.parametrize(
  'keep',
  [
    {PATH: np.array(KEEP)},
    {PATH: jnp.array([False, True, False, True])},
    {PATH: (3, 1)},
    {SITE: [False, True, False, True]},
  ],
)
def test_ranks_are_named_by_numbers_or_flags(keep):
  _, params, _ = adapted()
  after = surgery.merge(surgery.prune_ranks(params, keep))
  expected = surgery.merge(without(params, [0, 2]))
  np.testing.assert_allclose(
    after[PATH].value, expected[PATH].value, rtol=1e-5, atol=1e-6
  )


def test_no_rank_at_all_leaves_the_base():
  model, params, x = adapted()
  after = surgery.prune_ranks(params, {PATH: [], OTHER: []})
  expected, _ = model(surgery.disable(params), x)
  for through in (model, surgery.factored(model)):
    np.testing.assert_allclose(through(after, x)[0], expected, rtol=1e-6)
  half, rest = surgery.freeze(after).split()
  fast = surgery.factored(model)
  gradient = jax.grad(lambda h: fast(h.merge(rest), x)[0].sum())(half)
  assert {0} == {p.value.size for _, p in gradient.items()}


def test_pruning_twice_counts_from_what_is_there():
  _, params, _ = adapted()
  once = surgery.prune_ranks(params, {PATH: [1, 3]})
  twice = surgery.prune_ranks(once, {PATH: [1]})
  a, b = (surgery.weights(p)[PATH]['lora_a'] for p in (params, twice))
  np.testing.assert_array_equal(a[:, [3]], b)


def test_flags_and_metadata_stay_and_the_given_params_do_not_change():
  _, params, _ = adapted()
  frozen = surgery.freeze(params, '**/hidden0/lora_a*')
  after = surgery.prune_ranks(frozen, {PATH: KEEP})
  assert 4 == surgery.weights(frozen)[PATH]['lora_a'].shape[1]
  for path, param in after.items():
    assert param.trainable == frozen[path].trainable
    assert param.metadata == frozen[path].metadata


def test_stacked_layers_keep_the_same_ranks():
  params = bx.Params()
  params['net', 'h', 'kernel'] = bx.Param(models.normal(1, (3, 4, 5)))
  whole = surgery.attach(
    params.locked(), surgery.LoRA(rank=4), to='**', stacked=1
  )
  whole = stirred(whole)
  path = ('net', 'h', 'kernel')
  after = surgery.prune_ranks(whole, {path: [0, 2]})
  w = {n: np.asarray(v) for n, v in surgery.weights(whole)[path].items()}
  expected = np.asarray(params[path].value) + 2 * np.einsum(
    'lir,lro->lio', w['lora_a'][..., [0, 2]], w['lora_b'][:, [0, 2]]
  )
  np.testing.assert_allclose(
    surgery.merge(after)[path].value, expected, rtol=1e-4, atol=1e-5
  )


def test_it_is_done_under_jit_where_the_ranks_are_known():
  _, params, _ = adapted()
  expected = surgery.prune_ranks(params, {PATH: KEEP})
  found = jax.jit(lambda p: surgery.prune_ranks(p, {PATH: KEEP}))(params)
  for path, param in expected.items():
    assert (param.value == found[path].value).all()
  with pytest.raises(surgery.AdapterError, match='known outside of jit'):
    jax.jit(lambda p, k: surgery.prune_ranks(p, {PATH: k}))(
      params, jnp.array(KEEP)
    )


@pytest.mark.parametrize('wrapped', [True, False])
@pytest.mark.parametrize('as_step', [True, False])
def test_optimizer_states_follow(wrapped, as_step):
  model, params, x = adapted()
  params = surgery.freeze(params)
  tx = optax.adam(1e-2)
  tx = surgery.optimizer(tx, params) if wrapped else tx
  half, rest = params.split()
  state = tx.init(half)
  gradients = jax.grad(lambda h: model(h.merge(rest), x)[0].sum())(half)
  _, state = tx.update(gradients, state, half)
  if as_step:
    after = surgery.apply(params, {'prune-ranks': {'keep': {SITE: KEEP}}})
  else:
    after = surgery.prune_ranks(params, {PATH: KEEP})
  moved = surgery.migrate(state, params, after)
  before, now = (s[0].mu for s in (state, moved))
  a, b = surgery.weights(before)[PATH], surgery.weights(now)[PATH]
  np.testing.assert_array_equal(a['lora_a'][:, KEEP], b['lora_a'])
  np.testing.assert_array_equal(a['lora_b'][np.array(KEEP)], b['lora_b'])
  np.testing.assert_array_equal(
    surgery.weights(before)[OTHER]['lora_b'],
    surgery.weights(now)[OTHER]['lora_b'],
  )
  assert 1 == moved[0].count
  tx = surgery.optimizer(optax.adam(1e-2), after) if wrapped else tx
  half = after.split()[0]
  tx.update(half, moved, half)  # Structures and shapes fit.


@pytest.mark.parametrize('suffix', ['msgpack', 'safetensors'])
def test_files_hold_pruned_adapters(tmp_path, suffix):
  _, params, _ = adapted()
  after = surgery.prune_ranks(params, {PATH: KEEP, OTHER: []})
  whole, alone = (tmp_path / f'{n}.{suffix}' for n in ('whole', 'alone'))
  surgery.save(whole, after)
  surgery.save_adapter(alone, after)
  expected = surgery.merge(after)
  base = surgery.detach(params)
  for found in (surgery.load(whole), surgery.load_adapter(alone, base)):
    merged = surgery.merge(found)
    for path, param in expected.items():
      assert (param.value == merged[path].value).all()
  opened = surgery.open(whole)
  cut = surgery.prune_ranks(opened, {SITE: [0]})
  cut.write(tmp_path / f'cut.{suffix}')
  found = surgery.load(tmp_path / f'cut.{suffix}')
  again = surgery.prune_ranks(after, {PATH: [0]})
  assert (
    surgery.merge(again)[PATH].value == surgery.merge(found)[PATH].value
  ).all()


def test_a_file_with_ranks_that_differ_is_refused(tmp_path):
  _, params, _ = adapted()
  surgery.save_adapter(tmp_path / 'a.msgpack', params)
  opened = surgery.open(tmp_path / 'a.msgpack')
  [path] = [p for p in opened if p[-1].startswith('lora_a') and 'hidden0' in p]
  short = opened[path].replace(
    load=lambda: np.zeros((4, 2), np.float32), shape=(4, 2)
  )
  opened.replace(leaves={**opened, path: short}).write(tmp_path / 'b.msgpack')
  with pytest.raises(surgery.FormatError, match='rank 4 is configured'):
    surgery.load_adapter(tmp_path / 'b.msgpack', surgery.detach(params))


def test_dropout_goes_on_counting():
  model, params, x = adapted(surgery.LoRA(rank=4, dropout=0.5))[0:3]
  after = surgery.prune_ranks(params, {PATH: KEEP})
  y, counted = surgery.factored(model)(after, x)
  assert 1 == surgery.weights(counted)[PATH]['lora_dropout'][-1]


def test_pruned_adapters_are_combined():
  _, params, _ = adapted()
  params = surgery.prune_ranks(params, {PATH: KEEP})
  expected = surgery.merge(params)
  both = surgery.combine_adapters(params, {'default': 1.0})
  np.testing.assert_allclose(
    surgery.merge(both)[PATH].value, expected[PATH].value, rtol=1e-5, atol=1e-5
  )


class Plain(surgery.Adapter):
  """Has no rank."""

  name = 'plain'

  def init(self, site, key):
    return {'w': jnp.ones(site.out_shape), 'u': jnp.ones(3)}

  def init_shared(self, sites, key):
    return {'common': jnp.ones(3)}

  def apply(self, site, name, base, weights):
    return base * weights['w']


class Fixed(surgery.LoRA):
  """Takes its rank from its options."""

  name = 'fixed'

  def apply(self, site, name, base, weights):
    a = weights['lora_a'].reshape(site.in_size, self.rank)
    return base + a @ weights['lora_b']


def with_axes(axes):
  return type('Axes', (Plain,), {'name': 'axes', 'rank_axes': axes})()


@pytest.mark.parametrize(
  ('adapter', 'keep', 'message'),
  [
    (None, {'net/mlp/hiden0/kernel': [0]}, f"Did you mean '{SITE}'"),
    (None, {PATH: [4]}, 'there is no rank 4, only 0 to 3'),
    (None, {PATH: [-1]}, 'there is no rank -1'),
    (None, {PATH: [1, 1]}, 'a rank is given twice in [1, 1]'),
    (None, {PATH: [True, False]}, 'a flag for each of 4 ranks, found 2'),
    (None, {PATH: [0.5]}, 'expected a list of ranks, or a flag for each'),
    (None, {PATH: 2}, 'expected a list of ranks'),
    (None, {PATH: 'all'}, 'expected a list of ranks'),
    (None, {PATH: [0], SITE: [1]}, 'is given twice, as text and as a tuple'),
    (None, {3: [0]}, 'expected the path of a site, found 3'),
    (None, [SITE], 'expected ranks by site, found list'),
    (Plain(), {PATH: [0]}, "type 'plain' does not say which axes"),
    (with_axes({'lost': 0}), {PATH: [0]}, "'lost' is declared in `rank_axes`"),
    (with_axes({'w': 1}), {PATH: [0]}, "'w' has no axis 1"),
    (with_axes({'w': 0, 'u': 0}), {PATH: [0]}, 'the ranks of its weights diff'),
    (with_axes({'common': 0}), {PATH: [0]}, "'common' is shared by sites"),
    (Fixed(rank=4), {PATH: [0]}, "takes the rank from its weights' shapes"),
  ],
)
def test_what_cannot_be_pruned_is_refused(adapter, keep, message):
  # Wrong axes are refused when the adapter is attached already.
  with pytest.raises(surgery.SurgeryError, match=re.escape(message)):
    surgery.prune_ranks(adapted(adapter)[1], keep)


def test_a_half_is_refused():
  _, params, _ = adapted()
  half, _ = surgery.freeze(params, '**/lora_a*').split()
  with pytest.raises(surgery.AdapterError, match='Give the whole model'):
    surgery.prune_ranks(half, {PATH: [0]})


@pytest.mark.parametrize('axes', [('lora_a',), {'lora_a': '0'}, {'a': True}, 3])
def test_axes_that_are_none_are_refused(axes):
  with pytest.raises(
    surgery.PluginError, match='rank_axes: expected a mapping'
  ):
    with_axes(axes)


def test_a_layer_with_lora_by_design_is_pruned():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = surgery.LoraLinear(graph.child('one'), 3, rng, rank=2)
  x = models.normal(0, (5, 4))
  params = layer(rng.seed(bx.Params(), seed=0), x)[1].locked()
  [name] = surgery.adapters(params)
  params = stirred(params, name.name)
  [[path, found]] = surgery.weights(params, name.name).items()
  after = surgery.prune_ranks(params, {path: [1]}, name=name.name)
  gone = {path: {'lora_b': found['lora_b'].at[0].set(0)}}
  expected, _ = layer(surgery.with_weights(params, name.name, gone), x)
  np.testing.assert_allclose(layer(after, x)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'change',
  [
    lambda p: surgery.rename(p, '**/hidden0 -> **/first'),
    lambda p: surgery.cast(p, 'bf16'),
    lambda p: surgery.disable(p),
    lambda p: surgery.drop(p, '**/output'),
  ],
)
def test_what_was_pruned_is_on_record_through_passes(tmp_path, change):
  _, params, _ = adapted()
  after = change(surgery.prune_ranks(params, {PATH: KEEP}))
  surgery.save_adapter(tmp_path / 'a.msgpack', after)
  found = surgery.load_adapter(tmp_path / 'a.msgpack', surgery.detach(after))
  ours, theirs = (surgery.weights(p) for p in (after, found))
  assert ours.keys() == theirs.keys()
  for path, site in ours.items():
    for name, weight in site.items():
      assert (weight == theirs[path][name]).all()


def test_a_file_of_pruned_ranks_with_other_options_is_refused(tmp_path):
  _, params, _ = adapted()
  surgery.save_adapter(
    tmp_path / 'a.msgpack', surgery.prune_ranks(params, {PATH: KEEP})
  )
  opened = surgery.open(tmp_path / 'a.msgpack')
  [said] = opened.manifest.adapters
  said = {**said, 'config': {**said['config'], 'rank': 3}}
  changed = opened.manifest.replace(adapters=(said,))
  surgery.Checkpoint(dict(opened), changed).write(tmp_path / 'b.msgpack')
  with pytest.raises(surgery.FormatError, match='rank 3 is configured'):
    surgery.load_adapter(tmp_path / 'b.msgpack', surgery.detach(params))
