"""Comparing checkpoints: values against numpy, block by block."""

import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.looking import diff
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
  grid,
)
from surgery.model.layers import LayerType
from surgery.model.manifest import Manifest

HOST = surgery.Host()


def leaf(value, **options):
  if not isinstance(value, np.ndarray):
    return Leaf(lambda: value, **options)
  return Leaf(
    lambda: value,
    value.shape,
    value.dtype.name,
    part=lambda index: value[index],
    **options,
  )


NOTHING = Manifest()


def checkpoint(manifest=NOTHING, **values):
  leaves = {
    tuple(name.split('__')): v if isinstance(v, Leaf) else leaf(v)
    for name, v in values.items()
  }
  return Checkpoint(leaves, manifest)


def only(a, b):
  """Compares two arrays or leaves."""
  [one] = diff.diff(checkpoint(x=a), checkpoint(x=b), host=HOST)
  return one


def oracle(a, b):
  """max |a-b|, ‖a-b‖/‖a‖, cosine and the share that changed, by numpy."""
  a, b = (v.astype('float64').reshape(-1) for v in (a, b))
  return (
    np.abs(a - b).max(),
    np.linalg.norm(a - b) / np.linalg.norm(a),
    a @ b / (np.linalg.norm(a) * np.linalg.norm(b)),
    np.mean(a != b),
  )


def figures(one):
  f = one.figures
  return f.max_abs, f.relative, f.cosine, f.share


def normal(*shape, seed=0, dtype='float32'):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.parametrize(
  'dtype',
  ['float32', 'float16', 'float64', 'bfloat16', 'float8_e4m3fn', 'int8'],
)
def test_figures_are_those_of_numpy(dtype):
  dtype = getattr(ml_dtypes, dtype, dtype)
  a = (normal(40, 30) * 9).astype(dtype)
  b = (normal(40, 30, seed=1) * 9).astype(dtype)
  np.testing.assert_allclose(oracle(a, b), figures(only(a, b)), rtol=1e-12)


def test_figures_are_those_of_the_whole_where_one_block_of_many_differs():
  a = normal(3, BLOCK // 2 + 7)
  b = a.copy()
  b[2, 5] += 1
  assert 3 <= len(list(grid(a.shape)))
  one = only(a, b)
  np.testing.assert_allclose(oracle(a, b), figures(one), rtol=1e-12)
  assert 1 == one.figures.changed


def test_leaves_in_one_piece_are_compared_with_leaves_in_blocks():
  a = normal(3, BLOCK // 2 + 7)
  whole = Leaf(lambda: a + 1, a.shape, 'float32')
  one = only(leaf(a), whole)
  np.testing.assert_allclose(oracle(a, a + 1), figures(one), rtol=1e-12)


def test_equal_tensors_are_read_once_and_need_no_figures():
  a = normal(3, BLOCK)
  reads = []
  watched = leaf(a).replace(
    load=lambda: a, part=lambda i: reads.append(i) or a[i]
  )
  one = only(watched, a.copy())
  assert one.equal
  assert not one.differs()
  assert list(grid(a.shape)) == reads
  assert (0, 0.0, 0.0) == (
    one.figures.changed,
    one.figures.max_abs,
    one.figures.relative,
  )


def test_equal_nans_are_equal():
  a = np.array([1, np.nan, np.inf, -np.inf], 'float32')
  assert not only(a, a.copy()).differs()


def test_equal_nans_take_no_part_in_figures():
  a = np.array([3, np.nan, np.inf, 4], 'float32')
  b = np.array([3, np.nan, np.inf, 5], 'float32')
  f = only(a, b).figures
  assert (1, 1.0, 1 / 5, 0) == (f.changed, f.max_abs, f.relative, f.nonfinite)
  assert math.isclose(29 / (5 * math.sqrt(34)), f.cosine)


@pytest.mark.parametrize('other', [np.nan, np.inf, -np.inf])
def test_what_is_finite_in_one_only_is_infinitely_far(other):
  a = np.array([1, 2], 'float32')
  b = np.array([1, other], 'float32')
  for one in (only(a, b), only(b, a)):
    assert 1 == one.figures.nonfinite == one.figures.changed
    assert math.inf == one.figures.max_abs == one.figures.relative
    assert one.differs(1e9)


def test_other_bits_of_a_nan_and_of_a_zero_differ_unless_tolerated():
  a = np.array([0x7FC00000, 0, 0x3F800000], 'uint32').view('float32')
  b = np.array([0x7FC00001, 0x80000000, 0x3F800000], 'uint32').view('float32')
  one = only(a, b)
  assert 2 == one.figures.changed
  assert (0.0, 0.0) == (one.figures.max_abs, one.figures.relative)
  assert one.differs()
  assert not one.differs(1e-12)


def test_different_dtypes_are_compared_by_value():
  a = np.array([1, 2.5, np.nan], 'float32')
  one = only(a, a.astype(ml_dtypes.bfloat16))
  assert 0 == one.figures.changed
  assert one.differs()
  assert not one.differs(1e-9)


def test_rounding_to_another_dtype_has_its_error():
  a = normal(64, 32)
  b = a.astype(ml_dtypes.bfloat16)
  one = only(a, b)
  np.testing.assert_allclose(oracle(a, b), figures(one), rtol=1e-12)
  assert 1e-3 < one.figures.relative < 3e-3
  assert not one.differs(3e-3)
  assert one.differs(1e-3)


@pytest.mark.parametrize(
  ('a', 'b', 'apart'),
  [
    (np.array([2**53 + 1]), np.array([2**53]), 1.0),
    (np.array([-(2**62)]), np.array([2**62]), 2.0**63),
    (np.array([2**64 - 1], 'uint64'), np.array([2**64 - 3], 'uint64'), 2.0),
    (np.array([200], 'uint8'), np.array([-100], 'int8'), 300.0),
  ],
)
def test_distances_of_integers_are_exact(a, b, apart):
  one = only(a, b)
  assert (1, apart) == (one.figures.changed, one.figures.max_abs)


def test_booleans_and_complex_numbers_have_figures():
  a, b = np.array([True, False, True]), np.array([True, True, True])
  assert (1, 1.0) == (only(a, b).figures.changed, only(a, b).figures.max_abs)
  a = np.array([3 + 4j, 0], 'complex64')
  f = only(a, np.array([3 + 4j, 5j], 'complex64')).figures
  assert (1, 5.0, 1.0) == (f.changed, f.max_abs, f.relative)
  assert math.isclose(1 / math.sqrt(2), f.cosine)


def test_large_numbers_do_not_overflow():
  a = np.array([1e-3, 3e200, 4e200])
  b = np.array([1e-3, 3e200, 8e200])
  f = only(a, b).figures
  assert 4e200 == f.max_abs
  assert math.isclose(0.8, f.relative)
  assert math.isclose(41 / (5 * math.sqrt(73)), f.cosine)


def test_zeros_have_no_cosine_and_are_infinitely_far_from_others():
  a, b = np.zeros(2, 'float32'), np.ones(2, 'float32')
  f = only(a, b).figures
  assert (None, math.inf, 1.0) == (f.cosine, f.relative, f.share)
  f = only(b, a).figures
  assert (None, 1.0) == (f.cosine, f.relative)


def test_empty_tensors_are_equal():
  assert not only(
    np.zeros((0, 3), 'float32'), np.zeros((0, 3), 'float32')
  ).differs()


def test_shapes_that_differ_are_said_and_not_compared():
  one = only(np.zeros((2, 3), 'float32'), np.zeros((3, 2), 'float32'))
  assert not one.comparable
  assert one.figures is None
  assert one.differs(1e9)


@pytest.mark.parametrize(
  ('a', 'b', 'equal'),
  [
    (3, 3, True),
    (3, 4, False),
    ('x', 'x', True),
    (None, None, True),
    (None, 0, False),
    (math.nan, math.nan, True),
    ({}, {}, True),
    ([1, (2,)], [1, (2,)], True),
    ([1, (2,)], [1, [2]], False),
  ],
)
def test_plain_values_are_compared_by_equality(a, b, equal):
  one = only(a, b)
  assert equal == one.equal == (not one.differs()) == (not one.differs(1.0))


def test_a_value_and_a_tensor_differ():
  assert only(3, np.array(3)).differs(1.0)


def test_tensors_of_one_only_come_in_order():
  a = checkpoint(x=np.zeros(1), y=np.zeros(1))
  b = checkpoint(w=np.zeros(1), y=np.zeros(1))
  found = list(diff.diff(a, b, host=HOST))
  assert [('x',), ('y',), ('w',)] == [one.path for one in found]
  assert [True, False, True] == [one.differs(1e9) for one in found]
  assert (found[0].b, found[2].a) == (None, None)


def test_flags_metadata_and_kinds_of_keys_are_told():
  data = np.zeros(2, 'uint32')
  a = leaf(data, metadata={'m': (1,), 'gone': None})
  b = leaf(data, trainable=False, key='rbg', metadata={'m': [1]})
  one = only(a, b)
  assert one.equal
  assert one.differs(1e9)
  said = [str(n) for n in one.notes]
  assert [
    'trainable: True → False',
    'key: only in b (rbg)',
    "metadata 'm': (1,) → [1]",
    "metadata 'gone': only in a (None)",
  ] == said


def test_selectors_choose_from_both():
  a = checkpoint(net__x=np.zeros(1), net__y=np.zeros(1))
  b = checkpoint(net__z=np.zeros(1))
  found = diff.diff(a, b, ['**/x', 'net/z'], host=HOST)
  assert [('net', 'x'), ('net', 'z')] == [one.path for one in found]
  with pytest.raises(surgery.SelectorError, match='Nearest: net/x'):
    diff.diff(a, b, 'net/xx', host=HOST)


def test_types_of_layers_may_choose_and_are_compared_where_both_know_them():
  a = Manifest(layer_types={('net',): LayerType(('Linear',))})
  b = Manifest(
    layer_types={('net',): LayerType(('Conv',)), ('z',): LayerType(())}
  )
  ours = checkpoint(a, net__x=np.zeros(1), y=np.zeros(1))
  found = diff.diff(ours, checkpoint(y=np.zeros(1)), 'type:Linear', host=HOST)
  assert [('net', 'x')] == [one.path for one in found]
  [said] = diff.manifests(a, b)
  assert 'type of layer net' == said.what
  assert [] == diff.manifests(a, Manifest())


ADAPTER = {
  'name': 'x',
  'type': 'lora',
  'config': {'rank': 2, 'alpha': None},
  'enabled': True,
  'seed': 1,
  'sites': [1, 2],
}


def test_histories_and_seeds_are_no_difference():
  a = Manifest(adapters=(ADAPTER,), history=({'pass': 'attach'},))
  b = Manifest(adapters=({**ADAPTER, 'seed': 2, 'to': '**'},))
  assert [] == diff.manifests(a, b)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'config': {'rank': 3, 'alpha': None}}, "adapter 'x': rank: 2 → 3"),
    ({'enabled': False}, "adapter 'x': enabled: True → False"),
    ({'type': 'dora'}, "adapter 'x': type: lora → dora"),
    ({'sites': [1]}, "adapter 'x': sites: 2 → 1"),
    ({'sites': [1, 3]}, "adapter 'x': sites: 2, others → 2"),
  ],
)
def test_what_differs_in_an_adapter_is_told(change, said):
  a, b = ((one,) for one in (ADAPTER, {**ADAPTER, **change}))
  [found] = diff.manifests(Manifest(adapters=a), Manifest(adapters=b))
  assert said == str(found)


def test_adapters_of_one_only_and_their_order_are_told():
  y = {**ADAPTER, 'name': 'y'}
  [one] = diff.manifests(Manifest(), Manifest(adapters=(ADAPTER,)))
  assert "adapter 'x': only in b (lora)" == str(one)
  [one] = diff.manifests(
    Manifest(adapters=(ADAPTER, y)), Manifest(adapters=(y, ADAPTER))
  )
  assert "order of adapters: ['x', 'y'] → ['y', 'x']" == str(one)


def test_other_entries_of_the_manifest_are_told():
  a = Manifest(locked=True, extra={'note': 1})
  b = Manifest(locked=False, extra={'note': 2})
  assert ['locked', "extra 'note'"] == [d.what for d in diff.manifests(a, b)]


PROGRAM = """
import resource, sys
import surgery
from surgery.looking import diff
a, b = (surgery.open(f) for f in sys.argv[1:])
list(diff.diff(a.replace(leaves={}), b.replace(leaves={}), host=surgery.Host()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[one] = diff.diff(a, b, host=surgery.Host())
assert one.figures.changed == one.figures.size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert 'jax' not in sys.modules
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='units of ru_maxrss')
def test_memory_is_that_of_a_few_blocks(tmp_path):
  # 128 MB each; both mapped files together count while a block is in use.
  for name, seed in (('a', 0), ('b', 1)):
    value = np.full((32, BLOCK), seed, 'float32')
    checkpoint(x=value).write(tmp_path / f'{name}.msgpack')
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, 'a.msgpack', 'b.msgpack'],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
  )
  assert '' == done.stderr
  assert int(done.stdout) < 48 << 10
