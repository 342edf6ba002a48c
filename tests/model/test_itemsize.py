"""How many bytes an element takes, for every dtype that there is."""

import ml_dtypes
import numpy as np
import pytest

from surgery.files import arrays
from surgery.model.checkpoint import (
  Leaf,
)
from surgery.model.sizes import (
  itemsize,
)

ML_DTYPES = [
  name
  for name in dir(ml_dtypes)
  if isinstance(getattr(ml_dtypes, name), type)
  and issubclass(getattr(ml_dtypes, name), np.generic)
]


@pytest.mark.parametrize('name', ML_DTYPES)
def test_dtypes_of_ml_dtypes(name):
  dtype = np.dtype(getattr(ml_dtypes, name))

  assert dtype.itemsize == itemsize(dtype.name)


@pytest.mark.parametrize('name', arrays.DTYPES)
def test_dtypes_of_files(name):
  assert arrays.DTYPES[name].itemsize == itemsize(name)


@pytest.mark.parametrize('code', np.typecodes['AllInteger'] + 'efdgFDG?')
def test_dtypes_of_numpy(code):
  dtype = np.dtype(code)

  assert dtype.itemsize == itemsize(dtype.name)


def test_a_leaf_counts_its_bytes():
  assert 24 == Leaf(lambda: None, (3,), 'float64').nbytes
