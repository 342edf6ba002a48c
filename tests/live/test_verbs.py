"""The verbs on params in memory."""

from __future__ import annotations

import operator

import blox as bx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)
ALL = ['**/hidden0', '**/hidden1', '**/output']
LAYER = ('net', 'mlp', 'hidden0')


@pytest.fixture(scope='module')
def net():
  return models.mlp()


def _attach(params, *names, to='**/hidden*'):
  for name in names or ('default',):
    params = surgery.attach(params, LORA, to=to, name=name)
  return models.stirred(params)


def _flags(params):
  return {path: param.trainable for path, param in params.items()}


# Attach.


def test_attach_changes_nothing_that_the_caller_holds(net):
  _, base, _ = net
  before = jax.tree.structure(base), len(base)
  surgery.attach(base, LORA, to='**/hidden*')
  assert before == (jax.tree.structure(base), len(base))


def test_attach_twice_under_one_name_is_refused_and_changes_nothing(net):
  _, base, _ = net
  params = _attach(base)
  before = jax.tree.structure(params)
  with pytest.raises(surgery.AdapterError, match='attached already'):
    surgery.attach(params, LORA, to='**/hidden*')
  assert before == jax.tree.structure(params)


@pytest.mark.parametrize('name', ['', 'a.b', 'a/b', 'a\0', 3, None])
def test_attach_refuses_names_that_weights_cannot_carry(net, name):
  with pytest.raises(surgery.AdapterError, match='adapter name'):
    surgery.attach(net[1], LORA, to='**/hidden*', name=name)


@pytest.mark.parametrize('name', ['größe', 'mit Leer', 'a:b', '[0]', 'kernel'])
def test_attach_takes_any_other_name(net, name):
  model, base, x = net
  params = _attach(base, name)
  models.close(model(models.dense(params), x)[0], model(params, x)[0])
  models.assert_equal_params(base, surgery.detach(params, name))


@pytest.mark.parametrize('seed', ['0', 1.0, True, None])
def test_attach_refuses_seeds_that_are_no_integers(net, seed):
  with pytest.raises(surgery.ConfigError, match='seed'):
    surgery.attach(net[1], LORA, to='**/hidden*', seed=seed)


def test_attach_refuses_what_is_no_params(net):
  with pytest.raises(surgery.SurgeryError, match=r'expected bx\.Params'):
    surgery.attach(dict(net[1].items()), LORA, to='**/hidden*')  # type: ignore[call-overload]


def test_attach_refuses_a_class_in_place_of_a_configuration(net):
  with pytest.raises(surgery.ConfigError, match=r'LoRA\(…\)'):
    surgery.attach(net[1], surgery.LoRA, to='**/hidden*')  # type: ignore[call-overload]


def test_attach_refuses_an_integer_kernel_that_is_named(net):
  _, base, _ = net
  params = base.unlocked()
  params[(*LAYER, 'kernel')] = bx.Param(jnp.ones((4, 6), jnp.int8))
  params = params.locked()
  with pytest.raises(surgery.SiteError, match='int8'):
    surgery.attach(params, LORA, to='net/mlp/hidden0/kernel')
  with pytest.raises(surgery.SiteError, match='int8'):
    surgery.attach(params, LORA, to='**/hidden0')


def test_attach_by_layers_leaves_an_integer_kernel_alone(net):
  _, base, _ = net
  params = base.unlocked()
  params[(*LAYER, 'kernel')] = bx.Param(jnp.ones((4, 6), jnp.int8))
  with pytest.warns(surgery.SiteWarning, match=r'hidden0 \(kernel: .* int8'):
    params = surgery.attach(params.locked(), LORA, to='**/hidden*')
  assert (('net', 'mlp', 'hidden1', 'kernel'),) == (
    surgery.adapters(params)[0].sites
  )
  assert jnp.int8 == surgery.merge(params)[(*LAYER, 'kernel')].value.dtype


def test_attach_to_a_selection_means_its_layers(net):
  _, base, _ = net
  chosen = surgery.select(base, '**/kernel') - surgery.select(base, '**/output')
  actual = surgery.attach(base, LORA, to=chosen)
  expected = surgery.attach(base, LORA, to='**/hidden*')
  assert jax.tree.structure(expected) == jax.tree.structure(actual)


def test_attached_weights_do_not_depend_on_other_sites(net):
  _, base, _ = net
  expected = surgery.attach(base, LORA, to='**/hidden0')
  actual = surgery.attach(base, LORA, to=ALL)
  for path, value in models.weights_of(expected, 'default').items():
    assert models.bits(value) == models.bits(actual[path].value)


def test_attached_weights_are_sharded_as_the_base():
  sharding = {'sharding': ('data', 'model')}
  _, base, _ = models.mlp(kernel_metadata=sharding)
  params = surgery.attach(base, LORA, to='**/hidden*')
  assert ('data', None) == params[(*LAYER, 'lora_a')].sharding
  assert (None, 'model') == params[(*LAYER, 'lora_b')].sharding


def test_stacked_axes_are_sharded_as_the_base():
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(
    jnp.ones((3, 4, 5)), metadata={'sharding': ('layers', None, ('x', 'y'))}
  )
  params = surgery.attach(params.locked(), LORA, to='**/layer', stacked=1)
  assert ('layers', None, None) == params['net', 'layer', 'lora_a'].sharding
  assert ('layers', None, ('x', 'y')) == (
    params['net', 'layer', 'lora_b'].sharding
  )


def test_attach_works_on_shapes_alone(net):
  model, base, x = net
  shapes = jax.eval_shape(lambda p: p, base)
  params = surgery.attach(shapes, LORA, to='**/hidden*')
  expected = surgery.attach(base, LORA, to='**/hidden*')
  assert jax.tree.structure(expected) == jax.tree.structure(params)
  assert (7, 3) == jax.eval_shape(model, params, x)[0].shape


# Detach.


@hypothesis.given(
  layers=st.sets(st.sampled_from(ALL), min_size=1),
  rank=st.integers(1, 3),
  name=st.sampled_from(['default', 'other']),
  locked=st.booleans(),
  frozen=st.booleans(),
)
@hypothesis.settings(max_examples=15, deadline=None)
def test_detach_undoes_attach(net, layers, rank, name, locked, frozen):
  _, base, _ = net
  base = base if locked else base.unlocked()
  base = surgery.freeze(base, '**/hidden0') if frozen else base
  params = surgery.attach(
    base, surgery.LoRA(rank=rank), to=sorted(layers), name=name
  )
  detached = surgery.detach(params, name)
  assert jax.tree.structure(base) == jax.tree.structure(detached)
  assert all(base[path] is param for path, param in detached.items())


@hypothesis.given(order=st.permutations(['one', 'two', 'default']))
@hypothesis.settings(max_examples=6, deadline=None)
def test_adapters_come_off_in_any_order(net, order):
  model, base, x = net
  params = _attach(base, 'one', 'two', 'default')
  for i, name in enumerate(order):
    params = surgery.detach(params, name)
    left = order[i + 1 :]
    assert sorted(left) == sorted(i.name for i in surgery.adapters(params))
    models.close(model(models.dense(params), x)[0], model(params, x)[0])
  assert jax.tree.structure(base) == jax.tree.structure(params)


@hypothesis.given(order=st.permutations(['one', 'two', 'default']))
@hypothesis.settings(max_examples=6, deadline=None)
def test_adapters_that_add_merge_in_any_order(net, order):
  model, base, x = net
  params = _attach(base, 'one', 'two', 'default')
  expected = model(params, x)[0]
  for name in order:
    params = surgery.merge(params, name)
    models.close(expected, model(params, x)[0])
  assert jax.tree.structure(base) == jax.tree.structure(params)


def test_detach_drops_what_the_adapter_shared(net):
  _, base, _ = net
  host = models.host(models.Shared)
  params = surgery.attach(base, models.Shared(), to='**/hidden0', host=host)
  assert ('surgery.default', 'matrix') in params
  models.assert_equal_params(base, surgery.detach(params, host=host))


@pytest.mark.parametrize(
  'verb', [surgery.detach, surgery.merge, surgery.enable, surgery.disable]
)
class TestUnknownNames:
  def test_a_wrong_name_is_refused_with_the_right_one(self, net, verb):
    with pytest.raises(surgery.AdapterError, match="mean 'default'"):
      verb(_attach(net[1]), 'defalt')

  def test_one_wrong_name_among_several_is_refused(self, net, verb):
    with pytest.raises(surgery.AdapterError, match='defalt'):
      verb(_attach(net[1]), ['default', 'defalt'])

  def test_without_adapters_it_is_refused(self, net, verb):
    with pytest.raises(surgery.AdapterError, match='attached'):
      verb(net[1])

  def test_no_name_at_all_is_refused(self, net, verb):
    with pytest.raises(surgery.AdapterError):
      verb(_attach(net[1]), [])

  def test_what_is_no_params_is_refused(self, net, verb):
    with pytest.raises(surgery.SurgeryError, match=r'[Pp]arams'):
      verb(dict(net[1].items()))
    with pytest.raises(surgery.AdapterError, match='no adapter is attached'):
      verb({'a': jnp.ones(3)})  # A model of plain dicts.

  def test_lost_records_are_noticed(self, net, verb):
    plain = net[1].merge(_attach(net[1]))
    assert bx.Params is type(plain)
    with pytest.raises(surgery.AdapterError, match=r'adapted\.merge\(plain\)'):
      verb(plain)


# Merge.


def test_merging_twice_is_refused(net):
  merged = surgery.merge(_attach(net[1]))
  with pytest.raises(surgery.AdapterError, match='no adapter is attached'):
    surgery.merge(merged, 'default')


def test_merging_some_keeps_the_others(net):
  model, base, x = net
  params = _attach(base, 'one', 'two')
  merged = surgery.merge(params, ['two'])
  assert ['one'] == [i.name for i in surgery.adapters(merged)]
  models.close(model(params, x)[0], model(merged, x)[0])


def test_merging_a_disabled_adapter_is_refused(net):
  params = surgery.disable(_attach(net[1]))
  with pytest.raises(surgery.AdapterError, match='disabled'):
    surgery.merge(params)


def test_merging_a_half_is_refused(net):
  params = surgery.freeze(_attach(net[1]))
  for half in params.split():
    with pytest.raises(surgery.AdapterError, match='halves'):
      surgery.merge(half)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e38])
def test_merging_what_is_not_finite_is_refused(net, bad):
  weights, rest = _attach(net[1]).split(models.is_weight)
  params = jax.tree.map(lambda w: jnp.full_like(w, bad), weights).merge(rest)
  with pytest.raises(surgery.SiteError, match='NaN or infinity'):
    surgery.merge(params)
  merged = surgery.merge(params, check_finite=False)
  assert not np.isfinite(merged[(*LAYER, 'kernel')].value).all()


def test_merging_keeps_flags_and_metadata_of_the_base():
  _, base, _ = models.mlp(kernel_metadata={'tag': 'mine'})
  base = surgery.freeze(base, '**/hidden0/kernel')
  merged = surgery.merge(_attach(base))
  assert (
    base[(*LAYER, 'kernel')].metadata == merged[(*LAYER, 'kernel')].metadata
  )
  assert not merged[(*LAYER, 'kernel')].trainable


def test_merging_rounds_once(net):
  """Two bf16 adapters: rounding between them would be seen."""
  kernel = jnp.ones((4, 4), jnp.bfloat16)
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(kernel)
  params = params.locked()
  for name in ('one', 'two'):
    params = surgery.attach(
      params, surgery.LoRA(rank=1, alpha=1.0), to='**/layer', name=name
    )
  data = {}
  for name in ('one', 'two'):
    data['net', 'layer', f'lora_a.{name}'] = jnp.full((4, 1), 0.003)
    data['net', 'layer', f'lora_b.{name}'] = jnp.ones((1, 4))
  changed = bx.Params()
  for path, param in params.items():
    changed[path] = param.replace(value=data.get(path, param.value))
  params = params.merge(changed.locked())
  merged = surgery.merge(params)['net', 'layer', 'kernel'].value
  # 1.006 rounds up to 1.0078125; 1.003 rounds to 1 each time.
  assert jnp.bfloat16(1.0078125) == merged[0, 0]
  assert jnp.bfloat16 == merged.dtype


@pytest.fixture(scope='module')
def mixed(net):
  """A LoRA inside, a scaling outside."""
  host = models.host(models.Scale)
  params = surgery.attach(net[1], LORA, to='**/hidden*', name='lora')
  params = surgery.attach(
    params, models.Scale(), to='**/hidden*', name='scale', host=host
  )
  return models.stirred(params), host


def test_merging_what_does_not_commute_is_refused(mixed):
  params, host = mixed
  with pytest.raises(surgery.OrderError, match=r"Merge 'lora' first"):
    surgery.merge(params, 'scale', host=host)


def test_merging_the_innermost_first_is_right(net, mixed):
  model, _, x = net
  params, host = mixed
  merged = surgery.merge(params, 'lora', host=host)
  models.close(model(params, x)[0], model(merged, x)[0])
  merged = surgery.merge(merged, 'scale', host=host)
  models.close(model(params, x)[0], model(merged, x)[0])


def test_merging_both_together_is_right(net, mixed):
  model, base, x = net
  params, host = mixed
  merged = surgery.merge(params, host=host)
  expected = model(params, x)[0]
  assert models.bits(expected) == models.bits(model(merged, x)[0])
  w = models.dense(surgery.detach(params, 'scale'))[(*LAYER, 'kernel')].value
  scale = params[(*LAYER, 'scale.scale')].value
  models.close(w * scale, merged[(*LAYER, 'kernel')].value)
  models.close(
    base[(*LAYER, 'bias')].value * scale, merged[(*LAYER, 'bias')].value
  )


def test_merging_over_a_disabled_one_that_does_not_commute_is_refused(mixed):
  params, host = mixed
  with pytest.raises(surgery.OrderError):
    surgery.merge(surgery.disable(params, 'lora'), 'scale', host=host)


def test_a_plugin_may_refuse_a_merge(net):
  class Refuses:
    @surgery.hookimpl
    def surgery_merge_param(self, site):
      return surgery.Refusal('it is Monday')

  class Silent(models.Scale):
    name = 'silent'

    @surgery.hookimpl
    def surgery_merge_param(self):
      return None

  host = models.host(Silent, Refuses())
  params = surgery.attach(net[1], Silent(), to='**/hidden0', host=host)
  with pytest.raises(surgery.AdapterError, match=r'hidden0/kernel.*Monday'):
    surgery.merge(params, host=host)


def test_merging_under_jit_is_right(net):
  model, _, x = net
  params = _attach(net[1])
  merged = jax.jit(surgery.merge)(params)
  assert bx.Params is type(merged)
  models.close(model(params, x)[0], model(merged, x)[0])


# Enable and disable.


def test_disabling_one_leaves_the_other(net):
  model, base, x = net
  params = _attach(base, 'one', 'two')
  expected = model(surgery.detach(params, 'one'), x)[0]
  disabled = surgery.disable(params, 'one')
  assert models.bits(expected) == models.bits(model(disabled, x)[0])
  assert ['one', 'two'] == [i.name for i in surgery.adapters(disabled)]


def test_enabling_restores_the_same_bits(net):
  model, base, x = net
  params = _attach(base, 'one', 'two')
  back = surgery.enable(surgery.disable(params))
  assert jax.tree.structure(params) == jax.tree.structure(back)
  assert models.bits(model(params, x)[0]) == models.bits(model(back, x)[0])


def test_a_layer_may_write_what_a_disabled_adapter_rewrites(net):
  model, base, _ = net
  params, layer = _attach(base), model.layers[0]
  value = params[(*LAYER, 'kernel')].value + 1
  with pytest.raises(surgery.AdapterError, match='folded in again'):
    layer.set_param(params, 'kernel', value)
  written = layer.set_param(surgery.disable(params), 'kernel', value)
  assert models.bits(value) == models.bits(written[(*LAYER, 'kernel')].value)


def test_a_layer_may_set_flags_of_what_is_adapted(net):
  model, base, _ = net
  params = model.layers[0].set_param(
    _attach(base), 'kernel', None, trainable=False
  )
  assert not params[(*LAYER, 'kernel')].trainable


def test_a_layer_may_not_write_an_adapters_weight(net):
  model, base, _ = net
  with pytest.raises(surgery.AdapterError, match='weight of adapter'):
    model.layers[0].set_param(_attach(base), 'lora_a', jnp.zeros((4, 2)))


# Freeze and unfreeze.


def test_freeze_leaves_only_adapter_weights_to_train(net):
  params = surgery.freeze(_attach(net[1], 'one', 'two'))
  for path, param in params.items():
    assert models.is_weight(path, param) == param.trainable


def test_freeze_by_selector_means_all_beneath_a_layer(net):
  params = surgery.freeze(net[1], '**/hidden0')
  frozen = {p for p, t in _flags(params).items() if not t and 'rng' not in p}
  assert {(*LAYER, 'kernel'), (*LAYER, 'bias')} == frozen


def test_freeze_takes_a_selection(net):
  params = surgery.freeze(net[1], surgery.select(net[1], '**/bias'))
  for path, trains in _flags(params).items():
    if 'rng' not in path:
      assert trains == ('bias' not in path)


def test_freeze_refuses_a_selector_that_matches_nothing(net):
  with pytest.raises(surgery.SelectorError, match='hidden0'):
    surgery.freeze(net[1], '**/hiden0')


def test_freeze_refuses_selector_and_policy_together(net):
  with pytest.raises(surgery.SurgeryError, match='not both'):
    surgery.freeze(net[1], '**', policy='adapters')


def test_unfreeze_undoes_freeze(net):
  params = _attach(net[1])
  back = surgery.unfreeze(surgery.freeze(params))
  assert jax.tree.structure(params) == jax.tree.structure(back)


def test_unfreeze_by_selector_restores_only_that(net):
  params = surgery.unfreeze(surgery.freeze(_attach(net[1])), '**/output')
  trains = {p for p, t in _flags(params).items() if t}
  assert ('net', 'mlp', 'output', 'kernel') in trains
  assert (*LAYER, 'kernel') not in trains


def test_unfreeze_leaves_statistics_and_what_others_froze():
  graph = bx.Graph('net')
  norm = bx.BatchNorm(graph.child('norm'))
  _, params = norm(bx.Params(), models.normal(0, (4, 3)))
  params = norm.set_param(params.locked(), 'bias', None, trainable=False)
  back = surgery.unfreeze(surgery.freeze(params, '**/norm'))
  assert jax.tree.structure(params) == jax.tree.structure(back)
  assert [False] * 3 + [True] == [
    back['net', 'norm', name].trainable
    for name in ('running_mean', 'running_var', 'bias', 'scale')
  ]


def test_unfreeze_refuses_where_freeze_froze_nothing(net):
  with pytest.raises(surgery.SurgeryError, match='froze none'):
    surgery.unfreeze(net[1])


def test_freeze_leaves_weights_that_never_train_frozen(net):
  host = models.host(models.Shared)
  params = surgery.attach(net[1], models.Shared(), to='**/hidden0', host=host)
  shared = ('surgery.default', 'matrix')
  assert not params[shared].trainable
  frozen = surgery.freeze(params, host=host)
  assert not frozen[shared].trainable
  assert frozen[(*LAYER, 'size')].trainable
  assert not surgery.unfreeze(frozen, host=host)[shared].trainable


class BitFit:
  @surgery.hookimpl
  def surgery_freeze_param(self, site, policy):
    return site.name == 'bias' if policy == 'bitfit' else None


def test_freeze_by_a_plugins_policy(net):
  params = surgery.freeze(net[1], policy='bitfit', host=models.host(BitFit()))
  for path, trains in _flags(params).items():
    if 'rng' not in path:
      assert trains == (path[-1] == 'bias')


def test_freeze_refuses_a_policy_that_nobody_knows(net):
  with pytest.raises(surgery.PluginError, match='whim'):
    surgery.freeze(net[1], policy='whim')


def test_training_leaves_the_bits_of_what_is_frozen(net):
  model, base, x = net
  params = surgery.freeze(_attach(base))
  before, step = params, _sgd(model, x)
  for _ in range(3):
    params = step(params)
  for path, param in before.items():
    same = models.bits(param.value) == models.bits(params[path].value)
    assert same == (not models.is_weight(path, param)), path


def _sgd(model, x):
  @jax.jit
  def step(params):
    trainable, rest = params.split()

    def loss(trainable):
      out, new = model(trainable.merge(rest), x)
      return (out**2).mean(), new.split()[1]

    grads, rest_after = jax.grad(loss, has_aux=True)(trainable)
    update = lambda w, g: w - 0.1 * g
    return jax.tree.map(update, trainable, grads).merge(rest_after)

  return step


# Masks.


def test_mask_has_the_structure_of_the_params(net):
  for params in (net[1], surgery.freeze(_attach(net[1]))):
    mask = surgery.trainable_mask(params)
    assert jax.tree.structure(params) == jax.tree.structure(mask)
    for path, param in params.items():
      assert param.trainable is mask[path].value


def test_mask_works_with_optax_masked(net):
  model, base, x = net
  params = surgery.freeze(_attach(base))
  trainable, rest = params.split()
  mask = surgery.trainable_mask(params)
  # The mask of the half that is differentiated.
  mask, _ = mask.split()
  optimizer = optax.masked(optax.sgd(0.1), mask)
  grads = jax.grad(lambda t: model(t.merge(rest), x)[0].sum())(trainable)
  updates, _ = optimizer.update(grads, optimizer.init(trainable), trainable)
  assert jax.tree.structure(trainable) == jax.tree.structure(updates)


def test_inverted_mask_works_with_optax_freeze(net):
  _, base, _ = net
  base = base.split(lambda path, param: 'rng' not in path)[0]
  params = surgery.freeze(_attach(base))
  mask = jax.tree.map(operator.not_, surgery.trainable_mask(params))
  optimizer = optax.chain(optax.sgd(1.0), optax.freeze(mask))
  ones = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(ones, optimizer.init(params), params)
  for path, param in params.items():
    expected = -1.0 if param.trainable else 0.0
    assert (updates[path].value == expected).all()


# Adapters.


def test_adapters_says_what_is_attached(net):
  params = surgery.disable(_attach(net[1], 'one', 'two'), 'two')
  one, two = surgery.adapters(params)
  assert ('one', 'lora', True) == (one.name, one.type, one.enabled)
  assert ('two', 'lora', False) == (two.name, two.type, two.enabled)
  options = {'rank': 2, 'alpha': None, 'rslora': False, 'dropout': 0.0}
  assert options == one.config
  assert 2 == len(one.sites)
  assert (4 + 6 + 6 + 5) * 2 == one.size
  assert one.size * 4 == one.nbytes
  assert not one.pending
  assert 'one: lora(rank=2' in repr(one)


def test_adapters_of_a_plain_model_are_none(net):
  assert [] == surgery.adapters(net[1])


def test_observers_are_told_of_verbs_and_of_their_failure(net):
  told = []

  class Observer:
    @surgery.hookimpl
    def surgery_started(self, event):
      told.append(('started', event.verb))

    @surgery.hookimpl
    def surgery_finished(self, event):
      told.append((type(event.failed).__name__, event.verb))

  host = models.host(Observer())
  params = surgery.attach(net[1], LORA, to='**/hidden0', host=host)
  with pytest.raises(surgery.AdapterError):
    surgery.merge(params, 'nobody', host=host)
  assert [
    ('started', 'attach'),
    ('NoneType', 'attach'),
    ('started', 'merge'),
    ('AdapterError', 'merge'),
  ] == told
