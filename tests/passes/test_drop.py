"""Drop and keep: two halves of a model, and adapters whole or not at all."""

from __future__ import annotations

import blox as bx
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.adapting.attachment import attach
from surgery.model.layers import LayerType
from surgery.model.manifest import Manifest
from surgery.naming import paths
from surgery.passes.drop import drop
from surgery.passes.keep import keep
from surgery.passes.merge import merge
from tests.live import models
from tests.passes.test_rename import (
  HOST,
  NET,
  OWN,
  Scale,
  adapted,
  contents,
  model,
  net,
  saved,
  shown,
  sites,
  stirred,
)


def test_a_layer_goes_with_all_beneath_it():
  before = net()
  after = drop(before, '**/query', host=HOST)
  assert ['net/value/bias', 'net/value/kernel'] == shown(after)
  assert all(after[p] is before[p] for p in after)


def test_all_else_goes():
  before = net()
  after = keep(before, ['**/bias', 'net/query'], host=HOST)
  assert ['net/query/bias', 'net/query/kernel', 'net/value/bias'] == shown(
    after
  )
  assert all(after[p] is before[p] for p in after)


def test_selections_are_understood():
  chosen = surgery.select(net(), '**/bias')
  assert shown(keep(net(), chosen, host=HOST)) == shown(
    drop(net(), ~chosen, host=HOST)
  )


def test_keeping_all_is_nothing():
  assert shown(net()) == shown(keep(net(), '**', host=HOST))


@given(st.sets(st.sampled_from(NET), min_size=1, max_size=len(NET) - 1))
def test_what_is_dropped_and_what_is_kept_are_all(names):
  select = [paths.literal(paths.parse(n)) for n in sorted(names)]
  kept, left = keep(net(), select, host=HOST), drop(net(), select, host=HOST)
  assert set(names) == set(shown(kept))
  assert not set(kept) & set(left)
  assert set(net()) == set(kept) | set(left)
  assert [p for p in net() if p in kept] == list(kept)
  assert [p for p in net() if p in left] == list(left)


@given(
  st.sets(st.sampled_from(['query', 'value', 'mlp']), min_size=1, max_size=2)
)
def test_layers_with_adapters_are_parted(names):
  ckpt = adapted(model(*NET, 'net/mlp/kernel'), to='**/{query,value,mlp}')
  select = [f'net/{name}' for name in sorted(names)]
  kept, left = keep(ckpt, select, host=HOST), drop(ckpt, select, host=HOST)
  assert sorted(ckpt) == sorted([*kept, *left])
  assert sorted(sites(ckpt)) == sorted(sites(kept) + sites(left))


@pytest.mark.parametrize(
  ('verb', 'select', 'message'),
  [
    (drop, '**/valeu', 'Nearest: net/value'),
    (keep, '**/valeu', 'Nearest: net/value'),
    (drop, '**', 'nothing would be left of 4 tensors'),
    (drop, ['net/query', '!**'], 'nothing is selected'),
    (keep, ['net/query', '!**'], 'nothing is selected'),
  ],
)
def test_what_makes_no_sense_is_refused(verb, select, message):
  with pytest.raises(surgery.SurgeryError, match=message):
    verb(net(), select, host=HOST)


@pytest.mark.parametrize('verb', [drop, keep])
def test_an_adapter_without_its_base_is_refused(tmp_path, verb):
  _, params, _ = models.mlp()
  params = surgery.attach(params, surgery.LoRA(rank=1), to='**')
  surgery.save_adapter(tmp_path / 'a.msgpack', params)
  alone = surgery.open(tmp_path / 'a.msgpack')
  with pytest.raises(surgery.FormatError, match='an adapter without its base'):
    verb(alone, '**/lora_a', host=HOST)


def test_digests_are_kept(tmp_path):
  before = saved(net(), tmp_path / 'in.msgpack')
  after = saved(drop(before, '**/bias', host=HOST), tmp_path / 'out.msgpack')
  for path, leaf in after.items():
    assert before[path].digest == leaf.digest is not None
  assert contents(after) == {
    p: value for p, value in contents(before).items() if p in after
  }


# Types of layers.


LINEAR = LayerType(('Linear',))


def typed():
  names = ('net', 'net/query', 'net/value', 'net/value/act')
  return net(layer_types={paths.parse(n): LINEAR for n in names})


def test_types_are_those_of_what_is_left():
  after = drop(typed(), 'net/query', host=HOST)
  found = map(paths.show, after.manifest.layer_types)
  assert ['net', 'net/value', 'net/value/act'] == list(found)


def test_types_choose():
  types = {paths.parse('net/query'): LINEAR}
  after = drop(net(), 'type:Linear', layer_types=types, host=HOST)
  assert ['net/value/bias', 'net/value/kernel'] == shown(after)


# Adapters.


def test_an_adapter_keeps_its_other_sites(tmp_path):
  after = drop(stirred(adapted()), 'net/query', host=HOST)
  assert ['net/value/kernel'] == sites(after)
  whole = saved(after, tmp_path / 'a.msgpack')
  expected = merge(stirred(adapted()), host=HOST)['net', 'value', 'kernel']
  merged = merge(whole, host=HOST)
  found = merged['net', 'value', 'kernel']
  assert expected.load().tobytes() == found.load().tobytes()
  assert 2 == len(merged)


def test_an_adapter_without_sites_goes(tmp_path):
  after = drop(adapted(to='**/query'), '**/query', host=HOST)
  assert ['net/value/bias', 'net/value/kernel'] == shown(after)
  assert () == after.records(HOST).names
  assert () == saved(after, tmp_path / 'a.msgpack').manifest.adapters


def test_a_parameter_takes_its_weights_along():
  after = drop(adapted(), 'net/query/kernel', host=HOST)
  assert ['net/query/bias'] == [s for s in shown(after) if 'query' in s]
  assert ['net/value/kernel'] == sites(after)


@pytest.mark.parametrize(
  ('verb', 'select', 'message'),
  [
    (
      drop,
      '**/query/lora_*',
      'net/query/lora_a would go and net/query/kernel stay, and adapter '
      "'default' needs both. Merge or detach the adapter first, or select the "
      'whole layer.',
    ),
    (drop, 'net/query/lora_a', 'net/query/lora_a would go'),
    (keep, '**/{kernel,bias}', 'net/query/lora_a would go'),
  ],
)
def test_half_of_what_an_adapter_needs_is_refused(verb, select, message):
  with pytest.raises(surgery.AdapterError, match=message):
    verb(adapted(), select, host=HOST)


def test_weights_alone_are_not_kept():
  with pytest.raises(surgery.SurgeryError, match='nothing would be left'):
    keep(adapted(), '**/lora_a', host=HOST)


def shared():
  return adapted(adapter=Scale(), host=OWN)


def test_what_sites_share_stays_with_the_last():
  after = drop(shared(), 'net/query', host=OWN)
  assert 'surgery.default/all' in shown(after)
  after = drop(shared(), 'net/query', host=OWN)
  after = keep(shared(), 'net/query', host=OWN)
  assert 'surgery.default/all' in shown(after)
  assert ['net/query/kernel'] == sites(after, OWN)
  mixed = attach(model(*NET, 'x'), Scale(), to='**/query', host=OWN)
  assert 'surgery.default/all' not in shown(drop(mixed, '**/query', host=OWN))
  assert ['x'] == shown(keep(mixed, 'x', host=OWN))


@pytest.mark.parametrize(
  ('verb', 'select', 'message'),
  [
    (drop, 'surgery.default', 'surgery.default/all would go and net/query'),
    (
      drop,
      '**/query/bias',
      'net/query/bias would go and net/query/kernel stay',
    ),
    (keep, ['net/query/kernel', 'net/query/scale'], 'net/query/bias would go'),
  ],
)
def test_what_is_rewritten_together_stays_together(verb, select, message):
  with pytest.raises(surgery.AdapterError, match=message):
    verb(shared(), select, host=OWN)


def test_an_adapter_that_still_looks_for_sites_is_refused():
  _, params, _ = models.mlp(locked=False)
  params = surgery.attach(params, surgery.LoRA(rank=1), to='**')
  for verb in (surgery.drop, surgery.keep):
    with pytest.raises(surgery.AdapterError, match='still looks for sites'):
      verb(params, '**/hidden0')


# Parameters whose value is a pytree.


@pytest.fixture
def trees(tmp_path):
  params = bx.Params()
  params['net', 'state'] = bx.Param({'a': jnp.ones(2), 'b': [jnp.zeros(1)]})
  params['net', 'empty'] = bx.Param({})
  params['net', 'x'] = bx.Param(jnp.ones(3))
  surgery.save(tmp_path / 'in.msgpack', params.locked())
  return tmp_path / 'in.msgpack'


@pytest.mark.parametrize('verb', ['drop', 'keep'])
@pytest.mark.parametrize(
  'select', ['net/state', 'net/empty', 'net/{empty,x}', 'net/{state,empty}']
)
def test_pytrees_go_or_stay_whole(trees, tmp_path, verb, select):
  live = getattr(surgery, verb)(surgery.load(trees), select)
  if verb == 'keep' and select == 'net/empty':
    with pytest.raises(surgery.SurgeryError, match='nothing would be left'):
      keep(surgery.open(trees), select, host=HOST)
    return
  after = HOST.passes[verb](surgery.open(trees), select, host=HOST)
  after.write(tmp_path / 'out.msgpack')
  loaded = surgery.load(tmp_path / 'out.msgpack')
  assert set(live.keys()) == set(loaded.keys())


@pytest.mark.parametrize('verb', [drop, keep])
def test_a_part_of_a_parameter_is_refused(trees, verb):
  with pytest.raises(
    surgery.SurgeryError,
    match='would go and other parts of the parameter net/state stay. Select all',
  ):
    verb(surgery.open(trees), 'net/state/a', host=HOST)


def test_an_empty_manifest_has_no_structures(trees):
  after = keep(surgery.open(trees), 'net/x', host=HOST)
  assert {} == Manifest().trees == after.manifest.trees
