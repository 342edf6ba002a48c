"""Casting rounds once, and says what it cannot hold."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import blox as bx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.editing import rounding
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
  grid,
)
from surgery.model.manifest import Manifest
from surgery.passes.cast import cast, names
from surgery.passes.extract import extract, insert
from surgery.passes.merge import merge
from tests.live import models

HOST = surgery.default_host()
DTYPES = sorted(set(rounding.SHORT.values()))
NARROW = [d for d in DTYPES if d not in ('float32', 'float64')]


def f32(values):
  return np.array(values, 'float32')


def f64(values):
  return np.array(values, 'float64')


def leaf(value, **flags):
  value = np.asarray(value)
  part = lambda index: value[index]
  return Leaf(lambda: value, value.shape, value.dtype.name, part=part, **flags)


def one(value, **flags):
  return Checkpoint({('net', 'a', 'kernel'): leaf(value, **flags)})


def only(checkpoint):
  [found] = checkpoint.values()
  return found.load()


def casted(value, to, **options):
  # Most of what rounding is tried on becomes zero.
  options = {'underflow': True, **options}
  return only(cast(one(value), to, host=HOST, **options))


# Rounding.


INFINITE = ('bfloat16', 'float16', 'float32', 'e3m4', 'e4m3', 'e5m2')


def nearest(value, dtype):
  """The oracle: rounds by fractions, half to even."""
  info = ml_dtypes.finfo(dtype)
  has_infinity = dtype.split('_')[-1] in INFINITE
  if math.isinf(value):
    return value if has_infinity else math.nan
  if math.isnan(value) or value == 0:
    return value
  exact = Fraction(value)
  exponent = math.frexp(value)[1] - 1
  quantum = Fraction(2) ** (max(exponent, int(info.minexp)) - int(info.nmant))
  result = round(exact / quantum) * quantum
  if abs(result) > Fraction(float(info.max)):
    return math.copysign(math.inf, value) if has_infinity else math.nan
  return float(result)


def same(expected, actual):
  if math.isnan(expected):
    return math.isnan(actual)
  return expected == actual


@pytest.mark.parametrize('dtype', [d for d in DTYPES if d != 'float64'])
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_float64_is_rounded_once_to_nearest_even(dtype, data):
  to = rounding.DTYPES[dtype]
  bits = data.draw(st.integers(0, 2 ** (8 * to.itemsize) - 1))
  with np.errstate(invalid='ignore'):  # Of signalling NaNs.
    near = np.array(bits, f'u{to.itemsize}').view(to).astype(np.float64)
  # Half-way to the next number, and the numbers right beside that.
  scale = data.draw(
    st.sampled_from([1, 1 + 2.0 ** -(ml_dtypes.finfo(to).nmant + 1)])
  )
  value = float(near) * scale
  for _ in range(data.draw(st.integers(0, 2))):
    value = math.nextafter(value, data.draw(st.sampled_from([0, math.inf])))
  result = float(casted(f64([value]), dtype, overflow=True)[0])
  assert same(nearest(value, dtype), result), value


@pytest.mark.parametrize('to', DTYPES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_any_bits_are_cast_without_a_warning(dtype, to):
  size = rounding.DTYPES[dtype].itemsize
  every = np.arange(2 ** min(8 * size, 16), dtype=f'u{size}')
  for shift in range(0, 8 * size, 16):
    value = (every << every.dtype.type(shift)).view(rounding.DTYPES[dtype])
    casted(value, to, overflow=True)


@pytest.mark.parametrize('dtype', [d for d in DTYPES if d != 'float64'])
@given(st.floats(width=64))
@settings(deadline=None)
def test_any_float64_is_rounded_to_nearest_even(dtype, value):
  result = float(casted(f64([value]), dtype, overflow=True)[0])
  assert same(nearest(value, dtype), result)


def test_float64_beside_a_tie_of_bfloat16_is_not_one():
  # As float32 all of these lie half-way between two numbers of bfloat16.
  half = np.array([1 + 2**-8, -(1 + 3 * 2**-8), 2.0**-126 * (1 + 2**-8)])
  for factor, to in ((1, 'even'), (1 + 2**-40, 'out'), (1 - 2**-40, 'in')):
    found = rounding.rounded(half * factor, 'bfloat16').astype(np.float64)
    away = np.abs(found) > np.abs(half)
    assert {'even': [False, True, False], 'out': [True] * 3, 'in': [False] * 3}[
      to
    ] == away.tolist()


def test_what_numpy_would_round_twice_is_rounded_once():
  # A little more than half-way from 1 to the next bfloat16.
  value = f64([1 + 2.0**-8 + 2.0**-40])
  assert 1.0 == float(value.astype(ml_dtypes.bfloat16)[0])
  assert 1 + 2.0**-7 == float(casted(value, 'bf16')[0])
  assert 1 + 2.0**-7 == float(casted(value[0], 'bf16'))


@pytest.mark.parametrize('dtype', NARROW)
@pytest.mark.parametrize('wide', ['f32', 'f64'])
def test_every_narrow_number_comes_back(dtype, wide):
  to = rounding.DTYPES[dtype]
  bits = np.arange(2 ** (8 * to.itemsize), dtype=f'u{to.itemsize}')
  values = bits.view(to)
  with np.errstate(invalid='ignore'):
    values = values[np.isfinite(values)]
  back = casted(casted(values, wide), dtype)
  assert values.tobytes() == back.tobytes()


@given(st.lists(st.floats(width=32), min_size=1))
@settings(deadline=None)
def test_float32_comes_back_from_float64(values):
  value = f32(values)
  back = casted(casted(value, 'f64'), 'f32')
  np.testing.assert_array_equal(value, back)
  assert np.signbit(value).tolist() == np.signbit(back).tolist()


@given(st.lists(st.floats(width=32), min_size=1), st.sampled_from(NARROW))
@settings(deadline=None)
def test_float32_is_cast_as_numpy_does(values, dtype):
  value = f32(values)
  with np.errstate(all='ignore'):
    expected = value.astype(rounding.DTYPES[dtype])
  actual = casted(value, dtype, overflow=True)
  assert expected.dtype == actual.dtype
  assert expected.tobytes() == actual.tobytes()


@pytest.mark.parametrize('source', ['float16', 'bfloat16', 'float8_e5m2'])
@pytest.mark.parametrize('dtype', NARROW)
def test_narrow_dtypes_are_cast_by_way_of_exact_float32(source, dtype):
  kind = rounding.DTYPES[source]
  values = np.arange(2 ** (8 * kind.itemsize), dtype=f'u{kind.itemsize}')
  values = values.view(kind)
  expected = casted(values.astype(np.float32), dtype, overflow=True)
  actual = casted(values, dtype, overflow=True)
  # A NaN is a NaN: its other bits mean nothing.
  nan = np.isnan(expected.astype(np.float32))
  assert nan.tolist() == np.isnan(actual.astype(np.float32)).tolist()
  assert expected[~nan].tobytes() == actual[~nan].tobytes()


# Files and blocks.


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_file_is_cast_to_what_numpy_says(tmp_path, dtype):
  value = np.random.default_rng(0).normal(size=(40, 3)).astype('float32')
  source, target = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  one(value).write(source)
  cast(surgery.open(source), dtype, host=HOST).write(target)
  after = only(surgery.open(target))
  expected = value.astype(rounding.DTYPES[dtype])
  assert (expected.dtype, expected.tobytes()) == (after.dtype, after.tobytes())


@pytest.mark.parametrize('shape', [(3, BLOCK // 2 + 1), (BLOCK + 7,), (2, 3)])
def test_blocks_are_the_parts_of_the_whole(shape):
  value = np.random.default_rng(0).normal(size=shape)
  [after] = cast(one(value), 'bf16', host=HOST).values()
  whole = after.load()
  assert 'bfloat16' == after.dtype == whole.dtype.name
  for index in grid(shape):
    assert whole[index].tobytes() == after.part(index).tobytes()


def test_a_large_tensor_is_never_read_whole():
  def load():
    raise AssertionError('read whole')

  part = lambda index: np.ones((1, BLOCK), 'float32')
  large = Leaf(load, (4, BLOCK), 'float32', part=part)
  [after] = cast(Checkpoint({('x',): large}), 'f16', host=HOST).values()
  assert [(1, BLOCK)] * 4 == [p.shape for p in after.parts()]


def test_a_tensor_that_comes_in_one_piece_is_cast_in_one():
  whole = leaf(np.ones(3)).replace(part=None)
  [after] = cast(Checkpoint({('x',): whole}), 'f16', host=HOST).values()
  assert after.part is None
  assert 'float16' == after.load().dtype


def test_what_is_no_real_floating_tensor_is_copied_unread():
  ckpt = Checkpoint(
    {
      ('ints',): leaf(np.arange(3), digest='i'),
      ('bools',): leaf(np.ones(2, bool), digest='b'),
      ('complex',): leaf(np.ones(2, 'complex64'), digest='c'),
      ('key',): leaf(np.ones(2, 'uint32'), digest='k', key='fry'),
      ('text',): Leaf(lambda: 'text'),
      ('number',): Leaf(lambda: 1.5),
      ('half',): leaf(np.ones(2, 'float16'), digest='h'),
      ('float',): leaf(np.ones(2, 'float32'), digest='f'),
    }
  )
  after = cast(ckpt, 'f16', host=HOST)
  changed = [p for p in ckpt if ckpt[p] is not after[p]]
  assert [('float',)] == changed
  assert after['float',].digest is None


def test_flags_and_metadata_stay():
  ckpt = one(np.ones(2), trainable=False, metadata={'sharding': ('x',)})
  [after] = cast(ckpt, 'f32', host=HOST).values()
  assert not after.trainable
  assert {'sharding': ('x',)} == after.metadata


@pytest.mark.parametrize('dtype', ['bf16', 'f16', 'f64'])
def test_numpy_scalars_stay_scalars(tmp_path, dtype):
  value = np.float32(1.5)
  ckpt = Checkpoint({('x',): Leaf(lambda: value, (), 'float32', scalar=True)})
  source, target = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  ckpt.write(source)
  cast(surgery.open(source), dtype, host=HOST).write(target)
  [after] = surgery.open(target).values()
  assert after.scalar
  assert (1.5, rounding.SHORT[dtype]) == (float(after.load()), after.dtype)


# What does not fit.


@pytest.mark.parametrize(
  ('value', 'dtype', 'became', 'largest'),
  [
    (1e30, 'f16', 'infinite', '65504'),
    (-1e30, 'f16', 'infinite', '65504'),
    (500, 'f8_e4m3fn', 'NaN', '448'),
    (65520, 'f16', 'infinite', '65504'),
    (3.4e38, 'bf16', 'infinite', '3.38953e+38'),
  ],
)
def test_a_finite_value_that_does_not_fit_is_an_error(
  value, dtype, became, largest
):
  values = np.zeros((2, 3), 'float32')
  values[1, 2] = value
  after = cast(one(values), dtype, host=HOST)
  with pytest.raises(surgery.CastError) as raised:
    only(after)
  assert (
    f'net/a/kernel: {float(np.float32(value)):g} at index [1, 2] would become '
    f'{became} in {rounding.SHORT[dtype]}, whose largest number is {largest}. '
    "Keep this tensor as it is (keep='net/a/kernel', --keep 'net/a/kernel'), "
    'cast it to a wider dtype, or allow it (overflow=True, --allow-overflow).'
  ) == str(raised.value)


@pytest.mark.parametrize(
  ('value', 'dtype'),
  [(65519, 'f16'), (464, 'f8_e4m3fn'), (3.39e38, 'bf16'), (1e-40, 'f16')],
)
def test_what_is_rounded_to_a_finite_number_fits(value, dtype):
  assert np.isfinite(casted(f32([value]), dtype).astype('f4')).all()


@pytest.mark.parametrize('dtype', NARROW)
def test_nan_and_infinity_are_no_overflow(dtype):
  after = casted(f32([np.nan, 1]), dtype).astype(np.float32)
  assert [True, False] == np.isnan(after).tolist()
  for value in (np.inf, -np.inf):
    if has_infinity(dtype):
      after = casted(f32([value, 1]), dtype).astype(np.float32)
      assert [value, 1] == after.tolist()
    else:
      # It would become NaN, which is another number.
      with pytest.raises(
        surgery.CastError, match='inf at index .* would become NaN'
      ):
        casted(f32([value, 1]), dtype)


def has_infinity(dtype):
  name = casted(f32([1]), dtype).dtype
  return bool(np.isinf(np.array(np.inf, np.float32).astype(name)))


def test_one_value_of_a_scalar_has_no_index():
  with pytest.raises(surgery.CastError, match='kernel: 1e[+]30 would become'):
    casted(np.float64(1e30), 'f16')


def test_the_index_is_that_in_the_whole_tensor():
  value = np.zeros((3, BLOCK), 'float32')
  value[2, 5] = 1e9
  [after] = cast(one(value), 'f16', host=HOST).values()
  for way in (after.load, lambda: list(after.parts())):
    with pytest.raises(surgery.CastError, match=r'1e\+09 at index \[2, 5\]'):
      way()


def test_an_overflow_leaves_no_file_behind(tmp_path):
  after = cast(one(f32([1e30])), 'f16', host=HOST)
  with pytest.raises(surgery.CastError):
    after.write(tmp_path / 'out.msgpack')
  assert [] == list(tmp_path.iterdir())


def test_an_overflow_may_be_allowed():
  assert [np.inf] == casted(f32([1e30]), 'f16', overflow=True).tolist()
  after = casted(f32([1e30]), 'f8_e4m3fn', overflow=True)
  assert np.isnan(after.astype(np.float32)).all()


# What is kept, and what it is cast to.


def net(**manifest):
  value = np.ones(2, 'float32')
  names = ('a/kernel', 'a/bias', 'norm/scale', 'x=y/kernel')
  paths = [('net', *name.split('/')) for name in names]
  return Checkpoint({p: leaf(value) for p in paths}, Manifest(**manifest))


def dtypes(checkpoint):
  return ' '.join(x.dtype.removeprefix('b') for x in checkpoint.values())


@pytest.mark.parametrize(
  ('keep', 'expected'),
  [
    (None, 'float16 float16 float16 float16'),
    ('**/norm', 'float16 float16 float32 float16'),
    (['net/a', '!**/bias'], 'float32 float16 float16 float16'),
    ('**/norm=f64', 'float16 float16 float64 float16'),
    (['**/bias=f64', '**/a'], 'float32 float64 float16 float16'),
    (['**/a', '**/bias'], 'float32 float32 float16 float16'),
    (['**/x\\=y'], 'float16 float16 float16 float32'),
    (['**/x\\=y=f64'], 'float16 float16 float16 float64'),
    (['re:.*/(norm|a)/.*=f64'], 'float64 float64 float64 float16'),
  ],
)
def test_the_first_selector_that_matches_decides(keep, expected):
  assert expected == dtypes(cast(net(), 'bf16', keep=keep, host=HOST))


def test_a_selector_that_decides_nothing_is_refused():
  message = (
    "keep: selector '**/bias' has no effect: the earlier selector '**/a' "
    'decides all that it matches, e.g. net/a/bias. Put it first.'
  )
  with pytest.raises(surgery.SelectorError, match=re.escape(message)):
    cast(net(), 'bf16', keep=['**/a', '**/bias=f64'], host=HOST)


def test_a_selection_is_kept():
  chosen = surgery.select(net(), '**/bias')
  after = cast(net(), 'bf16', keep=chosen, host=HOST)
  assert 'float16 float32 float16 float16' == dtypes(after)


@pytest.mark.parametrize(
  ('to', 'keep', 'message'),
  [
    ('bf61', None, "found 'bf61'. Did you mean 'bf16'"),
    ('int8', None, "floating-point dtype, found 'int8'"),
    ('float8_e8m0fnu', None, "found 'float8_e8m0fnu'"),
    (3.5, None, "found '3.5'"),
    (
      'f16',
      '**/norm=f33',
      "keep '[*][*]/norm=f33': .* found 'f33'. Did you mean .* write '.='",
    ),
    ('f16', '=f32', "keep '=f32': expected SELECTOR"),
    ('f16', '**/morn', 'Nearest: net/norm'),
    ('f16', '**', 'none of the 4 tensors is to be cast'),
  ],
)
def test_what_cannot_be_meant_is_refused(to, keep, message):
  with pytest.raises(surgery.SurgeryError, match=message):
    cast(net(), to, keep=keep, host=HOST)


@pytest.mark.parametrize('to', [jnp.bfloat16, np.dtype('bfloat16'), 'bfloat16'])
def test_dtypes_of_numpy_and_jax_are_understood(to):
  assert 'bfloat16' == only(cast(one(np.ones(1)), to, host=HOST)).dtype.name


def test_all_names_are_offered():
  assert {'bf16', 'bfloat16', 'f32', 'f8_e5m2', 'float8_e4m3fn'} <= {*names()}
  for name in names():
    assert rounding.name_of(name) in names()


# Adapters.


def adapted(**options):
  _, params, _ = models.mlp()
  adapter = surgery.LoRA(rank=2)
  params = surgery.attach(params, adapter, to='**/hidden*', **options)
  return models.stirred(params)


@pytest.mark.parametrize('to', ['bf16', 'f16', 'f8_e5m2'])
def test_weights_of_adapters_follow_and_the_file_is_the_live_model(
  tmp_path, to
):
  params = surgery.cast(adapted(), to)
  [record] = params.records.adapters
  full = rounding.SHORT[to]
  for site in record.sites.values():
    assert full == site.site.dtype
    assert {full} == {w.dtype for w in site.weights.values()}
  source, target = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  surgery.save(source, adapted())
  after = cast(surgery.open(source), to, host=HOST)
  after.write(target)
  loaded = surgery.load(target)
  assert params.records == loaded.records
  assert jax.tree.structure(params) == jax.tree.structure(loaded)
  for path in params.keys():
    assert bytes_of(params[path]) == bytes_of(loaded[path])
  merged = surgery.merge(params)
  filed = merge(after, host=HOST)
  for path in merged.keys():
    if rounding.is_float(filed[path].dtype):
      assert bytes_of(merged[path]) == np.asarray(filed[path].load()).tobytes()


def bytes_of(param):
  value = param.value
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    value = jax.random.key_data(value)
  return np.asarray(value).tobytes()


def test_an_adapter_in_its_own_file_is_cast_and_fits_its_base(tmp_path):
  file = tmp_path / 'a.msgpack'
  params = adapted()
  surgery.save_adapter(file, params)
  alone = cast(surgery.open(file), 'bf16', host=HOST)
  alone.write(tmp_path / 'b.msgpack')
  base = surgery.detach(params)
  again = surgery.load_adapter(tmp_path / 'b.msgpack', base)
  kept = again['net', 'mlp', 'hidden0', 'lora_a'].value
  expected = params['net', 'mlp', 'hidden0', 'lora_a'].value
  assert expected.astype('bfloat16').tobytes() == kept.tobytes()
  with pytest.raises(surgery.BaseMismatchError):
    surgery.load_adapter(
      tmp_path / 'b.msgpack',
      jax.tree.map(lambda v: v, surgery.cast(base, 'f16')),
    )


def test_extract_and_insert_go_with_cast():
  source = Checkpoint(
    {
      ('net', 'kernel'): leaf(np.ones((4, 3), 'float32')),
    }
  )
  whole = HOST.passes['attach'](
    source, surgery.LoRA(rank=1), to='**', host=HOST
  )
  small = cast(whole, 'bf16', host=HOST)
  alone = extract(small, 'default', host=HOST)
  base = cast(source, 'bf16', host=HOST)
  assert ['bfloat16'] * 3 == [
    leaf.dtype for leaf in insert(base, alone, host=HOST).values()
  ]


# In memory.


def params_of(value):
  params = bx.Params()
  params['net', 'x'] = bx.Param(value)
  return params.locked()


def test_a_pytree_in_a_parameter_is_cast_too():
  tree = {'a': [jnp.ones(2), jnp.arange(2)], 'b': (1.5, None)}
  after = surgery.cast(params_of(tree), 'bf16')['net', 'x'].value
  assert 'bfloat16' == after['a'][0].dtype
  assert tree['a'][1] is after['a'][1]
  assert tree['b'] == after['b']
  again = surgery.cast(params_of(after), 'bf16')['net', 'x'].value
  assert after is again


def test_a_tree_that_overflows_names_its_parameter():
  with pytest.raises(surgery.CastError, match='net/x: 1e'):
    surgery.cast(params_of({'a': jnp.float32([1e9])}), 'f16')


def test_float64_stays_numpy_where_jax_would_narrow_it():
  value = surgery.cast(params_of(jnp.ones(2)), 'f64')['net', 'x'].value
  assert isinstance(value, np.ndarray)
  assert 'float64' == value.dtype


def test_arrays_stay_where_they_are():
  device = jax.devices()[0]
  for value in (jnp.ones(2), jax.device_put(jnp.ones(2), device)):
    after = surgery.cast(params_of(value), 'bf16')['net', 'x'].value
    assert (value.committed, value.sharding) == (
      after.committed,
      after.sharding,
    )


def test_shapes_without_values_are_cast():
  params = jax.eval_shape(lambda: params_of(jnp.ones(2)))
  after = surgery.cast(params, 'bf16')['net', 'x'].value
  assert ((2,), 'bfloat16') == (after.shape, after.dtype)


def test_traced_values_are_cast_where_that_rounds_once():
  value = jnp.float32([1 + 2**-9, 1e-40, 3])
  params = params_of(value)
  after = jax.jit(lambda p: surgery.cast(p, 'bf16'))(params)['net', 'x'].value
  assert 'bfloat16' == after.dtype
  assert [1, 3] == [float(after[0]), float(after[2])]
  with pytest.raises(surgery.CastError, match='net/x: a traced value'):
    jax.jit(lambda p: surgery.cast(p, 'f8_e4m3fn'))(params)


def test_subnormal_numbers_are_kept():
  value = jnp.float32([2**-133.0, 2**-24.0])
  after = surgery.cast(params_of(value), 'bf16')['net', 'x'].value
  assert [2**-133.0, 2**-24.0] == np.asarray(after, np.float64).tolist()


@pytest.mark.parametrize(
  ('wanted', 'hint'),
  [
    ('float8', "'f8_e4m3fn' or 'f8_e5m2'?"),
    ('fp8', "'f8_e4m3fn' or 'f8_e5m2'?"),
    ('E4M3', "'f8_e4m3fn'?"),
    ('F8_E4M3', "'f8_e4m3fn'?"),  # safetensors calls it so.
    ('fp8_e5m2', "'f8_e5m2'?"),
    ('fp16', "'f16'?"),
    ('BF16', "'bf16'?"),
    ('torch.bfloat16', "'bf16'?"),
    ('half', "'f16'?"),
    ('bfloat', "'bf"),
  ],
)
def test_names_of_other_programs_are_understood_in_errors(wanted, hint):
  with pytest.raises(surgery.ConfigError) as caught:
    rounding.name_of(wanted)
  assert f'found {wanted!r}. Did you mean {hint}' in str(caught.value)


def test_a_plan_says_what_is_rounded_beneath_adapters(tmp_path):
  base, adapted = tmp_path / 'base.msgpack', tmp_path / 'adapted.msgpack'
  params = models.mlp()[1]
  surgery.save(base, params)
  surgery.save(adapted, surgery.attach(params, surgery.LoRA(rank=2), to='**'))
  recipe = surgery.Recipe([{'cast': 'bf16'}])
  out = tmp_path / 'out.msgpack'
  remarks = recipe.plan(model=adapted, out=out).report()['remarks']
  [said] = [one for one in remarks if 'beneath adapters' in one]
  assert 'net/mlp/hidden0/kernel' in said
  assert 'bias' not in said  # No adapter rewrites it.
  assert 'remarks' not in recipe.plan(model=base, out=out).report()
  # What stays as it is is no matter.
  keep = surgery.Recipe([{'cast': {'to': 'bf16', 'keep': '**/kernel'}}])
  assert 'remarks' not in keep.plan(model=adapted, out=out).report()
