import json

import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf


def save(file, **values):
  """Writes arrays and plain values of the layer `net`."""
  leaves: dict[tuple[str, ...], Leaf] = {}
  for name, value in values.items():
    array = isinstance(value, np.ndarray)
    leaves[('net', name)] = Leaf(
      lambda value=value: value,
      value.shape if array else None,
      value.dtype.name if array else None,
    )
  Checkpoint(leaves).write(file)
  return file


@pytest.fixture
def two(tmp_path):
  """Two files: one tensor is equal, two differ, others are in one only."""
  same = np.arange(6, dtype='float32').reshape(2, 3)
  a = save(
    tmp_path / 'a.msgpack',
    same=same,
    near=np.full(8, 2, 'float32'),
    far=np.array([3, 4], 'float32'),
    step=3,
    left=same,
  )
  b = save(
    tmp_path / 'b.msgpack',
    same=same,
    near=np.array([2, 2, 2, 2, 2, 2, 2, 2.5], 'float32'),
    far=np.array([3, -4], 'float32'),
    step=4,
    right=np.zeros(1, 'float32'),
  )
  return a, b


def test_equal_files(model, adapted, surgery_cli):
  result = surgery_cli('diff', adapted, adapted)
  assert (0, 'equal: 10 tensors\n', '') == (
    result.code,
    result.out,
    result.err,
  )


def test_what_differs_is_listed_with_figures(two, surgery_cli):
  result = surgery_cli('diff', *two)
  assert (1, '') == (result.code, result.err)
  lines = result.out.splitlines()
  assert [
    'net/near   float32[8]    max 0.5, relative 0.0884, cosine 0.996801, '
    'changed 12.5%',
    'net/far    float32[2]    max 8, relative 1.6, cosine -0.280000, '
    'changed 50%',
    'net/step   value         3 → 4',
    'net/left   float32[2,3]  only in a',
    'net/right  float32[1]    only in b',
    '5 of 6 tensors differ, 1 of them only in a, 1 of them only in b',
  ] == lines


def test_the_worst_come_first_and_alone_on_request(two, surgery_cli):
  lines = surgery_cli('diff', *two, '**/{near,far,same}', '--top', 1).out
  assert ['net/far', '2 of 3 tensors differ'] == [
    line.split('  ')[0] for line in lines.splitlines()
  ]


def test_json_has_numbers(two, surgery_cli):
  result = surgery_cli('diff', *two, '--json')
  assert 1 == result.code
  data = json.loads(result.out)
  assert (*map(str, two), False, 6, 5) == tuple(
    data[k] for k in ('a', 'b', 'equal', 'compared', 'differing')
  )
  far = next(t for t in data['tensors'] if t['path'] == 'net/far')
  assert {
    'max_abs': 8.0,
    'relative': 1.6,
    'cosine': -0.28,
    'changed': 0.5,
    'nonfinite': 0,
  } == pytest.approx(far['figures'])
  only = {t['path']: t['only_in'] for t in data['tensors'] if t['only_in']}
  assert {'net/left': 'a', 'net/right': 'b'} == only


def test_json_has_no_infinity(tmp_path, surgery_cli):
  a = save(tmp_path / 'a.msgpack', x=np.zeros(2, 'float32'))
  b = save(tmp_path / 'b.msgpack', x=np.array([0, np.nan], 'float32'))
  text = surgery_cli('diff', a, b, '--json').out
  [one] = json.loads(text, parse_constant=pytest.fail)['tensors']
  assert (None, 1) == (one['figures']['max_abs'], one['figures']['nonfinite'])
  assert 'max inf, relative inf' in surgery_cli('diff', a, b).out


def test_a_tolerance_lets_small_errors_and_other_dtypes_pass(
  tmp_path, surgery_cli
):
  value = np.linspace(1, 2, 100, dtype='float32')
  a = save(tmp_path / 'a.msgpack', x=value)
  b = save(tmp_path / 'b.msgpack', x=value.astype(ml_dtypes.bfloat16))
  assert 1 == surgery_cli('diff', a, b).code
  assert 1 == surgery_cli('diff', a, b, '--tolerance', '1e-4').code
  result = surgery_cli('diff', a, b, '--tolerance', '1e-2')
  assert (0, 'equal within 0.01: 1 tensors\n') == (result.code, result.out)


def test_selectors_leave_the_rest_aside(two, surgery_cli):
  assert 0 == surgery_cli('diff', *two, 'net/same').code
  assert 1 == surgery_cli('diff', *two, 'net/right').code


def test_flags_and_adapters_are_compared(model, adapted, tmp_path, surgery_cli):
  frozen, off = tmp_path / 'f.msgpack', tmp_path / 'off.msgpack'
  surgery.save(frozen, surgery.freeze(surgery.load(adapted)))
  surgery.save(off, surgery.disable(surgery.load(adapted)))
  said = surgery_cli('diff', adapted, frozen, '**/query/bias').out
  assert 'trainable: True → False' in said
  result = surgery_cli('diff', adapted, off)
  assert 1 == result.code
  assert (
    "adapter 'default': enabled: True → False\n1 difference beside tensors\n"
  ) == result.out


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (('nowhere.msgpack',), 3, 'nowhere.msgpack: No such file or directory.'),
    ((), 2, "Missing argument 'B'"),
    (('{b}', 'net/sume'), 3, "selector 'net/sume' matches nothing"),
    (('{b}', '--top', '0'), 2, '--top'),
    (('{b}', '--tolerance', '-1'), 2, '--tolerance'),
    (('{b}', '--tolerance', 'nan'), 2, 'expected a number, found nan'),
  ],
)
def test_bad_input_is_refused_with_its_reason(
  two, surgery_cli, arguments, code, message
):
  a, b = two
  result = surgery_cli('diff', a, *(x.format(b=b) for x in arguments))
  assert code == result.code
  assert message in result.err
