"""Each example of the page about frameworks is run."""

import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

import surgery

eqx = pytest.importorskip('equinox')
pytest.importorskip('haiku')

PAGE = pathlib.Path(__file__).parents[2] / 'docs/frameworks.md'


def test_the_examples_run_one_after_another(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
  head, linen, net, equinox, *others = blocks
  names = {'__name__': 'page'}
  exec(head, names)
  exec(linen, names)
  assert isinstance(names['plain'], dict)
  exec(net, names)
  assert isinstance(names['plain'], nnx.Module)
  assert 9 == len(jax.tree.leaves(names['opt'].opt_state))
  exec(equinox, names)
  assert isinstance(names['plain'], eqx.nn.MLP)
  for block in others:
    exec(block, names)
  assert isinstance(names['nested'], surgery.AdaptedTree)
  np.testing.assert_allclose(
    names['call'](surgery.merge(names['tree']), names['x']),
    names['y'],
    rtol=1e-5,
  )
