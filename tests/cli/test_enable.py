import jax.numpy as jnp
import pytest

import surgery
from tests.cli.saved import assert_same, values


@pytest.fixture
def disabled(adapted, surgery_cli):
  file = adapted.with_name('disabled.msgpack')
  assert 0 == surgery_cli('disable', adapted, '-o', file).code
  return file


def test_layers_get_what_the_adapter_answers_again(
  model, adapted, disabled, out, surgery_cli
):
  assert 0 == surgery_cli('enable', disabled, '-o', out).code
  expected, _ = model.net(surgery.load(adapted), model.x)
  actual, _ = model.net(surgery.load(out), model.x)
  assert jnp.array_equal(expected, actual)
  assert_same(values(adapted), values(out))
  assert 0 == surgery_cli('diff', adapted, out).code


def test_an_unknown_adapter_is_refused(disabled, out, surgery_cli):
  result = surgery_cli('enable', disabled, '--adapter', 'defualt', '-o', out)
  assert 3 == result.code
  assert "there is no adapter 'defualt'. Did you mean 'default'?" in result.err
