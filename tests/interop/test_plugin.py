"""Adapters of other programs that a plugin reads."""

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery.passes import extract


class Rows:
  """Files with a tensor `rows`: a rank one update of one kernel."""

  def __init__(self, result=None):
    self._result = result

  def knows(self, alone):
    return set(alone) == {('a',), ('b',)}

  def bound(self, alone, base, *, names, host):
    if self._result is not None:
      return self._result
    [path] = [p for p in base if p[-1] == 'kernel']
    adapted = surgery.attach(
      base, surgery.LoRA(rank=1, alpha=1), to='/'.join(path[:-1]), host=host
    )
    mine = extract.extract(adapted, host=host)
    new = {'lora_a': alone['a',], 'lora_b': alone['b',]}
    leaves = {
      p: new[p[-1]].replace(metadata=leaf.metadata) for p, leaf in mine.items()
    }
    return mine.replace(leaves=leaves)


def host_with(one):
  class Plugin:
    @surgery.hookimpl
    def surgery_adapter_files(self):
      return {'rows': one}

  return surgery.Host(plugins=[Plugin()])


@pytest.fixture
def params():
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.zeros((3, 2)))
  return params.locked()


@pytest.fixture
def file(tmp_path):
  a, b = np.array([[1], [2], [3]], 'f4'), np.array([[4, 5]], 'f4')
  save_file({'a': a, 'b': b}, tmp_path / 'rows.safetensors')
  return tmp_path / 'rows.safetensors'


def test_a_plugin_reads_adapters_of_another_program(params, file):
  found = surgery.load_adapter(file, params, host=host_with(Rows()))
  expected = np.array([[4, 5], [8, 10], [12, 15]])
  merged = surgery.merge(found)['net', 'kernel'].value
  np.testing.assert_array_equal(merged, expected)


def test_a_plugin_that_returns_something_else_is_named(params, file):
  with pytest.raises(surgery.PluginError, match="'rows': bound returned 7"):
    surgery.load_adapter(file, params, host=host_with(Rows(7)))


def test_an_offer_without_its_methods_is_refused(params, file):
  with pytest.raises(surgery.PluginError, match='an object with knows'):
    surgery.load_adapter(file, params, host=host_with(object()))


def test_a_file_that_nothing_knows_is_no_adapter(params, file):
  with pytest.raises(surgery.FormatError, match='not the file of an adapter'):
    surgery.load_adapter(file, params)
