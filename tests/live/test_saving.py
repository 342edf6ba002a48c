"""Saving and loading params: everything comes back, and nothing is guessed."""

from __future__ import annotations

import blox as bx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import surgery
from tests.live import models


def same(a, b):
  """Whether two values are equal bit for bit, in structure and type."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      if x.dtype != y.dtype:
        return False
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    if not hasattr(x, 'dtype'):
      if (type(x), x) != (type(y), y):
        return False
      continue
    if (x.dtype, x.shape) != (y.dtype, y.shape):
      return False
    if np.asarray(x).tobytes() != np.asarray(y).tobytes():
      return False
  return True


def assert_same(expected, actual):
  assert type(expected) is type(actual)
  assert expected.is_locked == actual.is_locked
  assert set(expected.keys()) == set(actual.keys())
  for path, param in expected.items():
    assert param.trainable == actual[path].trainable, path
    assert param.metadata == actual[path].metadata, path
    assert same(param.value, actual[path].value), path


def around(tmp_path, params, **options):
  """Returns params that went through a file."""
  file = tmp_path / 'params.msgpack'
  surgery.save(file, params, **options)
  return surgery.load(file)


def of(**values):
  params = bx.Params()
  for name, value in values.items():
    params[('net', name)] = (
      value if isinstance(value, bx.Param) else bx.Param(value)
    )
  return params


DTYPES = [
  'bool',
  'int8',
  'uint8',
  'int16',
  'int32',
  'uint32',
  'float16',
  'bfloat16',
  'float32',
  'complex64',
  'float8_e4m3fn',
  'float8_e5m2',
  'int4',
  'uint4',
]


@pytest.mark.parametrize('dtype', DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
  value = jnp.arange(6).reshape(2, 3).astype(dtype)
  assert_same(of(a=value), around(tmp_path, of(a=value)))


@pytest.mark.parametrize('dtype', ['float64', 'int64', 'complex128'])
def test_64_bits_stay_numpy_where_jax_would_narrow_them(tmp_path, dtype):
  value = np.arange(3).astype(dtype) + np.asarray(2**40).astype(dtype)
  loaded = around(tmp_path, of(a=value))[('net', 'a')].value
  assert isinstance(loaded, np.ndarray)
  assert same(value, loaded)


@pytest.mark.parametrize('shape', [(), (0,), (3, 0, 2), (1, 1)])
def test_odd_shapes_come_back(tmp_path, shape):
  params = of(a=jnp.ones(shape))
  assert_same(params, around(tmp_path, params))


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg', 'unsafe_rbg'])
@pytest.mark.parametrize('shape', [(), (3,)])
def test_typed_keys_come_back_with_their_implementation(tmp_path, impl, shape):
  key = jax.random.key(7, impl=impl)
  key = jax.random.split(key, shape) if shape else key
  assert_same(of(a=key), around(tmp_path, of(a=key)))


@pytest.mark.parametrize(
  'value',
  [
    {'a': jnp.ones(2), 'b': {'c': jnp.zeros((2, 3), 'bfloat16')}},
    (jnp.ones(2), [jnp.zeros(3), None]),
    {'key': jax.random.key(3), 'n': 3},
    {},
    (),
    None,
    [{'a/b': jnp.ones(1)}, ()],
    3,
    2.5,
    True,
    'text',
    np.float32(1.5),
  ],
  ids=repr,
)
def test_parameters_of_any_shape_come_back(tmp_path, value):
  params = of(a=bx.Param(value, False, {'tag': 'x'}), b=jnp.ones(1))
  assert_same(params, around(tmp_path, params))


@pytest.mark.parametrize('locked', [False, True])
def test_lock_state_flags_and_metadata_come_back(tmp_path, locked):
  params = of(
    a=bx.Param(jnp.ones((2, 2)), False, {'sharding': (None, 'model')}),
    b=bx.Param(jnp.ones(2), True, {'list': [1, (2, {'x': None})], 'f': 1e-3}),
  )
  params = params.locked() if locked else params
  assert_same(params, around(tmp_path, params))


def test_odd_names_come_back(tmp_path):
  params = bx.Params()
  for name in ('a/b', 'a.b', '', ' ', '[0]', 'größe', '\\', '{x,y}', '!x'):
    params[('net', name, 'kernel')] = bx.Param(jnp.ones(2))
  assert_same(params, around(tmp_path, params))


values = st.recursive(
  st.sampled_from([1, 2.5, 'x', None, True])
  | st.sampled_from(DTYPES).map(lambda d: jnp.ones((2,), d)),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
  ),
  max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
  st.dictionaries(
    st.text(min_size=1, max_size=3).filter(lambda s: s != '__surgery__'),
    values,
    min_size=1,
    max_size=3,
  ),
  st.booleans(),
)
def test_saving_and_loading_is_the_identity(tmp_path_factory, whole, locked):
  params = bx.Params()
  for name, value in whole.items():
    params[('net', name)] = bx.Param(value)
  params = params.locked() if locked else params
  assert_same(params, around(tmp_path_factory.mktemp('law'), params))


# Adapters.


@pytest.fixture(scope='module')
def net():
  return models.mlp()


def adapted(params):
  params = surgery.attach(
    params, surgery.LoRA(rank=1), to='**/hidden*', name='a', seed=4
  )
  params = surgery.attach(
    params,
    surgery.LoRA(rank=2, rslora=True, patterns={'**/output': {'rank': 1}}),
    to='**',
  )
  return models.stirred(surgery.disable(surgery.freeze(params), 'a'))


def test_adapters_come_back_with_all_of_their_state(tmp_path, net):
  model, params, x = net
  params = adapted(params)
  loaded = around(tmp_path, params)
  assert_same(params, loaded)
  assert jax.tree.structure(params) == jax.tree.structure(loaded)
  assert repr(surgery.adapters(params)) == repr(surgery.adapters(loaded))
  assert jnp.array_equal(model(params, x)[0], model(loaded, x)[0])


def test_a_loaded_model_runs_in_a_function_that_was_compiled_before(
  tmp_path, net
):
  model, params, x = net
  params = adapted(params)
  traced = []

  @jax.jit
  def call(params):
    traced.append(1)
    return model(params, x)[0]

  call(params)
  call(around(tmp_path, params))
  assert 1 == len(traced)


def test_seed_and_selector_are_remembered_in_the_file(tmp_path, net):
  params = adapted(net[1])
  file = tmp_path / 'm.msgpack'
  surgery.save(file, params)
  surgery.save(file, surgery.load(file))
  first, second = surgery.open(file).manifest.adapters
  assert (4, '**/hidden*') == (first['seed'], first['to'])
  assert (0, '**') == (second['seed'], second['to'])
  assert first['distribution'].startswith('blox-surgery')


def test_layer_types_come_from_the_graph_and_stay(tmp_path, net):
  model, params, _ = net
  file = tmp_path / 'm.msgpack'
  surgery.save(file, adapted(params), graph=model.root)
  # Three layers of two, two adapted by one adapter and three by another.
  assert 16 == len(surgery.select(surgery.open(file), 'type:Linear'))
  surgery.save(file, surgery.load(file))
  assert surgery.open(file).manifest.layer_types


def test_the_same_params_give_the_same_bytes_whatever_they_went_through(
  tmp_path, net
):
  params = adapted(net[1])
  files = [tmp_path / 'a.msgpack', tmp_path / 'b.msgpack']
  surgery.save(files[0], params)
  surgery.save(files[1], jax.jit(lambda p: p)(params))
  restored = [surgery.open(f) for f in files]
  assert list(restored[0]) == list(restored[1])
  for path, leaf in restored[0].items():
    assert leaf.digest == restored[1][path].digest, path


def test_flax_reads_what_is_saved(tmp_path, net):
  params = adapted(net[1])
  file = tmp_path / 'm.msgpack'
  surgery.save(file, params)
  tree = flax.serialization.msgpack_restore(file.read_bytes())
  kernel = tree['net']['mlp']['output']['kernel']
  path = ('net', 'mlp', 'output', 'kernel')
  assert np.array_equal(kernel, params[path].value)
  moved = jax.tree.map(jnp.asarray, tree)  # The manifest is an array too.
  assert '__surgery__' in moved


def test_what_flax_saved_is_loaded(tmp_path):
  file = tmp_path / 'flax.msgpack'
  file.write_bytes(
    flax.serialization.to_bytes({'net': {'a': jnp.ones((2, 3)), 'n': 3}})
  )
  params = surgery.load(file)
  assert type(params) is bx.Params
  assert 3 == params[('net', 'n')].value
  assert jnp.array_equal(jnp.ones((2, 3)), params[('net', 'a')].value)


def test_a_type_that_is_not_installed_is_named_with_where_it_came_from(
  tmp_path, net
):
  file = tmp_path / 'm.msgpack'
  surgery.save(file, adapted(net[1]))
  host = surgery.Host(block=['lora'])
  with pytest.raises(
    surgery.UnknownAdapterType,
    match=r"adapter 'a' needs its type, which came from blox-surgery 0\.1",
  ):
    surgery.load(file, host=host)


# An adapter alone.


def test_an_adapter_alone_comes_back_under_another_name(tmp_path, net):
  model, base, x = net
  params = adapted(base)
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params, 'default')
  loaded = surgery.load_adapter(file, base, name='other')
  assert ['other'] == [a.name for a in surgery.adapters(loaded)]
  alone = surgery.detach(params, 'a')
  assert jnp.array_equal(model(alone, x)[0], model(loaded, x)[0])
  # Its type, options and weights, but nothing of the base.
  assert not [p for p in surgery.open(file) if p[-1] in ('kernel', 'bias')]


def test_another_base_is_refused_unless_told(tmp_path, net):
  _, base, _ = net
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, adapted(base))
  path = ('net', 'mlp', 'hidden0', 'kernel')
  other = base.unlocked()
  other[path] = other[path].replace(value=other[path].value + 1)
  with pytest.raises(
    surgery.BaseMismatchError,
    match='net/mlp/hidden0/kernel: adapter .default. was made for other values',
  ):
    surgery.load_adapter(file, other.locked())
  surgery.load_adapter(file, other.locked(), check_base=False)
  smaller = base.unlocked()
  smaller[path] = smaller[path].replace(value=jnp.ones((2, 2)))
  with pytest.raises(surgery.BaseMismatchError, match=r'found \(2, 2\)'):
    surgery.load_adapter(file, smaller.locked(), check_base=False)


def test_a_name_that_is_taken_is_refused(tmp_path, net):
  params = adapted(net[1])
  file = tmp_path / 'a.msgpack'
  surgery.save_adapter(file, params)
  with pytest.raises(surgery.AdapterError, match="'default' is attached"):
    surgery.load_adapter(file, params)


def test_files_of_models_and_of_adapters_are_not_confused(tmp_path, net):
  params = adapted(net[1])
  model, alone = tmp_path / 'm.msgpack', tmp_path / 'a.msgpack'
  surgery.save(model, params)
  surgery.save_adapter(alone, params)
  with pytest.raises(surgery.FormatError, match='Use surgery.load_adapter'):
    surgery.load(alone)
  with pytest.raises(surgery.FormatError, match='not the file of an adapter'):
    surgery.load_adapter(model, net[1])


# What is refused.


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (object(), 'net/a: a value of type object cannot be saved'),
    ({1: jnp.ones(1)}, 'net/a: a dict in a parameter has the key 1'),
    (
      jax.ShapeDtypeStruct((2,), 'float32'),
      'params with shapes instead of values',
    ),
  ],
)
def test_values_that_a_file_cannot_hold_are_refused(tmp_path, value, message):
  file = tmp_path / 'm.msgpack'
  with pytest.raises(surgery.SurgeryError, match=message):
    surgery.save(file, of(a=value))
  assert not file.exists()


def test_metadata_that_a_file_cannot_hold_is_refused(tmp_path):
  with pytest.raises(surgery.FormatError, match='net/a: metadata of type'):
    surgery.save(
      tmp_path / 'm.msgpack', of(a=bx.Param(jnp.ones(1), True, {'x': object()}))
    )


def test_a_path_that_is_leaf_and_prefix_is_refused_with_both(tmp_path):
  params = of(a=jnp.ones(1))
  params[('net', 'a', 'b')] = bx.Param(jnp.ones(1))
  with pytest.raises(
    surgery.FormatError, match='net/a is a parameter and net/a/b lies beneath'
  ):
    surgery.save(tmp_path / 'm.msgpack', params)


def test_traced_params_are_refused(tmp_path):
  with pytest.raises(surgery.SurgeryError, match='Save outside of jit'):
    jax.jit(lambda p: surgery.save(tmp_path / 'm.msgpack', p))(
      of(a=jnp.ones(1))
    )


def test_an_adapter_that_still_looks_for_sites_is_not_saved(tmp_path):
  params = surgery.attach(bx.Params(), surgery.LoRA(rank=1), to='**')
  with pytest.raises(surgery.AdapterError, match=r'Call params\.locked\(\)'):
    surgery.save(tmp_path / 'm.msgpack', params)


def test_what_is_no_params_is_refused(tmp_path):
  with pytest.raises(surgery.SurgeryError, match='expected bx.Params, found d'):
    surgery.save(tmp_path / 'm.msgpack', {'a': 1})  # type: ignore[arg-type]


def test_an_existing_file_is_kept_if_asked(tmp_path):
  file = tmp_path / 'm.msgpack'
  surgery.save(file, of(a=jnp.ones(1)))
  before = file.read_bytes()
  with pytest.raises(FileExistsError):
    surgery.save(file, of(a=jnp.zeros(1)), overwrite=False)
  assert before == file.read_bytes()


def test_a_failure_while_saving_leaves_the_old_file(tmp_path):
  file = tmp_path / 'm.msgpack'
  surgery.save(file, of(a=jnp.ones(1)))
  before = file.read_bytes()
  with pytest.raises(surgery.SurgeryError):
    surgery.save(file, of(a=jnp.zeros(1), z=object()))
  assert before == file.read_bytes()
  assert [file] == list(tmp_path.iterdir())
