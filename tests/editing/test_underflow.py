"""What becomes zero by a cast is told, and refused if it is most of it."""

import json

import blox as bx
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.editing import rounding
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
)

NARROW = [
  name
  for name in rounding.SHORT.values()
  if rounding.DTYPES[name].itemsize == 1
]


def every_kind_of_float32():
  """All upper halves of float32, with lower halves at and around a half."""
  high = np.arange(1 << 16, dtype=np.uint32) << 16
  low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
  return (high[:, None] | low).reshape(-1).view(np.float32)


def same(expected, found):
  a, b = expected.astype(np.float32), found.astype(np.float32)
  nan = np.isnan(a)
  assert np.array_equal(nan, np.isnan(b))
  bits = [v.view(np.uint8)[~nan] for v in (expected, found)]
  assert np.array_equal(*bits)


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.filterwarnings('ignore:overflow')
@pytest.mark.parametrize('name', NARROW)
def test_float32_is_rounded_as_ml_dtypes_does(name):
  values = every_kind_of_float32()

  same(values.astype(rounding.DTYPES[name]), rounding.rounded(values, name))


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.filterwarnings('ignore:overflow')
@pytest.mark.parametrize('name', NARROW)
@pytest.mark.parametrize('source', ['bfloat16', 'float16', 'float8_e5m2'])
def test_narrower_ones_are_rounded_as_ml_dtypes_does(source, name):
  bits = np.arange(1 << 16, dtype=np.uint16)
  values = bits.view(rounding.DTYPES[source])

  same(
    values.astype(np.float32).astype(rounding.DTYPES[name]),
    rounding.rounded(values, name),
  )


@pytest.mark.parametrize('name', NARROW)
def test_float64_is_rounded_once(name):
  step = float(ml_dtypes.finfo(rounding.DTYPES[name]).eps)
  tie = 1 + step / 2
  above = np.array([tie + 2.0**-40, tie - 2.0**-40, tie, -tie - 2.0**-40])

  found = rounding.rounded(above, name).astype(np.float64)

  assert [1 + step, 1.0, 1.0, -1 - step] == found.tolist()


@pytest.mark.parametrize('shape', [(), (0,), (3, 0, 2), (1,), (5, 7)])
def test_shapes_stay(shape):
  values = np.ones(shape, np.float32)

  assert shape == rounding.rounded(values, 'float8_e5m2').shape
  turned = values.T
  assert turned.shape == rounding.rounded(turned, 'float8_e5m2').shape


@pytest.mark.parametrize('name', rounding.SHORT.values())
def test_zeros_of_either_sign_are_counted(name):
  values = np.array([0.0, -0.0, 1.0, -1.0, np.nan]).astype(
    rounding.DTYPES[name]
  )

  # Some 8-bit dtypes have no negative zero, and none of them is a number less.
  assert 3 == rounding.nonzero(values)


def weights(shape=(3, BLOCK // 2), scale=0.02):
  return np.random.default_rng(0).normal(0, scale, shape).astype(np.float32)


def model_of(**arrays):
  leaves: dict[tuple[str, ...], Leaf] = {
    ('l', name): Leaf(lambda a=a: a, a.shape, str(a.dtype))  # type: ignore[misc]
    for name, a in arrays.items()
  }
  return Checkpoint(leaves)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'model.msgpack'
  bias = np.zeros(4, np.float32)
  model_of(kernel=weights(), bias=bias).write(path)
  return path


def test_the_shell_tells_what_became_zero(file, tmp_path, surgery_cli):
  out = tmp_path / 'out.msgpack'
  expected = np.mean(weights().astype(ml_dtypes.float8_e4m3fn) == 0)

  result = surgery_cli('cast', file, '--to', 'f8_e4m3fn', '-o', out)

  assert 0.03 < expected < 0.05
  assert (
    f'{expected:.2%} of the numbers that were not zero became zero in '
    f'float8_e4m3fn, in 1 tensor: l/kernel {expected:.2%}.'
  ) in result.err


def test_json_has_it_too(file, tmp_path, surgery_cli):
  out = tmp_path / 'out.msgpack'

  args = ('cast', file, '--to', 'f8_e4m3fn', '-o', out, '--json')
  [found] = json.loads(surgery_cli(*args).out)['found']

  kept = np.count_nonzero(surgery.open(out)['l', 'kernel'].load())
  assert ('l/kernel', 'underflow') == (found['path'], found['what'])
  assert weights().size - kept == found['count']
  assert found['share'] == found['count'] / found['of']


def test_nothing_is_told_where_nothing_is_lost(file, tmp_path, surgery_cli):
  out = tmp_path / 'out.msgpack'

  result = surgery_cli('cast', file, '--to', 'bf16', '-o', out, '--json')

  assert 'found' not in json.loads(result.out)
  assert 'became zero' not in result.err


def test_a_tensor_that_would_be_lost_is_an_error(tmp_path, surgery_cli):
  file, out = tmp_path / 'model.msgpack', tmp_path / 'out.msgpack'
  model_of(kernel=weights(scale=1e-5)).write(file)
  args = ('cast', file, '--to', 'f8_e4m3fn', '-o', out)

  result = surgery_cli(*args)

  assert 'l/kernel: 1,572,864 of its 1,572,864 numbers' in result.err
  assert '--allow-underflow' in result.err
  assert not out.exists()
  assert 0 == surgery_cli(*args, '--allow-underflow').code
  assert not surgery.open(out)['l', 'kernel'].load().astype('f4').any()


def test_half_of_the_numbers_may_become_zero():
  values = np.array([1e-9, 1e-9, 1.0, 1.0, 0.0, 0.0], np.float32)

  half = surgery.cast(model_of(kernel=values), 'f8_e5m2')

  assert [0, 0, 1, 1, 0, 0] == half['l', 'kernel'].load().tolist()
  values[2] = 1e-9
  with pytest.raises(
    surgery.CastError, match='3 of its 4 numbers that are not'
  ):
    surgery.cast(model_of(kernel=values), 'f8_e5m2')['l', 'kernel'].load()


def test_params_warn():
  params = bx.Params()
  params['l', 'kernel'] = bx.Param(jnp.asarray(weights((64, 64))))

  with pytest.warns(RuntimeWarning, match=r'not zero became zero in float8_e4'):
    surgery.cast(params.locked(), 'f8_e4m3fn')
