"""`surgery explain`."""

import json
import sys

import pytest

CODE = """
import blox as bx, jax, jax.numpy as jnp

class Net(bx.Module):
  def __init__(self, graph):
    super().__init__(graph)
    self.query = bx.Linear(graph.child('query'), 8, rng=None)
    self.value = bx.Linear(graph.child('value'), 8, rng=None)

  def __call__(self, params, x):
    q, params = self.query(params, x)
    kernel, params = self.value.get_param(params, 'kernel')
    return jax.nn.relu(q) @ jnp.tanh(kernel), params

def example():
  return Net(bx.Graph('model').child('net')), jnp.ones((2, 6))

def wrong():
  return 3

def failing():
  raise ValueError('no weights here')

def narrow():
  return Net(bx.Graph('model').child('net')), jnp.ones((2, 5))
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
  (tmp_path / 'some_model.py').write_text(CODE)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.delitem(sys.modules, 'some_model', raising=False)


def test_each_parameter_is_explained(surgery_cli, adapted, code):
  out = surgery_cli('explain', adapted, 'some_model:example').out
  lines = [line.split(None, 1) for line in out.splitlines()]
  assert [
    ['model/net/query/kernel', 'factored'],
    ['model/net/value/kernel', 'dense (tanh)'],
  ] == lines


def test_json_has_the_same(surgery_cli, adapted, code):
  out = surgery_cli('explain', adapted, 'some_model:example', '--json').out
  found = json.loads(out)
  assert {'state': 'factored', 'factored': 1, 'dense': {}} == found[
    'model/net/query/kernel'
  ]
  assert {'tanh': 1} == found['model/net/value/kernel']['dense']


@pytest.mark.parametrize(
  ('what', 'exit_code', 'message'),
  [
    ('some_model', 2, 'expected MODULE:FUNCTION'),
    (
      'some_model:failing',
      3,
      'error: some_model:failing() raises ValueError: no weights here',
    ),
    ('some_model:narrow', 3, 'some_model:narrow: the model raises TypeError: '),
    ('no_such_module:f', 2, "No module named 'no_such_module'"),
    ('some_model:nothing', 2, "has no attribute 'nothing'"),
    ('some_model:wrong', 3, r'some_model:wrong() returned int, expected'),
  ],
)
def test_what_is_no_model_is_refused(
  surgery_cli, adapted, code, what, exit_code, message
):
  result = surgery_cli('explain', adapted, what)
  assert exit_code == result.code
  assert message in ' '.join(result.err.split())
