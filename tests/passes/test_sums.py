"""Add, subtract, scale and matmul against plain numpy; live, in files, in blocks."""

import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.editing.rounding import rounded
from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  close,
  same,
  saved,
  values,
)


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
