"""What adapters compute: formulas, dtypes, and answers that are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.adapting.saved import model, numbers, values


def adapter(apply, init=None, **attributes):
  """Returns an adapter whose `apply` is a function."""

  def drawn(self, site, key):
    del self, key
    return {'w': jnp.ones(site.out_shape)}

  return type(
    'Odd',
    (surgery.Adapter,),
    {'name': 'odd', 'apply': apply, 'init': init or drawn, **attributes},
  )()


def attached(apply, checkpoint=None, **options):
  checkpoint = checkpoint or model(a__kernel=numbers(4, 6))
  return surgery.attach(checkpoint, adapter(apply, **options), to='a')


@pytest.mark.parametrize(
  ('apply', 'message'),
  [
    (lambda self, site, name, base, w: base[0], r'returned shape \(6,\), expe'),
    (lambda self, site, name, base, w: None, 'returned NoneType, expected an'),
    (
      lambda self, site, name, base, w: base.astype('int32'),
      'returned int32, expected a floating dtype',
    ),
    (lambda self, site, name, base, w: base * w['v'], 'The weights are w.'),
    (lambda self, site, name, base, w: 1 / 0, 'ZeroDivisionError'),
    (
      lambda self, site, name, base, w: surgery.LowRank(
        base, base[:, :1], w['w'][None], 1.0, 0.5, None
      ),
      'names no vector of integers',
    ),
    (
      lambda self, site, name, base, w: surgery.LowRank(base, base, base),
      'have no common rank',
    ),
    (
      lambda self, site, name, base, w: surgery.LowRank(None, base),
      'expected a base, or a and b',
    ),
  ],
)
def test_what_apply_must_not_return_is_refused_at_attach(apply, message):
  with pytest.raises(surgery.SurgeryError, match=message):
    attached(apply)


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_arithmetic_is_float32_or_wider(dtype):
  kernel = numbers(4, 6, dtype=dtype)
  seen = []

  def apply(self, site, name, base, weights):
    del self, site, name
    seen.append(base.dtype.name)
    return base * weights['w'] / 3

  merged = values(surgery.merge(attached(apply, model(a__kernel=kernel))))[
    'a/kernel'
  ]
  assert {'float64' if dtype == 'float64' else 'float32'} == set(seen)
  assert dtype == merged.dtype.name
  expected = (kernel.astype('f8') / 3).astype(dtype)
  np.testing.assert_allclose(
    merged, expected, rtol=2 * np.finfo(dtype).eps, atol=0
  )


def test_stacked_layers_are_computed_one_by_one():
  kernel = numbers(3, 4, 6)
  one = surgery.attach(
    model(a__kernel=kernel),
    adapter(lambda self, site, name, base, w: base / jnp.linalg.norm(base)),
    to='a',
    stacked=1,
  )
  got = values(surgery.merge(one))['a/kernel']
  norms = np.linalg.norm(kernel.astype('f8').reshape(3, -1), axis=1)
  np.testing.assert_allclose(got, kernel / norms[:, None, None], rtol=3e-6)


def test_axes_come_as_inputs_and_outputs_whatever_the_layout_is():
  kernel = numbers(6, 5, 4)
  one = surgery.attach(
    model(a__kernel=kernel),
    adapter(lambda self, site, name, base, w: base * jnp.arange(6.0)),
    to='a',
    layout='oii',
  )
  got = values(surgery.merge(one))['a/kernel']
  np.testing.assert_allclose(
    got, kernel * np.arange(6.0)[:, None, None], rtol=1e-6
  )


def test_apply_reads_another_parameter_of_its_site():
  def apply(self, site, name, base, weights):
    del self, weights
    return base + site.base('bias') if name == 'kernel' else base

  kernel, bias = numbers(4, 6), numbers(6, seed=1)
  one = attached(
    apply,
    model(a__kernel=kernel, a__bias=bias),
    rewrites=('kernel', 'bias'),
  )
  got = values(surgery.merge(one))
  np.testing.assert_allclose(got['a/kernel'], kernel + bias, rtol=1e-6)
  np.testing.assert_array_equal(got['a/bias'], bias)
