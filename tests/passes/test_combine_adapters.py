"""Several adapters in one: against PEFT, and against plain mathematics."""

import json
import pathlib
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery
from surgery.passes import combine_adapters

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'peft_weighted'
LAYERS = {'hidden0': (16, 64), 'hidden1': (64, 32), 'output': (32, 10)}


def zeros():
  params = bx.Params()
  for layer, shape in LAYERS.items():
    params['mlp', layer, 'kernel'] = bx.Param(jnp.zeros(shape))
  return params.locked()


def written(params, values):
  params = params.unlocked()
  for path, value in values.items():
    assert params[path].value.shape == value.shape
    params[path] = params[path].replace(value=jnp.asarray(value))
  return params.locked()


@pytest.fixture(scope='module')
def both():
  """Params of zeros with PEFT's two adapters."""
  params = zeros()
  for name in 'ab':
    config = json.loads((DATA / f'{name}.json').read_text())
    lora = surgery.LoRA(rank=config['r'], alpha=config['lora_alpha'])
    params = surgery.attach(params, lora, to='**', name=name)
    theirs = load_file(DATA / f'{name}.safetensors')
    values = {}
    for layer in LAYERS:
      for ours, key in (('lora_a', 'lora_A'), ('lora_b', 'lora_B')):
        value = theirs[f'base_model.model.mlp.{layer}.{key}.weight']
        values['mlp', layer, f'{ours}.{name}'] = value.T
    params = written(params, values)
  return params


def deltas(params, host=None):
  merged = surgery.merge(params, host=host)
  return {k: np.asarray(merged['mlp', k, 'kernel'].value) for k in LAYERS}


WEIGHTS = {'': {'a': 0.7, 'b': 0.3}, '_neg': {'a': 1.2, 'b': -0.5}}


@pytest.mark.parametrize('signs', WEIGHTS)
@pytest.mark.parametrize(
  'method',
  ['cat', 'svd', 'ties', 'magnitude_prune', 'dare_linear', 'dare_ties'],
)
def test_it_equals_peft(both, method, signs, monkeypatch):
  case = method if method in ('cat', 'svd') else f'{method}_svd'
  theirs = load_file(DATA / f'{case}{signs}.safetensors')
  if method.startswith('dare'):
    masks = load_file(DATA / f'masks_{case}.safetensors')

    def uniform(self, name, shape, number):
      # In the order in which PEFT drew them: by layer, then by adapter.
      at = 2 * list(LAYERS).index(self._path[1]) + 'ab'.index(name)
      return np.where(masks[f'mask_{at:02}'].T, 0.0, 1.0)

    monkeypatch.setattr(combine_adapters._Combined, '_uniform', uniform)
  combined = surgery.combine_adapters(both, WEIGHTS[signs], method=method)
  assert ['combined'] == [i.name for i in surgery.adapters(combined)]
  for layer, delta in deltas(combined).items():
    expected = theirs[f'delta.mlp.{layer}.weight'].T
    np.testing.assert_allclose(expected, delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('signs', WEIGHTS)
def test_linear_is_the_sum_of_updates(both, signs):
  weights = WEIGHTS[signs]
  parts = {
    name: deltas(surgery.detach(both, [n for n in 'ab' if n != name]))
    for name in 'ab'
  }
  combined = surgery.combine_adapters(both, weights, name='sum')
  for layer, delta in deltas(combined).items():
    expected = sum(w * parts[n][layer] for n, w in weights.items())
    np.testing.assert_allclose(expected, delta, rtol=1e-5, atol=1e-6)


def test_every_scaling_rule_and_rank_counts():
  params = zeros()
  for name, lora in (
    ('a', surgery.LoRA(rank=2, alpha=3.0)),
    ('b', surgery.LoRA(rank=3, rslora=True)),
    ('c', surgery.LoRA(rank=1, patterns={'**/hidden1': {'rank': 4}})),
  ):
    params = surgery.attach(params, lora, to='**', name=name)
  rng = np.random.default_rng(0)
  params = written(
    params,
    {
      path: rng.normal(size=p.value.shape).astype('float32')
      for path, p in params.items()
      if 'adapter' in p.metadata
    },
  )
  weights = {'a': 1.0, 'b': 1.0, 'c': 1.0}
  before = deltas(params)
  after = surgery.combine_adapters(params, weights)
  for layer, delta in deltas(after).items():
    np.testing.assert_allclose(before[layer], delta, rtol=1e-4, atol=1e-5)
  assert (16, 6) == after['mlp', 'hidden0', 'lora_a.combined'].value.shape
  assert (64, 9) == after['mlp', 'hidden1', 'lora_a.combined'].value.shape


def test_stacked_layers_and_other_layouts():
  params = bx.Params()
  params['net', 'stack', 'kernel'] = bx.Param(jnp.zeros((3, 5, 4)))
  params['net', 'turned', 'kernel'] = bx.Param(jnp.zeros((4, 6)))
  params = params.locked()
  options: Any = {
    'stacked': {'**/stack': 1},
    'layout': {'net/turned/kernel': 'oi', 'net/stack/kernel': 'io'},
  }
  for name in 'ab':
    params = surgery.attach(
      params,
      surgery.LoRA(rank=2),
      to='**',
      name=name,
      seed=ord(name),
      **options,
    )
  rng = np.random.default_rng(0)
  params = written(
    params,
    {
      path: rng.normal(size=p.value.shape).astype('float32')
      for path, p in params.items()
      if 'lora_b' in path[-1]
    },
  )
  merged = surgery.merge(params)
  for method in ('linear', 'svd'):
    one = surgery.combine_adapters(
      params, {'a': 1.0, 'b': 1.0}, method=method, rank=4
    )
    for path, param in surgery.merge(one).items():
      np.testing.assert_allclose(
        merged[path].value, param.value, rtol=1e-4, atol=1e-5
      )


def test_files_and_params_get_the_same(both, tmp_path):
  surgery.save(tmp_path / 'm.msgpack', both)
  step = {'weights': WEIGHTS[''], 'method': 'ties', 'density': 0.3, 'rank': 3}
  surgery.Recipe([{'combine-adapters': step}]).run(
    model=tmp_path / 'm.msgpack', out=tmp_path / 'o.msgpack'
  )
  live = surgery.combine_adapters(
    both, WEIGHTS[''], method='ties', density=0.3, rank=3
  )
  saved = surgery.load(tmp_path / 'o.msgpack')
  assert jax.tree.structure(live) == jax.tree.structure(saved)
  for path, param in live.items():
    assert isinstance(param.value, jax.Array)
    assert np.array_equal(param.value, saved[path].value), path


def test_what_is_dropped_depends_on_seed_adapter_and_path(both):
  draw = lambda **options: deltas(
    surgery.combine_adapters(both, WEIGHTS[''], method='dare_linear', **options)
  )
  one, two, other = draw(), draw(), draw(seed=1)
  for layer in LAYERS:
    assert np.array_equal(one[layer], two[layer])
    assert not np.array_equal(one[layer], other[layer])


@pytest.mark.parametrize(
  ('weights', 'options', 'error', 'message'),
  [
    ({'a': 1.0, 'x': 1.0}, {}, surgery.AdapterError, "no adapter 'x'"),
    ({}, {}, surgery.AdapterError, 'expected adapters, found none'),
    (['a', 'b'], {}, surgery.ConfigError, 'expected weights by adapter'),
    ({'a': float('nan')}, {}, surgery.ConfigError, 'expected a finite weight'),
    ({'a': 1.0}, {'method': 'tise'}, surgery.ConfigError, "mean 'ties'"),
    ({'a': 1.0}, {'density': 0.0}, surgery.ConfigError, 'a share above 0'),
    ({'a': 1.0}, {'rank': 0}, surgery.ConfigError, 'rank: expected 1 or more'),
    ({'a': 1.0}, {'name': 'b'}, surgery.AdapterError, "'b'"),
  ],
)
def test_bad_input_is_refused(both, weights, options, error, message):
  with pytest.raises(error, match=message):
    surgery.combine_adapters(both, weights, **options)


def test_what_does_not_add_is_refused():
  class Scale(surgery.Adapter):
    name = 'scale'

    def init(self, site, key):
      return {'s': jnp.ones(site.out_shape)}

    def apply(self, site, name, base, weights):
      return base * weights['s']

  host = surgery.Host(plugins=[Scale], only=())
  params = surgery.attach(zeros(), Scale(), to='**', name='a', host=host)
  with pytest.raises(surgery.AdapterError, match="'a' .'scale'. does not add"):
    surgery.combine_adapters(params, {'a': 1.0}, host=host)


class Sum(surgery.Adapter):
  """Adds a product and something more, in one way or another."""

  name = 'sum'
  adds = True

  way: str = surgery.field(default='nested', doc='How it is written.')

  def init(self, site, key):
    del key
    one = lambda *shape: jnp.ones(shape, 'float32')
    return {
      'a': one(*site.in_shape, 1),
      'b': one(1, *site.out_shape),
      'c': one(*site.out_shape),
      # Not a number to compute with.
      'where': jnp.arange(site.in_size, dtype='int32')[::-1],
    }

  def apply(self, site, name, base, weights):
    a, b, c = (weights[n] for n in 'abc')
    a = a[weights['where']]
    return {
      'nested': surgery.LowRank(surgery.LowRank(base, a, b, 2.0), a, b),
      'base': surgery.LowRank(base + c, a, b),
      'alone': surgery.LowRank(base + c),
      'none': surgery.LowRank(None, a, b).dense() + base,
    }[self.way]


@pytest.mark.parametrize('way', ['nested', 'base', 'alone', 'none'])
def test_all_that_is_added_is_combined(way):
  host = surgery.Host(plugins=[Sum], only=())
  params = surgery.attach(zeros(), Sum(way=way), to='**', name='a', host=host)
  one = surgery.combine_adapters(params, {'a': 0.5}, host=host)
  expected = deltas(params, host)
  assert any(abs(v).max() for v in expected.values())
  for layer, value in deltas(one).items():
    np.testing.assert_allclose(value, 0.5 * expected[layer], atol=1e-5)


def test_an_adapter_with_dropout_is_combined():
  lora = surgery.LoRA(rank=2, dropout=0.1)
  params = surgery.attach(zeros(), lora, to='**', name='a')
  values = {
    path: np.ones(param.value.shape)
    for path, param in params.items()
    if path[-1] in ('lora_a.a', 'lora_b.a')
  }
  params = written(params, values)
  one = surgery.combine_adapters(params, {'a': 1.0})
  expected = deltas(params)
  for layer, value in deltas(one).items():
    np.testing.assert_allclose(value, expected[layer], rtol=1e-6)


@pytest.mark.parametrize('off', [[], ['a']])
def test_what_is_kept_does_not_count_beside_the_sum(both, off):
  params = surgery.disable(both, off) if off else both
  kept = surgery.combine_adapters(params, {'a': 0.7, 'b': 0.3}, keep=True)
  alone = surgery.combine_adapters(params, {'a': 0.7, 'b': 0.3})
  assert {'a': False, 'b': False, 'combined': True} == {
    i.name: i.enabled for i in surgery.adapters(kept)
  }
  expected, actual = deltas(alone), deltas(surgery.detach(kept, ['a', 'b']))
  merged = surgery.merge(kept, 'combined')
  for layer in LAYERS:
    assert np.array_equal(expected[layer], actual[layer])
    value = merged['mlp', layer, 'kernel'].value
    assert np.array_equal(expected[layer], np.asarray(value))
    # What layers get is what is merged.
    assert np.array_equal(
      expected[layer], kept._get(('mlp', layer, 'kernel'), None, None)[0]
    )
  back = surgery.enable(surgery.detach(kept, 'combined'))
  assert both.records == back.records


def test_others_stay_enabled(both):
  params = surgery.attach(both, surgery.LoRA(rank=1), to='**', name='other')
  kept = surgery.combine_adapters(params, {'a': 1.0}, keep=True)
  on = {i.name for i in surgery.adapters(kept) if i.enabled}
  assert {'b', 'other', 'combined'} == on


METHODS = (
  'linear',
  'cat',
  'svd',
  'ties',
  'magnitude_prune',
  'dare_linear',
  'dare_ties',
)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_named(both, method, value):
  path = ('mlp', 'hidden0', 'lora_b.b')
  wrong = both[path].value.at[0, 0].set(value)
  params = written(both, {path: wrong})
  with pytest.raises(
    surgery.SiteError,
    match=r"hidden0/kernel: weight mlp/hidden0/lora_b\.b of adapter 'b' has NaN "
    'or infinity',
  ) as caught:
    surgery.combine_adapters(params, {'a': 1.0, 'b': 0.5}, method=method)
  assert 'nonfinite' not in str(caught.value)


def test_a_sum_that_is_too_large_names_no_option_that_is_not_there(both):
  with pytest.raises(surgery.CastError, match='too large') as caught:
    surgery.combine_adapters(both, {'a': 1e60})
  assert 'nonfinite' not in str(caught.value)


@pytest.mark.parametrize('routed', [False, True])
@pytest.mark.parametrize(
  ('verb', 'done'),
  [
    (lambda p: surgery.combine_adapters(p, {'a': 1.0}), 'combined'),
    (surgery.merge, 'merged'),
  ],
)
def test_stacked_adapters_are_refused(both, routed, verb, done):
  params = surgery.stack_adapters([both, both], names='a')
  if routed:
    params = surgery.route(params, [0, 1], names='a')
  with pytest.raises(
    surgery.AdapterError, match=f"'a' holds several .* cannot be {done}"
  ):
    verb(params)


@pytest.mark.parametrize('part', [0, 1])
def test_a_half_is_refused(both, part):
  half = both.split(lambda path, param: path[-1] == 'kernel')[part]
  with pytest.raises(
    surgery.AdapterError, match='cannot be combined without it. Put the halves'
  ):
    surgery.combine_adapters(half, {'a': 1.0})
