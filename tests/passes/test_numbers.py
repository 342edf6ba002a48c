"""Mean, multiply, clamp, prune and interpolate, against numpy and JAX."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import surgery
from surgery.files import arrays
from surgery.model import grid as grids
from surgery.model.checkpoint import Checkpoint, Leaf


def model(**values):
  leaves: dict[tuple[str, ...], Leaf] = {
    tuple(n.split('__')): Leaf(lambda v=v: v, v.shape, v.dtype.name)
    for n, v in values.items()
  }
  return Checkpoint(leaves)


def done(step, ckpt, *args, path=('x',), **options):
  host = surgery.default_host()
  after = host.passes[step](ckpt, *args, host=host, **options)
  leaf = after[path]
  value = np.asarray(leaf.load())
  assert (leaf.shape, leaf.dtype) == (value.shape, value.dtype.name)
  return value


def draw(shape, dtype='float32', seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


NUMBERS = hnp.arrays(
  'float32',
  hnp.array_shapes(min_dims=1, max_dims=3, max_side=6),
  elements=st.floats(-4, 4, width=32),
)


# Steps give the same bits from a file, in blocks, as from memory.


@pytest.mark.parametrize(
  ('step', 'options'),
  [
    ('mean', {'axis': 1, 'groups': 3, 'size': 5}),
    ('mean', {'axis': 0}),
    ('clamp', {'min': -0.5, 'max': 0.25}),
    ('prune', {'share': 0.37}),
    ('interpolate', {'to': 17, 'axis': 1}),
    ('interpolate', {'to': [2, 3], 'axis': [0, 1], 'method': 'cubic'}),
  ],
)
def test_files_have_the_bits_of_memory(tmp_path, monkeypatch, step, options):
  value = draw((12, 30, 7))
  direct = done(step, model(x=value), 'x', **options)
  model(x=value).write(tmp_path / 'm.safetensors')
  recipe = surgery.Recipe(
    [{step: {'select': 'x', **options}}],
    inputs={'model': tmp_path / 'm.safetensors'},
    outputs={'out': tmp_path / 'out.safetensors'},
  )
  recipe.run()
  [leaf] = surgery.open(tmp_path / 'out.safetensors').values()
  np.testing.assert_array_equal(direct, leaf.load())


@pytest.mark.parametrize('step', ['mean', 'clamp', 'interpolate'])
def test_any_region_is_that_of_the_whole(step):
  host = surgery.default_host()
  options: Any = {
    'mean': {'axis': 1, 'groups': 3, 'size': 5},
    'clamp': {'min': 0},
    'interpolate': {'to': 11, 'axis': 1, 'prefix': 1},
  }[step]
  value = draw((4, 30, 3))
  leaf = Leaf(lambda: value, value.shape, 'float32', part=lambda i: value[i])
  after = host.passes[step](
    Checkpoint({('x',): leaf}), 'x', host=host, **options
  )
  found = after[('x',)]
  whole = found.load()
  cut = (slice(1, 3), slice(2, 9), slice(0, 2))
  np.testing.assert_array_equal(whole[cut], found.region(cut))


@pytest.mark.parametrize('step', ['mean', 'clamp', 'prune', 'interpolate'])
def test_what_has_no_arithmetic_is_refused(step):
  options: Any = {
    'mean': {'axis': 0},
    'clamp': {'min': 0},
    'prune': {'share': 0.5},
  }
  given = options.get(step, {'to': 3})
  for dtype in ('int32', 'bool'):
    with pytest.raises(surgery.SurgeryError, match='floating-point'):
      done(step, model(x=np.ones((2, 2), dtype)), 'x', **given)
  scaled = model(w=np.ones((2, 2), 'int8'), w_scale=np.ones(2, 'float32'))
  from surgery.model import quantised

  with pytest.raises(surgery.SurgeryError):
    done(step, quantised.marked(scaled, None), '**', **given, path=('w',))


# Mean.


def test_heads_become_groups():
  kernel = draw((6, 8 * 4))
  heads = kernel.reshape(6, 2, 4, 4)
  want = heads.astype('float64').mean(2).astype('float32').reshape(6, 8)
  got = done('mean', model(x=kernel), 'x', axis=-1, groups=2, size=4)
  np.testing.assert_array_equal(want, got)
  # As an axis of heads.
  got = done('mean', model(x=kernel.reshape(6, 8, 4)), 'x', axis=1, groups=2)
  np.testing.assert_array_equal(want.reshape(6, 2, 4), got)


def test_as_many_groups_as_places_change_nothing():
  value = draw((3, 4), ml_dtypes.bfloat16)
  np.testing.assert_array_equal(
    value, done('mean', model(x=value), 'x', axis=1, groups=4)
  )


def test_the_mean_of_an_axis():
  value = draw((3, 4, 5))
  want = value.astype('f8').mean(1).astype('f4')
  np.testing.assert_array_equal(want, done('mean', model(x=value), 'x', 1))


@pytest.mark.parametrize(
  ('shape', 'options', 'said'),
  [
    ((3, 4), {'axis': 1, 'groups': 3}, 'expected a multiple of 3'),
    ((3, 0), {'axis': 1}, 'but not 0'),
    ((3, 4), {'axis': 2}, 'has no axis 2'),
    ((3, 4), {'axis': 1, 'groups': 0}, 'groups: expected 1 or more'),
    ((3, 4), {'axis': 1, 'size': 2}, 'and groups beside it'),
    ((), {'axis': 0}, 'has no axis 0'),
  ],
)
def test_a_mean_that_cannot_be(shape, options, said):
  with pytest.raises(surgery.SurgeryError, match=said):
    done('mean', model(x=draw(shape)), 'x', **options)


# Multiply.


@settings(deadline=None, max_examples=30)
@given(NUMBERS, st.data())
def test_factors_are_repeated_as_in_numpy(value, data):
  shape = tuple(data.draw(st.sampled_from([1, n])) for n in value.shape)
  shape = shape[data.draw(st.integers(0, len(shape))) :]
  factor = draw(shape)
  want = (value.astype('f8') * factor).astype('f4')
  got = done('multiply', model(x=value, y=factor), 'y -> x')
  np.testing.assert_array_equal(want, got)


def test_a_mask_and_another_model():
  value = draw((2, 3))
  mask = np.array([[1, 0, 1], [0, 0, 1]], bool)
  got = done('multiply', model(x=value), 'o::x', inputs={'o': model(x=mask)})
  np.testing.assert_array_equal(value * mask, got)


def test_factors_that_cannot_be():
  for values, rules, said in (
    (
      {'x': draw((2, 3)), 'y': draw(2)},
      'y -> x',
      r'cannot be repeated to \(2, 3',
    ),
    (
      {'x': draw(3), 'y': draw(()), 'z': draw(3)},
      ['y -> x', 'z -> x'],
      'two fac',
    ),
    ({'x': draw(3)}, 'x -> other', 'no other to which x'),
    ({'x': np.ones(3, int), 'y': draw(3)}, 'y -> x', 'floating-point'),
    (
      {'x': draw(3), 'y': np.ones(3, 'c8')},
      'y -> x',
      'cannot hold the product',
    ),
  ):
    with pytest.raises(surgery.SurgeryError, match=said):
      done('multiply', model(**values), rules)
  big = model(x=np.array([6e4], 'float16'), y=np.array([2.0]))
  with pytest.raises(surgery.CastError):
    done('multiply', big, 'y -> x')


# Clamp.


@settings(deadline=None, max_examples=30)
@given(NUMBERS, st.floats(-3, 0), st.floats(0, 3))
def test_numbers_lie_in_the_range(value, low, high):
  got = done('clamp', model(x=value), 'x', min=low, max=high)
  want = np.clip(value.astype('f8'), low, high).astype('f4')
  np.testing.assert_array_equal(want, got)
  again = done('clamp', model(x=got), 'x', min=low, max=high)
  np.testing.assert_array_equal(got, again)


def test_nan_stays_and_infinity_is_clamped():
  value = np.array([np.nan, np.inf, -np.inf, 1], ml_dtypes.bfloat16)
  got = done('clamp', model(x=value), 'x', max=2).astype('f4')
  np.testing.assert_array_equal([np.nan, 2, -np.inf, 1], got)
  for options in ({}, {'min': 1, 'max': 0}, {'min': float('nan')}):
    with pytest.raises(surgery.SurgeryError, match='min'):
      done('clamp', model(x=value), 'x', **options)
  with pytest.raises(surgery.SurgeryError, match='which have an order'):
    done('clamp', model(x=np.ones(2, 'c8')), 'x', min=0)


def test_nan_is_not_spread_by_means():
  value = draw((6, 4))
  value[3, 2] = np.nan
  for step, options in (
    ('interpolate', {'to': 9}),
    ('mean', {'axis': 0}),
    ('mean', {'axis': 0, 'groups': 2}),
  ):
    with pytest.raises(
      surgery.CastError, match=r'x: has nan at index \[3, 2\].*stats --finite'
    ):
      done(step, model(x=value), 'x', **options)
  found = done('mean', model(x=value), 'x', axis=0, nonfinite='allow')
  assert [False, False, True, False] == list(np.isnan(found))


# Prune.


@settings(deadline=None, max_examples=40)
@given(NUMBERS, st.floats(0, 1))
def test_so_many_are_zero_and_no_kept_one_is_smaller(value, share):
  got = done('prune', model(x=value), 'x', share=share)
  gone = (got == 0) & (value != 0)
  count = int(share * value.size * (1 + 1e-12))
  zeros = np.count_nonzero(value == 0)
  assert max(count, zeros) == np.count_nonzero(got == 0)
  kept = got[got != 0]
  np.testing.assert_array_equal(value[got != 0], kept)
  if gone.any() and len(kept):
    assert np.abs(value[gone]).max() <= np.abs(kept).min()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float8_e4m3fn', 'float64'])
def test_other_dtypes_are_pruned(dtype):
  value = np.array([1, -4, 2, 3]).astype(arrays.DTYPES[dtype])
  got = done('prune', model(x=value), 'x', share=0.5).astype('f8')
  np.testing.assert_array_equal([0, -4, 0, 3], got)


def test_of_equal_numbers_the_first_go():
  got = done('prune', model(x=np.array([2.0, -2, 2, -2])), 'x', share=0.5)
  np.testing.assert_array_equal([0, 0, 2, -2], got)


@settings(deadline=None, max_examples=40)
@given(
  st.lists(NUMBERS, min_size=1, max_size=3),
  st.floats(0, 1),
  st.sampled_from(['float32', 'float64', 'bfloat16', 'complex64']),
)
def test_one_threshold_holds_for_all_tensors(some, share, dtype):
  kind = arrays.DTYPES[dtype]
  named = {f'x{k}': value.astype(kind) for k, value in enumerate(some)}
  # Another dtype beside it.
  named['y'] = np.array([1 / 3, -2, 0])
  host = surgery.default_host()
  after = host.passes['prune'](
    model(**named), ['x*', 'y'], share, scope='all', host=host
  )
  wide = np.concatenate(
    [
      np.ravel(v).astype('c16' if 'c' in dtype else 'f8')
      for v in named.values()
    ]
  )
  gone = np.argsort(np.abs(wide), kind='stable')
  gone = gone[: int(share * len(wide) * (1 + 1e-12))]
  wide[gone] = 0
  at = 0
  for name, value in named.items():
    want = wide[at : at + value.size].reshape(value.shape)
    at += value.size
    got = np.asarray(after[(name,)].load())
    real = want if value.dtype.kind == 'c' else want.real
    np.testing.assert_array_equal(got, real.astype(value.dtype))
    parts = [np.ravel(part) for part in after[(name,)].parts()]
    np.testing.assert_array_equal(np.concatenate(parts), got.reshape(-1))


@pytest.mark.parametrize('scope', ['tensor', 'all'])
def test_pruned_copies_of_the_embedding_stay_copies(tmp_path, scope):
  # Few values, so that many are equal at the threshold.
  table = np.random.default_rng(0).integers(-3, 4, (9, 5)).astype('f4')
  other = np.random.default_rng(1).integers(-3, 4, (9, 5)).astype('f4')
  named = {
    'embed__w': table, 'head__w': table.copy(), 'flax__head': table.T.copy(),
    'other__head': other, 'z': draw((7,)),
  }  # fmt: skip
  model(**named).write(tmp_path / 'm.safetensors')
  for ckpt in (model(**named), surgery.open(tmp_path / 'm.safetensors')):
    host = surgery.default_host()
    after = host.passes['prune'](ckpt, '**', 0.6, scope=scope, host=host)
    got = {'__'.join(p): np.asarray(v.load()) for p, v in after.items()}
    np.testing.assert_array_equal(got['embed__w'], got['head__w'])
    np.testing.assert_array_equal(got['embed__w'], got['flax__head'].T)
    if scope == 'all':
      counted = [got['embed__w'], got['other__head'], got['z']]
      zeros = sum(np.count_nonzero(v == 0) for v in counted)
      assert int(0.6 * (45 + 45 + 7)) == zeros
    else:
      assert 27 == np.count_nonzero(got['embed__w'] == 0)


def test_a_file_is_pruned_in_blocks(tmp_path, monkeypatch):
  value = draw((300, 40))
  model(x=value, y=draw((50,), seed=1)).write(tmp_path / 'm.safetensors')
  host = surgery.default_host()
  made = lambda: host.passes['prune'](
    surgery.open(tmp_path / 'm.safetensors'), '*', 0.37, scope='all', host=host
  )
  want = {path: np.asarray(leaf.load()) for path, leaf in made().items()}
  small = lambda shape, most=77, grid=grids.grid: grid(shape, most)
  monkeypatch.setattr('surgery.editing.regions.grid', small)
  monkeypatch.setattr('surgery.model.checkpoint.grid', small)
  monkeypatch.setattr('surgery.methods.streaming.PIECE', 16)
  for path, leaf in made().items():
    parts = [np.ravel(part) for part in leaf.parts()]
    assert len(parts) > 1 or path == ('y',)
    np.testing.assert_array_equal(want[path].reshape(-1), np.concatenate(parts))


def test_pruning_that_cannot_be():
  with pytest.raises(surgery.SurgeryError, match='share: expected 0 to 1'):
    done('prune', model(x=draw(3)), 'x', share=1.5)
  with pytest.raises(surgery.SurgeryError, match='tensor or all'):
    done('prune', model(x=draw(3)), 'x', share=0.5, scope='x')
  with pytest.raises(surgery.SurgeryError, match='has NaN'):
    done('prune', model(x=np.array([np.nan, 1])), 'x', share=0.5)
  assert 0 == done('prune', model(x=draw((0, 3))), 'x', share=0.5).size


# Interpolate.


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 20))
def test_a_line_is_what_jax_makes_of_it(old, new):
  value = draw((old, 3))
  want = jax.image.resize(value, (new, 3), 'linear', antialias=False)
  got = done('interpolate', model(x=value), 'x', new)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_grid_is_what_jax_makes_of_it_however_it_lies():
  value = draw((4, 6, 5))
  want = np.asarray(
    jax.image.resize(value, (7, 3, 5), 'linear', antialias=False)
  )
  got = done('interpolate', model(x=value), 'x', [7, 3], axis=[0, 1])
  np.testing.assert_allclose(got, want, atol=1e-5)
  token = draw((1, 1, 5), seed=1)
  flat = np.concatenate([token, value.reshape(1, 24, 5)], 1)
  got = done(
    'interpolate', model(x=flat), 'x', [7, 3], axis=1, grid=[4, 6], prefix=1
  )
  np.testing.assert_array_equal(token, got[:, :1])
  np.testing.assert_allclose(got[0, 1:], want.reshape(21, 5), atol=1e-5)


def test_cubic_is_what_pytorch_makes_of_it():
  # torch.nn.functional.interpolate(…, mode='bicubic', align_corners=False).
  line = np.array([1.0, 3, -2, 5])
  for new, want in (
    (
      7,
      [
        *(0.8015670553935856, 1.9889759475218662, 3.11652696793003, 0.03125),
        *(-1.8304482507288642, 2.307306851311952, 5.694515306122453),
      ],
    ),
    (3, [1.3738425925925917, 0.03125, 3.908564814814813]),
  ):
    got = done('interpolate', model(x=line), 'x', new, method='cubic')
    np.testing.assert_allclose(got, want, atol=1e-12)
  grid = np.arange(12.0).reshape(3, 4) ** 2
  table = [
    [1.7837265625, 3.2629609375, 6.359375, 11.3217890625, 15.9280234375],
    [52.7477734375, 62.9145390625, 77.515625, 93.9827109375, 107.2764765625],
  ]
  got = done(
    'interpolate', model(x=grid), 'x', [2, 5], axis=[0, 1], method='cubic'
  )
  np.testing.assert_allclose(got, table, atol=1e-10)


@pytest.mark.parametrize('method', ['linear', 'cubic'])
@given(value=NUMBERS)
@settings(deadline=None, max_examples=15)
def test_the_same_size_changes_nothing_and_constants_stay(method, value):
  n = value.shape[0]
  same = done('interpolate', model(x=value), 'x', n, method=method)
  np.testing.assert_array_equal(value, same)
  ones = np.ones_like(value)
  other = done('interpolate', model(x=ones), 'x', 2 * n + 1, method=method)
  np.testing.assert_allclose(other, 1, rtol=1e-6)


@pytest.mark.parametrize(
  ('to', 'options', 'said'),
  [
    (0, {}, 'to: expected'),
    ([2, 2, 2], {}, 'one or two numbers'),
    (3, {'axis': [0, 1]}, 'as many axes'),
    ([3, 3], {'axis': [0, 0]}, '0 twice'),
    ([3, 3], {}, r'6 positions do not make a grid of 2 × 2'),
    ([3, 3], {'grid': [2, 2]}, r'6 positions do not make a grid'),
    ([3, 3], {'axis': [0, 1], 'prefix': 1}, 'along one axis'),
    (3, {'grid': [2, 3]}, 'grid: expected two'),
    (3, {'prefix': 6}, 'no positions there behind a prefix of 6'),
    (3, {'method': 'quintic'}, "'quintic'"),
    (3, {'axis': 5}, 'has no axis 5'),
  ],
)
def test_an_interpolation_that_cannot_be(to, options, said):
  with pytest.raises(surgery.SurgeryError, match=said):
    done('interpolate', model(x=draw((6, 4))), 'x', to, **options)


def test_adapters_do_not_follow_what_is_rearranged():
  adapted = surgery.attach(
    model(a__kernel=draw((4, 4))), surgery.LoRA(rank=1), to='a'
  )
  for step, options in (
    ('mean', {'axis': 0, 'groups': 4}),
    ('interpolate', {'to': 4}),
  ):
    with pytest.raises(surgery.AdapterError, match='cannot follow'):
      done(step, adapted, 'a/kernel', **options, path=('a', 'kernel'))
