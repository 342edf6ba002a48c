"""Tie and untie against plain numpy; live, in files, in blocks."""

from tests.passes.structure import array
from tests.passes.structure import elements as elements
from tests.recipes.models import (
  applied,
  same,
)


def test_tie_and_untie():
  net = {'embed': array(5, 3), 'head': array(5, 3).T.copy()}
  step = {'rules': 'embed -> head', 'transpose': True}
  after = applied(net, {'tie': step})
  same({'embed': net['embed']}, after)
  same(net, applied(after, {'untie': step}))
