import inspect
import subprocess
import sys

import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.passes.freeze import freeze, unfreeze

HOST = surgery.default_host()
NAMES = [
  'attach',
  'cast',
  'detach',
  'disable',
  'drop',
  'enable',
  'freeze',
  'keep',
  'merge',
  'rename',
  'unfreeze',
]


def test_all_passes_are_offered_by_name():
  assert set(NAMES) <= set(HOST.passes)


@pytest.mark.parametrize('name', NAMES)
def test_a_pass_has_name_documentation_and_signature(name):
  one = HOST.passes[name]
  assert name == one.__name__
  assert inspect.getdoc(one)
  parameters = inspect.signature(one).parameters
  assert 'checkpoint' == next(iter(parameters))
  assert 'host' in parameters


def test_a_pass_is_the_function_of_its_module():
  assert freeze.__doc__ == HOST.passes['freeze'].__doc__
  assert inspect.signature(unfreeze) == inspect.signature(
    HOST.passes['unfreeze']
  )
  assert '<pass surgery.passes.enable.disable>' == repr(HOST.passes['disable'])


def test_a_pass_does_what_it_says():
  leaf = Leaf(lambda: np.zeros(2), (2,), 'float64')
  ckpt = Checkpoint({('net', 'a'): leaf, ('net', 'b'): leaf})
  frozen = HOST.passes['freeze'](ckpt, 'net/a', host=HOST)
  assert [False, True] == [leaf.trainable for leaf in frozen.values()]


def test_listing_the_passes_imports_neither_jax_nor_numpy():
  program = """
import sys
import surgery
assert 'merge' in surgery.default_host().passes
assert not {'jax', 'numpy', 'surgery.passes.merge'} & set(sys.modules)
"""
  subprocess.run([sys.executable, '-c', program], check=True)


@pytest.mark.parametrize('name', ['cast', 'drop', 'keep', 'rename', 'freeze'])
def test_passes_without_arithmetic_of_adapters_import_no_jax(name):
  program = f"""
import sys
import surgery
assert surgery.default_host().passes[{name!r}].__doc__
assert not {{'jax', 'blox'}} & set(sys.modules)
"""
  subprocess.run([sys.executable, '-c', program], check=True)


def test_a_host_without_plugins_has_no_passes():
  host = surgery.Host(entry_points=False, block=['passes', 'maps'])
  assert {} == host.passes
