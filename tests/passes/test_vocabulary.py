"""Resize-vocab against plain numpy; live, in files, in blocks."""

from typing import Any

import numpy as np
import pytest

import surgery
from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  close,
  same,
)


def test_resize_vocab():
  net = {'e': array(10, 4), 'k': array(4, 10)}
  after = applied(net, {'resize-vocab': {'select': 'e', 'size': 7}})
  same({'e': net['e'][:7], 'k': net['k']}, after)
  step = {'select': 'k', 'size': 12, 'axis': -1}
  after = applied(net, {'resize-vocab': step})
  mean = net['k'].astype('float64').mean(1, keepdims=True)
  new = np.concatenate([net['k'], mean.repeat(2, 1).astype('float32')], 1)
  close({'e': net['e'], 'k': new}, after, 1e-7)
  same({'k': net['k']}, {'k': after['k'][:, :10].copy()})
  step = {'select': 'e', 'size': 12, 'new': 'zero'}
  after = applied(net, {'resize-vocab': step})
  same({'e': np.pad(net['e'], ((0, 2), (0, 0))), 'k': net['k']}, after)
  step |= {'new': 'random', 'seed': 1, 'scale': 0.0}
  after = applied(net, {'resize-vocab': step})
  rows = net['e'].astype('float64').mean(0).astype('float32')
  close({'e': np.stack([rows, rows])}, {'e': after['e'][10:]}, 1e-6)


def test_a_number_of_tokens_becomes_a_multiple():
  net = {'e': array(10, 4), 'f': array(16, 4)}
  after = applied(net, {'resize-vocab': {'select': 'e', 'multiple-of': 8}})
  assert (16, 4) == after['e'].shape
  same({'k': net['e']}, {'k': after['e'][:10].copy()})
  step = {'select': '*', 'size': 17, 'multiple-of': 8, 'new': 'zero'}
  after = applied(net, {'resize-vocab': step})
  assert ((24, 4), (24, 4)) == (after['e'].shape, after['f'].shape)
  bad: Any
  for bad, message in (
    ({'select': 'f', 'multiple-of': 16}, r'f is float32\[16,4\]'),
    ({'select': 'f'}, 'give size, or multiple-of'),
    ({'select': 'f', 'multiple-of': 0}, '1 or more, found 0'),
    (
      {'select': 'f', 'size': 20, 'new': 'random', 'scale': np.inf},
      'scale: expected',
    ),
  ):
    with pytest.raises(surgery.SurgeryError, match=message):
      applied(net, {'resize-vocab': bad})


@pytest.mark.parametrize('new', ['mean', 'zero', 'random'])
def test_copies_of_an_embedding_stay_copies(new):
  table = array(100, 37)
  net = {'embed': table, 'head/kernel': table.T.copy(), 'a/b': table.copy()}
  step = {'size': 103, 'new': new, 'seed': 5}
  after = applied(
    net,
    {'resize-vocab': {'select': ['embed', 'a/b'], **step}},
    {'resize-vocab': {'select': 'head/kernel', 'axis': -1, **step}},
  )
  same({'k': after['embed']}, {'k': after['head/kernel'].T.copy()})
  same({'k': after['embed']}, {'k': after['a/b']})
  if new == 'random':
    other = applied(
      net, {'resize-vocab': {'select': 'embed', **step, 'seed': 6}}
    )
    assert (other['embed'][100:] != after['embed'][100:]).all()


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_no_token_is_made_of_nan(bad):
  net = {'e': array(10, 4)}
  net['e'][7, 2] = bad
  with pytest.raises(surgery.CastError, match='e: row 7 has .*surgery stats'):
    applied(net, {'resize-vocab': {'select': 'e', 'size': 12}})
  # Where nothing is made of it, it is copied as it is.
  after = applied(
    net, {'resize-vocab': {'select': 'e', 'size': 12, 'new': 'zero'}}
  )
  assert 1 == np.count_nonzero(~np.isfinite(after['e']))
