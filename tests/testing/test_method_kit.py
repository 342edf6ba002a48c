"""The suite of merge methods finds what is wrong with one."""

import numpy as np
import pytest

import surgery
from surgery.methods import plugin as methods
from surgery.testing import MethodConformance


class Good(surgery.Method):
  """The smallest number at each place."""

  name = 'least'

  def combine(self, block, prepared):
    return np.min(block.tensors, axis=0)


class Undocumented(Good):
  """The same, with an option nobody says a word of."""

  scale: float = surgery.field(default=1.0)


class ByBlock(Good):
  """Depends on how it is cut."""

  def combine(self, block, prepared):
    return block.tensors[0] - block.tensors[0].mean()


class ByChance(Good):
  """Draws by itself."""

  def combine(self, block, prepared):
    return block.tensors[0] + np.random.default_rng().normal()


class First(Good):
  """The first model."""

  def combine(self, block, prepared):
    return block.tensors[0]


class Nan(Good):
  """Divides by zero in narrow dtypes."""

  def combine(self, block, prepared):
    return block.tensors[0] + 1e300


def suite(cls):
  class Plugin:
    @surgery.hookimpl
    def surgery_methods(self):
      return {'least': cls}

  class Suite(MethodConformance):
    plugin = Plugin
    name = 'least'
    symmetric = True
    refused = [({'nothing': 1}, 'has no option')]

  return Suite


@pytest.mark.parametrize(
  ('cls', 'broken'),
  [
    (Good, set()),
    (Undocumented, {'it_says_what_it_is'}),
    (ByBlock, {'blocks_are_the_whole', 'models_that_are_alike_stay'}),
    (ByChance, {'a_result_is_made_again', 'models_that_are_alike_stay'}),
    (First, {'the_order_of_models_does_not_matter'}),
    (Nan, {'the_dtype_stays'}),
  ],
)
def test_laws_find_what_is_wrong(cls, broken):
  found = suite(cls).broken()
  assert broken <= set(found), found
  if not broken:
    assert not found


class TestTies(MethodConformance):
  plugin = methods
  name = 'ties'
  options = {'density': 0.3}
  symmetric = True
  refused = [({'density': 0.0}, 'expected a value > 0')]


class TestDella(MethodConformance):
  plugin = methods
  name = 'della'
  options = {'density': 0.5}
  alike = False


class TestSlerp(MethodConformance):
  plugin = methods
  name = 'slerp'
  options = {'t': 0.3}
