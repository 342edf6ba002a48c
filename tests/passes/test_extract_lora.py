"""A LoRA of the difference of two models, against numpy's decomposition."""

import json
import warnings

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import EXTRACTED


def model(values, **options):
  leaves: dict[tuple[str, ...], Leaf] = {
    tuple(path.split('/')): Leaf(lambda v=v: v, v.shape, v.dtype.name)
    for path, v in values.items()
  }
  return Checkpoint(leaves, **options)


def extracted(base, tuned, **options):
  host = surgery.default_host()
  passed = host.passes['extract-lora']
  return passed(base, tuned, host=host, **options)


def merged(base, alone):
  """Returns what layers get of a base with an adapter, merged, by path."""
  host = surgery.default_host()
  from surgery.passes import extract

  adapted = extract.insert(base, alone, host=host)
  after = surgery.merge(adapted)
  return {'/'.join(p): np.asarray(leaf.load()) for p, leaf in after.items()}


def draw(seed, shape, dtype='float32'):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def two(shapes, dtype='float32', scale=0.1):
  base = {n: draw(k, s, dtype) for k, (n, s) in enumerate(shapes.items())}
  tuned = {
    n: (v + scale * draw(50 + k, v.shape)).astype(dtype)
    for k, (n, v) in enumerate(base.items())
  }
  return base, tuned


@settings(deadline=None, max_examples=15)
@given(
  st.dictionaries(
    st.sampled_from(['a/kernel', 'b/kernel', 'c/embedding', 'd/bias']),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
  ),
  st.booleans(),
)
def test_at_full_rank_the_merged_model_is_the_tuned_one(shapes, exact):
  shapes = {'z/kernel': (3, 4), **{k: tuple(v) for k, v in shapes.items()}}
  base, tuned = two(shapes)
  alone = extracted(
    model(base), model(tuned), rank=999, keep_whole='all', exact=exact
  )
  after = merged(model(base), alone)
  assert tuned.keys() == after.keys()
  for name, value in tuned.items():
    np.testing.assert_allclose(after[name], value, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize('exact', [False, True])
def test_it_is_the_nearest_of_its_rank(exact):
  base, tuned = two({'a/kernel': (60, 80)})
  u, s, v = np.linalg.svd((tuned['a/kernel'] - base['a/kernel']).astype('f8'))
  alone = extracted(model(base), model(tuned), rank=3, exact=exact)
  after = merged(model(base), alone)['a/kernel'] - base['a/kernel']
  want = (u[:, :3] * s[:3]) @ v[:3]
  np.testing.assert_allclose(after, want, atol=1e-6 if exact else 3e-2)
  said = alone.manifest.adapters[0][EXTRACTED]
  best = np.linalg.norm(s[3:]) / np.linalg.norm(s)
  assert best == pytest.approx(said['error'], rel=1e-6 if exact else 1e-2)
  one = said['sites']['a/kernel']
  assert (3, said['error']) == (one['rank'], one['error'])


def low_rank(rank, shape=(30, 40)):
  a, b = draw(1, (shape[0], rank)), draw(2, (rank, shape[1]))
  return a @ b


def test_energy_finds_the_rank_that_is_needed():
  base = {'a/kernel': draw(0, (30, 40)), 'b/kernel': draw(1, (30, 40))}
  tuned = {
    'a/kernel': base['a/kernel'] + low_rank(2),
    'b/kernel': base['b/kernel'] + low_rank(9),
  }
  alone = extracted(model(base), model(tuned), energy=0.9999, max_rank=7)
  said = alone.manifest.adapters[0][EXTRACTED]
  ranks = {p: one['rank'] for p, one in said['sites'].items()}
  assert {'a/kernel': 2, 'b/kernel': 7} == ranks
  assert said['sites']['a/kernel']['error'] < 1e-2
  alone = extracted(
    model(base), model(tuned), energy={'a': 0.5, 'all': 0.1}, exact=True
  )
  said = alone.manifest.adapters[0][EXTRACTED]
  assert [1, 1] == [one['rank'] for one in said['sites'].values()]


def test_ranks_by_selector():
  base, tuned = two({'a/kernel': (9, 8), 'b/kernel': (9, 8)})
  alone = extracted(model(base), model(tuned), rank={'b': 5, 'all': 2})
  shapes = {p[0]: leaf.shape for p, leaf in alone.items() if 'lora_a' in p[-1]}
  assert {'a': (9, 2), 'b': (9, 5)} == shapes
  with pytest.raises(surgery.SelectorError, match='other'):
    extracted(model(base), model(tuned), rank={'other': 5, 'all': 2})
  with pytest.raises(surgery.ConfigError, match="'all', at the end"):
    extracted(model(base), model(tuned), rank={'b': 5})


def test_a_layout_of_pytorch_and_a_stack():
  base, tuned = two({'a/kernel': (2, 6, 4), 'c/kernel': (3, 2, 5, 7)})
  alone = extracted(
    model(base), model(tuned), rank=99,
    layout={'a/kernel': 'soi', 'c/kernel': 'iioo'},
  )  # fmt: skip
  shapes = {'.'.join(p): leaf.shape for p, leaf in alone.items()}
  assert {
    'a.lora_a': (2, 4, 4), 'a.lora_b': (2, 4, 6),
    'c.lora_a': (3, 2, 6), 'c.lora_b': (6, 5, 7),
  } == {k.replace('kernel_', ''): v for k, v in shapes.items()}  # fmt: skip
  after = merged(model(base), alone)
  for name, value in tuned.items():
    np.testing.assert_allclose(after[name], value, atol=2e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float64'])
def test_other_dtypes(dtype):
  import ml_dtypes

  base, tuned = two({'a/kernel': (9, 8)})
  kind = ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype
  base, tuned = (
    {k: v.astype(kind) for k, v in m.items()} for m in (base, tuned)
  )
  after = merged(model(base), extracted(model(base), model(tuned), rank=8))
  one, other = (m['a/kernel'].astype('f8') for m in (after, tuned))
  # The sum is rounded as the tuned model was, but for ties of the last bit.
  assert np.abs(one - other).max() < {'float64': 1e-6}.get(dtype, 0.02)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
  base, tuned = two({'a/kernel': (90, 80), 'b/kernel': (70, 80)})
  files = []
  for k, seed in enumerate((0, 0, 1)):
    file = tmp_path / f'{k}.safetensors'
    extracted(model(base), model(tuned), rank=2, seed=seed).write(file)
    files.append(file.read_bytes())
  assert files[0] == files[1] != files[2]


def test_what_differs_and_is_not_extracted_is_said():
  base, tuned = two({'a/kernel': (9, 8), 'a/bias': (8,), 'n/scale': (3,)})
  tuned['n/scale'] = base['n/scale']
  with pytest.warns(
    surgery.SiteWarning, match=r'1 tensor that .*: a/bias; keep'
  ):
    alone = extracted(model(base), model(tuned))
  assert {'a/bias'} == {
    n for n, v in merged(model(base), alone).items()
    if np.abs(v - tuned[n]).max() > 1e-5
  }  # fmt: skip
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    alone = extracted(model(base), model(tuned), keep_whole='**/bias')
  after = merged(model(base), alone)
  np.testing.assert_array_equal(tuned['a/bias'], after['a/bias'])


def test_a_matrix_that_is_kept_whole_is_no_factor():
  base, tuned = two({'a/kernel': (9, 8), 'head/kernel': (8, 8)})
  alone = extracted(model(base), model(tuned), rank=1, keep_whole='head')
  assert ['a/kernel'] == list(alone.manifest.adapters[0][EXTRACTED]['sites'])
  after = merged(model(base), alone)
  np.testing.assert_array_equal(tuned['head/kernel'], after['head/kernel'])


def test_equal_matrices_have_no_adapter():
  base, tuned = two({'a/kernel': (9, 8), 'b/kernel': (8, 8)})
  tuned['b/kernel'] = base['b/kernel']
  alone = extracted(model(base), model(tuned), rank=1)
  assert {'a'} == {path[0] for path in alone}
  with pytest.raises(surgery.AdapterError, match='no matrix that is selected'):
    extracted(model(base), model(base))


def test_models_that_are_not_alike_are_refused():
  base, tuned = two({'a/kernel': (9, 8), 'b/kernel': (8, 8)})
  for change, error, said in (
    ({'c/kernel': draw(0, (2, 2))}, surgery.AdapterError, 'only the tuned mod'),
    (
      {'a/kernel': draw(0, (9, 7))},
      surgery.SiteError,
      r'a/kernel: float32\[9,8',
    ),
    (
      {'a/kernel': draw(0, (9, 8), 'f8')},
      surgery.SiteError,
      'have to be alike',
    ),
    ({'a/kernel': np.full((9, 8), np.nan, 'f4')}, surgery.SurgeryError, 'NaN'),
  ):
    with pytest.raises(error, match=said):
      extracted(model(base), model({**tuned, **change}))
  for options, said in (
    ({'rank': 0}, 'rank: expected 1 or more'),
    ({'energy': 1.5}, 'energy: expected a share'),
    ({'energy': 0.5, 'max_rank': 0}, 'rank: expected 1 or more'),
  ):
    with pytest.raises(surgery.ConfigError, match=said):
      extracted(model(base), model(tuned), **options)


def test_a_model_with_an_adapter_is_refused():
  base, tuned = two({'a/kernel': (9, 8)})
  adapted = surgery.attach(model(tuned), surgery.LoRA(rank=1), to='a')
  with pytest.raises(
    surgery.AdapterError, match='has adapters: default. Merge'
  ):
    extracted(model(base), adapted)


def test_it_attaches_to_params_and_to_the_base_alone(tmp_path):
  base, tuned = two({'a/kernel': (9, 8)})
  file, params = tmp_path / 'a.msgpack', bx.Params()
  extracted(model(base), model(tuned), rank=8).write(file)
  params['a', 'kernel'] = bx.Param(jnp.asarray(base['a/kernel']))
  adapted = surgery.load_adapter(file, params.locked())
  got = surgery.merge(adapted)['a', 'kernel'].value
  np.testing.assert_allclose(got, tuned['a/kernel'], atol=2e-6)
  params = bx.Params()
  params['a', 'kernel'] = bx.Param(jnp.asarray(tuned['a/kernel']))
  with pytest.raises(surgery.BaseMismatchError):
    surgery.load_adapter(file, params.locked())


def params_of(values):
  params = bx.Params()
  for path, value in values.items():
    params[tuple(path.split('/'))] = bx.Param(jnp.asarray(value))
  return params.locked()


def test_params_give_what_files_give(tmp_path):
  base, tuned = two({'a/kernel': (9, 8), 'a/bias': (8,)})
  alone = surgery.extract_lora(
    params_of(base), params_of(tuned), rank=8, keep_whole='all'
  )
  other = surgery.extract_lora(
    model(base), model(tuned), rank=8, keep_whole='all'
  )
  assert other.keys() == alone.keys()
  for path, leaf in alone.items():
    np.testing.assert_array_equal(leaf.load(), other[path].load())
  alone.write(tmp_path / 'a.msgpack')
  adapted = surgery.load_adapter(tmp_path / 'a.msgpack', params_of(base))
  after = surgery.merge(adapted)
  for path, value in tuned.items():
    got = after[tuple(path.split('/'))].value
    np.testing.assert_allclose(got, value, atol=2e-6)
  with pytest.raises(surgery.AdapterError, match='base: expected bx.Params or'):
    surgery.extract_lora('base.msgpack', params_of(tuned))  # type: ignore


def test_what_is_no_matrix_of_floats_is_not_extracted():
  base, tuned = two({'a/kernel': (9, 8), 'e/kernel': (0, 3)})
  odd = {
    'n/count': np.array(3),
    'n/mask': np.array([True, False]),
    'n/table': np.ones((2, 2), 'int8'),
    'n/scalar': np.array(0.5, 'float32'),
  }
  changed = {k: (v + 1).astype(v.dtype) for k, v in odd.items()}
  changed['n/mask'] = ~odd['n/mask']
  one, other = model({**base, **odd}), model({**tuned, **changed})
  with pytest.warns(surgery.SiteWarning, match='4 tensors that differ are not'):
    alone = extracted(one, other)
  assert {'a'} == {path[0] for path in alone}
  alone = extracted(one, other, keep_whole='all')
  after = merged(one, alone)
  for name, value in changed.items():
    np.testing.assert_array_equal(value, after[name])


def test_codes_of_quantised_weights_refuse():
  from surgery.model import quantised

  base, tuned = two({'a/kernel': (9, 8)})
  codes = {
    'q/weight': np.ones((4, 4), 'int8'),
    'q/weight_scale': np.ones(4, 'f4'),
  }
  other = {**codes, 'q/weight': 2 * codes['q/weight']}
  one, two_ = (
    quantised.marked(model({**some, **more}), None)
    for some, more in ((base, codes), (tuned, other))
  )
  with pytest.raises(surgery.QuantisedError, match='q/weight'):
    extracted(one, two_)


def test_in_the_shell(tmp_path, surgery_cli):
  base, tuned = two({'a/kernel': (9, 8), 'a/bias': (8,), 'b/kernel': (8, 8)})
  one, other = tmp_path / 'base.safetensors', tmp_path / 'tuned.safetensors'
  model(base).write(one)
  model(tuned).write(other)
  out = tmp_path / 'out.msgpack'
  verb = ('extract-lora', one, other, '-o', out)
  with pytest.warns(surgery.SiteWarning, match=r'a/bias; keep-whole \(--keep'):
    result = surgery_cli(*verb, '--rank', 8, '--rank', 'b=1', '--dry-run')
  assert 0 == result.code, result.err
  lines = result.out.splitlines()
  assert any(
    x.startswith('factors   a/kernel  rank 8  error 0.000') for x in lines
  )
  assert 'note      1 tensor that differs' in result.out
  result = surgery_cli(*verb, '--rank', 8, '--keep-whole', 'all', '--json')
  assert 0 == result.code, result.err
  report = json.loads(result.out)['extracted']
  assert report['error'] < 1e-6
  assert {'a/kernel', 'b/kernel'} == report['sites'].keys()
  again = tmp_path / 'again.safetensors'
  result = surgery_cli('merge', one, '--with', out, '-o', again)
  assert 0 == result.code, result.err
  for path, leaf in surgery.open(again).items():
    np.testing.assert_allclose(leaf.load(), tuned['/'.join(path)], atol=2e-6)


@pytest.mark.parametrize(
  ('options', 'said'),
  [
    (('--rank', '4', '--energy', '0.5'), 'not both'),
    (('--max-rank', '4'), '--max-rank needs --energy'),
    (('--rank', 'many'), "expected a whole number, found 'many'"),
    (('--rank', 'a=4', '--rank', 'a=5'), 'given twice'),
  ],
)
def test_options_that_do_not_go_together(tmp_path, surgery_cli, options, said):
  result = surgery_cli(
    'extract-lora', 'x', 'y', *options, '-o', tmp_path / 'o.msgpack'
  )
  assert 2 == result.code
  assert said in result.err


def test_an_empty_matrix_elsewhere_does_not_matter():
  base, tuned = two(
    {'a/kernel': (9, 8), 'e/kernel': (0, 3), 'f/kernel': (3, 0)}
  )
  alone = extracted(model(base), model(tuned), to='a')
  assert {'a'} == {path[0] for path in alone}
