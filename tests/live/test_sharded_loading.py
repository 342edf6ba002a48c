"""Files are loaded straight into the shards of a mesh."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import surgery
from tests.live.test_placing import ROOT, environment

SETUP = """
import pathlib, sys
import jax
import numpy as np
import surgery
from surgery.files import source
from jax.sharding import NamedSharding, PartitionSpec as P

numbers = np.random.default_rng(0)
values = {
  ('net', 'kernel'): numbers.normal(size=(16, 8)).astype('float32'),
  ('net', 'half'): numbers.normal(size=(8, 4)).astype('float16'),
  ('net', 'deep'): numbers.normal(size=(4, 6, 8)).astype('float32'),
  ('net', 'bias'): numbers.normal(size=8).astype('float32'),
}
def leaf(value):
  return surgery.Leaf(lambda: value, value.shape, value.dtype.name)
saved = surgery.Checkpoint({path: leaf(v) for path, v in values.items()})
"""

SPECS = """
mesh = jax.make_mesh((4, 2), ('x', 'y'))
specs = {
  'kernel': P('x', 'y'), 'half': P(None, 'x'), 'deep': P(None, 'y', 'x'),
  'bias': P(),
}
def shardings(path, leaf):
  return NamedSharding(mesh, specs[path[-1]])
"""


def run(program, *arguments, count=8, check=True):
  return subprocess.run(
    [sys.executable, '-W', 'error', '-c', program, *map(str, arguments)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=environment(count),
    check=check,
  )


def test_each_device_gets_its_part_of_what_is_read_once(tmp_path):
  """Rows, columns, inner axes and copies, of both formats."""
  done = run(
    SETUP
    + SPECS
    + """
folder = pathlib.Path(sys.argv[1])
read = []
whole = source.Source.__call__
put = jax.device_put
def spy(value, device=None, **more):
  read.append(np.size(value))
  return put(value, device, **more)
for name in ('m.msgpack', 'm.safetensors'):
  saved.write(folder / name)
  jax.device_put = spy
  params = surgery.load(folder / name, shardings=shardings)
  jax.device_put = put
  for path, value in values.items():
    found = params[path].value
    assert found.sharding == shardings(path, None), path
    for shard in found.addressable_shards:
      assert np.array_equal(value[shard.index], np.asarray(shard.data))
    assert value.tobytes() == np.asarray(found).tobytes()
  # No device got more than its part: an eighth of the kernel.
  assert 16 in read and 128 not in read, read
  # Adapters are split as their bases are.
  made = surgery.attach(params, surgery.LoRA(rank=2), to='net', seed=0)
  names = [path for path in made.keys() if path[-1].startswith('lora_a')]
  assert P('x', None) == made[names[0]].value.sharding.spec
""",
    tmp_path,
    check=False,
  )
  assert 0 == done.returncode, done.stderr


def test_damage_is_found_where_all_is_read(tmp_path):
  done = run(
    SETUP
    + SPECS
    + """
file = pathlib.Path(sys.argv[1]) / 'm.msgpack'
saved.write(file)
whole = bytearray(file.read_bytes())
at = whole.index(values['net', 'kernel'].tobytes())
whole[at + 5] ^= 1
file.write_bytes(whole)
try:
  surgery.load(file, shardings=shardings)
except surgery.FormatError as error:
  assert 'net/kernel: expected the digest' in str(error), error
else:
  raise AssertionError('it was loaded')
""",
    tmp_path,
    check=False,
  )
  assert 0 == done.returncode, done.stderr


def saved(tmp_path, **values):
  leaves: dict[tuple[str, ...], surgery.Leaf] = {
    ('net', name): surgery.Leaf(lambda v=v: v, v.shape, v.dtype.name)
    for name, v in values.items()
  }
  surgery.Checkpoint(leaves).write(tmp_path / 'm.msgpack')
  return tmp_path / 'm.msgpack'


def one(*axes):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('x',))
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def test_one_sharding_serves_all_tensors(tmp_path):
  file = saved(tmp_path, a=np.ones((2, 3), 'float32'), b=np.ones(2, 'int32'))
  params = surgery.load(file, shardings=one())
  for path in (('net', 'a'), ('net', 'b')):
    assert one() == params[path].value.sharding
    assert params[path].value.committed


@pytest.mark.parametrize(
  'shardings, match',
  [
    (one(None, 'x'), r'net/b: float32\[3\] cannot lie as NamedSharding'),
    (lambda path, leaf: 'rows', 'net/b: shardings returned str'),
    (jax.sharding.PartitionSpec('x'), r'found \w+\. .*NamedSharding\('),
    ('x', 'found str'),
  ],
)
def test_what_cannot_lie_so_is_named(tmp_path, shardings, match):
  file = saved(tmp_path, b=np.ones(3, 'float32'))
  with pytest.raises(surgery.ConfigError, match=match):
    surgery.load(file, shardings=shardings)


def test_64_bits_are_not_narrowed(tmp_path):
  file = saved(tmp_path, b=np.ones(3, 'float64'))
  with pytest.raises(surgery.ConfigError, match='JAX would narrow float64'):
    surgery.load(file, shardings=one())
  loaded = surgery.load(file, shardings=lambda path, leaf: None)
  assert 'float64' == loaded['net', 'b'].value.dtype


PROCESS = (
  SETUP
  + """
import json
number, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{port}', 2, number)
mesh = jax.make_mesh((4,), ('x',))
rows = NamedSharding(mesh, P('x'))
read = []
view = np.array
def counted(value, *given, **more):
  read.append(np.size(value))
  return view(value, *given, **more)
from surgery.live import sharded
sharded.np = type('', (), {**vars(np), 'array': staticmethod(counted)})
params = surgery.load(
  file, shardings=lambda path, leaf: rows if path[-1] == 'kernel' else None
)
kernel = params['net', 'kernel'].value
expected = values['net', 'kernel']
for shard in kernel.addressable_shards:
  assert np.array_equal(expected[shard.index], np.asarray(shard.data))
total = float(jax.jit(lambda k: k.sum())(kernel))
assert abs(total - expected.sum()) < 1e-4
try:
  surgery.save(file + f'.{number}.msgpack', params)
except surgery.SurgeryError as error:
  said = str(error)
print(json.dumps([read, said]))
"""
)


def test_processes_read_only_their_shards(tmp_path):
  """Two processes of JAX, two devices each; neither can save the whole."""
  numbers = np.random.default_rng(0)
  file = saved(
    tmp_path,
    kernel=numbers.normal(size=(16, 8)).astype('float32'),
  )
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  started = [
    subprocess.Popen(
      [sys.executable, '-c', PROCESS, str(n), str(port), str(file)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env={**os.environ, **environment(2)},
    )
    for n in range(2)
  ]
  for process in started:
    out, wrong = process.communicate(timeout=120)
    assert 0 == process.returncode, wrong
    read, said = json.loads(out.splitlines()[-1])
    assert [32, 32] == read  # Of 128 numbers.
    assert 'Save them with Orbax' in said
