"""Factorise against plain numpy; live, in files, in blocks."""

import numpy as np
import pytest

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  close,
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
