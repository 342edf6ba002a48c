"""Recipes on params: the same as on files."""

from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery


def scanned(layers=3):
  params = bx.Params()
  rng = np.random.default_rng(0)
  for i in range(layers):
    for name, shape in (('kernel', (4, 4)), ('bias', (4,))):
      value = rng.standard_normal(shape).astype('float32')
      params['net', f'h{i}', name] = bx.Param(jnp.asarray(value))
  params['net', 'seed'] = bx.Param(jax.random.key(0), trainable=False)
  return params.locked()


STEPS: list[Any] = [
  {'stack': 'net/h<i>/** -> net/h/**'},
  {'scale': {'select': 'net/h/kernel', 'by': 0.5}},
  {'slice': {'select': 'net/h/kernel', 'axis': -1, 'keep': '1:3'}},
  {'matmul': {'rules': 'net/{h/kernel,h/kernel2} -> x'}},
]


def test_params_and_files_get_the_same(tmp_path):
  params = scanned()
  surgery.save(tmp_path / 'm.msgpack', params)
  live = surgery.apply(params, STEPS[:3])
  surgery.Recipe(STEPS[:3]).run(
    model=tmp_path / 'm.msgpack', out=tmp_path / 'o.msgpack'
  )
  saved = surgery.load(tmp_path / 'o.msgpack')
  assert sorted(live.keys()) == sorted(saved.keys())
  for path, param in live.items():
    if jnp.issubdtype(param.value.dtype, jax.dtypes.prng_key):
      continue
    assert isinstance(param.value, jax.Array)
    assert param.value.dtype == saved[path].value.dtype
    assert np.array_equal(param.value, saved[path].value)
  assert (3, 4, 2) == live['net', 'h', 'kernel'].value.shape
  assert 7 == len(params)  # What was given is as it was.


def test_other_models_may_be_params_or_files(tmp_path):
  params = scanned()
  surgery.save(tmp_path / 'm.msgpack', params)
  for other in (
    params,
    surgery.open(tmp_path / 'm.msgpack'),
    tmp_path / 'm.msgpack',
  ):
    after = surgery.apply(params, {'add': 'b::net/h0/kernel'}, b=other)
    twice = 2 * params['net', 'h0', 'kernel'].value
    assert np.array_equal(twice, after['net', 'h0', 'kernel'].value)


def test_an_adapter_of_a_file_is_attached(tmp_path):
  params = scanned()
  adapted = surgery.attach(params, surgery.LoRA(rank=1), to='net/h0', seed=4)
  surgery.save_adapter(tmp_path / 'a.msgpack', adapted)
  for value in (tmp_path / 'a.msgpack', surgery.open(tmp_path / 'a.msgpack')):
    again = surgery.apply(params, {'attach': {'from': 'a'}}, a=value)
    assert jax.tree.structure(adapted) == jax.tree.structure(again)
    assert np.array_equal(
      adapted['net', 'h0', 'lora_a'].value, again['net', 'h0', 'lora_a'].value
    )
  step = {
    'attach': {'adapter': 'lora', 'to': 'net/h0', 'set': {'rank': 1}, 'seed': 4}
  }
  again = surgery.apply(params, step)
  assert jax.tree.structure(adapted) == jax.tree.structure(again)


def test_what_is_shared_stays_shared():
  params = scanned()
  after = surgery.apply(params, {'rename': 'net/h0 -> net/first'})
  assert (
    after['net', 'first', 'kernel'].value is params['net', 'h0', 'kernel'].value
  )
  assert after['net', 'seed'] is params['net', 'seed']


def test_structure_is_traced():
  params = scanned()
  stacked = jax.jit(lambda p: surgery.apply(p, STEPS[0]))(params)
  eager = surgery.apply(params, STEPS[0])
  assert jax.tree.structure(stacked) == jax.tree.structure(eager)
  with pytest.raises(surgery.SurgeryError, match='traced value.*outside'):
    jax.jit(lambda p: surgery.apply(p, STEPS[1:2]))(eager)


def test_assertions_are_seen_to_at_once():
  with pytest.raises(surgery.CheckError, match='are zero: net/h0/bias has'):
    surgery.apply(scanned(), {'assert': {'zero': 'net/h0/bias'}})
  with pytest.raises(surgery.RecipeError, match=r'step 1 \(drop\)'):
    surgery.apply(scanned(), {'drop': 'nothing'})


def test_types_of_layers_come_from_the_graph():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(graph.child('out'), 3, rng=rng)
  params = rng.seed(bx.Params(), seed=0)
  _, params = layer(params, jnp.ones((1, 2)))
  params = params.locked()
  after = surgery.apply(params, {'drop': 'type:Rng'}, graph=graph)
  assert {'kernel', 'bias'} == {path[-1] for path in after.keys()}


ADAPTED: list[Any] = [
  ({'rename': 'net/h<i> -> net/b<i>'}, None),
  ({'drop': 'net/h2'}, None),
  ({'slice': {'select': '**/kernel', 'keep': 0}}, 'is rewritten by adapter'),
  ({'transpose': '**/kernel'}, "Merge or detach 'default' first"),
  ({'stack': 'net/h<i>/kernel -> net/h/kernel'}, 'cannot follow'),
  ({'repeat': {'layers': 'net/h<i>', 'numbers': 0}}, "'default' is attached"),
  ({'copy': 'net/h0 -> net/h9'}, 'is a weight of an adapter'),
  ({'fold-norm': 'net/h0 -> net/h1'}, 'has no mean'),
  ({'scale': {'select': 'net/h0/kernel', 'by': 2}}, 'cannot follow'),
]


@pytest.mark.parametrize(('step', 'message'), ADAPTED)
def test_adapters_follow_or_the_step_refuses(step, message):
  params = surgery.attach(scanned(), surgery.LoRA(rank=2), to='**')
  if message is not None:
    with pytest.raises(surgery.RecipeError, match=message):
      surgery.apply(params, step)
    return
  after = surgery.apply(params, step)
  [info] = surgery.adapters(after)
  assert all(path in after for path in info.sites)
  surgery.merge(after)
