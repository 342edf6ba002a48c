"""Fold-norm against plain numpy; live, in files, in blocks."""

import numpy as np
import pytest

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  close,
)


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
