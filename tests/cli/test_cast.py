import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
)
from tests.cli.saved import assert_same, planned, steps, values


def cast(before, dtype):
  return {
    p: v.astype(dtype) if v.dtype == 'float32' else v for p, v in before.items()
  }


@pytest.mark.parametrize(
  ('name', 'dtype'),
  [('bf16', ml_dtypes.bfloat16), ('float16', 'float16'), ('f64', 'float64')],
)
def test_floating_tensors_are_rounded_as_numpy_does(
  model, out, surgery_cli, name, dtype
):
  assert 0 == surgery_cli('cast', model.file, '--to', name, '-o', out).code
  assert_same(cast(values(model.file), dtype), values(out))


def test_some_are_kept_and_some_get_another_dtype(model, out, surgery_cli):
  args = ('--to', 'bf16', '--keep', '**/bias', '--keep', '**/query/kernel=f16')
  assert 0 == surgery_cli('cast', model.file, *args, '-o', out).code
  after = values(out)
  assert ['float32', 'float16', 'bfloat16'] == [
    after[f'model/net/{path}'].dtype.name
    for path in ('value/bias', 'query/kernel', 'value/kernel')
  ]
  [(verb, said)] = steps(out)
  assert ('cast', ['**/bias', '**/query/kernel=f16']) == (verb, said['keep'])


def test_the_plan_says_how_it_is_computed(tmp_path, out, surgery_cli):
  value = np.ones((3, BLOCK), 'float32')
  file = tmp_path / 'large.msgpack'
  Checkpoint({('x',): Leaf(lambda: value, value.shape, 'float32')}).write(file)
  plan = planned(surgery_cli, 'cast', file, '--to', 'bf16', '-o', out)
  [row] = plan['tensors']
  assert ('computed', True, 6 * BLOCK) == (
    row['what'],
    row['blocks'],
    row['bytes'],
  )
  assert 16 * BLOCK == plan['memory']


def test_an_overflow_is_refused_unless_allowed(tmp_path, out, surgery_cli):
  value = np.array([1, 1e30], 'float32')
  file = tmp_path / 'm.msgpack'
  Checkpoint({('a', 'x'): Leaf(lambda: value, (2,), 'float32')}).write(file)
  args = ('cast', file, '--to', 'f16', '-o', out)
  result = surgery_cli(*args)
  assert 3 == result.code
  assert 'a/x' in result.err
  assert not out.exists()
  assert 0 == surgery_cli(*args, '--allow-overflow').code
  assert [1, np.inf] == values(out)['a/x'].tolist()


def test_an_adapter_in_its_own_file_is_cast_too(
  adapted, tmp_path, out, surgery_cli
):
  alone = tmp_path / 'a.msgpack'
  surgery_cli('extract', adapted, '-o', alone)
  assert 0 == surgery_cli('cast', alone, '--to', 'bf16', '-o', out).code
  assert {'bfloat16'} == {leaf.dtype for leaf in surgery.open(out).values()}


def test_an_unknown_dtype_is_refused(model, out, surgery_cli):
  result = surgery_cli('cast', model.file, '--to', 'bf61', '-o', out)
  assert 3 == result.code
  assert 'bf61' in result.err
