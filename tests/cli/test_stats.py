import json

import numpy as np
import pytest

from surgery.model.checkpoint import Checkpoint, Leaf


@pytest.fixture
def file(tmp_path):
  return save(
    tmp_path / 'm.safetensors',
    kernel=np.array([[3, 0], [0, 4]], 'float32'),
    scale=np.array([1, np.nan, -np.inf], 'float32'),
    steps=np.array([7, 9]),
  )


def save(file, **values):
  leaves: dict[tuple[str, ...], Leaf] = {
    ('net', name): Leaf(lambda v=v: v, v.shape, v.dtype.name)
    for name, v in values.items()
  }
  Checkpoint(leaves).write(file)
  return file


def test_a_table(file, surgery_cli):
  result = surgery_cli('stats', file)
  assert (0, '') == (result.code, result.err)
  lines = [line.split() for line in result.out.splitlines()]
  head = ['tensor', 'norm', 'mean', 'std', 'min', 'max', 'zeros', 'not']
  assert head == lines[0][:8]
  kernel = ['net/kernel', 'float32[2,2]', '5', '1.75', '1.785', '0', '4', '50%']
  assert kernel == lines[1]
  assert ['net/steps', 'int64[2]', '11.4', '8', '1', '7', '9', '0%'] == lines[3]
  assert (
    '1 NaN and 1 infinite of 3, first net/scale[1]'
    in result.out.splitlines()[2]
  )


def test_the_largest_come_first_and_alone(file, surgery_cli):
  out = surgery_cli('stats', file, '--top', 2, '--by', 'std').out
  assert ['net/kernel', 'net/steps'] == [
    line.split()[0] for line in out.splitlines()[1:]
  ]
  out = surgery_cli('stats', file, '--top', 1).out
  assert 'net/steps' == out.splitlines()[1].split()[0]


def test_json_has_no_infinity_and_names_the_first(file, surgery_cli):
  out = surgery_cli('stats', file, '--json', '--select', '**/scale').out
  data = json.loads(out, parse_constant=pytest.fail)
  [one] = data['tensors']
  assert (False, 'net/scale', 1, 1, [1], 1.0) == (
    data['finite'], one['path'], one['nan'], one['inf'], one['first'],
    one['max'],
  )  # fmt: skip


def test_ranks_are_shown_where_they_were_asked_for(file, surgery_cli):
  out = surgery_cli('stats', file, '--rank', '--select', '**/kernel').out
  assert ['1.98', '1.562', '4', '3'] == out.splitlines()[1].split()[-4:]
  out = surgery_cli('stats', file, '--rank', '--json').out
  first, *others = json.loads(out)['tensors']
  assert [4, 3] == pytest.approx(first['singular_values'])
  assert not any('singular_values' in one for one in others)


def test_finite_exits_with_1_at_the_first_nan(file, tmp_path, surgery_cli):
  result = surgery_cli('stats', file, '--finite')
  assert (
    1, 'net/scale[1] is not finite (1 NaN and 1 infinite of 3)\n', '',
  ) == (result.code, result.out, result.err)  # fmt: skip
  result = surgery_cli('stats', file, '--finite', '--select', '!**/scale', '-q')
  assert (0, '', '') == (result.code, result.out, result.err)
  fine = save(tmp_path / 'fine.msgpack', x=np.ones(2))
  result = surgery_cli('stats', fine, file, '--finite')
  assert (1, f'{fine}: no NaN or infinity in 1 tensor\n') == (
    result.code, result.err,
  )  # fmt: skip
  assert result.out.startswith(f'{file}: net/scale[1] is')
  [good, bad] = json.loads(
    surgery_cli('stats', fine, file, '--finite', '--json').out
  )
  assert (True, None, False) == (good['finite'], good['first'], bad['finite'])
  assert 'net/scale' == bad['first']['path']


def test_nan_in_a_scalar_has_no_index(tmp_path, surgery_cli):
  file = save(tmp_path / 'm.msgpack', x=np.array(np.nan))
  assert 'net/x is not finite (1 NaN of 1)\n' == (
    surgery_cli('stats', file, '--finite').out
  )


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (('--finite', '--top', '3'), 'does not go with --top'),
    (('--by', 'sigma'), '--by sigma needs --rank'),
    (('--by', 'colour'), 'colour'),
    (('--top', '0'), '0'),
  ],
)
def test_options_that_do_not_go_together(file, surgery_cli, options, said):
  result = surgery_cli('stats', file, *options)
  assert 2 == result.code
  assert said in result.err
