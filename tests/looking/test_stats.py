"""Figures of tensors, against numpy on the whole of each."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import surgery
from surgery.files.arrays import DTYPES
from surgery.looking import spectrum
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.grid import BLOCK


def leaf(value, **options):
  return Leaf(
    lambda: value,
    value.shape,
    value.dtype.name,
    part=lambda index: value[index],
    **options,
  )


def described(value, **options):
  [one] = surgery.stats(Checkpoint({('x',): leaf(value)}), **options)
  return one


@settings(deadline=None, max_examples=60)
@given(
  hnp.arrays(
    st.sampled_from(
      ['float16', 'float32', 'float64', 'int8', 'uint64', 'bool']
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
  )
)
def test_figures_are_those_of_numpy_on_the_finite_elements(value):
  one = described(value)
  wide = value.astype('float64')
  finite = wide[np.isfinite(wide)]
  assert value.size == one.size
  assert np.count_nonzero(wide == 0) == one.zeros
  assert (np.isnan(wide).sum(), np.isinf(wide).sum()) == (one.nan, one.inf)
  assert one.finite == (len(finite) == value.size)
  if not one.finite:
    assert one.first == tuple(np.argwhere(~np.isfinite(wide))[0])
  if not len(finite):
    assert (0.0, None, None, None, None) == (
      one.norm, one.mean, one.std, one.min, one.max,
    )  # fmt: skip
    return
  assert (finite.min(), finite.max()) == (one.min, one.max)
  scale = max(abs(finite).max(), 1e-300)
  some = finite / scale
  near = pytest.approx
  assert near(np.linalg.norm(some), rel=1e-9) == one.norm / scale
  assert near(some.mean(), rel=1e-9, abs=1e-12) == one.mean / scale
  assert near(some.std(), rel=1e-6, abs=1e-9) == one.std / scale


def test_extremes_of_large_integers_are_exact():
  one = described(np.array([2**63 + 1, 3], 'uint64'))
  assert (3, 2**63 + 1) == (one.min, one.max)


@pytest.mark.parametrize('dtype', [d for d in DTYPES if 'complex' not in d])
def test_every_dtype_of_files_has_figures(dtype):
  one = described(np.ones((2, 3), DTYPES[dtype]))
  assert (6, 1, 0) == (one.size, one.mean, one.std)
  assert 6**0.5 == one.norm


def test_complex_numbers_have_a_norm_and_no_extremes():
  one = described(np.array([3j, 4, 0, complex(0, np.nan)], 'complex64'))
  assert (5, 1, 1, None, None) == (
    one.norm, one.zeros, one.nan, one.mean, one.max,
  )  # fmt: skip
  assert (3,) == one.first


@pytest.mark.parametrize('dtype', ['bfloat16', 'float8_e4m3fn', 'float8_e5m2'])
def test_narrow_dtypes_show_what_is_not_finite(dtype):
  value = np.ones((2, 3), DTYPES[dtype])
  value[1, 1] = np.nan
  one = described(value)
  assert (1, (1, 1), 5**0.5) == (one.nan, one.first, one.norm)


def test_the_first_is_found_across_blocks():
  value = np.zeros((3, BLOCK // 2 + 5), 'float32')
  value[2, 7], value[2, 9] = np.inf, np.nan
  one = described(value)
  assert (1, 1, (2, 7)) == (one.inf, one.nan, one.first)
  assert value.size - 2 == one.zeros


def test_a_number_that_is_no_array_is_described_and_text_is_not():
  made = Checkpoint(
    {
      ('lr',): Leaf(lambda: float('nan')),
      ('name',): Leaf(lambda: 'net'),
      ('big',): Leaf(lambda: 10**30),
      ('none',): Leaf(lambda: None),
    }
  )
  [one] = surgery.stats(made)
  assert ('lr', (), 1, ()) == (one.path, one.shape, one.nan, one.first)


def test_codes_have_no_figures_and_yet_no_nan_unseen():
  codes = quantised.Codes('fp8', ('w',))
  scale = np.array([1, np.inf], 'float32')
  made = Checkpoint(
    {
      ('w',): leaf(np.ones(2, ml_dtypes.float8_e4m3fn), codes=codes),
      ('w_scale',): leaf(scale, codes=codes),
    }
  )
  one, other = surgery.stats(made)
  assert (None, 'codes of a quantised weight') == (one.norm, one.note)
  assert one.finite
  assert (None, 1, (1,)) == (other.norm, other.inf, other.first)


def test_the_state_of_a_generator_is_no_number():
  key = leaf(np.array([1, 2], 'uint32'), key='threefry2x32')
  [one] = surgery.stats(Checkpoint({('rng',): key}))
  assert ('a PRNG key', None) == (one.note, one.norm)


def test_a_tensor_that_is_damaged_has_no_figures(tmp_path):
  file = tmp_path / 'm.safetensors'
  Checkpoint({('x',): leaf(np.ones(8, 'float32'))}).write(file)
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  with pytest.raises(surgery.FormatError, match='digest on record'):
    list(surgery.stats(surgery.open(file)))


def test_arguments_are_checked():
  with pytest.raises(surgery.SurgeryError, match=r'expected a surgery\.Checkp'):
    surgery.stats('model.safetensors')  # type: ignore[arg-type]
  with pytest.raises(surgery.ConfigError, match='expected 0 or more'):
    surgery.stats(Checkpoint({}), singular=-1)
  with pytest.raises(surgery.SelectorError, match='other'):
    surgery.stats(Checkpoint({('x',): leaf(np.ones(2))}), 'other')


def low_rank(shape, values):
  rows, columns = shape
  rng = np.random.default_rng(0)
  u = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
  v = np.linalg.qr(rng.normal(size=(columns, len(values))))[0]
  return (u * values) @ v.T


# Each is decomposed in another way where the limits are as small as these.
@pytest.mark.parametrize('shape', [(6, 9), (60, 9), (9, 60), (50, 60)])
def test_singular_values_however_they_are_computed(monkeypatch, shape):
  monkeypatch.setattr(spectrum, '_WHOLE', 60)
  monkeypatch.setattr(spectrum, '_SIDE', 10)
  values = [4.0, 2.0, 1.0]
  found = described(low_rank(shape, values), singular=2).spectrum
  assert [4, 2] == pytest.approx(found.values)
  assert (16 + 4 + 1) / 16 == pytest.approx(found.stable_rank)
  assert found.exact == (shape != (50, 60))
  if found.exact:
    p = np.array(values) / 7
    want = np.exp(-(p * np.log(p)).sum())
    assert want == pytest.approx(found.effective_rank, rel=1e-6)
  else:
    assert found.effective_rank is None


def test_ranks_of_large_and_of_empty_matrices():
  huge = described(np.eye(3) * 1e300, singular=1).spectrum
  assert (1e300,) == huge.values
  assert 3 == pytest.approx(huge.effective_rank)
  zero = described(np.zeros((2, 3)), singular=9).spectrum
  assert ((0, 0), 0, 0) == (
    zero.values, zero.stable_rank, zero.effective_rank,
  )  # fmt: skip
  assert described(np.zeros((0, 3)), singular=1).spectrum is None
  assert described(np.full((2, 2), np.nan), singular=1).spectrum is None
  assert described(np.ones(3), singular=1).spectrum is None
