"""Renaming copies bytes, and takes along all that hangs on a name."""

from __future__ import annotations

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.adapting.attachment import attach
from surgery.model import layers
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType
from surgery.model.manifest import Manifest
from surgery.naming import paths
from surgery.passes.merge import merge
from surgery.passes.rename import rename
from tests.live import models

OPTIMIZED = True
HOST = surgery.default_host()


def leaf(seed=0, shape=(4, 3), **flags):
  value = np.random.default_rng(seed).normal(size=shape).astype('float32')
  part = lambda index: value[index]
  return Leaf(lambda: value, value.shape, 'float32', part=part, **flags)


def model(*shown, **manifest):
  """Returns a model of tensors that all differ, in sorted order."""
  found = sorted(map(paths.parse, shown))
  return Checkpoint(
    {path: leaf(i) for i, path in enumerate(found)}, Manifest(**manifest)
  )


def shown(checkpoint):
  return list(map(paths.show, checkpoint))


def go(checkpoint, *rules, host=HOST):
  return rename(checkpoint, rules, host=host)


NET = (
  'net/query/bias',
  'net/query/kernel',
  'net/value/bias',
  'net/value/kernel',
)


def net(**manifest):
  return model(*NET, **manifest)


# Tensors.


def test_leaves_are_the_same_under_other_names():
  before = net()
  after = go(before, 'net/query -> net/q')
  assert before['net', 'query', 'kernel'] is after['net', 'q', 'kernel']
  assert 4 == len(after)


def test_bytes_are_copied_unread(tmp_path):
  source, target = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  net().write(source)
  before = surgery.open(source)
  after = go(before, '** -> model/**')
  for path, one in before.items():
    other = after['model', *path]
    assert one.load is other.load
    assert one.source is other.source
    assert one.digest == other.digest is not None
  after.write(target)
  digests = lambda ckpt: [one.digest for one in ckpt.values()]
  assert digests(before) == digests(surgery.open(target))


def test_two_layers_are_swapped():
  before = net()
  after = go(before, 'net/{query,value} -> net/{value,query}')
  for one, other in (('query', 'value'), ('value', 'query')):
    assert before['net', one, 'bias'] is after['net', other, 'bias']


def test_one_rule_may_be_text():
  assert 'q/bias' in shown(rename(net(), 'net/query -> q', host=HOST))


def test_what_was_sorted_is_sorted():
  after = go(net(), 'net/query -> z')
  assert sorted(after) == list(after)


def test_what_was_not_sorted_keeps_its_order():
  before = Checkpoint({p: leaf() for p in reversed(list(net()))})
  assert ['net/value/kernel', 'net/value/bias', 'a/kernel', 'a/bias'] == shown(
    go(before, 'net/query -> a')
  )


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ((), "expected rules 'OLD -> NEW', found none"),
    (('net/quary -> x',), 'Nearest: net/query'),
    (('net -> net',), 'every tensor would keep its name'),
    (
      ('net/query/kernel -> net/query/bias',),
      'net/query/bias and net/query/kernel would all be net/query/bias',
    ),
    (
      ('net/query -> net/value/kernel',),
      r'net/value/kernel/bias \(from net/query/bias\) would lie beneath the '
      r'tensor net/value/kernel \(from net/value/kernel\)',
    ),
    (('net/{query,value} -> net/{x,x}',), 'would all be net/x/bias; .*kernel'),
  ],
)
def test_what_cannot_be_renamed_is_refused(rules, message):
  with pytest.raises(surgery.RenameError, match=message):
    go(net(), *rules)


def test_an_adapter_without_its_base_is_refused(tmp_path):
  _, params, _ = models.mlp()
  params = surgery.attach(params, surgery.LoRA(rank=1), to='**')
  surgery.save_adapter(tmp_path / 'a.msgpack', params)
  with pytest.raises(
    surgery.FormatError, match='a.msgpack is an adapter without its base'
  ):
    go(surgery.open(tmp_path / 'a.msgpack'), 'net -> model')


# Laws.


SEGMENTS = st.text('abc/*é \\', min_size=1, max_size=3)
MODELS = st.lists(
  st.lists(SEGMENTS, min_size=1, max_size=3).map(tuple),
  min_size=1,
  max_size=6,
  unique=True,
).filter(
  lambda found: (
    not any(a != b and a == b[: len(a)] for a in found for b in found)
  )
)


@given(found=MODELS, data=st.data())
@settings(deadline=None)
def test_there_and_back_gives_the_same_bytes(tmp_path_factory, found, data):
  folder = tmp_path_factory.mktemp('laws')
  source, target = folder / 'in.msgpack', folder / 'out.msgpack'
  trains = st.booleans()
  before = Checkpoint(
    {
      path: leaf(i, (2,), trainable=data.draw(trains), metadata={'i': i})
      for i, path in enumerate(sorted(found))
    }
  )
  before.write(source)
  layer = data.draw(st.sampled_from(found))
  layer = layer[: data.draw(st.integers(1, len(layer)))]
  new = ('new', *data.draw(st.lists(SEGMENTS, max_size=2)))
  old, back = (paths.literal(p).replace(' ', '\\ ') for p in (layer, new))
  there = go(surgery.open(source), f'{old} -> {back}')
  there.write(target)
  again = go(surgery.open(target), f'{back} -> {old}')
  again.write(target, overwrite=True)
  assert source.read_bytes() == target.read_bytes()


# Types of layers.


LINEAR = LayerType(('Linear',), {'kernel': 'io', 'bias': 'o'})
OTHER = LayerType(('Other',), {})


def types(checkpoint):
  return {
    paths.show(p): (t.names[0], dict(t.layouts))
    for p, t in checkpoint.manifest.layer_types.items()
  }


def typed(**found):
  return net(
    layer_types={paths.parse(p.replace('_', '/')): t for p, t in found.items()}
  )


BOTH = {'kernel': 'io', 'bias': 'o'}


@pytest.mark.parametrize(
  ('rules', 'expected'),
  [
    (['net/query -> q'], {'net': ('Other', {}), 'q': ('Linear', BOTH)}),
    (
      ['net -> model'],
      {'model': ('Other', {}), 'model/query': ('Linear', BOTH)},
    ),
    (
      ['net/query/* -> net/q/*'],
      {'net': ('Other', {}), 'net/q': ('Linear', BOTH)},
    ),
    (
      ['net/query/kernel -> net/query/weight'],
      {
        'net': ('Other', {}),
        'net/query': ('Linear', {'weight': 'io', 'bias': 'o'}),
      },
    ),
    (
      ['net/query/kernel -> q/kernel'],
      {
        'net': ('Other', {}),
        'net/query': ('Linear', {'bias': 'o'}),
        'q': ('Linear', {'kernel': 'io'}),
      },
    ),
  ],
)
def test_types_follow_their_layers(rules, expected):
  after = go(typed(net=OTHER, net_query=LINEAR), *rules)
  assert expected == types(after)


def test_a_layer_of_two_types_has_none():
  ckpt = typed(net_query=LINEAR, net_value=OTHER)
  after = go(ckpt, 'net/query/kernel -> net/value/weight')
  assert ['net/query'] == list(types(after))


def test_a_layer_without_parameters_follows_by_its_name():
  after = go(typed(net_query_act=OTHER), 'net/query -> q')
  assert ['q/act'] == list(types(after))


# Parameters whose value is a pytree.


def with_trees(tmp_path):
  params = bx.Params()
  params['net', 'state'] = bx.Param({'a': jnp.ones(2), 'b': [jnp.zeros(1)]})
  params['net', 'empty'] = bx.Param({})
  params['net', 'x'] = bx.Param(jnp.ones(3))
  surgery.save(tmp_path / 'in.msgpack', params.locked())
  return surgery.open(tmp_path / 'in.msgpack')


@pytest.mark.parametrize(
  'rule', ['net -> model', '** -> a/**', 'net/{state,empty} -> x/{s,e}']
)
def test_pytrees_move_with_all_their_parts(tmp_path, rule):
  live = surgery.rename(surgery.load(_saved(tmp_path)), rule)
  file = tmp_path / 'out.msgpack'
  go(surgery.open(tmp_path / 'in.msgpack'), rule).write(file)
  loaded = surgery.load(file)
  assert jax.tree.structure(live) == jax.tree.structure(loaded)
  assert {*live.keys()} == {*loaded.keys()}


def _saved(tmp_path):
  with_trees(tmp_path)
  return tmp_path / 'in.msgpack'


@pytest.mark.parametrize(
  'rule',
  [
    'net/state/a -> net/state/c',
    'net/state/b -> net/b',
    'net/state/{a,b} -> {a,b}',
  ],
)
def test_a_part_of_a_parameter_is_not_renamed(tmp_path, rule):
  with pytest.raises(
    surgery.RenameError, match='is a part of the parameter net/state and would'
  ):
    go(with_trees(tmp_path), rule)


# Adapters.


LORA = surgery.LoRA(rank=2)


def adapted(checkpoint=None, adapter=LORA, to='**/{query,value}', **options):
  return attach(
    net() if checkpoint is None else checkpoint,
    adapter,
    to=to,
    host=options.pop('host', HOST),
    **options,
  )


def sites(checkpoint, host=HOST):
  return [
    paths.show(p)
    for record in checkpoint.records(host).adapters
    for p in record.sites
  ]


def stirred(checkpoint, host=HOST):
  """Returns a checkpoint whose adapter weights are not zero."""
  owned = checkpoint.records(host).owned
  rng = np.random.default_rng(1)
  leaves = {}
  for path, one in checkpoint.items():
    if path in owned:
      value = rng.normal(size=one.shape).astype(one.dtype)
      one = one.replace(load=lambda value=value: value)
    leaves[path] = one
  return checkpoint.replace(leaves=leaves)


def saved(checkpoint, file):
  checkpoint.write(file)
  return surgery.open(file)


def contents(checkpoint):
  return {
    path: np.asarray(one.load()).tobytes() for path, one in checkpoint.items()
  }


RULES = {
  'a layer': ['net/query -> net/q'],
  'both layers': ['net -> model/inner'],
  'each parameter': ['net/query/* -> x/*'],
  'the parameters': [
    'net/query/kernel -> net/q/kernel',
    'net/query/bias -> net/q/bias',
  ],
  'one parameter': ['net/query/kernel -> net/q/kernel'],
  'swapped': ['net/{query,value} -> net/{value,query}'],
  'another name': ['**/kernel -> **/weight'],
  'weights': ['**/lora_a -> **/a', '**/lora_b -> **/b'],
}


@pytest.mark.parametrize('rules', RULES.values(), ids=RULES)
def test_renamed_and_merged_is_merged_and_renamed(tmp_path, rules):
  source = saved(stirred(adapted()), tmp_path / 'in.msgpack')
  renamed = saved(go(source, *rules), tmp_path / 'renamed.msgpack')
  one = saved(merge(renamed, host=HOST), tmp_path / 'one.msgpack')
  merged = saved(merge(source, host=HOST), tmp_path / 'merged.msgpack')
  rest = [r for r in rules if 'lora' not in r]
  two = saved(go(merged, *rest), tmp_path / 'two.msgpack') if rest else merged
  assert contents(one) == contents(two)
  assert 4 == len(contents(one))
  assert sorted(sites(renamed)) == sorted(sites(go(source, *rules)))


@pytest.mark.parametrize('rules', RULES.values(), ids=RULES)
def test_live_and_file_are_the_same(tmp_path, rules):
  file, out = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  source = saved(stirred(adapted()), file)
  live = surgery.rename(surgery.load(file), rules)
  go(source, *rules).write(out)
  loaded = surgery.load(out)
  assert live.records == loaded.records
  surgery.save(file, live)
  strip = lambda f: surgery.open(f).manifest.replace(history=())
  assert strip(file) == strip(out)
  assert contents(surgery.open(file)) == contents(surgery.open(out))
  merged = surgery.merge(live)
  filed = merge(surgery.open(out), host=HOST)
  for path in merged.keys():
    expected = np.asarray(merged[path].value).tobytes()
    assert expected == np.asarray(filed[path].load()).tobytes()


def test_a_layer_gets_the_same_parameter_under_its_new_name():
  net_, params, x = models.mlp()
  params = models.stirred(
    surgery.attach(params, LORA, to='**/hidden*', graph=net_.root)
  )
  expected, _ = net_(params, x)
  graph = bx.Graph('model')
  rng = bx.Rng(graph.child('rng'))
  other = models.MLP(graph.child('deep').child('mlp'), [6, 5, 3], rng)
  moved = surgery.rename(params, ['net/mlp -> model/deep/mlp', 'net -> model'])
  assert expected.tobytes() == other(moved, x)[0].tobytes()


def test_weights_that_no_rule_names_follow_their_parameter():
  after = go(adapted(), 'net/query/kernel -> q/kernel')
  assert [
    'net/query/bias',
    'q/kernel',
    'q/lora_a',
    'q/lora_b',
  ] == [s for s in shown(after) if 'value' not in s]


def test_the_draw_does_not_change_with_the_name(tmp_path):
  before = adapted(seed=3)
  after = go(before, 'net -> model')
  for path in before.records(HOST).owned:
    expected = np.asarray(before[path].load())
    found = np.asarray(after['model', *path[1:]].load())
    assert expected.tobytes() == found.tobytes()


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    (
      'net/query/lora_a -> x/lora_a',
      'net/query/kernel would be net/query/kernel, and net/query/lora_a would '
      "be x/lora_a: adapter 'default' needs both in one layer. Rename the whole "
      'layer, or merge or detach the adapter first.',
    ),
    ('net/query/lora_a -> lora_a', "adapter 'default' needs both"),
  ],
)
def test_half_a_site_is_refused(rule, message):
  with pytest.raises(surgery.AdapterError, match=message):
    go(adapted(), rule)


def test_two_adapters_follow():
  ckpt = adapted(adapted(), surgery.LoRA(rank=1), name='second')
  after = go(ckpt, 'net/query -> q')
  assert 4 == sum(s.startswith('q/lora') for s in shown(after))
  assert ['q/kernel', 'net/value/kernel'] * 2 == sites(after)


def test_a_disabled_adapter_stays_disabled():
  ckpt = HOST.passes['disable'](adapted(), host=HOST)
  [record] = go(ckpt, 'net -> model').records(HOST).adapters
  assert not record.enabled


class Scale(surgery.Adapter):
  """Rewrites two parameters, each in its way, and shares a weight."""

  name = 'scale'
  rewrites = ('kernel', 'bias')
  offset: float = surgery.field(default=0.0)

  def init(self, site, key):
    return {'scale': jnp.ones(site.out_shape) * 2}

  def init_shared(self, sites, key):
    return {'all': jnp.full((), 3.0)}

  def apply(self, site, name, base, weights):
    if name == 'bias':
      return base + self.offset
    return base * weights['scale'] * weights['all']


class Where(surgery.Adapter):
  """What it computes hangs on the path."""

  name = 'where'

  def init(self, site, key):
    return {}

  def apply(self, site, name, base, weights):
    return base + len(site.path[0])


OWN = surgery.Host(plugins=[Scale, Where])


def test_what_sites_share_stays_where_it_is():
  ckpt = adapted(adapter=Scale(), to='**/query', host=OWN)
  after = go(ckpt, '** -> model/**', host=OWN)
  assert 'surgery.default/all' in shown(after)
  assert 'model/net/query/scale' in shown(after)
  expected = contents(merge(ckpt, host=OWN))
  found = contents(merge(after, host=OWN))
  assert expected == {path[1:]: value for path, value in found.items()}


def test_no_rule_matches_what_sites_share():
  ckpt = adapted(adapter=Scale(), to='**/query', host=OWN)
  with pytest.raises(surgery.RenameError, match='matches nothing'):
    go(ckpt, 'surgery.default -> x', host=OWN)


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    ('net/query/bias -> x/bias', 'needs both in one layer'),
    ('net/query/kernel -> x/kernel', 'needs both in one layer'),
    (
      'net/query/bias -> net/query/b',
      'net/query/bias would be net/query/b, and adapter .default. knows the 2 '
      'parameters that it rewrites in this layer by their names',
    ),
  ],
)
def test_parameters_that_are_rewritten_together_stay_together(rule, message):
  ckpt = adapted(adapter=Scale(), to='**/query', host=OWN)
  with pytest.raises(surgery.AdapterError, match=message):
    go(ckpt, rule, host=OWN)


def test_an_adapter_that_asks_for_its_path_is_refused():
  ckpt = adapted(adapter=Where(), to='**/query', host=OWN)
  with pytest.raises(
    surgery.AdapterError,
    match="net/query/kernel: what adapter 'default' .'where'. computes depends "
    "on the parameter's name, so it cannot follow to net/q/kernel",
  ):
    go(ckpt, 'net/query -> net/q', host=OWN)
  assert 'v/kernel' in shown(go(ckpt, 'net/value -> v', host=OWN))


def test_an_interceptor_that_depends_on_the_name_is_refused():
  class Chooses:
    @surgery.hookimpl(wrapper=True)
    def surgery_intercept_param(self, site):
      found = yield
      return surgery.LoRA(rank=2, alpha=9) if site.layer[0] == 'x' else found

  host = surgery.Host(plugins=[Chooses()])
  ckpt = adapted(host=host)
  with pytest.raises(surgery.AdapterError, match='cannot follow to x/kernel'):
    go(ckpt, 'net/query -> x', host=host)
  assert 'y/kernel' in sites(go(ckpt, 'net/query -> y', host=host))


# Patterns: options by selector.


def patterns(checkpoint):
  [record] = checkpoint.records(HOST).adapters
  return {s: dict(v) for s, v in record.adapter.patterns}


def ranks(checkpoint):
  [record] = checkpoint.records(HOST).adapters
  return {
    paths.show(p): one.interceptor.rank for p, one in record.sites.items()
  }


@pytest.mark.parametrize(
  ('given', 'rules', 'expected'),
  [
    # What still means the same stays as it is.
    ('**/query', ['net -> model'], {'**/query': {'rank': 3}}),
    # A path follows.
    ('net/query', ['net/query -> net/q'], {'net/q': {'rank': 3}}),
    ('net/query', ['net/query/* -> q/*'], {'q': {'rank': 3}}),
    (
      'net/query/kernel',
      ['net/query -> q'],
      {'q/kernel': {'rank': 3}},
    ),
    # Another selector is replaced by paths.
    ('**/query', ['net/query -> q'], {'q/kernel': {'rank': 3}}),
    (
      '**/query',
      ['net/{query,value} -> net/{value,query}'],
      {
        'net/value/kernel': {'rank': 3},
        'net/query/kernel': {},
        '**/query': {'rank': 3},
      },
    ),
  ],
)
def test_each_site_keeps_its_options(given, rules, expected):
  adapter = surgery.LoRA(rank=2, patterns={given: {'rank': 3}})
  before = adapted(adapter=adapter)
  after = go(before, *rules)
  assert expected == patterns(after)
  # In the order of sites.
  assert list(ranks(before).values()) == list(ranks(after).values())


def test_patterns_that_follow_survive_a_file(tmp_path):
  adapter = surgery.LoRA(rank=2, patterns={'**/query': {'rank': 3}})
  after = go(adapted(adapter=adapter), 'net/query -> net/value2')
  assert ranks(after) == ranks(saved(after, tmp_path / 'a.msgpack'))


# What was said when it was attached.


@pytest.mark.parametrize(
  ('to', 'rule', 'expected'),
  [
    ('**/query', 'net -> model', '**/query'),
    ('net/query', 'net/query -> net/q', 'net/q'),
    ('**/query', 'net/query -> q', None),
    (['net/query', 'net/value'], 'net -> m', ['m/query', 'm/value']),
  ],
)
def test_the_selector_of_an_adapter_follows_or_goes(
  tmp_path, to, rule, expected
):
  ckpt = adapted(to=to, seed=5)
  after = saved(go(ckpt, rule), tmp_path / 'a.msgpack')
  [said] = after.manifest.adapters
  assert (5, expected) == (said['seed'], said.get('to'))


def test_params_remember_it_too(tmp_path):
  file = tmp_path / 'in.msgpack'
  adapted(to='net/query').write(file)
  moved = surgery.rename(surgery.load(file), 'net -> model')
  surgery.save(file, moved)
  assert 'model/query' == surgery.open(file).manifest.adapters[0]['to']


def test_params_keep_types_of_layers_that_moved(tmp_path):
  model_, params, _ = models.mlp()
  params = surgery.attach(params, LORA, to='**', graph=model_.root)
  file = tmp_path / 'in.msgpack'
  surgery.save(file, params, graph=model_.root)
  moved = surgery.rename(surgery.load(file), 'net/mlp -> net/deep')
  surgery.save(file, moved)
  found = surgery.open(file).manifest.layer_types
  assert 'Linear' == found['net', 'deep', 'hidden0'].names[0]
  assert ('net', 'mlp', 'hidden0') not in found
  assert layers.of_graph(model_.root)['net', 'mlp'] == found['net', 'deep']


# Layers that make their own weights; unlocked params.


def test_a_designed_in_adapter_says_what_its_parameter_is_called():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = surgery.LoraLinear(graph.child('a'), 3, rng, rank=2)
  _, params = layer(rng.seed(bx.Params(), seed=1), jnp.ones((2, 4)))
  renamed = surgery.rename(params.locked(), '**/kernel -> **/w')
  metadata = renamed['net', 'a', 'lora_a'].metadata
  assert 'w' == metadata['surgery']['param']['name']
  cast = surgery.cast(params.locked(), 'bf16')
  metadata = cast['net', 'a', 'lora_a'].metadata
  assert 'bfloat16' == metadata['surgery']['param']['dtype']
  lost = bx.Params().locked().merge(cast)
  assert surgery.adapters(cast) == surgery.adapters(lost)


def test_an_adapter_that_still_looks_for_sites_is_refused():
  _, params, _ = models.mlp(locked=False)
  params = surgery.attach(params, LORA, to='**')
  with pytest.raises(
    surgery.AdapterError,
    match="rename: adapter 'default' still looks for sites",
  ):
    surgery.rename(params, 'net -> model')
