"""No step reads the base beneath an adapter: it gets what the layer gets."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import surgery
from surgery.adapting import beneath
from surgery.adapting.attachment import attach
from surgery.passes.merge import merge
from tests.recipes.models import HOST, SmallBlocks, blocks, held, saved, values

SHAPES = {
  **{f'net/{n}/kernel': (8, 8) for n in 'abc'},
  **{f'net/{n}/bias': (8,) for n in 'abc'},
  'net/norm/scale': (8,),
  'net/norm/mean': (8,),
  'net/norm/var': (8,),
}
ONE, TWO = 'net/a/kernel', 'net/b/kernel'

# Every pass, in ways that read, write, move or join adapted parameters (those
# of net/a) and others. None: what it does is about adapters themselves.
STEPS: dict[str, list[Any] | None] = {
  'add': [
    f'{ONE} -> {TWO}',
    f'{TWO} -> {ONE}',
    'net/b/kernel -> net/c/kernel',
    {'t::net/a/kernel': 0.5, 'u::net/a/kernel': -0.5},
    {'t::net/b/*': 0.5, 't::net/c/*': -0.5},
    {f't::{ONE} -> {TWO}': 0.5, f'u::{ONE} -> {TWO}': -0.5},
    {'t::**': 0.5, 'u::**': -0.5},
  ],
  'assert': [
    {'equal': {'of': ONE, 'to': 'u'}},
    {'equal': {'of': ONE, 'to': 't'}},
    {'zero': {'of': ONE, 'eps': 1e-3}},
    {'finite': '**'},
    {'shape': {'of': ONE, 'is': [8, 8]}},
  ],
  'attach': [{'adapter': 'lora', 'to': 'net/b', 'name': 'more'}],
  'cast': ['bf16'],
  'clamp': [
    {'select': ONE, 'min': -0.1, 'max': 0.1},
    {'select': TWO, 'max': 0.1},
    {'select': '**/bias', 'min': 0},
  ],
  'combine': [{'with': 't'}, {'with': ['u'], 'set': {'weight': [1, 3]}}],
  'combine-adapters': None,
  'concat': [
    {'rules': 'net/{a,b}/kernel -> joined', 'keep': True},
    'net/{a,b}/kernel -> joined',
    'net/{b,c}/kernel -> joined',
  ],
  'copy': [
    f'{ONE} -> copy/w',
    f'{TWO} -> copy/w',
    'net/a -> copy',
    {'rules': f'{ONE} -> {TWO}', 'overwrite': True},
    {'rules': f'{TWO} -> {ONE}', 'overwrite': True},
    f't::{ONE} -> copy/w',
    {'rules': f't::{ONE}', 'overwrite': True},
    {'rules': f't::{ONE} -> {TWO}', 'overwrite': True},
  ],
  'detach': None,
  'disable': None,
  'drop': ['net/a', 'net/b', TWO],
  'enable': None,
  'extract': None,
  'extract-lora': None,
  'factorise': [
    {'rules': f'{ONE} -> x{{1,2}}', 'rank': 8, 'keep': True},
    {'rules': f'{TWO} -> x{{1,2}}', 'rank': 8},
  ],
  'fill': [ONE, TWO, {'rules': 'net/a/bias', 'value': 1}, f'{ONE} -> filled'],
  'fold-norm': ['net/a -> net/norm', 'net/b -> net/norm'],
  'freeze': ['net/b', ONE],
  'interpolate': [
    {'select': ONE, 'to': 8},
    {'select': TWO, 'to': 12},
    {'select': ONE, 'to': [4, 4], 'axis': [0, 1]},
  ],
  'keep': ['net/a', 'net/b'],
  'matmul': [
    {'rules': 'net/{a,b}/kernel -> product', 'keep': True},
    'net/{b,c}/kernel -> product',
  ],
  'mean': [
    {'select': ONE, 'axis': 0, 'groups': 8},
    {'select': ONE, 'axis': 0},
    {'select': TWO, 'axis': 1, 'groups': 2},
  ],
  'merge': [None],
  'move': ['net/a -> net/z', 'net/b -> net/z', f'{TWO} -> w'],
  'multiply': [
    f'{ONE} -> {TWO}',
    f'{TWO} -> {ONE}',
    'net/b/bias -> net/b/kernel',
    f't::{ONE}',
    f't::{ONE} -> {TWO}',
  ],
  'pad': [{'select': ONE, 'after': 1}, {'select': TWO, 'after': 1}],
  'permute': [
    {'select': ONE, 'order': [*range(7, -1, -1)]},
    {'select': TWO, 'order': [*range(7, -1, -1)]},
  ],
  'prune': [
    {'select': ONE, 'share': 0.5},
    {'select': TWO, 'share': 0.5},
    {'select': '**', 'share': 0.5},
  ],
  'prune-ranks': None,
  'random': [ONE, TWO, 'net/a/bias'],
  'rename': ['net/a -> net/z', 'net/* -> *', f'{TWO} -> w'],
  'renumber': None,
  'repeat': None,
  'reshape': [
    {'select': ONE, 'shape': [4, 16]},
    {'select': TWO, 'shape': [4, 16]},
  ],
  'resize-vocab': [{'select': ONE, 'size': 9}, {'select': TWO, 'size': 9}],
  'scale': [
    {'select': ONE, 'by': 0.5},
    {'select': TWO, 'by': 0.5},
    {'select': '**/kernel', 'by': 2},
    {'select': 'net/a/bias', 'by': 2},
  ],
  'slice': [
    {'select': ONE, 'keep': '0:4'},
    {'select': ONE, 'keep': [7, 6, 5, 4, 3, 2, 1, 0]},
    {'select': TWO, 'keep': [7, 0]},
  ],
  'split': [
    {'rules': f'{ONE} -> s{{1,2}}', 'keep': True},
    {'rules': f'{ONE} -> s{{1,2}}'},
    {'rules': f'{TWO} -> s{{1,2}}'},
  ],
  'stack': [
    {'rules': 'net/{a,b}/kernel -> all', 'keep': True},
    'net/{a,b}/* -> all/*',
    'net/{b,c}/kernel -> all',
  ],
  'subtract': [
    f'{ONE} -> {TWO}',
    f't::{ONE} -> {TWO}',
    {'t::net/b/kernel': 1},
    {'t::**': 1},
  ],
  'tie': [
    f'{ONE} -> net/same',
    {'rules': f'{ONE} -> net/same', 'check': False},
    f'{TWO} -> net/also',
  ],
  'transpose': [ONE, TWO],
  'unfreeze': None,
  'unstack': [
    {'rules': f'{ONE} -> u<i>', 'keep': True},
    {'rules': f'{TWO} -> u<i>'},
  ],
  'untie': [f'{ONE} -> other/w', f'{TWO} -> other/w'],
}

TYPES = {
  'lora': 'kernel',
  'dora': 'kernel',
  'pissa': 'kernel',
  'lora-bias': 'kernel and bias',
  'oft': 'kernel',
  'boft': 'kernel',
  'hra': 'kernel',
  'loha': 'kernel',
  'lokr': 'kernel',
  'ia3': 'kernel and bias',
  'bitfit': 'bias',
  'vera': 'kernel',
}


def drawn(seed=0):
  rng = np.random.default_rng(seed)
  net = {
    p: rng.uniform(0.5, 1, shape).astype('float32')
    for p, shape in SHAPES.items()
  }
  return {**net, 'net/same': net[ONE], 'net/also': net[TWO]}


def stirred(ckpt):
  """Gives adapters' trainable weights other values."""
  leaves = dict(ckpt)
  rng = np.random.default_rng(5)
  for path in ckpt.records(HOST).owned:
    leaf = leaves[path]
    if leaf.trainable and leaf.dtype == 'float32':
      value = np.asarray(leaf.load())
      value = value + rng.uniform(0.1, 0.3, value.shape).astype('float32')
      leaves[path] = leaf.replace(load=functools.partial(np.asarray, value))
  return ckpt.replace(leaves=leaves)


@functools.cache
def adapted(kind, to='net/a', seed=0):
  adapter = HOST.adapter_type(kind)
  options = {'rank': 2} if hasattr(adapter, 'rank') else {}
  ckpt = attach(held(drawn(seed)), adapter(**options), to=to, host=HOST)
  return stirred(ckpt)


def merged(ckpt):
  return merge(ckpt, host=HOST) if ckpt.records(HOST).adapters else ckpt


def done(verb, step, model, kind, both):
  """Does a step; `both` is what the other inputs are sent through."""
  recipe = surgery.Recipe(
    [{verb: step}], inputs={'model': None, 't': None, 'u': None}
  )
  tuned, base = both(adapted(kind, seed=1)), held(drawn())
  after = recipe.apply(model, host=HOST, t=tuned, u=base)
  after.check()
  return values(merged(after))


CASES = [(v, s) for v, steps in STEPS.items() for s in steps or []]


def test_every_pass_is_here():
  ours = {n for n, p in HOST.passes.items() if 'surgery.passes' in repr(p)}
  assert ours == STEPS.keys()


@hypothesis.settings(
  deadline=None, max_examples=len(CASES) * 2, derandomize=True
)
@hypothesis.given(st.sampled_from(sorted(TYPES)), st.sampled_from(CASES))
def test_merging_before_a_step_and_behind_it_come_to_the_same(kind, case):
  verb, step = case
  before = adapted(kind)
  try:
    found = done(verb, step, before, kind, lambda c: c)
  except surgery.CheckError:
    # Then it does not hold of what layers get.
    with pytest.raises(surgery.CheckError):
      done(verb, step, merged(before), kind, merged)
    return
  except surgery.SurgeryError as error:
    assert 'erge' in str(error), error
    return
  if verb == 'merge':
    expected = values(merged(before))
  else:
    expected = done(verb, step, merged(before), kind, merged)
  assert expected.keys() == found.keys()
  for path, value in expected.items():
    both = [np.asarray(v, 'float64') for v in (value, found[path])]
    # A cast rounds base and weights, or their sum; where a type turns a kernel
    # small numbers are differences of large ones.
    rtol = 0.03 if verb == 'cast' else 1e-5
    atol = 0.01 * np.abs(both[0]).max() if verb == 'cast' else 0
    np.testing.assert_allclose(both[0], both[1], rtol, atol=atol, err_msg=path)


def update():
  """What the adapter adds to the kernel of net/a."""
  base = adapted('lora')
  return values(merged(base))[ONE] - values(base)[ONE]


@pytest.mark.parametrize(
  'step',
  [
    {'add': {f'tuned::{ONE}': 0.5, f'base::{ONE}': -0.5}},
    {'add': {'tuned::**': 0.5, 'base::**': -0.5}},
    {'subtract': {'terms': {f'tuned::{ONE}': -0.5, f'base::{ONE}': 0.5}}},
  ],
)
@pytest.mark.parametrize('elements', [1 << 20, 5])
def test_a_sum_has_the_update_of_an_adapter(tmp_path, step, elements):
  base = saved(drawn(), tmp_path)
  tuned = tmp_path / 'tuned.msgpack'
  adapted('lora').write(tuned)
  recipe = surgery.Recipe(
    [step], inputs={'base': base, 'tuned': tuned}, outputs={'out': None}
  )
  out = tmp_path / 'out.msgpack'
  with SmallBlocks(elements):
    recipe.run(out=out)
  after = values(surgery.open(out))
  expected = drawn()
  expected[ONE] = expected[ONE] + update() / 2
  assert np.abs(update()).max() > 0.1
  for path, value in expected.items():
    np.testing.assert_allclose(value, after[path], rtol=1e-5, err_msg=path)


def test_a_copy_is_what_the_layer_gets_and_the_layer_stays_adapted():
  before = adapted('lora')
  after = surgery.apply(before, {'copy': f'{ONE} -> copy/w'})
  assert after['net', 'a', 'kernel'] is not None
  assert before['net', 'a', 'kernel'].load is after['net', 'a', 'kernel'].load
  expected = values(merged(before))[ONE]
  np.testing.assert_array_equal(expected, values(after)['copy/w'])
  np.testing.assert_array_equal(expected, blocks(after)['copy/w'])
  assert not after.shows_layers


@pytest.mark.parametrize(
  'step',
  [
    {'scale': {'select': ONE, 'by': 2}},
    {'add': f'{TWO} -> {ONE}'},
    {'fill': ONE},
    {'random': '**/kernel'},
    {'copy': {'rules': f'{TWO} -> {ONE}', 'overwrite': True}},
  ],
)
@pytest.mark.parametrize('enabled', [True, False])
def test_what_an_adapter_rewrites_is_not_changed_beneath_it(step, enabled):
  before = adapted('lora')
  if not enabled:
    before = surgery.disable(before)
  with pytest.raises(
    surgery.RecipeError,
    match=f"{ONE} is rewritten by adapter 'default'.* Merge or detach",
  ):
    surgery.apply(before, step)


def test_a_disabled_adapter_is_not_read():
  before = surgery.disable(adapted('lora'))
  after = surgery.apply(before, {'copy': f'{ONE} -> copy/w'})
  np.testing.assert_array_equal(drawn()[ONE], values(after)['copy/w'])


def test_adapters_over_adapters_are_read_together():
  before = attach(
    adapted('lora'),
    surgery.LoRA(rank=3),
    to='net/a',
    name='second',
    seed=3,
    host=HOST,
  )
  before = stirred(before)
  after = surgery.apply(before, {'copy': f'{ONE} -> copy/w'})
  np.testing.assert_array_equal(
    values(merged(before))[ONE], values(after)['copy/w']
  )


def test_tying_compares_what_layers_get():
  tied = {'tie': f'{ONE} -> net/same'}
  surgery.apply(held(drawn()), tied).check()
  with pytest.raises(surgery.CheckError, match='are not equal'):
    surgery.apply(adapted('lora'), tied).check()


def test_assertions_are_about_what_layers_get():
  condition = {'equal': {'of': ONE, 'to': 'tuned'}}
  recipe = surgery.Recipe(
    [{'assert': condition}], inputs={'base': None, 'tuned': None}
  )
  recipe.apply(held(drawn()), tuned=held(drawn())).check()
  with pytest.raises(surgery.CheckError, match='differ by'):
    recipe.apply(held(drawn()), tuned=adapted('lora')).check()


def test_what_is_unchanged_is_what_is_stored():
  steps: list[dict[str, Any]] = [
    {'scale': {'select': TWO, 'by': 2}},
    {'assert': {'unchanged-except': TWO}},
  ]
  surgery.apply(adapted('dora'), steps).check()


def test_params_are_read_as_files_are():
  import blox as bx

  params = bx.Params()
  for path, value in drawn().items():
    params[tuple(path.split('/'))] = bx.Param(jax.numpy.asarray(value))
  params = surgery.attach(
    params.locked(), surgery.LoRA(rank=2), to='net/a', seed=3
  )
  weights, rest = params.split(lambda path, p: 'adapter' in p.metadata)
  params = jax.tree.map(lambda w: w + 0.1, weights).merge(rest)
  after = surgery.apply(params, {'copy': f'{ONE} -> copy/w'})
  expected = surgery.merge(params)['net', 'a', 'kernel'].value
  np.testing.assert_array_equal(expected, after['copy', 'w'].value)
  # Without its adapter's weights it is not known what the layer gets.
  half, _ = params.split(lambda path, p: 'adapter' not in p.metadata)
  with pytest.raises(surgery.AdapterError, match='Put the halves'):
    surgery.apply(half, {'copy': f'{ONE} -> copy/w'})


# Plugins' passes.


def reading(checkpoint, *, host):
  """Doubles what it reads, in a new tensor; as any plugin may."""
  del host
  leaf = checkpoint['net', 'a', 'kernel']
  new = surgery.Leaf(lambda: leaf.load() * 2, leaf.shape, leaf.dtype)
  return checkpoint.replace(leaves={**checkpoint, ('double',): new})


def writing(checkpoint, *, host):
  """Doubles a tensor in its place."""
  del host
  leaf = checkpoint['net', 'a', 'kernel']
  new = leaf.replace(load=lambda: leaf.load() * 2)
  leaves = {**checkpoint, ('net', 'a', 'kernel'): new}
  return checkpoint.replace(leaves=leaves)


def mixing(checkpoint, other: surgery.Checkpoint, *, inputs=None, host):
  """Takes the mean of this and another model, and of an input."""
  del host
  path = ('net', 'a', 'kernel')
  leaves = [checkpoint[path], other[path], inputs['third'][path]]
  new = leaves[0].replace(
    load=lambda: sum(np.asarray(leaf.load()) for leaf in leaves) / 3
  )
  return checkpoint.replace(leaves={**checkpoint, ('mean',): new})


def composed(checkpoint, *, host):
  """Renames, reads and merges by the library's own passes."""
  moved = surgery.rename(checkpoint, 'net/a -> net/z', host=host)
  leaf = moved['net', 'z', 'kernel']
  copy = leaf.replace(load=lambda: np.asarray(leaf.load()))
  result = surgery.merge(moved, host=host)
  return result.replace(leaves={**result, ('copy',): copy})


@surgery.handles_adapters
def raw(checkpoint, *, host):
  """Gets what is stored, since it says that it knows."""
  del host
  leaf = checkpoint['net', 'a', 'kernel']
  assert leaf.beneath is None
  return checkpoint


def hosted(*passes):
  class Plugin:
    @surgery.hookimpl
    def surgery_passes(self):
      return {p.__name__: p for p in passes}

  return surgery.Host(plugins=[Plugin()])


def test_a_plugin_reads_what_the_layer_gets():
  host = hosted(reading)
  after = surgery.apply(adapted('lora'), 'reading', host=host)
  expected = values(merged(adapted('lora')))[ONE]
  np.testing.assert_array_equal(2 * expected, values(after)['double'])
  assert after['net', 'a', 'kernel'].load is (
    adapted('lora')['net', 'a', 'kernel'].load
  )


def test_a_plugin_cannot_write_beneath_an_adapter():
  with pytest.raises(surgery.RecipeError, match='Merge or detach'):
    surgery.apply(adapted('lora'), 'writing', host=hosted(writing))
  surgery.apply(held(drawn()), 'writing', host=hosted(writing))


def test_a_plugin_reads_other_models_likewise():
  recipe = surgery.Recipe(
    [{'mixing': {'other': 'second'}}],
    inputs={'first': None, 'second': None, 'third': None},
  )
  models = [adapted('lora', seed=k) for k in range(3)]
  after = recipe.apply(
    models[0], host=hosted(mixing), second=models[1], third=models[2]
  )
  expected = sum(values(merged(m))[ONE] for m in models) / 3
  np.testing.assert_allclose(expected, values(after)['mean'], rtol=1e-6)


def test_a_plugin_may_call_passes_that_handle_adapters():
  after = surgery.apply(adapted('lora'), 'composed', host=hosted(composed))
  expected = values(merged(adapted('lora')))[ONE]
  found = values(after)
  np.testing.assert_array_equal(expected, found['net/z/kernel'])
  np.testing.assert_array_equal(expected, found['copy'])


def test_a_pass_that_handles_adapters_gets_what_is_stored():
  after = surgery.apply(adapted('lora'), 'raw', host=hosted(raw))
  assert values(adapted('lora'))[ONE].tobytes() == values(after)[ONE].tobytes()


def test_a_model_that_a_pass_was_given_is_written_as_it_is_stored(tmp_path):
  before = adapted('lora')
  beneath.seen(before, HOST).write(tmp_path / 'm.msgpack')
  after = values(surgery.open(tmp_path / 'm.msgpack'))
  np.testing.assert_array_equal(values(before)[ONE], after[ONE])
