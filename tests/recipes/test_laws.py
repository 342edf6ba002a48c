"""Laws of steps, over generated models."""

import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np

import surgery
from tests.recipes.models import (
  SmallBlocks,
  by_name,
  close,
  held,
  same,
  saved,
  values,
)

laws = hypothesis.settings(deadline=None, max_examples=60)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, max_side=5)
dtypes = st.sampled_from(['float32', 'float16', 'int8', 'bool'])


@st.composite
def arrays(draw, shape=shapes, dtype=dtypes):
  kind = np.dtype(draw(dtype))
  size = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
  bits = draw(st.integers(0, 2**32 - 1))
  raw = np.random.default_rng(bits).integers(-9, 9, size)
  return raw.astype(kind)


@st.composite
def towers(draw):
  """Some layers of a kind, and what stands before and behind them."""
  count = draw(st.integers(1, 12))
  kinds = draw(st.lists(arrays(), min_size=1, max_size=3))
  net = {'embed': draw(arrays())}
  for i in range(count):
    for k, value in enumerate(kinds):
      net[f'h/{i}/w{k}'] = np.roll(value, i)
  net['out'] = draw(arrays())
  return net


def done(net, *steps):
  return values(surgery.Recipe(steps).apply(held(net)))


@laws
@hypothesis.given(towers(), st.integers(1, 20))
def test_stack_then_unstack(net, elements):
  with SmallBlocks(elements):
    steps = [{'stack': 'h/<i>/* -> h/*'}, {'unstack': 'h/* -> h/<i>/*'}]
    same(by_name(net), by_name(done(net, *steps)))


@laws
@hypothesis.given(towers(), st.integers(0, 30))
def test_move_there_and_back_is_the_same_file(net, by):
  with tempfile.TemporaryDirectory() as folder:
    file = saved(net, Path(folder))
    out = Path(folder) / 'out.msgpack'
    steps = [
      {'move': [f'h/<i>/** -> block{{}}x<i+{by}>/**'.replace('{}', '')]},
      {'move': [f'blockx<i>/** -> h/<i-{by}>/**']},
    ]
    recipe = surgery.Recipe(
      steps, outputs={'out': {'path': out, 'strict-flax': True}}
    )
    recipe.run(model=file)
    plain = Path(folder) / 'plain.msgpack'
    surgery.open(file).write(plain, manifest=False)
    assert plain.read_bytes() == out.read_bytes()


@laws
@hypothesis.given(st.data(), st.integers(1, 20))
def test_split_then_concat_and_slices_then_concat(data, elements):
  value = data.draw(arrays())
  axis = data.draw(st.integers(-value.ndim, value.ndim - 1))
  size = value.shape[axis]
  cut = data.draw(st.integers(0, size))
  net = {'w': value}
  rule = {'axis': axis, 'sizes': [cut, size - cut]}
  with SmallBlocks(elements):
    back = {'concat': {'rules': '{a,b} -> w', 'axis': axis}}
    same(net, done(net, {'split': {'rules': 'w -> {a,b}', **rule}}, back))
    if 0 < cut < size:
      steps = [
        {'copy': ['w -> a', 'w -> b']},
        {'drop': 'w'},
        {'slice': {'select': 'a', 'axis': axis, 'keep': f':{cut}'}},
        {'slice': {'select': 'b', 'axis': axis, 'drop': f':{cut}'}},
        back,
      ]
      same(net, done(net, *steps))


@laws
@hypothesis.given(st.data(), st.integers(1, 20))
def test_transposing_and_reshaping_back(data, elements):
  value = data.draw(arrays())
  order = data.draw(st.permutations(range(value.ndim)))
  back = [order.index(k) for k in range(value.ndim)]
  net = {'w': value}
  with SmallBlocks(elements):
    steps = []
    if value.ndim > 1:
      steps = [
        {'transpose': {'select': 'w', 'axes': list(order)}},
        {'transpose': {'select': 'w', 'axes': back}},
      ]
    steps += [
      {'reshape': {'select': 'w', 'shape': [-1]}},
      {'reshape': {'select': 'w', 'shape': list(value.shape)}},
    ]
    same(net, done(net, *steps))


@laws
@hypothesis.given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_factors_of_full_rank(rows, columns, seed):
  w = np.random.default_rng(seed).standard_normal((rows, columns))
  net = {'w': w.astype('float32')}
  rank = min(rows, columns)
  steps = [
    {'factorise': {'rules': 'w -> {a,b}', 'rank': rank}},
    {'matmul': '{a,b} -> w'},
  ]
  close(net, done(net, *steps), 1e-5)


@laws
@hypothesis.given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_folding_a_norm_keeps_the_output(seed, width, bias):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.uniform(0.5, 2, shape).astype('float32')
  net = {'c/kernel': draw(3, width), 'n/running_mean': draw(width)}
  net |= {'n/running_var': draw(width), 'n/scale': draw(width)}
  net |= {'n/bias': draw(width)} | ({'c/bias': draw(width)} if bias else {})
  after = done(net, {'fold-norm': 'c -> n'})
  x = rng.standard_normal((4, 3))
  y = x @ net['c/kernel'].astype('float64') + net.get('c/bias', 0)
  y = (y - net['n/running_mean']) / np.sqrt(net['n/running_var'] + 1e-5)
  y = y * net['n/scale'] + net['n/bias']
  folded = x @ after['c/kernel'].astype('float64') + after['c/bias']
  np.testing.assert_allclose(y, folded, rtol=1e-4, atol=1e-4)


STEPS: list[Any] = [
  {'drop': 'out'},
  {'scale': {'select': 'h/*/w', 'by': 0.5}},
  {'rename': 'h/<i>/** -> block<i+1>/**'},
  {'renumber': {'layers': 'block<i>', 'start': 0}},
  {'repeat': {'layers': 'block<i>', 'numbers': '0:1'}},
  {'transpose': '**/w'},
  {'add': 'block0/w -> block1/w'},
  {'cast': {'to': 'bf16', 'keep': 'embed'}},
  {'stack': 'block<i>/* -> blocks/*'},
  {'copy': 'embed -> more/embed'},
]


@laws
@hypothesis.given(st.integers(1, len(STEPS)), st.integers(2, 5))
def test_a_recipe_is_its_steps_one_by_one(count, layers):
  rng = np.random.default_rng(0)
  net = {'embed': rng.standard_normal((3, 2)).astype('float32')}
  for i in range(layers):
    net[f'h/{i}/w'] = rng.standard_normal((3, 2)).astype('float32')
  net['out'] = np.ones(1, 'float32')
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    before = file = saved(net, folder)
    for k, step in enumerate(STEPS[:count]):
      before, last = folder / f'{k}.msgpack', before
      surgery.Recipe([step]).run(model=last, out=before)
    out = folder / 'out.msgpack'
    surgery.Recipe(STEPS[:count]).run(model=file, out=out)
    same(values(surgery.open(before)), values(surgery.open(out)))


@laws
@hypothesis.given(st.integers(1, len(STEPS)))
def test_the_plan_is_what_is_done(count):
  rng = np.random.default_rng(1)
  net = {'embed': rng.standard_normal((3, 2)).astype('float32')}
  for i in range(3):
    net[f'h/{i}/w'] = rng.standard_normal((3, 2)).astype('float32')
  net['out'] = np.ones(1, 'float32')
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    file, out = saved(net, folder), folder / 'out.msgpack'
    recipe = surgery.Recipe(STEPS[:count]).bound(model=file, out=out)
    report = recipe.plan().report()
    assert not out.exists()
    assert report == recipe.run().report()
    before, after = surgery.open(file), surgery.open(out)
    rows = {row['path']: row for row in report['tensors']}
    written = {p: r for p, r in rows.items() if r['what'] != 'gone'}
    assert written.keys() == {'/'.join(p) for p in after}
    gone = {p for p, r in rows.items() if r['what'] == 'gone'}
    assert gone <= {'/'.join(p) for p in before} - written.keys()
    for path, row in written.items():
      leaf = after[tuple(path.split('/'))]
      assert (row['shape'], row['dtype'], row['bytes']) == (
        list(leaf.shape or ()),
        leaf.dtype,
        leaf.nbytes,
      )
      if row['what'] in ('copied', 'renamed') or 'from' in row:
        old = before[tuple(row.get('from', path).split('/'))]
        assert old.load().tobytes() == leaf.load().tobytes()
      # What is copied unread keeps its digest; the rest has one of its own.
      assert leaf.digest is not None
