import jax.numpy as jnp

import surgery
from tests.cli.saved import assert_same, values


def test_layers_get_the_base(model, adapted, out, surgery_cli):
  assert 0 == surgery_cli('disable', adapted, '-o', out).code
  params = surgery.load(out)
  expected, _ = model.net(model.params, model.x)
  actual, _ = model.net(params, model.x)
  assert jnp.array_equal(expected, actual)
  assert [False] == [info.enabled for info in surgery.adapters(params)]
  assert_same(values(adapted), values(out))


def test_one_of_two_is_switched_off(adapted, tmp_path, out, surgery_cli):
  two = tmp_path / 'two.msgpack'
  args = ('attach', adapted, '--adapter', 'lora', '--to', '**/query')
  surgery_cli(*args, '--set', 'rank=1', '--name', 'b', '-o', two)
  result = surgery_cli('disable', two, '--adapter', 'b', '-o', out)
  assert 0 == result.code, result.err
  infos = surgery.adapters(surgery.load(out))
  assert {'default': True, 'b': False} == {i.name: i.enabled for i in infos}
  assert (
    "adapter 'b': enabled: True → False" in surgery_cli('diff', two, out).out
  )


def test_a_model_without_adapters_is_refused(model, out, surgery_cli):
  result = surgery_cli('disable', model.file, '-o', out)
  assert 3 == result.code
  assert 'no adapter is attached' in result.err
