"""What Orbax's writers write is read as Orbax reads it, and the other way."""

import functools
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import surgery


def tree():
  """Returns a tree with a bit of all that Orbax knows."""
  numbers = np.random.default_rng(0)
  return {
    'layer': {
      'kernel': jnp.asarray(numbers.normal(size=(6, 4)), jnp.bfloat16),
      'bias': numbers.normal(size=4).astype('float32'),
      'zeros': np.zeros((3, 2), 'float16'),
    },
    'with/slash': {'w': np.arange(5, dtype='int32')},
    'codes': np.array([-3, 7], ml_dtypes.int4),
    'mask': np.array([True, False]),
    'step': 3,
    'rate': 0.25,
    'nothing': None,
    'empty': {},
    'list': [jnp.ones(2), (jnp.zeros(()), jnp.full((1,), 7, 'int8'))],
  }


def standard(path, value):
  with ocp.StandardCheckpointer() as saver:
    saver.save(path, value)


def pytree(path, value, **options):
  handler = ocp.PyTreeCheckpointHandler(**options)
  with ocp.Checkpointer(handler) as saver:
    saver.save(path, args=ocp.args.PyTreeSave(value))


def manager(path, value):
  with ocp.CheckpointManager(path) as saver:
    saver.save(7, args=ocp.args.StandardSave(value))


def newest(path, value):
  from orbax.checkpoint import v1

  save = getattr(v1, 'save', None) or v1.save_pytree
  save(path, value)


WRITERS = {
  'standard': standard,
  'files': functools.partial(pytree, use_ocdbt=False),
  'zarr3': functools.partial(pytree, use_ocdbt=True, use_zarr3=True),
  'manager': manager,
  'v1': newest,
}


@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
  """Returns folders by writer, made once."""
  made = {}

  def get(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp('zoo') / name
      WRITERS[name](made[name], tree())
    return made[name]

  return get


def flat(value):
  """Returns leaves by path, as Orbax restored them."""
  empty = lambda v: v is None or (isinstance(v, dict) and not v)
  found = jax.tree_util.tree_flatten_with_path(value, is_leaf=empty)[0]
  key = lambda k: str(getattr(k, 'key', getattr(k, 'idx', None)))
  return {tuple(map(key, path)): leaf for path, leaf in found}


def same(expected, checkpoint):
  """Checks a checkpoint against what Orbax restored, bit by bit."""
  assert expected.keys() == set(checkpoint)
  for path, value in expected.items():
    found = checkpoint[path].load()
    if isinstance(value, jax.Array | np.ndarray):
      value = np.asarray(value)
      assert value.dtype == found.dtype, path
      assert value.shape == found.shape, path
      assert value.tobytes() == np.asarray(found).tobytes(), path
    else:
      assert type(value) is type(found), path
      assert value == found, path


def restored(path):
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(path)


@pytest.mark.parametrize('writer', WRITERS)
def test_all_writers_and_layouts_are_read_as_orbax_reads_them(zoo, writer):
  path = zoo(writer)
  same(flat(tree()), surgery.open(path))


@pytest.mark.parametrize('writer', WRITERS)
def test_what_is_rewritten_restores_with_its_lists(zoo, writer, tmp_path):
  from orbax.checkpoint import v1

  opened = surgery.open(zoo(writer))
  out = tmp_path / 'out.orbax'
  opened.write(out)
  expected = flat(tree())
  load = getattr(v1, 'load', None) or v1.load_pytree
  for found in (
    restored(out),
    ocp.PyTreeCheckpointer().restore(out),
    load(out),
  ):
    assert isinstance(found['list'], list)
    assert isinstance(found['list'][1], list)
    found['list'][1] = tuple(found['list'][1])
    assert jax.tree.structure(tree()) == jax.tree.structure(found)
    same(flat(found), opened)
  target = {k: v for k, v in tree().items() if k != 'list'}
  with ocp.StandardCheckpointer() as reader:
    # With a target: shapes, dtypes and devices are the caller's.
    abstract = jax.tree.map(
      lambda v: (
        jax.ShapeDtypeStruct(v.shape, v.dtype) if hasattr(v, 'shape') else v
      ),
      {**target, 'list': [jnp.ones(2), [jnp.ones(()), jnp.ones(1, 'int8')]]},
    )
    again = reader.restore(out, abstract)
  for path, value in expected.items():
    if hasattr(value, 'shape'):
      assert (
        np.asarray(flat(again)[path]).tobytes() == np.asarray(value).tobytes()
      )


def test_an_optimizer_s_state_and_a_module_s_are_read(tmp_path):
  from flax import nnx

  state = optax.adam(1e-3).init({'w': jnp.ones(3)})
  standard(tmp_path / 'adam', state)
  opened = surgery.open(tmp_path / 'adam')
  assert {('0', 'count'), ('0', 'mu', 'w'), ('0', 'nu', 'w'), ('1',)} == set(
    opened
  )
  module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
  standard(tmp_path / 'nnx', nnx.state(module))
  opened = surgery.open(tmp_path / 'nnx')
  kernel = opened['kernel', 'value'].load()
  assert np.asarray(module.kernel[...]).tobytes() == kernel.tobytes()


def test_keys_keep_their_implementation(tmp_path):
  standard(tmp_path / 'a', {'key': jax.random.key(3, impl='rbg')})
  opened = surgery.open(tmp_path / 'a')
  assert 'rbg' == opened[('key',)].key
  opened.write(tmp_path / 'b.orbax')
  again = surgery.open(tmp_path / 'b.orbax')
  assert 'rbg' == again[('key',)].key
  expected = jax.random.key_data(jax.random.key(3, impl='rbg'))
  np.testing.assert_array_equal(expected, again[('key',)].load())


def test_texts_are_read_and_written(tmp_path):
  newest(tmp_path / 'a', {'name': 'hello', 'w': np.ones(2)})
  opened = surgery.open(tmp_path / 'a')
  assert 'hello' == opened[('name',)].load()
  opened.write(tmp_path / 'b.orbax')
  assert 'hello' == surgery.open(tmp_path / 'b.orbax')[('name',)].load()
  assert 'hello' == restored(tmp_path / 'b.orbax')['name']


def test_blocks_are_the_whole(tmp_path):
  numbers = np.random.default_rng(1)
  value = numbers.normal(size=(3000, 1000)).astype('float32')
  deep = numbers.normal(size=(2, 3, 701, 503)).astype('float16')
  standard(tmp_path / 'a', {'w': value, 'deep': deep})
  opened = surgery.open(tmp_path / 'a')
  for name, expected in (('w', value), ('deep', deep)):
    parts = [np.ravel(part) for part in opened[(name,)].parts()]
    assert len(parts) > 1
    assert expected.tobytes() == np.concatenate(parts).tobytes()
  # Of what is computed the chunks are of another shape than the blocks.
  out = tmp_path / 'b.orbax'
  surgery.cast(opened, 'float64').write(out)
  again = restored(out)
  assert value.astype('float64').tobytes() == again['w'].tobytes()
  assert deep.astype('float64').tobytes() == again['deep'].tobytes()


def test_a_rename_links_the_data(tmp_path):
  value = np.random.default_rng(0).integers(0, 255, (2048, 1024), np.uint8)
  standard(tmp_path / 'a', {'w': value, 'n': {'b': np.ones(3)}})
  out = tmp_path / 'b.orbax'
  surgery.rename(surgery.open(tmp_path / 'a'), ['w -> renamed']).write(out)
  assert value.tobytes() == restored(out)['renamed'].tobytes()
  own = sum(
    f.stat().st_size
    for f in out.rglob('*')
    if f.is_file() and f.stat().st_nlink == 1
  )
  assert own < 100_000
  # The first checkpoint may go.
  shutil.rmtree(tmp_path / 'a')
  assert value.tobytes() == surgery.open(out)[('renamed',)].load().tobytes()
  # What points into another's data can be rewritten again.
  surgery.open(out).write(tmp_path / 'c.orbax')
  shutil.rmtree(out)
  assert value.tobytes() == restored(tmp_path / 'c.orbax')['renamed'].tobytes()


def test_what_is_dropped_does_not_stay_on_the_disk(tmp_path):
  value = np.random.default_rng(0).integers(0, 255, (2048, 1024), np.uint8)
  standard(tmp_path / 'a', {'large': value, 'small': np.ones(300)})
  out = tmp_path / 'b.orbax'
  surgery.drop(surgery.open(tmp_path / 'a'), 'large').write(out)
  size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
  assert size < 100_000
  assert (300,) == restored(out)['small'].shape


def test_a_name_in_front_of_another_takes_nothing_along(tmp_path):
  leaves = {
    (name,): surgery.Leaf(lambda v=v: np.full(400, v), (400,), 'float64')
    for name, v in (('c/b', 3.0), ('a', 1.0), ('a/b', 2.0))
  }
  surgery.Checkpoint(leaves).write(tmp_path / 'a.orbax')
  for rule in ('a -> c', 'a -> d'):
    out = tmp_path / f'{rule[-1]}.orbax'
    made = surgery.rename(surgery.open(tmp_path / 'a.orbax'), [rule])
    made.write(out)
    for checkpoint in (made, surgery.open(out)):
      found = {path[0]: checkpoint[path].load()[0] for path in checkpoint}
      assert {rule[-1]: 1.0, 'a/b': 2.0, 'c/b': 3.0} == found
    assert 3.0 == restored(out)['c/b'][0]


def test_adapters_go_through_orbax(tmp_path):
  numbers = np.random.default_rng(0)
  standard(
    tmp_path / 'base',
    {'net': {'h': {'kernel': numbers.normal(size=(8, 6)).astype('float32')}}},
  )
  base = surgery.open(tmp_path / 'base')
  adapted = surgery.attach(base, surgery.LoRA(rank=2), to='**')
  adapted.write(tmp_path / 'adapted.orbax')
  adapted.write(tmp_path / 'adapted.msgpack')
  out = tmp_path / 'merged.orbax'
  surgery.merge(surgery.open(tmp_path / 'adapted.orbax')).write(out)
  surgery.merge(surgery.open(tmp_path / 'adapted.msgpack')).write(
    tmp_path / 'merged.msgpack'
  )
  path = ('net', 'h', 'kernel')
  expected = surgery.open(tmp_path / 'merged.msgpack')[path]
  found = surgery.open(out)[path]
  assert expected.digest == found.digest
  assert expected.load().tobytes() == found.load().tobytes()


def test_the_shell_keeps_the_format(tmp_path):
  standard(tmp_path / 'a', {'net': {'kernel': np.ones((2, 3), 'float32')}})

  def shell(*arguments):
    done = subprocess.run(
      [sys.executable, '-m', 'surgery', *map(str, arguments)],
      capture_output=True,
      text=True,
      cwd=tmp_path,
    )
    assert 0 == done.returncode, done.stderr
    return done

  shell('rename', 'a', 'net/kernel -> net/w', '-o', 'out/')
  assert (2, 3) == restored(tmp_path / 'out')['net']['w'].shape
  shell('cast', 'a', '--to', 'float16', '-o', 'half.orbax')
  assert 'float16' == restored(tmp_path / 'half.orbax')['net']['kernel'].dtype
  shell('convert', 'half.orbax', 'half.safetensors')
  shell('convert', 'half.safetensors', 'again', '--to', 'orbax')
  shell('diff', 'half.orbax', 'again')
  (tmp_path / 'empty.orbax').mkdir()
  shell('convert', 'half.safetensors', 'empty.orbax')
  assert (tmp_path / 'empty.orbax' / '_METADATA').exists()


def test_no_jax_and_no_orbax_is_imported(zoo):
  program = f"""
import sys
import surgery
opened = surgery.open({str(zoo('standard'))!r})
assert opened[('layer', 'bias')].load().shape == (4,)
print([m for m in ('jax', 'orbax') if m in sys.modules])
"""
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert '[]' == done.stdout.strip()


def test_shards_are_read_by_themselves(tmp_path):
  """Each device gets its part; of the file no more is decoded than chunks."""
  program = f"""
import jax, numpy as np, surgery
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
value = np.arange(64 * 8, dtype='float32').reshape(64, 8)
with ocp.StandardCheckpointer() as saver:
  saver.save({str(tmp_path / 'a')!r}, {{'net': {{'kernel': value}}}})
mesh = jax.make_mesh((4, 2), ('x', 'y'))
for spec in (P('x'), P(None, 'y'), P('y', 'x')):
  sharding = NamedSharding(mesh, spec)
  params = surgery.load({str(tmp_path / 'a')!r}, shardings=sharding)
  found = params['net', 'kernel'].value
  assert sharding == found.sharding
  assert value.tobytes() == np.asarray(found).tobytes()
"""
  subprocess.run(
    [sys.executable, '-c', program],
    check=True,
    env={
      **os.environ,
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    },
  )
