"""What was trained with an adapter comes and goes with the adapter."""

import copy
import pickle

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models
from tests.live.test_saving import assert_same

HEAD = ('net', 'mlp', 'output', 'kernel')
SAVED = ('net', 'mlp', 'output', 'saved')
BIAS = ('net', 'mlp', 'output', 'bias')


class Normed(bx.Module):
  """A linear layer, a batch norm and another linear layer."""

  def __init__(self, graph, rng):
    super().__init__(graph)
    self.first = bx.Linear(graph.child('first'), 5, rng=rng)
    self.norm = bx.BatchNorm(graph.child('norm'), rng=rng)
    self.last = bx.Linear(graph.child('last'), 3, rng=rng)

  def __call__(self, params, x, is_training=False):
    x, params = self.first(params, x)
    x, params = self.norm(params, x, is_training)
    return self.last(params, jax.nn.relu(x))


@pytest.fixture(scope='module')
def net():
  return models.mlp()


@pytest.fixture(scope='module')
def normed():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = Normed(graph.child('bn'), rng)
  x = models.normal(3, (9, 4))
  _, params = model(rng.seed(bx.Params(), seed=1), x)
  return model, params.locked(), x


def step(model, x):
  """One step of gradient descent on what trains."""

  def loss(trainable, rest):
    y, params = model(trainable.merge(rest), x)
    return jnp.mean((y - 1) ** 2), params

  def halves(trainable, rest):
    grads, _ = jax.grad(loss, has_aux=True)(trainable, rest)
    return jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)

  return halves


def trained(net, how, to='**/hidden0', head='**/output', name='default'):
  """Returns params of which an adapter and the head were trained."""
  model, base, x = net
  params = surgery.attach(base, surgery.LoRA(rank=2), to=to, name=name)
  params = surgery.unfreeze(surgery.freeze(params), head)
  update = step(model, x)

  def whole(params):
    trainable, rest = params.split()
    return update(trainable, rest).merge(rest)

  if how == 'halves':
    trainable, rest = params.split()
    params = jax.jit(update)(trainable, rest).merge(rest)
  else:
    params = (jax.jit(whole) if how == 'jit' else whole)(params)
  # The second step has a gradient for lora_a as well.
  return whole(params) if how != 'jit' else jax.jit(whole)(params)


def outputs(net, params, **options):
  return np.asarray(net[0](params, net[2], **options)[0])


HOW = ['eager', 'halves', 'jit']


@pytest.mark.parametrize('how', HOW)
def test_a_head_that_was_trained_along_is_put_back(tmp_path, net, how):
  params = trained(net, how)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  assert {'lora_a', 'lora_b', 'saved', 'saved.default.bias'} == {
    path[-1] for path in surgery.open(file)
  }
  loaded = surgery.load_adapter(file, net[1])
  assert np.array_equal(outputs(net, params), outputs(net, loaded))
  assert not np.array_equal(outputs(net, net[1]), outputs(net, loaded))
  assert ((*HEAD,), (*BIAS,)) == tuple(
    sorted(surgery.adapters(loaded)[0].saved, reverse=True)
  )


@pytest.mark.parametrize('frozen', [False, True])
def test_detach_gives_the_very_base(tmp_path, net, frozen):
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, trained(net, 'jit'))
  base = surgery.freeze(net[1], '**/hidden1') if frozen else net[1]
  assert_same(base, surgery.detach(surgery.load_adapter(file, base)))


def test_disabled_it_is_the_base_and_enabled_what_was_saved(tmp_path, net):
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, trained(net, 'jit'))
  loaded = surgery.load_adapter(file, net[1])
  off = surgery.disable(loaded)
  assert np.array_equal(outputs(net, net[1]), outputs(net, off))
  on = surgery.enable(off)
  assert np.array_equal(outputs(net, loaded), outputs(net, on))


def test_merged_it_is_the_base_that_was_trained(tmp_path, net):
  params = trained(net, 'jit')
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  base = surgery.freeze(net[1])
  merged = surgery.merge(surgery.load_adapter(file, base))
  assert set(net[1].keys()) == set(merged.keys())
  expected = surgery.merge(params)
  for path, param in merged.items():
    if 'rng' not in path:
      assert np.array_equal(expected[path].value, param.value), path
    assert base[path].trainable == param.trainable
    assert base[path].metadata == param.metadata


@pytest.mark.parametrize('how', HOW)
def test_what_was_not_trained_is_not_saved(tmp_path, net, how):
  model, base, x = net
  params = surgery.freeze(
    surgery.attach(base, surgery.LoRA(rank=2), to='**/hidden0')
  )
  if how == 'jit':
    params = jax.jit(lambda p: p)(params)
  if how == 'halves':
    trainable, rest = params.split()
    params = jax.jit(step(model, x))(trainable, rest).merge(rest)
  surgery.save_adapter(tmp_path / 'a.msgpack', params)
  assert {'lora_a', 'lora_b'} == {
    path[-1] for path in surgery.open(tmp_path / 'a.msgpack')
  }


def test_without_freeze_only_what_changed_is_saved(tmp_path, net):
  params = surgery.attach(net[1], surgery.LoRA(rank=2), to='**/hidden0')
  params = models.stirred(params)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  assert 2 == len(surgery.open(file))
  # Where nothing says what was trained, all of it may have been.
  traced = jax.jit(lambda p: p)(params)
  surgery.save_adapter(file, traced)
  loaded = surgery.load_adapter(file, net[1])
  assert np.array_equal(outputs(net, params), outputs(net, loaded))
  # What the base has already does not stand in its place.
  assert () == surgery.adapters(loaded)[0].saved


def test_a_head_that_was_frozen_again_is_saved(tmp_path, net):
  params = surgery.freeze(trained(net, 'halves'))
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  loaded = surgery.load_adapter(file, net[1])
  assert np.array_equal(outputs(net, params), outputs(net, loaded))


def test_a_head_that_was_frozen_again_after_jit_is_saved(tmp_path, net):
  params = trained(net, 'jit')
  frozen = surgery.freeze(params)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, frozen)
  loaded = surgery.load_adapter(file, net[1])
  assert np.array_equal(outputs(net, params), outputs(net, loaded))
  # Freezing leaves no other trace, as for all that was frozen.
  again = surgery.unfreeze(frozen, '**/output')
  assert_same(params, again)


@pytest.mark.parametrize(
  'copied', [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies_know_what_was_trained(tmp_path, net, copied):
  params = copied(surgery.attach(net[1], surgery.LoRA(rank=2), to='**/hidden0'))
  params = params.unlocked()
  params[HEAD] = params[HEAD].replace(value=params[HEAD].value + 1)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params.locked())
  assert {'lora_a', 'lora_b', 'saved'} == {p[-1] for p in surgery.open(file)}


def test_half_an_adapter_is_not_saved(tmp_path, net):
  trainable, rest = trained(net, 'jit').split()
  for half, missing in (
    (trainable, 'net/mlp/hidden0/kernel:'),
    (rest, 'net/mlp/hidden0/lora_a, net/mlp/hidden0/lora_b:'),
  ):
    with pytest.raises(surgery.AdapterError, match=f'{missing} .*without it'):
      surgery.save_adapter(tmp_path / 'a.msgpack', half)


def test_a_base_that_was_trained_under_its_adapter_is_put_back(tmp_path, net):
  params = trained(net, 'jit', to='**/output', head='**/output')
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  loaded = surgery.load_adapter(file, net[1])
  assert np.array_equal(outputs(net, params), outputs(net, loaded))
  assert_same(net[1], surgery.detach(loaded))
  merged = surgery.merge(loaded)
  assert np.array_equal(surgery.merge(params)[HEAD].value, merged[HEAD].value)


# Statistics.


@pytest.mark.parametrize('how', HOW)
def test_statistics_that_moved_are_put_back(tmp_path, normed, how):
  model, base, x = normed
  params = surgery.attach(base, surgery.LoRA(rank=2), to='**/first')
  params = models.stirred(surgery.freeze(params))
  run = lambda p: model(p, x * 3 + 1, is_training=True)[1]
  if how == 'halves':
    trainable, rest = params.split()
    rest = jax.jit(lambda t, r: run(t.merge(r)).split()[1])(trainable, rest)
    params = trainable.merge(rest)
  else:
    params = (jax.jit(run) if how == 'jit' else run)(params)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  loaded = surgery.load_adapter(file, base)
  assert np.array_equal(outputs(normed, params), outputs(normed, loaded))
  names = {path[-1] for path in surgery.adapters(loaded)[0].saved}
  assert {'running_mean', 'running_var'} == names
  assert_same(base, surgery.detach(loaded))


def test_statistics_go_on_moving_and_the_base_keeps_its_own(tmp_path, normed):
  model, base, x = normed
  params = surgery.attach(base, surgery.LoRA(rank=2), to='**/first')
  run = jax.jit(lambda p: model(p, x * 3 + 1, is_training=True)[1])
  once = run(surgery.freeze(params))
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, once)
  loaded = run(surgery.load_adapter(file, surgery.freeze(base)))
  twice = run(once)
  assert np.array_equal(outputs(normed, twice), outputs(normed, loaded))
  assert_same(surgery.freeze(base), surgery.detach(loaded))
  # And they are saved from where they are now.
  surgery.save_adapter(file, loaded)
  again = surgery.load_adapter(file, base)
  assert np.array_equal(outputs(normed, twice), outputs(normed, again))


# Going on.


def test_it_trains_on_and_is_saved_again(tmp_path, net):
  model, base, x = net
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, trained(net, 'jit'))
  loaded = surgery.freeze(surgery.load_adapter(file, base))
  trainable, rest = loaded.split()
  assert {'lora_a', 'lora_b', 'saved', 'saved.default.bias'} == {
    path[-1] for path in trainable.keys()
  }
  more = jax.jit(step(model, x))(trainable, rest).merge(rest)
  assert not np.array_equal(loaded[SAVED].value, more[SAVED].value)
  surgery.save_adapter(file, more, 'default')
  again = surgery.load_adapter(file, base)
  assert np.array_equal(outputs(net, more), outputs(net, again))


def test_a_model_is_saved_and_loaded_with_it(tmp_path, net):
  file, whole = tmp_path / 'a.msgpack', tmp_path / 'm.safetensors'
  surgery.save_adapter(file, trained(net, 'jit'))
  loaded = surgery.load_adapter(file, net[1], 'other')
  surgery.save(whole, loaded)
  again = surgery.load(whole)
  assert_same(loaded, again)
  assert jax.tree.structure(loaded) == jax.tree.structure(again)
  assert_same(net[1], surgery.detach(again))


def test_a_model_file_remembers_what_was_trained(tmp_path, net):
  file, whole = tmp_path / 'a.msgpack', tmp_path / 'm.msgpack'
  params = surgery.attach(net[1], surgery.LoRA(rank=2), to='**/hidden0')
  params = params.unlocked()
  params[HEAD] = params[HEAD].replace(value=params[HEAD].value + 1)
  params = models.stirred(params.locked())
  surgery.save(whole, params)
  surgery.save_adapter(file, surgery.load(whole))
  assert {'lora_a', 'lora_b', 'saved'} == {p[-1] for p in surgery.open(file)}


def test_one_program_serves_tenants_with_heads_of_their_own(tmp_path, net):
  traced = []

  @jax.jit
  def call(params):
    traced.append(1)
    return net[0](params, net[2])[0]

  for number in range(3):
    params = trained(net, 'jit').unlocked()
    params[HEAD] = params[HEAD].replace(value=params[HEAD].value + number)
    file = tmp_path / f'{number}.msgpack'
    surgery.save_adapter(file, params.locked())
    loaded = surgery.load_adapter(file, net[1])
    np.testing.assert_allclose(
      outputs(net, params), call(loaded), rtol=1e-5, atol=1e-6
    )
  assert 1 == len(traced)


def test_attached_before_initialisation_it_is_known_what_changed(tmp_path):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = models.MLP(graph.child('mlp'), [6, 5, 3], rng)
  x = models.normal(0, (7, 4))
  params = rng.seed(bx.Params(), seed=42)
  params = surgery.attach(params, surgery.LoRA(rank=2), to='**/hidden0')
  _, params = model(params, x)
  params = params.locked()
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, models.stirred(params))
  assert 2 == len(surgery.open(file))


def test_check_looks_for_it_too(tmp_path, net):
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, trained(net, 'jit'))
  loaded = surgery.load_adapter(file, net[1])
  assert {HEAD, BIAS} < set(surgery.check(net[0], loaded, net[2]))

  def raw(params, x):
    x, params = net[0].layers[0](params, x)
    x, params = net[0].layers[1](params, x)
    return x @ params[HEAD].value, params

  with pytest.raises(surgery.UnreachedError, match='net/mlp/output/kernel'):
    surgery.check(raw, loaded, net[2])


# By selector.


def test_a_selector_says_what_is_saved(tmp_path, net):
  file = tmp_path / 'a.msgpack'
  params = trained(net, 'jit')
  surgery.save_adapter(file, params, modules_to_save='**/output/kernel')
  loaded = surgery.load_adapter(file, net[1])
  assert (HEAD,) == surgery.adapters(loaded)[0].saved
  surgery.save_adapter(
    file, params, modules_to_save=['type:Linear'], graph=net[0].root
  )
  assert 6 + 2 == len(surgery.open(file))
  surgery.save_adapter(file, params, modules_to_save=[])
  assert 2 == len(surgery.open(file))


@pytest.mark.parametrize(
  ('select', 'error', 'message'),
  [
    ('**/outptu', surgery.SelectorError, 'outptu'),
    ('**/lora_a', surgery.AdapterError, 'is saved with its adapter anyway'),
    ('**/rng', surgery.AdapterError, 'Select parameters of the base'),
  ],
)
def test_a_selector_that_means_nothing_is_refused(
  tmp_path, net, select, error, message
):
  file = tmp_path / 'a.msgpack'
  with pytest.raises(error, match=message):
    surgery.save_adapter(file, trained(net, 'jit'), modules_to_save=select)
  assert not file.exists()


def test_a_value_that_is_no_array_is_refused_by_name(tmp_path, net):
  params = surgery.attach(net[1], surgery.LoRA(rank=1), to='**/hidden0')
  params = params.unlocked()
  params[('net', 'x')] = bx.Param({'a': jnp.ones(2)})
  file = tmp_path / 'a.msgpack'
  with pytest.raises(
    surgery.AdapterError,
    match=r'net/x.*: changed in training.*=\[\] to save noth',
  ):
    surgery.save_adapter(file, params)
  surgery.save_adapter(file, params, modules_to_save=[])


# Several.


def heads(tmp_path, net):
  """Returns the files of two adapters that were trained with a head each."""
  for number, name in enumerate('ab'):
    params = trained(net, 'jit', name=name).unlocked()
    params[HEAD] = params[HEAD].replace(value=params[HEAD].value + number)
    surgery.save_adapter(tmp_path / f'{name}.msgpack', params.locked(), name)
  return tmp_path / 'a.msgpack', tmp_path / 'b.msgpack'


def test_two_heads_are_refused(tmp_path, net):
  a, b = heads(tmp_path, net)
  loaded = surgery.load_adapter(a, net[1])
  with pytest.raises(
    surgery.AdapterError,
    match=r"net/mlp/output/bias, net/mlp/output/kernel: adapter 'b' was saved "
    r"with values of its own, and so was 'a', which is enabled\. Disable or",
  ):
    surgery.load_adapter(b, loaded)


def test_one_of_two_heads_at_a_time(tmp_path, net):
  a, b = heads(tmp_path, net)
  one = surgery.disable(surgery.load_adapter(a, net[1]), 'a')
  two = surgery.load_adapter(b, one)
  only = surgery.load_adapter(b, net[1])
  assert np.array_equal(outputs(net, only), outputs(net, two))
  with pytest.raises(surgery.AdapterError, match='only one of them can be en'):
    surgery.enable(two, 'a')
  swapped = surgery.enable(surgery.disable(two, 'b'), 'a')
  only = surgery.load_adapter(a, net[1])
  assert np.array_equal(outputs(net, only), outputs(net, swapped))
  assert_same(net[1], surgery.detach(two))


def test_halves_with_a_head_each_do_not_go_together(tmp_path, net):
  a, b = (surgery.load_adapter(f, net[1]) for f in heads(tmp_path, net))
  with pytest.raises(surgery.AdapterError, match='both saved with a value'):
    a.merge(b)


def test_an_adapter_beneath_keeps_its_head_where_one_above_has_none(
  tmp_path, net
):
  a, _ = heads(tmp_path, net)
  params = surgery.load_adapter(a, net[1])
  params = surgery.attach(
    params, surgery.LoRA(rank=1), to='**/output', name='over'
  )
  path = (*HEAD[:-1], 'lora_b.over')
  weight = models.normal(5, params[path].value.shape)
  params = params.unlocked()
  params[path] = params[path].replace(value=weight)
  params = params.locked()
  over = tmp_path / 'over.msgpack'
  surgery.save_adapter(over, params, 'over')
  loaded = surgery.load_adapter(over, surgery.load_adapter(a, net[1]))
  assert np.array_equal(outputs(net, params), outputs(net, loaded))
  merged = surgery.merge(surgery.load_adapter(a, net[1]))
  assert surgery.load_adapter(over, merged)
  with pytest.raises(surgery.BaseMismatchError, match="trained over 'a'"):
    surgery.load_adapter(over, net[1])
  with pytest.raises(surgery.OrderError, match="Merge 'a' first"):
    surgery.merge(loaded, 'over')
  both = surgery.merge(loaded)
  np.testing.assert_allclose(
    outputs(net, loaded), outputs(net, both), rtol=1e-5, atol=1e-6
  )


def test_two_that_were_trained_with_one_head_come_back(tmp_path, net):
  params = trained(net, 'eager', name='a')
  params = surgery.attach(
    params, surgery.LoRA(rank=1), to='**/hidden1', name='b'
  )
  params = models.stirred(params)
  for name in 'ab':
    surgery.save_adapter(tmp_path / f'{name}.msgpack', params, name)
  loaded = surgery.load_adapter(tmp_path / 'a.msgpack', net[1])
  loaded = surgery.load_adapter(tmp_path / 'b.msgpack', loaded)
  assert np.array_equal(outputs(net, params), outputs(net, loaded))
  assert_same(net[1], surgery.detach(loaded))


def test_a_head_of_an_adapter_that_is_not_beneath_is_not_shared(tmp_path, net):
  params = trained(net, 'eager', name='a')
  params = surgery.attach(
    params, surgery.LoRA(rank=1), to='**/hidden1', name='b'
  )
  surgery.save_adapter(tmp_path / 'a.msgpack', params, 'a')
  off = surgery.disable(params, 'a')
  surgery.save_adapter(tmp_path / 'b.msgpack', off, 'b')
  a = surgery.load_adapter(tmp_path / 'a.msgpack', net[1])
  # Without a, b would be without the head that it was trained with.
  with pytest.raises(surgery.AdapterError, match="and so was 'a', which is en"):
    surgery.load_adapter(tmp_path / 'b.msgpack', a)
  loaded = surgery.load_adapter(tmp_path / 'b.msgpack', surgery.disable(a))
  assert np.array_equal(outputs(net, off), outputs(net, loaded))


def test_heads_are_not_combined_and_not_stacked(tmp_path, net):
  a, _ = heads(tmp_path, net)
  loaded = surgery.load_adapter(a, net[1])
  with pytest.raises(surgery.AdapterError, match='no update to combine'):
    surgery.combine_adapters(loaded, {'a': 1.0})
  with pytest.raises(surgery.AdapterError, match='net/mlp/output/kernel'):
    surgery.stack_adapters([loaded, loaded])


# Passes.


def test_it_follows_when_layers_are_renamed_cast_and_dropped(tmp_path, net):
  a, _ = heads(tmp_path, net)
  loaded = surgery.load_adapter(a, net[1])
  there = surgery.rename(loaded, ['net/mlp/output -> net/mlp/head'])
  assert ('net', 'mlp', 'head', 'kernel') in surgery.adapters(there)[0].saved
  back = surgery.rename(there, ['net/mlp/head -> net/mlp/output'])
  assert_same(loaded, back)
  assert jax.tree.structure(loaded) == jax.tree.structure(back)
  small = surgery.cast(loaded, 'bf16')
  assert 'bfloat16' == str(net[0](small, net[2].astype('bfloat16'))[0].dtype)
  assert_same(surgery.cast(net[1], 'bf16'), surgery.detach(small))
  less = surgery.drop(loaded, '**/output')
  assert () == surgery.adapters(less)[0].saved
  with pytest.raises(surgery.AdapterError, match='needs both'):
    surgery.drop(loaded, 'net/mlp/output/saved.a')


def test_steps_read_what_the_layer_gets_and_change_nothing(tmp_path, net):
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, trained(net, 'jit'))
  loaded = surgery.load_adapter(file, net[1])
  after = surgery.apply(loaded, {'copy': 'net/mlp/output/bias -> net/copy'})
  saved = loaded[(*BIAS[:-1], 'saved.default.bias')].value
  assert np.array_equal(saved, after[('net', 'copy')].value)
  assert np.array_equal(net[1][BIAS].value, after[BIAS].value)
  with pytest.raises(surgery.SurgeryError, match='net/mlp/output/bias'):
    surgery.apply(loaded, {'scale': {'select': '**/output/bias', 'by': 2}})
