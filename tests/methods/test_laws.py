"""Laws of all methods that come with the library."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import surgery
from surgery.contract.method import Block
from surgery.methods import streaming
from surgery.model import checkpoint as checkpoints

METHODS = sorted(surgery.default_host().methods)
# Options without a default.
NEEDED = {
  'breadcrumbs': {'density': 0.6},
  'breadcrumbs_ties': {'density': 0.6},
  'dare_linear': {'density': 0.6},
  'dare_ties': {'density': 0.6},
  'della': {'density': 0.6},
  'della_linear': {'density': 0.6},
  'nearswap': {'t': 0.05},
  'slerp': {'t': 0.3},
}
# Further options, so that every way through a method is taken.
CASES = [
  *((name, NEEDED.get(name, {})) for name in METHODS),
  ('ties', {'density': 0.3}),
  ('magnitude_prune', {'density': 0.3}),
  ('dare_linear', {'density': 0.5, 'rescale': 'l1'}),
  ('della', {'density': 0.5, 'rescale': 'l1'}),
  ('sce', {'select_topk': 0.4}),
  ('model_stock', {'filter_wise': True}),
  ('nuslerp', {'flatten': False}),
  ('nuslerp', {'flatten': False, 'row_wise': True}),
]
# Whose result does not depend on the order of models of equal weight.
SYMMETRIC = {
  'linear', 'mean', 'multislerp', 'task_arithmetic', 'ties', 'sce',
  'model_stock', 'karcher', 'magnitude_prune', 'breadcrumbs',
}  # fmt: skip


def leaf(value):
  return surgery.Leaf(lambda: value, value.shape, str(value.dtype))


def model(tensors):
  return surgery.Checkpoint(
    {tuple(k.split('/')): leaf(v) for k, v in tensors.items()}
  )


def drawn(seed, scale=1.0, base=None):
  rng = np.random.default_rng(seed)
  shapes = {
    'net/h0/kernel': (7, 5),
    'net/h1/kernel': (5, 6),
    'net/h1/bias': (6,),
    'net/conv': (3, 2, 4),
    'net/one': (1,),
    'net/scalar': (),
    'net/empty': (0, 3),
  }
  found = {}
  for name, shape in shapes.items():
    value = np.asarray(rng.normal(size=shape) * scale, np.float32)
    found[name] = value if base is None else np.asarray(base[name] + value)
  return found


def count(name):
  cls = surgery.default_host().methods[name]
  return min(3, cls.most or 3)


def inputs(name, seed=0):
  base = drawn(seed)
  models = [drawn(seed + 1 + k, 0.3, base) for k in range(count(name))]
  return models, base


def combined(name, models, base, host=None, **options):
  cls = surgery.default_host().methods[name]
  given = model(base) if cls.base != 'none' else None
  found = surgery.combine(
    [model(one) for one in models], base=given, method=name, host=host,
    **options,
  )  # fmt: skip
  return {'/'.join(p): np.asarray(one.load()) for p, one in found.items()}


def same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    assert value.dtype == b[name].dtype and value.shape == b[name].shape
    assert np.array_equal(value, b[name]), name


@pytest.mark.parametrize(('name', 'options'), CASES)
def test_blocks_are_the_whole(name, options, monkeypatch):
  models, base = inputs(name)
  expected = combined(name, models, base, **options)
  # Smaller blocks of files, and smaller shares of threads.
  in_parts = lambda tensors: surgery.Checkpoint(
    {
      path: one.replace(
        load=one.load, part=lambda index, one=one: one.load()[index]
      )
      for path, one in model(tensors).items()
    }
  )
  for block, threads in itertools.product((7, 1 << 20), (1, 3)):
    monkeypatch.setattr(streaming, 'workers', lambda threads=threads: threads)
    small = lambda shape, most=block, grid=checkpoints.grid: grid(shape, most)
    cls = surgery.default_host().methods[name]
    with monkeypatch.context() as patch:
      for module in ('editing.regions', 'model.checkpoint'):
        patch.setattr(f'surgery.{module}.grid', small)
      found = surgery.combine(
        [in_parts(one) for one in models],
        base=in_parts(base) if cls.base != 'none' else None,
        method=name,
        **options,
      )
      parts = {
        '/'.join(p): np.concatenate(
          [np.asarray(part).reshape(-1) for part in one.parts()]
        ).reshape(one.shape)
        for p, one in found.items()
      }
    same(expected, parts)


@pytest.mark.parametrize(('name', 'options'), CASES)
def test_pieces_decide_nothing_but_how_sums_round(name, options, monkeypatch):
  models, base = inputs(name)
  expected = combined(name, models, base, **options)
  monkeypatch.setattr(streaming, 'PIECE', 4)
  monkeypatch.setattr(streaming, '_SHARE', 2)
  found = combined(name, models, base, **options)
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(('name', 'options'), CASES)
def test_models_that_are_alike_stay_as_they_are(name, options):
  if name in (
    'dare_linear',
    'dare_ties',
    'della',
    'della_linear',
    'passthrough',
  ):
    options = {k: 1.0 for k in options if k == 'density'}
  base = drawn(3)
  models = [base] * count(name)
  cls: Any = surgery.default_host().methods[name]
  if 'weight' in {f.name for f in dataclasses.fields(cls)}:
    options = {**options, 'weight': 1 / len(models)}
  found = combined(name, models, base, **options)
  for path, value in base.items():
    np.testing.assert_allclose(found[path], value, rtol=3e-7, atol=0)


@pytest.mark.parametrize('name', sorted(SYMMETRIC))
def test_the_order_of_models_does_not_matter(name):
  models, base = inputs(name)
  options = NEEDED.get(name, {})
  first = combined(name, models, base, **options)
  again = combined(name, models[::-1], base, **options)
  for path, value in first.items():
    np.testing.assert_allclose(again[path], value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(('name', 'options'), CASES)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float64'])
def test_the_dtype_is_that_of_the_models(name, options, dtype):
  import ml_dtypes

  kind = ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.dtype(dtype)
  models, base = inputs(name)
  cast = lambda some: {k: np.asarray(v).astype(kind) for k, v in some.items()}
  found = combined(name, [cast(m) for m in models], cast(base), **options)
  assert {dtype} == {str(v.dtype) for v in found.values()}
  wide = lambda some: {k: v.astype(np.float64) for k, v in cast(some).items()}
  exact = combined(name, [wide(m) for m in models], wide(base), **options)
  if dtype != 'float64':
    for path, value in exact.items():
      # Rounded once from what float64 gives.
      near = np.abs(found[path].astype(np.float64) - value.astype(np.float64))
      assert (near <= np.abs(value) * 2.0**-8 + 1e-6).all(), path


@pytest.mark.parametrize('name', ['dare_linear', 'della'])
def test_what_is_dropped_depends_on_seed_and_path_alone(name):
  models, base = inputs(name)
  draw = lambda **more: combined(name, models, base, density=0.5, **more)
  same(draw(), draw())
  other = draw(seed=1)
  assert not np.array_equal(draw()['net/h0/kernel'], other['net/h0/kernel'])
  # A tensor more does not change the others.
  more = [{**m, 'a/kernel': m['net/h0/kernel']} for m in models]
  found = combined(
    name, more, {**base, 'a/kernel': base['net/h0/kernel']}, density=0.5
  )
  assert not np.array_equal(found['a/kernel'], found['net/h0/kernel'])
  del found['a/kernel']
  same(draw(), found)


def test_random_numbers_are_a_function_of_the_place():
  uniform = streaming.Uniform(3, ('a', 'b'))
  whole = uniform(0, 0, 1000)
  for start, stop in ((0, 1), (1, 9), (7, 8), (8, 16), (13, 999), (999, 1000)):
    assert np.array_equal(whole[start:stop], uniform(0, start, stop - start))
  assert not np.array_equal(whole, uniform(1, 0, 1000))
  assert 0 <= whole.min() and whole.max() < 1
  assert abs(whole.mean() - 0.5) < 0.03


# Of one method alone.

numbers = st.floats(-100, 100, width=32)
arrays = st.lists(numbers, min_size=1, max_size=40).map(
  lambda some: np.array(some, np.float32)
)
quick = hypothesis.settings(max_examples=40, deadline=None, database=None)


def pair(draw, size=2):
  first = draw(arrays)
  more = [
    np.array(
      draw(st.lists(numbers, min_size=len(first), max_size=len(first))),
      np.float32,
    )
    for _ in range(size - 1)
  ]
  return [{'w': one} for one in (first, *more)]


@quick
@hypothesis.given(st.data())
def test_slerp_ends_in_its_models(data):
  a, b = pair(data.draw)
  same(a, combined('slerp', [a, b], None, t=0))
  same(b, combined('slerp', [a, b], None, t=1))


@quick
@hypothesis.given(st.data())
def test_a_task_vector_of_weight_one_gives_the_tuned_model(data):
  base, tuned = pair(data.draw)
  same(tuned, combined('task_arithmetic', [tuned], base))


ALL_OF_IT = {
  'ties': {},
  'magnitude_prune': {},
  'dare_linear': {'density': 1},
  'dare_ties': {'density': 1},
  'della': {'density': 1, 'epsilon': 0},
  'della_linear': {'density': 1, 'epsilon': 0},
  'breadcrumbs': {'density': 1, 'gamma': 0},
  'breadcrumbs_ties': {'density': 1, 'gamma': 0},
  'sce': {'select_topk': 1},
}


@pytest.mark.parametrize('name', ALL_OF_IT)
@quick
@hypothesis.given(st.data())
def test_all_of_one_model_gives_the_tuned_model(name, data):
  base, tuned = pair(data.draw)
  found = combined(name, [tuned], base, **ALL_OF_IT[name])['w']
  # A number that is lost beside its base in float64 is lost.
  np.testing.assert_allclose(found, tuned['w'], rtol=1e-7, atol=1e-13)


PROGRAM = """
import os, sys
if sys.argv[1] == '1' and hasattr(os, 'sched_setaffinity'):
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from surgery.files.digest import digest
from tests.methods import test_laws as laws

for name, options in laws.CASES:
  models, base = laws.inputs(name)
  after = laws.combined(name, models, base, **options)
  for path, value in after.items():
    print(name, options, path, digest(value))
"""


def test_results_do_not_depend_on_the_process():
  """The order of sets, and the number of cores, are another in each."""
  found = []
  for seed in '01':
    done = subprocess.run(
      [sys.executable, '-c', PROGRAM, seed],
      env={**os.environ, 'PYTHONHASHSEED': seed, 'JAX_PLATFORMS': 'cpu'},
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      text=True,
      check=False,
    )
    assert 0 == done.returncode, done.stderr
    found.append(done.stdout)
  assert len(CASES) * 7 == len(found[0].splitlines())
  assert found[0] == found[1]


@quick
@hypothesis.given(st.data())
def test_nearswap_takes_what_is_near(data):
  base, tuned = pair(data.draw)
  same(
    base,
    combined('nearswap', [tuned], base, t=0)
    | {k: v for k, v in base.items() if np.array_equal(v, tuned[k])},
  )
  same(tuned, combined('nearswap', [tuned], base, t=1000))


@quick
@hypothesis.given(
  values=st.lists(
    st.floats(0, 100, width=32) | st.sampled_from([0.0, 1.0, 2.0]),
    min_size=1,
    max_size=60,
  ),
  wanted=st.integers(0, 70),
  wide=st.booleans(),
  few=st.sampled_from([0, 3, 20, streaming._FEW]),
  sampled=st.sampled_from([1, 4, 30]),
)
def test_a_selection_is_that_of_a_stable_sort(
  values, wanted, wide, few, sampled
):
  array = np.array(values, np.float32)
  source = streaming.Source('x', lambda a, b: array[a:b], wide)
  tensor = streaming.Tensor(
    ('w',), array.shape, [source], None, rows=False,
    uniform=lambda *_: array, finite=True,
  )  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    # Numbers are counted by their bits, or kept, or first one, then the other;
    # and guessed by samples, which tell more or less of them.
    patch.setattr(streaming, '_FEW', few)
    patch.setattr(streaming, 'PIECE', 4)
    patch.setattr(streaming, '_SAMPLED', sampled)
    patch.setattr(streaming, '_SAMPLES', 2)
    [[cut]] = tensor.largest(lambda block: block.tensors, [[wanted]])
  order = np.argsort(-array, kind='stable')[:wanted]
  expected = np.zeros(len(array), bool)
  expected[order] = True
  assert np.array_equal(expected, cut.mask(array.astype(np.float64), 0))
  halves = [cut.mask(array[k : k + 7], k) for k in range(0, len(array), 7)]
  assert np.array_equal(expected, np.concatenate(halves))


def test_a_share_of_a_small_tensor_is_one_element_at_least():
  base, tuned = {'w': np.zeros(4, np.float32)}, {'w': np.ones(4, np.float32)}
  for name, options in (
    ('ties', {'density': 0.01}),
    ('breadcrumbs', {'density': 0.01, 'gamma': 0.5}),
  ):
    found = combined(name, [tuned], base, **options)
    assert 1 == np.count_nonzero(found['w'])


@pytest.mark.parametrize('rescale', ['density', 'l1', 'none'])
def test_dare_keeps_what_it_promises(rescale):
  rng = np.random.default_rng(0)
  base = {'w': rng.normal(size=40_000).astype(np.float32)}
  delta = rng.normal(size=40_000).astype(np.float32)
  tuned = {'w': base['w'] + delta}
  found = combined('dare_linear', [tuned], base, density=0.3, rescale=rescale)
  left = found['w'].astype(np.float64) - base['w']
  kept = np.abs(left) > 1e-4
  assert abs(kept.mean() - 0.3) < 0.01
  factor = np.median(left[kept] / delta[kept])
  l1 = np.abs(delta).sum() / np.abs(delta[kept]).sum()
  expected = {'density': 1 / 0.3, 'l1': l1, 'none': 1.0}[rescale]
  assert abs(factor - expected) < 0.01


def test_della_keeps_large_magnitudes_more_often():
  rng = np.random.default_rng(0)
  base = {'w': np.zeros((100, 200), np.float32)}
  tuned = {'w': rng.normal(size=(100, 200)).astype(np.float32)}
  found = combined(
    'della_linear', [tuned], base, density=0.5, epsilon=0.4, rescale='none'
  )
  kept = found['w'] != 0
  order = np.argsort(np.abs(tuned['w']), axis=-1)
  ranked = np.take_along_axis(kept, order, -1)
  assert ranked[:, :50].mean() < 0.3 < 0.7 < ranked[:, -50:].mean()


def test_a_block_without_a_base_has_its_tensors_as_deltas():
  block = Block((np.ones(2),), None, 0, lambda model: np.zeros(2))
  assert block.deltas is block.tensors
