"""What an entry point of `surgery.plugins` may name: module, class, object."""

import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf

MODULE = """
  import surgery

  @surgery.hookimpl
  def surgery_freeze_param(site, policy):
    return site.name == 'bias' if policy == 'mine' else None
"""

CLASS = """
  import surgery

  made = []

  class Mine:
    def __init__(self):
      made.append(self)

    @surgery.hookimpl
    def surgery_freeze_param(self, site, policy):
      return site.name == 'bias' if policy == 'mine' else None

  plugin = Mine()
"""


def frozen(host):
  one = np.ones(2, np.float32)
  model = Checkpoint(
    {
      ('net', name): Leaf(lambda: one, (2,), 'float32')
      for name in ('kernel', 'bias')
    }
  )
  found = surgery.freeze(model, policy='mine', host=host)
  return {path[-1]: leaf.trainable for path, leaf in found.items()}


@pytest.mark.parametrize(
  ('source', 'value'),
  [
    (MODULE, 'form_a'),
    (CLASS, 'form_b:Mine'),
    (CLASS, 'form_c:plugin'),
  ],
)
def test_a_module_a_class_and_an_object_are_plugins(installed, source, value):
  module = value.partition(':')[0]
  installed(f'dist-{module}', module, source, plugins=f'mine = {value}')
  host = surgery.Host(only=['mine'])
  assert {'kernel': False, 'bias': True} == frozen(host)
  [info] = [one for one in host.plugins() if one.name == 'mine']
  assert ('loaded', ('surgery_freeze_param',)) == (info.state, info.hooks)


def test_a_class_is_made_once_a_host(installed):
  installed('dist-once', 'form_once', CLASS, plugins='mine = form_once:Mine')
  host = surgery.Host(only=['mine'])
  frozen(host)
  frozen(host)
  import form_once  # type: ignore[import-not-found]

  # One of them is `plugin`, which the module makes itself.
  assert 2 == len(form_once.made)
