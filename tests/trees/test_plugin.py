"""A framework of somebody else's, registered by the hook."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.contract.hookspecs import hookimpl


class Model:
  """A model that JAX cannot flatten."""

  def __init__(self, table):
    self.table = table

  def __call__(self, x):
    return x @ self.table['in', 'kernel'] @ self.table['out', 'kernel']


class Ours(surgery.Tree):
  name = 'a model of ours'

  def owns(self, value):
    return isinstance(value, Model)

  def slots(self, value):
    return {path: surgery.Slot(v) for path, v in value.table.items()}

  def build(self, like, values, rest=None):
    return Model(dict(values))

  def layers(self, model, example, kwargs):
    known = surgery.LayerType(('Projection',), {'kernel': 'io'})
    return {path[:-1]: known for path in model.table}


class Plugin:
  @hookimpl
  def surgery_trees(self):
    return {'ours': Ours()}


HOST = surgery.Host(plugins=[Plugin()])


def model() -> Any:
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), 'float32')
  return Model({('in', 'kernel'): draw(4, 8), ('out', 'kernel'): draw(8, 2)})


def test_verbs_take_a_model_of_a_framework_that_a_plugin_offers():
  x = jnp.ones((3, 4))
  lora = surgery.LoRA(rank=2)
  begun = surgery.attach(model(), lora, to='type:Projection', host=HOST)
  assert 2 == len(surgery.adapters(begun)[0].sites)
  grown = jax.tree.map(lambda w: w + 0.1, surgery.weights(begun))
  tree: Any = surgery.with_weights(begun, 'default', grown)
  merged = surgery.merge(tree, host=HOST)
  assert isinstance(merged, Model)
  np.testing.assert_allclose(
    merged(x), surgery.factored(tree)(x), rtol=1e-5, atol=1e-6
  )


def test_a_model_that_nobody_knows_is_refused():
  with pytest.raises(surgery.SurgeryError, match='expected bx.Params'):
    surgery.attach(model(), surgery.LoRA(rank=2), to='all')


def test_what_is_no_tree_is_a_failure_of_the_plugin():
  class Wrong:
    @hookimpl
    def surgery_trees(self):
      return {'ours': Model}

  host = surgery.Host(plugins=[Wrong()])
  with pytest.raises(surgery.PluginError, match=r'a subclass of surgery\.Tree'):
    surgery.freeze(model(), host=host)
