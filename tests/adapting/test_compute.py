"""What a result is held against before it is kept."""

import jax
import ml_dtypes
import numpy as np
import pytest

from surgery.adapting import compute

DTYPES = (
  'float32',
  'float64',
  'float16',
  'bfloat16',
  'float8_e4m3fn',
  'complex64',
)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', DTYPES)
def test_numbers_in_memory_are_looked_at_without_a_program(
  dtype, bad, monkeypatch
):
  # A program for each shape took as long to compile as what was merged.
  monkeypatch.delattr(compute.jnp, 'isfinite')
  kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
  good = np.linspace(-3, 3, 12).astype(kind).reshape(3, 4)
  wrong = good.copy()
  wrong[1, 2] = bad
  with jax.transfer_guard('disallow'):
    for to in (np.asarray, jax.device_put):
      assert compute.finite(to(good))
      assert not compute.finite(to(wrong))
      assert compute.finite(to(good[:0]))
  assert compute.finite(np.arange(3))
