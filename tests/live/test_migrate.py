"""An optimizer's state follows its params."""

from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import surgery


def network(layers=3, width=4):
  params = bx.Params()
  rng = np.random.default_rng(0)
  for i in range(layers):
    kernel = rng.standard_normal((width, width)).astype('float32')
    params['net', f'h{i}', 'kernel'] = bx.Param(jnp.asarray(kernel))
    params['net', f'h{i}', 'bias'] = bx.Param(jnp.zeros(width) + i)
  params['net', 'steps'] = bx.Param(jnp.array(3), trainable=False)
  return params.locked()


def grads(params, seed=1):
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  made = [
    jax.random.normal(k, v.shape) for k, v in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, made)


def trained(tx, params, steps=2):
  """A state that has moments, of the half that trains."""
  half = params.split()[0]
  state = tx.init(half)
  for k in range(steps):
    _, state = tx.update(grads(half, k), state, half)
  return state


def nodes(state):
  is_params = lambda x: isinstance(x, bx.Params)
  return [x for x in jax.tree.leaves(state, is_leaf=is_params) if is_params(x)]


def moments(state, path, which=0):
  return np.asarray(nodes(state)[which][path].value)


OPTIMIZERS = {
  'adam': optax.adam(1e-3),
  'momentum': optax.sgd(0.1, momentum=0.9),
  'chain': optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.scale(0.5)
  ),
  'schedule': optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
  'hyperparams': optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
  'multi_steps': optax.MultiSteps(optax.adam(1e-3), 2),
}


@pytest.fixture(params=OPTIMIZERS)
def tx(request):
  return OPTIMIZERS[request.param]


def checked(tx, state, after):
  """Raises unless a state fits params: an update works and compiles."""
  half = after.split()[0]
  assert jax.tree.structure(tx.init(half)) == jax.tree.structure(state)
  for a, b in zip(
    jax.tree.leaves(nodes(tx.init(half))),
    jax.tree.leaves(nodes(state)),
    strict=True,
  ):
    assert jnp.shape(a) == jnp.shape(b)
    assert jnp.result_type(a) == jnp.result_type(b)
  jax.jit(tx.update)(grads(half), state, half)


def test_what_is_renamed_is_followed(tx):
  before = network()
  state = trained(tx, before)
  after = surgery.rename(before, 'net/h<i> -> net/block<i+1>')
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  for which in range(len(nodes(state))):
    for i in range(3):
      for name in ('kernel', 'bias'):
        assert np.array_equal(
          moments(state, ('net', f'h{i}', name), which),
          moments(moved, ('net', f'block{i + 1}', name), which),
        )


STEPS: dict[str, Any] = {
  'slice': (
    {'slice': {'select': '**/kernel', 'axis': 1, 'keep': [0, 2]}},
    lambda m: m['h1', 'kernel'][:, [0, 2]],
    ('net', 'h1', 'kernel'),
  ),
  'permute': (
    {'permute': {'select': '**/bias', 'order': [3, 1, 0, 2]}},
    lambda m: m['h2', 'bias'][[3, 1, 0, 2]],
    ('net', 'h2', 'bias'),
  ),
  'transpose': (
    {'transpose': '**/kernel'},
    lambda m: m['h0', 'kernel'].T,
    ('net', 'h0', 'kernel'),
  ),
  'stack': (
    {'stack': 'net/h<i>/** -> net/h/**'},
    lambda m: np.stack([m[f'h{i}', 'kernel'] for i in range(3)]),
    ('net', 'h', 'kernel'),
  ),
  'concat': (
    {'concat': 'net/{h1,h0}/bias -> net/bias'},
    lambda m: np.concatenate([m['h1', 'bias'], m['h0', 'bias']]),
    ('net', 'bias'),
  ),
  'reshape': (
    {'reshape': {'select': 'net/h1/kernel', 'shape': [2, 8]}},
    lambda m: m['h1', 'kernel'].reshape(2, 8),
    ('net', 'h1', 'kernel'),
  ),
  'drop': (
    {'drop': 'net/h0'},
    lambda m: m['h1', 'bias'],
    ('net', 'h1', 'bias'),
  ),
  'repeat': (
    {'repeat': {'layers': 'net/h<i>', 'numbers': '1:2'}},
    lambda m: m['h2', 'bias'],
    ('net', 'h3', 'bias'),
  ),
  'pad': (
    {'pad': {'select': 'net/h1/bias', 'before': 1, 'after': 2, 'value': 7}},
    lambda m: np.pad(m['h1', 'bias'], (1, 2)),
    ('net', 'h1', 'bias'),
  ),
  'resize-vocab': (
    {'resize-vocab': {'select': 'net/h1/kernel', 'size': 6}},
    lambda m: np.pad(m['h1', 'kernel'], ((0, 2), (0, 0))),
    ('net', 'h1', 'kernel'),
  ),
  'scale': (
    {'scale': {'select': '**/kernel', 'by': 2}},
    lambda m: m['h1', 'kernel'],
    ('net', 'h1', 'kernel'),
  ),
  'fill': (
    {'fill': {'rules': 'net/h1/bias -> net/h1/more', 'shape': [2, 3]}},
    lambda m: np.zeros((2, 3)),
    ('net', 'h1', 'more'),
  ),
  'factorise': (
    {'factorise': {'rules': 'net/h1/kernel -> net/h1/{a,b}', 'rank': 2}},
    lambda m: np.zeros((2, 4)),
    ('net', 'h1', 'b'),
  ),
  'copy': (
    {'copy': 'net/h1 -> net/h9'},
    lambda m: m['h1', 'kernel'],
    ('net', 'h9', 'kernel'),
  ),
}


@pytest.mark.parametrize('name', STEPS)
@pytest.mark.parametrize('optimizer', ['adam', 'momentum'])
def test_moments_go_where_values_go(optimizer, name):
  tx = OPTIMIZERS[optimizer]
  step, expected, path = STEPS[name]
  before = network()
  state = trained(tx, before)
  after = surgery.apply(before, step)
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  for which, node in enumerate(nodes(state)):
    old = {p[1:]: np.asarray(v.value) for p, v in node.items()}
    assert np.array_equal(
      np.asarray(expected(old), 'float32'), moments(moved, path, which)
    )


def test_adapters_begin_and_the_base_goes_on(tx):
  before = network()
  state = trained(tx, before)
  after = surgery.attach(before, surgery.LoRA(rank=2), to='**')
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  path = ('net', 'h0', 'kernel')
  assert np.array_equal(moments(state, path), moments(moved, path))
  assert not moments(moved, ('net', 'h0', 'lora_a')).any()
  # And back: the base's moments are what they were.
  for verb in (surgery.merge, surgery.detach):
    again = verb(after)
    back = surgery.migrate(moved, after, again)
    checked(tx, back, again)
    assert np.array_equal(moments(state, path), moments(back, path))


def test_freezing_takes_moments_away_and_unfreezing_begins_anew(tx):
  before = network()
  state = trained(tx, before)
  frozen = surgery.freeze(before, '**/kernel')
  less = surgery.migrate(state, before, frozen)
  checked(tx, less, frozen)
  again = surgery.unfreeze(frozen)
  more = surgery.migrate(less, frozen, again)
  checked(tx, more, again)
  assert not moments(more, ('net', 'h0', 'kernel')).any()
  assert moments(more, ('net', 'h0', 'bias')).any()


def test_training_adapters_alone(tx):
  """A base that is frozen has no moments; adapters are sliced by merging."""
  params = surgery.attach(network(), surgery.LoRA(rank=2), to='**')
  before = surgery.freeze(params)
  state = trained(tx, before)
  after = surgery.rename(before, 'net/h<i> -> net/g<i>')
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  assert np.array_equal(
    moments(state, ('net', 'h1', 'lora_b')),
    moments(moved, ('net', 'g1', 'lora_b')),
  )


def test_several_changes_at_once(tx):
  before = network()
  state = trained(tx, before)
  after = surgery.apply(
    surgery.rename(before, 'net/h<i> -> net/g<i>'),
    [
      {'drop': 'net/g0'},
      {'renumber': 'net/g<i>'},
      {'slice': {'select': '**/kernel', 'keep': '0:3'}},
      {'assert': {'finite': '**'}},
      {'cast': 'bf16'},
    ],
  )
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  expected = moments(state, ('net', 'h1', 'kernel'))[:3].astype(jnp.bfloat16)
  assert np.array_equal(expected, moments(moved, ('net', 'g0', 'kernel')))


def test_halves_will_do_too(tx):
  before = network().split()[0]
  state = trained(tx, before)
  after = surgery.apply(before, {'transpose': '**/kernel'})
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  path = ('net', 'h0', 'kernel')
  assert np.array_equal(moments(state, path).T, moments(moved, path))


def test_a_state_of_all_params():
  before = network().split()[0]
  tx = optax.adam(1e-3)
  frozen = surgery.freeze(before, '**/bias')
  state = tx.init(frozen)
  after = surgery.rename(frozen, 'net/h0 -> net/first')
  moved = surgery.migrate(state, frozen, after)
  assert jax.tree.structure(tx.init(after)) == jax.tree.structure(moved)


def labelled(params):
  return jax.tree.map(lambda x: 'm' if x.ndim == 2 else 'b', params)


MASKED = {
  'masked': optax.masked(
    optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)
  ),
  'labels': optax.multi_transform(
    {'m': optax.adam(1e-3), 'b': optax.sgd(0.1, momentum=0.9)}, labelled
  ),
}


@pytest.mark.parametrize('name', MASKED)
def test_masks_and_labels(name):
  tx = MASKED[name]
  before = network()
  state = trained(tx, before)
  path = ('net', 'h1', 'kernel')
  after = surgery.rename(before, 'net/h<i> -> net/g<i>')
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  assert np.array_equal(
    moments(state, path), moments(moved, ('net', 'g1', 'kernel'))
  )
  after = surgery.attach(before, surgery.LoRA(rank=2), to='**')
  with pytest.raises(surgery.SurgeryError, match='Give the optimizer: tx='):
    surgery.migrate(state, before, after)
  moved = surgery.migrate(state, before, after, tx=tx)
  checked(tx, moved, after)
  assert np.array_equal(moments(state, path), moments(moved, path))
  after = surgery.apply(
    before, {'slice': {'select': path_text(path), 'keep': 0}}
  )
  moved = surgery.migrate(state, before, after, tx=tx)
  checked(tx, moved, after)
  assert np.array_equal(moments(state, path)[:1], moments(moved, path))


def path_text(path):
  return '/'.join(path)


def test_what_begins_otherwise_than_with_zero_needs_the_optimizer():
  tx = optax.adagrad(0.1)
  before = network()
  state = trained(tx, before)
  after = surgery.attach(before, surgery.LoRA(rank=2), to='net/h0')
  with pytest.raises(
    surgery.SurgeryError, match=r'net/h0/lora_a is new, .* tx=…'
  ):
    surgery.migrate(state, before, after)
  moved = surgery.migrate(state, before, after, tx=tx)
  checked(tx, moved, after)
  assert 0.1 == pytest.approx(moments(moved, ('net', 'h0', 'lora_a')).min())
  with pytest.raises(
    surgery.SurgeryError, match='a state of another structure'
  ):
    surgery.migrate(state, before, after, tx=optax.adam(1e-3))


def test_other_models_are_not_held_and_need_not_be_there(tmp_path):
  import gc
  import weakref

  tx = optax.adam(1e-3)
  before, other = network(), network()
  state = trained(tx, before)
  path = ('net', 'h1', 'kernel')
  adapted = surgery.attach(before, surgery.LoRA(rank=1), to='**')
  surgery.save_adapter(tmp_path / 'a.msgpack', adapted)
  after = surgery.apply(
    before,
    [{'add': 'b::**/kernel'}, {'attach': {'from': 'a', 'check-base': False}}],
    b=other,
    a=tmp_path / 'a.msgpack',
  )
  value = weakref.ref(other[path].value)
  del other
  gc.collect()
  assert value() is None
  moved = surgery.migrate(state, before, after)
  checked(tx, moved, after)
  assert np.array_equal(moments(state, path), moments(moved, path))
  assert not moments(moved, ('net', 'h1', 'lora_b')).any()
  for step, message in (
    ({'copy': 'b::net/h0 -> net/h9'}, 'reads another model'),
    ({'drop': 'net/h0', 'in': 'b', 'as': 'c'}, 'uses several models'),
  ):
    after = surgery.apply(before, [step, {'drop': 'net/h2'}], b=network())
    with pytest.raises(surgery.SurgeryError, match=message):
      surgery.migrate(state, before, after)


def test_what_cannot_be_placed_is_refused():
  tx = optax.adam(1e-3)
  before = network()
  state = trained(tx, before)
  other = bx.Params()
  for path, param in before.items():
    other[(*path[:-1], 'k' if path[-1] == 'kernel' else path[-1])] = (
      param.replace(value=param.value + 1)
    )
  with pytest.raises(
    surgery.SurgeryError, match='h0/kernel is gone and .*/k is'
  ):
    surgery.migrate(state, before, other.locked())
  cut = surgery.apply(before, {'slice': {'select': '**/kernel', 'keep': 0}})
  lost = jax.tree.map(lambda x: x, cut)  # Nothing is known of that.
  with pytest.raises(
    surgery.SurgeryError, match=r'the shape \(4, 4\) and has \(1, 4\)'
  ):
    surgery.migrate(state, before, lost)
  with pytest.raises(
    surgery.SurgeryError, match='nor for its half that trains'
  ):
    surgery.migrate(state, surgery.apply(before, {'drop': 'net/h0'}), cut)
  with pytest.raises(surgery.SurgeryError, match='contains no bx.Params'):
    surgery.migrate(optax.sgd(0.1).init(before.split()[0]), before, cut)
  with pytest.raises(surgery.SurgeryError, match='expected bx.Params, found'):
    surgery.migrate(state, before, state)
  factored = optax.adafactor(0.1, min_dim_size_to_factor=2)
  with pytest.raises(surgery.SurgeryError, match='cannot follow'):
    surgery.migrate(trained(factored, before), before, cut)


def test_what_only_got_other_names_is_known_by_its_arrays():
  tx = optax.adam(1e-3)
  before = network()
  state = trained(tx, before)
  other = bx.Params()
  for path, param in before.items():
    other[('model', *path)] = param
  moved = surgery.migrate(state, before, other.locked())
  path = ('net', 'h0', 'kernel')
  assert np.array_equal(moments(state, path), moments(moved, ('model', *path)))


@pytest.mark.parametrize('verb', ['attach', 'apply'])
def test_lineage_stays_in_its_process(verb):
  import copy
  import pickle

  before = network()
  if verb == 'attach':
    after = surgery.attach(before, surgery.LoRA(rank=1), to='**')
  else:
    after = surgery.apply(before, {'scale': {'select': '**/bias', 'by': 2}})
  other = pickle.loads(pickle.dumps(after))
  assert jax.tree.structure(after) == jax.tree.structure(other)
  tx = optax.adam(1e-3)
  state = trained(tx, before)
  surgery.migrate(state, before, copy.deepcopy(after))
  surgery.migrate(state, before, copy.copy(after))


def test_lineage_leaves_params_as_they_are():
  """It is no part of the pytree, and holds no arrays."""
  import gc
  import weakref

  before = network()
  after = surgery.apply(before, {'scale': {'select': '**/kernel', 'by': 2}})
  assert jax.tree.structure(before) == jax.tree.structure(after)
  value = weakref.ref(before['net', 'h0', 'kernel'].value)
  del before
  gc.collect()
  assert value() is None


def _factored(params):
  tx = optax.adafactor(1e-2, min_dim_size_to_factor=4)
  state = tx.init(params)
  grads = jax.tree.map(
    lambda x: jnp.sin(jnp.arange(x.size) + 1.0).reshape(x.shape), params
  )
  return tx, tx.update(grads, state, params)[1]


def _matrices(**shapes):
  params = bx.Params()
  for name, shape in shapes.items():
    params[name, 'kernel'] = bx.Param(jnp.ones(shape))
    params[name, 'bias'] = bx.Param(jnp.ones(shape[-1]))
  return params.locked()


@pytest.mark.parametrize(
  ('change', 'names'),
  [
    (lambda p: surgery.rename(p, 'a -> c'), {'a': 'c', 'b': 'b'}),
    (lambda p: surgery.rename(p, ['a -> b', 'b -> a']), {'a': 'b', 'b': 'a'}),
    (lambda p: surgery.drop(p, 'a'), {'b': 'b'}),
    (lambda p: surgery.apply(p, [{'move': 'b -> z'}]), {'a': 'a', 'b': 'z'}),
  ],
  ids=['rename', 'swap', 'drop', 'move'],
)
def test_factored_moments_follow_what_only_moves(change, names):
  before = _matrices(a=(8, 6), b=(5, 7))
  _, state = _factored(before)

  after = change(before)
  moved = surgery.migrate(state, before, after)

  for field in ('v_row', 'v_col', 'v'):
    old, new = getattr(state[0], field), getattr(moved[0], field)
    assert set(new.keys()) == set(after.keys())
    for was, now in names.items():
      for name in ('kernel', 'bias'):
        expected, found = old[was, name].value, new[now, name].value
        assert np.array_equal(expected, found)


def test_factored_moments_do_not_follow_what_is_cut():
  before = _matrices(a=(8, 6), b=(5, 7))
  tx, state = _factored(before)
  cut = {'slice': {'select': 'a/kernel', 'keep': '0:4'}}
  after = surgery.apply(before, [cut])

  with pytest.raises(
    surgery.SurgeryError, match=r'a/kernel: moments of shape .* cannot follow'
  ):
    surgery.migrate(state, before, after, tx=tx)
