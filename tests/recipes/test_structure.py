"""Each step of structure against plain numpy; live, in files, in blocks."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.editing.rounding import rounded
from tests.recipes.models import (
  HOST,
  SmallBlocks,
  applied,
  blocks,
  by_name,
  close,
  held,
  same,
  saved,
  values,
)


def array(*shape, seed=0, dtype='float32'):
  values = np.random.default_rng(seed).standard_normal(shape)
  return values.astype(dtype)


@pytest.fixture(autouse=True, params=[1 << 20, 5], ids=['whole', 'blocks'])
def elements(request):
  with SmallBlocks(request.param):
    yield


NET = {
  'h/0/a': array(4, 6),
  'h/0/b': array(6, seed=1),
  'h/1/a': array(4, 6, seed=2),
  'h/1/b': array(6, seed=3),
  'out': array(6, 3, seed=4),
}


def test_copy():
  after = applied(NET, {'copy': ['h/1 -> h/2', 'out -> other']})
  same(
    {
      **{k: NET[k] for k in ('h/0/a', 'h/0/b', 'h/1/a', 'h/1/b')},
      'h/2/a': NET['h/1/a'],
      'h/2/b': NET['h/1/b'],
      'other': NET['out'],
      'out': NET['out'],
    },
    {k: after[k] for k in sorted(after)},
  )


def test_copy_from_another_model(tmp_path):
  other = saved({'x/a': array(2), 'y': array(3)}, tmp_path, 'other')
  file, out = saved(NET, tmp_path), tmp_path / 'out.msgpack'
  recipe = surgery.Recipe(
    [{'copy': ['other::x/* -> x/*', 'other::y']}],
    inputs={'model': file, 'other': other},
    outputs={'out': out},
  )
  recipe.run()
  same({**NET, 'x/a': array(2), 'y': array(3)}, values(surgery.open(out)))


def test_copy_over_what_is_there():
  step = {'copy': {'rules': 'h/0 -> h/1', 'overwrite': True}}
  after = applied(NET, step)
  same({**NET, 'h/1/a': NET['h/0/a'], 'h/1/b': NET['h/0/b']}, after)


def test_move():
  after = applied(NET, {'move': {'rules': 'h/0 -> h/1', 'overwrite': True}})
  same({'h/1/a': NET['h/0/a'], 'h/1/b': NET['h/0/b'], 'out': NET['out']}, after)


def test_renumber():
  net = {f'h/{i}/x': array(2, seed=i) for i in (0, 3, 11)}
  net |= {f'g/{i}/x': array(2, seed=i) for i in (1, 2)}
  after = applied(net, {'renumber': '*/<i>'})
  same(
    {
      'h/0/x': net['h/0/x'],
      'h/1/x': net['h/3/x'],
      'h/2/x': net['h/11/x'],
      'g/0/x': net['g/1/x'],
      'g/1/x': net['g/2/x'],
    },
    after,
  )


def test_renumber_keeps_the_width_and_starts_anywhere():
  net = {f'h{i:02}/x': array(2, seed=i) for i in (1, 9, 10)}
  after = applied(net, {'renumber': {'layers': 'h<i>', 'start': 8}})
  same(
    {'h08/x': net['h01/x'], 'h09/x': net['h09/x'], 'h10/x': net['h10/x']}, after
  )


def test_repeat():
  net = {'first': array(1), **{f'h/{i}/x': array(2, seed=i) for i in range(4)}}
  net['last'] = array(3)
  after = applied(net, {'repeat': {'layers': 'h/<i>', 'numbers': '1:3'}})
  order = [0, 1, 2, 1, 2, 3]
  same(
    {
      'first': net['first'],
      **{f'h/{n}/x': net[f'h/{o}/x'] for n, o in enumerate(order)},
      'last': net['last'],
    },
    after,
  )
  step = {'layers': 'h/<i>', 'numbers': [1, 2], 'times': 3, 'interleave': True}
  after = applied(net, {'repeat': step})
  order = [0, 1, 1, 1, 2, 2, 2, 3]
  same(
    {f'h/{n}/x': net[f'h/{o}/x'] for n, o in enumerate(order)},
    {k: v for k, v in after.items() if k.startswith('h/')},
  )


@pytest.mark.parametrize(
  ('options', 'places'),
  [
    ({'keep': '1:4'}, [1, 2, 3]),
    ({'keep': [0, '4:']}, [0, 4, 5]),
    ({'keep': '-1, 0:2'}, [5, 0, 1]),
    ({'keep': [3, 1, 0]}, [3, 1, 0]),
    ({'keep': [2, 2, '0:2', 2]}, [2, 2, 0, 1, 2]),
    ({'keep': [5, 4, 3, 2, 1, 0]}, [5, 4, 3, 2, 1, 0]),
    ({'keep': [0, 1, 2, 3, 4, 5, 0]}, [0, 1, 2, 3, 4, 5, 0]),
    ({'keep': [1, 0], 'of': 3}, [2, 3, 0, 1]),
    ({'drop': [4, 1, 4]}, [0, 2, 3, 5]),
    ({'drop': 2}, [0, 1, 3, 4, 5]),
    ({'keep': 2, 'of': 3}, [4, 5]),
    ({'drop': '0:1', 'of': 2}, [3, 4, 5]),
  ],
)
@pytest.mark.parametrize('axis', [0, 1, -1])
def test_slice(options, places, axis):
  net = {'x': array(6, 6, 6), 'y': array(1)}
  after = applied(net, {'slice': {'select': 'x', 'axis': axis, **options}})
  same({'x': np.take(net['x'], places, axis), 'y': net['y']}, after)


def test_permute():
  net = {'x': array(3, 8)}
  step = {'select': 'x', 'axis': -1, 'order': [2, 0, 3, 1], 'of': 4}
  after = applied(net, {'permute': step})
  expected = net['x'].reshape(3, 4, 2)[:, [2, 0, 3, 1]].reshape(3, 8)
  same({'x': expected}, after)


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_concat_and_split(axis):
  net = {'h/0/q': array(4, 4), 'h/0/k': array(4, 4, seed=1), 'z': array(1)}
  rule = 'h/<i>/{q,k} -> h/<i>/qk'
  after = applied(net, {'concat': {'rules': rule, 'axis': axis}})
  joined = np.concatenate([net['h/0/q'], net['h/0/k']], axis)
  same({'h/0/qk': joined, 'z': net['z']}, after)
  rule = 'h/<i>/qk -> h/<i>/{q,k}'
  again = applied(after, {'split': {'rules': rule, 'axis': axis}})
  same(by_name(net), by_name(again))


def test_split_into_sizes():
  net = {'x': array(6, 2)}
  step: Any = {'rules': 'x -> {a,b,c}', 'sizes': [1, 3, 2]}
  a, b, c = np.split(net['x'], [1, 4])
  same({'a': a, 'b': b, 'c': c}, applied(net, {'split': step}))
  step = {'rules': 'x -> x<i>', 'sizes': [1, 3, 2], 'keep': True}
  same(
    {'x': net['x'], 'x0': a, 'x1': b, 'x2': c}, applied(net, {'split': step})
  )


@pytest.mark.parametrize('axis', [0, 1, -1])
def test_stack_and_unstack(axis):
  net = {f'h/{i}/x': array(2, 3, seed=i) for i in range(12)}
  after = applied(net, {'stack': {'rules': 'h/<i>/* -> h/*', 'axis': axis}})
  stacked = np.stack(list(net.values()), axis)
  same({'h/x': stacked}, after)
  step = {'rules': 'h/* -> h/<i>/*', 'axis': axis}
  again = applied(after, {'unstack': step})
  same(net, {k: again[k] for k in net})


def test_stack_by_name():
  net = {'a/w': array(2), 'b/w': array(2, seed=1), 's': array()}
  after = applied(net, {'stack': '{b,a}/w -> w'})
  expected = {'s': net['s'], 'w': np.stack([net['b/w'], net['a/w']])}
  same(expected, after)


def test_scalars_are_stacked_too():
  net = {'a/w': array(), 'b/w': array(seed=1)}
  after = applied(net, {'stack': '{a,b}/w -> w'})
  same({'w': np.stack(list(net.values()))}, after)
  same(net, applied(after, {'unstack': 'w -> {a,b}/w'}))


def test_transpose():
  net = {'x': array(2, 3, 4), 'y': array(3, 4)}
  after = applied(net, {'transpose': '*'})
  same({'x': net['x'].swapaxes(1, 2), 'y': net['y'].T}, after)
  after = applied(net, {'transpose': {'select': 'x', 'axes': [2, 0, 1]}})
  same({'x': net['x'].transpose(2, 0, 1), 'y': net['y']}, after)


def test_reshape():
  net = {'x': array(4, 6)}
  for shape in ([24], [2, -1, 3], [4, 6, 1], [1, 24]):
    after = applied(net, {'reshape': {'select': 'x', 'shape': shape}})
    same({'x': net['x'].reshape(shape)}, after)


def test_pad():
  net = {'x': array(3, 4), 'n': np.arange(3, dtype='int8')}
  step = {'select': 'x', 'axis': 1, 'before': 1, 'after': 2, 'value': 0.5}
  after = applied(net, {'pad': step})
  expected = np.pad(net['x'], ((0, 0), (1, 2)), constant_values=0.5)
  same({'x': expected, 'n': net['n']}, after)
  after = applied(net, {'pad': {'select': '*', 'to': 5, 'value': -1}})
  same(
    {
      'x': np.pad(net['x'], ((0, 2), (0, 0)), constant_values=-1),
      'n': np.pad(net['n'], (0, 2), constant_values=-1),
    },
    after,
  )


def test_fill():
  net = {'h/0/w': array(2, 3), 'h/1/w': array(2, 3), 'b': np.ones(2, 'int32')}
  same(
    {**net, 'b': np.full(2, 7, 'int32')},
    applied(net, {'fill': {'rules': 'b', 'value': 7}}),
  )
  step: Any = {'rules': 'h/<i>/w -> h/<i>/gate', 'shape': [3], 'dtype': 'bf16'}
  after = applied(net, {'fill': step})
  gate = np.zeros(3, ml_dtypes.bfloat16)
  assert ['h/0/w', 'h/0/gate', 'h/1/w', 'h/1/gate', 'b'] == list(after)
  same({'h/0/gate': gate}, {'h/0/gate': after['h/0/gate']})
  step = {'rules': '-> new/x', 'value': 2.5, 'shape': [2], 'dtype': 'float64'}
  after = applied(net, {'fill': step})
  same({**net, 'new/x': np.full(2, 2.5)}, after)


def test_random_is_by_seed_and_path_alone():
  one = applied({'x': array(4, 5)}, {'random': {'rules': 'x', 'seed': 3}})
  net = {'a': array(2), 'x': array(4, 5), 'z': array(7)}
  more = applied(net, {'random': {'rules': ['z', 'x'], 'seed': 3}})
  same(one, {'x': more['x']})
  assert not np.array_equal(more['x'].reshape(-1)[:7], more['z'])
  other = applied({'x': array(4, 5)}, {'random': {'rules': 'x', 'seed': 4}})
  assert not np.array_equal(one['x'], other['x'])


def test_random_numbers_have_their_distribution():
  net = {'x': np.zeros((40, 50), 'float32')}
  step = {'rules': 'x', 'scale': 0.5, 'mean': 2}
  found = applied(net, {'random': step})['x']
  assert abs(found.mean() - 2) < 0.05 and abs(found.std() - 0.5) < 0.03
  step |= {'distribution': 'uniform'}
  found = applied(net, {'random': step})['x']
  assert 1.5 <= found.min() < 1.55 and 2.45 < found.max() <= 2.5


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16', 'float64'])
def test_add_and_subtract(tmp_path, dtype):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  x, y, z = (array(4, 5, seed=i).astype(dtype) for i in range(3))
  files = [
    saved({'w': v, 'u': y}, tmp_path, n)
    for v, n in zip((x, y, z), 'xyz', strict=True)
  ]
  recipe = surgery.Recipe(
    [
      {'add': {'y::w': 0.4, 'z::w': -1}},
      {'subtract': {'terms': 'u -> w', 'scale': 2}},
    ],
    inputs=dict(zip('xyz', files, strict=True)),
  )
  recipe.run(out=tmp_path / 'out.msgpack')
  wide = [v.astype('float64') for v in (x, y, z)]
  first = rounded(wide[0] + wide[1] * 0.4 - wide[2], dtype.name)
  second = rounded(first.astype('float64') - wide[1] * 2, dtype.name)
  same({'w': second, 'u': y}, values(surgery.open(tmp_path / 'out.msgpack')))


def test_scale():
  net = {'x': array(3, 4).astype(ml_dtypes.bfloat16), 'y': array(2)}
  after = applied(net, {'scale': {'select': 'x', 'by': 0.3}})
  expected = rounded(net['x'].astype('float64') * 0.3, 'bfloat16')
  same({'x': expected, 'y': net['y']}, after)


def test_matmul():
  net = {'a': array(4, 2), 'b': array(2, 5), 'c': array(5, 3)}
  after = applied(net, {'matmul': {'rules': '{a,b,c} -> w', 'scale': 0.5}})
  wide = {k: v.astype('float64') for k, v in net.items()}
  expected = (wide['a'] @ wide['b'] @ wide['c'] * 0.5).astype('float32')
  close({'w': expected}, after, 1e-6)
  net = {'a': array(3, 4, 2), 'b': array(3, 2, 5)}
  after = applied(net, {'matmul': {'rules': '{a,b} -> w', 'keep': True}})
  close(
    {**net, 'w': net['a'] @ net['b']}, {k: after[k] for k in ('a', 'b', 'w')}
  )


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('shape', [(40, 50), (50, 40), (3, 40, 50)])
def test_factorise_is_the_nearest_of_its_rank(exact, shape):
  net = {'w': array(*shape[:-1], 6, seed=1) @ array(*shape[:-2], 6, shape[-1])}
  net['w'] += 0.01 * array(*shape, seed=2)
  step = {'rules': 'w -> {a,b}', 'rank': 6, 'exact': exact}
  after = applied(net, {'factorise': step})
  assert ((*shape[:-1], 6), (*shape[:-2], 6, shape[-1])) == (
    after['a'].shape,
    after['b'].shape,
  )
  u, s, v = np.linalg.svd(net['w'].astype('float64'), full_matrices=False)
  best = (u[..., :6] * s[..., None, :6]) @ v[..., :6, :]
  close({'w': best.astype('float32')}, {'w': after['a'] @ after['b']}, 1e-4)


def test_factors_of_full_rank_are_the_matrix():
  net = {'w': array(7, 5)}
  steps = [
    {'factorise': {'rules': 'w -> {a,b}', 'rank': 5}},
    {'matmul': '{a,b} -> w'},
  ]
  close(net, applied(net, *steps), 1e-6)


def test_resize_vocab():
  net = {'e': array(10, 4), 'k': array(4, 10)}
  after = applied(net, {'resize-vocab': {'select': 'e', 'size': 7}})
  same({'e': net['e'][:7], 'k': net['k']}, after)
  step = {'select': 'k', 'size': 12, 'axis': -1}
  after = applied(net, {'resize-vocab': step})
  mean = net['k'].astype('float64').mean(1, keepdims=True)
  new = np.concatenate([net['k'], mean.repeat(2, 1).astype('float32')], 1)
  close({'e': net['e'], 'k': new}, after, 1e-7)
  same({'k': net['k']}, {'k': after['k'][:, :10].copy()})
  step = {'select': 'e', 'size': 12, 'new': 'zero'}
  after = applied(net, {'resize-vocab': step})
  same({'e': np.pad(net['e'], ((0, 2), (0, 0))), 'k': net['k']}, after)
  step |= {'new': 'random', 'seed': 1, 'scale': 0.0}
  after = applied(net, {'resize-vocab': step})
  rows = net['e'].astype('float64').mean(0).astype('float32')
  close({'e': np.stack([rows, rows])}, {'e': after['e'][10:]}, 1e-6)


def test_tie_and_untie():
  net = {'embed': array(5, 3), 'head': array(5, 3).T.copy()}
  step = {'rules': 'embed -> head', 'transpose': True}
  after = applied(net, {'tie': step})
  same({'embed': net['embed']}, after)
  same(net, applied(after, {'untie': step}))


def batch_norm(x, norm, epsilon=1e-5):
  scale = norm['scale'] / np.sqrt(norm['running_var'] + epsilon)
  return (x - norm['running_mean']) * scale + norm['bias']


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('norm', ['drop', 'identity'])
def test_fold_norm_keeps_the_output(bias, norm):
  rng = np.random.default_rng(0)
  net = {'conv0/kernel': array(3, 3, 4, 6)}
  if bias:
    net['conv0/bias'] = array(6, seed=1)
  net |= {
    'norm0/scale': array(6, seed=2),
    'norm0/bias': array(6, seed=3),
    'norm0/running_mean': array(6, seed=4),
    'norm0/running_var': rng.uniform(0.5, 2, 6).astype('float32'),
  }
  step = {'rules': 'conv<i> -> norm<i>', 'norm': norm}
  after = applied(net, {'fold-norm': step})
  x = rng.standard_normal((10, 36))

  def output(values):
    y = x @ values['conv0/kernel'].reshape(36, 6).astype('float64')
    y = y + values.get('conv0/bias', 0)
    beneath = {k[6:]: v for k, v in values.items() if k.startswith('norm0/')}
    return batch_norm(y, beneath) if beneath else y

  assert (norm == 'identity') == ('norm0/scale' in after)
  np.testing.assert_allclose(output(net), output(after), rtol=1e-4, atol=1e-5)


def test_fold_norm_of_torch_and_of_flax():
  torch = {
    'conv/weight': array(6, 4, 3, 3),
    'bn/weight': array(6, seed=1),
    'bn/bias': array(6, seed=2),
    'bn/running_mean': array(6, seed=3),
    'bn/running_var': array(6, seed=4) ** 2,
  }
  step = {'rules': 'conv -> bn', 'axis': 0, 'epsilon': 1e-3}
  after = applied(torch, {'fold-norm': step})
  s = torch['bn/weight'] / np.sqrt(torch['bn/running_var'] + 1e-3)
  expected = {
    'conv/weight': torch['conv/weight'] * s[:, None, None, None],
    'conv/bias': torch['bn/bias'] - torch['bn/running_mean'] * s,
  }
  close(expected, after)
  flax = {
    'params/Conv_0/kernel': np.moveaxis(torch['conv/weight'], 0, -1).copy(),
    'params/BatchNorm_0/scale': torch['bn/weight'],
    'params/BatchNorm_0/bias': torch['bn/bias'],
    'batch_stats/BatchNorm_0/mean': torch['bn/running_mean'],
    'batch_stats/BatchNorm_0/var': torch['bn/running_var'],
  }
  step = {
    'rules': '**/Conv_<i> -> **/BatchNorm_<i>',
    'statistics': 'params/** -> batch_stats/**',
    'epsilon': 1e-3,
  }
  after = applied(flax, {'fold-norm': step})
  expected = {
    'params/Conv_0/kernel': np.moveaxis(expected['conv/weight'], 0, -1),
    'params/Conv_0/bias': expected['conv/bias'],
  }
  close(expected, after)


@pytest.mark.parametrize(
  'step',
  [
    {'slice': {'select': 'w', 'keep': [0, 2], 'axis': 1}},
    {'transpose': 'w'},
    {'reshape': {'select': 'w', 'shape': [-1]}},
    {'concat': {'rules': '{w,v} -> x', 'axis': 1}},
    {'stack': '{w,v} -> x'},
    {'pad': {'select': 'w', 'after': 1}},
    {'permute': {'select': 'w', 'order': [3, 2, 1, 0]}},
  ],
  ids=lambda step: next(iter(step)),
)
@pytest.mark.parametrize(
  'dtype', ['bool', 'int4', 'uint8', 'bfloat16', 'float8_e4m3fn', 'complex64']
)
def test_any_dtype_is_moved_about(step, dtype):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  net = {k: np.arange(12).reshape(4, 3).astype(dtype) for k in 'wv'}
  assert {dtype} == {v.dtype for v in applied(net, step).values()}


def test_steps_compose_lazily():
  net = {'q': array(6, 4), 'k': array(6, 4, seed=1)}
  steps = [
    {'concat': {'rules': '{q,k} -> qk', 'axis': 1}},
    {'transpose': 'qk'},
    {'scale': {'select': 'qk', 'by': 2}},
    {'slice': {'select': 'qk', 'keep': '2:6'}},
    {'reshape': {'select': 'qk', 'shape': [2, 2, 6]}},
    {'cast': 'bf16'},
  ]
  joined = np.concatenate([net['q'], net['k']], 1).T * np.float32(2)
  expected = joined[2:6].reshape(2, 2, 6).astype(ml_dtypes.bfloat16)
  same({'qk': expected}, applied(net, *steps))


def test_nothing_is_read_while_it_is_planned():
  def fail():
    raise AssertionError('read')

  net = held(NET)
  lazy = net.replace(
    leaves={p: leaf.replace(load=fail) for p, leaf in net.items()}
  )
  steps: list[Any] = [
    {'slice': {'select': '**/a', 'keep': '0:2'}},
    {'factorise': {'rules': '**/a -> **/{u,v}', 'rank': 1}},
    {'stack': 'h/<i>/* -> h/*'},
    {'assert': {'finite': '**'}},
  ]
  after = surgery.Recipe(steps).apply(lazy)
  assert ['h/b', 'h/u', 'h/v', 'out'] == ['/'.join(p) for p in after]
  with pytest.raises(AssertionError, match='read'):
    after.check()


def test_blocks_are_as_planned():
  after = surgery.Recipe([{'transpose': 'out'}]).apply(held(NET))
  same({**NET, 'out': NET['out'].T}, blocks(after))


def test_flags_and_metadata_stay():
  net = held(NET)
  leaf = net['out',].replace(trainable=False, metadata={'tag': 'x'})
  net = net.replace(leaves={**net, ('out',): leaf})
  steps = [{'transpose': 'out'}, {'copy': 'out -> more'}]
  after = surgery.Recipe(steps).apply(net, host=HOST)
  for path in (('out',), ('more',)):
    assert (False, {'tag': 'x'}) == (
      after[path].trainable,
      dict(after[path].metadata),
    )


@pytest.mark.parametrize(
  'step',
  [
    {'transpose': 'x'},
    {'slice': {'select': 'x', 'axis': 1, 'keep': '5:15'}},
    {'permute': {'select': 'x', 'order': [1, 0], 'of': 2}},
    {'reshape': {'select': 'x', 'shape': [-1]}},
    {'pad': {'select': 'x', 'axis': 1, 'before': 3}},
  ],
  ids=lambda step: next(iter(step)),
)
def test_what_is_computed_is_computed_once(tmp_path, step):
  """Or twice, where blocks of the result begin within others."""
  file = saved({'x': array(40, 30)}, tmp_path)
  scaled = surgery.Recipe([{'scale': {'select': 'x', 'by': 2}}]).apply(
    surgery.open(file)
  )
  [leaf] = scaled.values()
  computed = 0

  def part(index):
    nonlocal computed
    block = leaf.part(index)
    computed += block.size
    return block

  def load():
    nonlocal computed
    computed += leaf.size
    return leaf.load()

  counted = leaf.replace(load=load, part=part)
  after = surgery.Recipe([step]).apply(scaled.replace(leaves={('x',): counted}))
  expected = applied({'x': 2 * array(40, 30)}, step)
  same(expected, blocks(after))
  assert computed <= 2 * leaf.size
