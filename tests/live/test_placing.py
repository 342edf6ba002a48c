"""Weights are drawn on the CPU, and lie where their base does.

There is no accelerator here. What one would do is done by several devices of
the host, and by a second platform whose devices are the host's as well.
"""

import json
import os
import pathlib
import subprocess
import sys

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.editing import devices

ROOT = pathlib.Path(surgery.__file__).parents[1]

SETUP = """
import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import surgery
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

KERNEL = ('net', 'layer', 'kernel')
A, B = ('net', 'layer', 'lora_a'), ('net', 'layer', 'lora_b')

def params(kernel):
  made = bx.Params()
  made[KERNEL] = bx.Param(kernel)
  return made.locked()

def adapted(kernel, adapter=None, **options):
  adapter = adapter or surgery.LoRA(rank=4)
  return surgery.attach(params(kernel), adapter, to='**', **options)

def same(expected, actual):
  assert np.asarray(expected).tobytes() == np.asarray(actual).tobytes()

class Mask(surgery.Adapter):
  name = 'mask'
  def init(self, site, key):
    return {'mask': jax.random.normal(key, site.primary.shape, 'float32')}
  def apply(self, site, name, base, weights):
    return base * weights['mask']
  def sharding(self, site, weight):
    return site.primary.sharding

class Own(surgery.Adapter):
  '''Draws from its base, as PiSSA does.'''
  name = 'own'
  def init(self, site, key):
    return {'own': jnp.linalg.svd(site.base('kernel'))[1]}
  def apply(self, site, name, base, weights):
    return base + weights['own'].sum()

class Shared(surgery.Adapter):
  name = 'shared'
  def init(self, site, key):
    return {'own': jnp.zeros(site.out_shape, 'float32')}
  def init_shared(self, sites, key):
    return {'all': jax.random.normal(key, (3,), 'float32')}
  def apply(self, site, name, base, weights):
    return base + weights['own'] * weights['all'].sum()

kernel = np.random.default_rng(0).normal(size=(16, 8)).astype('float32')
plain = adapted(jnp.asarray(kernel))
"""


# Runs scripts one after another, each behind what `SETUP` made: importing JAX
# takes longer than most of them.
SERVER = """
import json, sys, traceback
names = {'__name__': 'scripts'}
exec(SETUP, names)
for line in sys.stdin:
  wrong = ''
  try:
    exec(json.loads(line), dict(names))
  except BaseException:
    wrong = traceback.format_exc()
  print(json.dumps(wrong), flush=True)
"""


def environment(count, **more):
  """Returns the environment of a process with some devices of the host."""
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={count}',
    # As here, see conftest.py.
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    **more,
  }


@pytest.fixture(scope='module')
def python():
  """Runs scripts behind `SETUP`, with eight devices of the host."""
  with subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', f'SETUP = {SETUP!r}{SERVER}'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env=environment(8),
  ) as process:
    assert process.stdin and process.stdout

    there, back = process.stdin, process.stdout

    def run(script):
      there.write(f'{json.dumps(script)}\n')
      there.flush()
      answer = back.readline()
      assert answer, 'the process has ended; see its stderr'
      wrong = json.loads(answer)
      assert not wrong, wrong

    yield run
    there.close()


def test_weights_are_split_as_the_base_is(python):
  python("""
for kind in (AxisType.Auto, AxisType.Explicit):
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(kind, kind))
  for spec, of_a, of_b in [
    (P('x', 'y'), P('x', None), P(None, 'y')),
    (P('y'), P('y', None), P(None, None)),
    (P(None, ('x', 'y')), P(None, None), P(None, ('x', 'y'))),
    (P(), P(None, None), P(None, None)),
  ]:
    base = jax.device_put(kernel, NamedSharding(mesh, spec))
    made = adapted(base)
    for path, expected in ((A, of_a), (B, of_b)):
      value = made[path].value
      assert NamedSharding(mesh, expected) == value.sharding, value.sharding
      assert value.committed
      same(plain[path].value, value)
    merged = surgery.merge(made)[KERNEL].value
    assert merged.sharding.is_equivalent_to(base.sharding, 2), merged.sharding
    # A type that says nothing has its weights whole on each device.
    own = adapted(base, Own())['net', 'layer', 'own'].value
    assert NamedSharding(mesh, P(None)) == own.sharding
    same(adapted(jnp.asarray(kernel), Own())['net', 'layer', 'own'].value, own)
    mask = adapted(base, Mask())['net', 'layer', 'mask'].value
    assert mask.sharding.is_equivalent_to(base.sharding, 2)
    shared = adapted(base, Shared())['surgery.default', 'all'].value
    assert NamedSharding(mesh, P(None)) == shared.sharding
""")


def test_stacked_axes_are_split_as_those_of_the_base(python):
  python("""
mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
stack = np.stack([kernel] * 4)
base = jax.device_put(stack, NamedSharding(mesh, P('x', None, 'y')))
made = adapted(base, stacked=1)
assert P('x', None, None) == made[A].value.sharding.spec
assert P('x', None, 'y') == made[B].value.sharding.spec
same(adapted(jnp.asarray(stack), stacked=1)[A].value, made[A].value)
""")


def test_a_split_that_does_not_divide_a_weight_is_left_out(python):
  python("""
class Half(Mask):
  name = 'half'
  def init(self, site, key):
    return {'mask': jnp.zeros((site.in_size // 8, *site.out_shape), 'float32')}
  def apply(self, site, name, base, weights):
    return base + weights['mask'].sum()

mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
base = jax.device_put(kernel, NamedSharding(mesh, P('x', 'y')))
value = adapted(base, Half())['net', 'layer', 'mask'].value
assert P(None, 'y') == value.sharding.spec
""")


def test_one_device_is_the_base_s(python):
  python("""
third = jax.devices()[3]
made = adapted(jax.device_put(kernel, third))
for path in (A, B):
  assert made[path].value.committed
  assert {third} == made[path].value.devices()
  same(plain[path].value, made[path].value)
with jax.default_device(third):
  loose = jnp.asarray(kernel) + 0
made = adapted(loose)
for path in (A, B):
  assert not made[path].value.committed
  assert {third} == made[path].value.devices()
assert not plain[A].value.committed
""")


def test_what_is_loaded_or_combined_lies_beside_the_base(python, tmp_path):
  python(f"""
import pathlib
file = pathlib.Path({str(tmp_path)!r}) / 'a.msgpack'
mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
base = jax.device_put(kernel, NamedSharding(mesh, P('x', 'y')))
surgery.save_adapter(file, plain)
made = surgery.load_adapter(file, params(base))
assert P('x', None) == made[A].value.sharding.spec
same(plain[A].value, made[A].value)
two = surgery.attach(made, surgery.LoRA(rank=4), to='**', name='b', seed=1)
one = surgery.combine_adapters(two, {{'default': 1, 'b': 1}}, method='svd')
path = [p for p in one.keys() if p[-1].startswith('lora_a')]
assert P('x', None) == one[path[0]].value.sharding.spec, one[path[0]]
""")


def test_steps_keep_the_layout(python):
  """Also those that compute on the host."""
  python("""
mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
split = NamedSharding(mesh, P('x', 'y'))
base = params(jax.device_put(kernel, split))
third = params(jax.device_put(kernel, jax.devices()[3]))
for step in (
  {'scale': {'select': '**', 'by': 0.3}},
  {'clamp': {'select': '**', 'min': -0.5, 'max': 0.5}},
  {'multiply': 'net/layer/kernel -> net/layer/kernel'},
  {'add': 'net/layer/kernel -> net/layer/kernel'},
  {'prune': {'select': '**', 'share': 0.5}},
  {'cast': 'bfloat16'},
):
  expected = surgery.apply(params(jnp.asarray(kernel)), [step])[KERNEL].value
  for before in (base, third):
    found = surgery.apply(before, [step])[KERNEL].value
    assert before[KERNEL].value.sharding == found.sharding, step
    assert found.committed, step
    same(expected, found)
""")


def test_traced_draws_stay_in_the_program(python):
  python("""
def attach(kernel):
  return adapted(kernel)
shapes = jax.eval_shape(attach, jax.ShapeDtypeStruct((16, 8), 'float32'))
assert (16, 4) == shapes[A].value.shape
jaxpr = str(jax.make_jaxpr(attach)(kernel))
assert 'random_bits' in jaxpr or 'threefry' in jaxpr
mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
for base in (kernel, jax.device_put(kernel, NamedSharding(mesh, P('x', 'y')))):
  same(plain[A].value, jax.jit(attach)(base)[A].value)
# The base is known, the draw is not.
known = jnp.asarray(kernel)
same(plain[A].value, jax.jit(lambda: adapted(known)[A].value)())
""")


# As on a machine with an accelerator: JAX's default is another platform.
ACCELERATOR = """
from jax._src import xla_bridge
from surgery.adapting import drawing
from surgery.editing import devices

cpu = jax.local_devices(backend='cpu')[0]
fast = jax.devices()[0]
assert fast.client is not cpu.client
plain = bx.Params()
on_cpu = lambda v: all(d.client is cpu.client for d in v.devices())
# Both say that they are a CPU.
devices._default = lambda: (
  'cpu' if jax.config.jax_default_device is not None else 'fake')
devices.is_of_host = lambda v: not isinstance(v, jax.core.Tracer) and (
  not isinstance(v, jax.Array) or on_cpu(v))

drawn = []
def spied(make):
  def spy(*key):
    run = make(*key)
    def call(*given):
      out = run(*given)
      drawn.extend(jax.tree.leaves(out))
      return out
    return call
  return spy
drawing._drawing = spied(drawing._drawing)
drawing._drawing_shared = spied(drawing._drawing_shared)
"""
REGISTERED = """
from jax._src import xla_bridge
xla_bridge.register_backend_factory(
  'fake', xla_bridge.make_cpu_client, priority=1000)
"""


def accelerator(script):
  """Runs a script where JAX's default is no CPU."""
  head, _, tail = SETUP.partition('kernel = np.random')
  tail = f'kernel = np.random{tail.replace("plain = adapted", "# adapted")}'
  whole = head + REGISTERED + tail + ACCELERATOR + script
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', whole],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
    env=environment(1, JAX_PLATFORMS=''),
  )
  assert 0 == done.returncode, done.stderr


def test_live_draws_are_computed_on_the_cpu():
  accelerator("""
for adapter in (surgery.LoRA(rank=4), Own(), Shared()):
  drawn.clear()
  made = adapted(jnp.asarray(kernel), adapter)
  assert drawn and all(map(on_cpu, drawn))
  for path, param in made.items():
    assert {fast} == param.value.devices(), path
    assert not param.value.committed, path
  # What a layer gets, and what is merged, is computed where the arrays are.
  merged = surgery.merge(made)[KERNEL].value
  assert {fast} == merged.devices()
""")


def test_what_is_made_before_initialisation_is_drawn_there_too():
  accelerator("""
graph = bx.Graph('net')
rng = bx.Rng(graph.child('rng'))
layer = bx.Linear(graph.child('layer'), 8, rng)
waiting = rng.seed(bx.Params(), seed=0)
waiting = surgery.attach(waiting, surgery.LoRA(rank=4), to='**/layer')
_, made = layer(waiting, jnp.ones((2, 16)))
assert drawn and all(map(on_cpu, drawn))
assert {fast} == made[A].value.devices()
""")


def test_files_are_computed_on_the_cpu(tmp_path):
  accelerator(f"""
import pathlib
from surgery.model import grid
from surgery.adapting import blocks, compute

grid.BLOCK = 64  # So that there are several.
folder = pathlib.Path({str(tmp_path)!r})
saved = params(jnp.asarray(kernel))
surgery.save(folder / 'base.msgpack', saved)
base = surgery.open(folder / 'base.msgpack')
computed = []
def spied(make):
  def spy(*key):
    run = make(*key)
    def call(*given):
      out = run(*given)
      computed.append(out)
      return out
    return call
  return spy
blocks._program = spied(blocks._program)
compute._PROGRAMS.get = spied(compute._PROGRAMS.get)
types = surgery.LoRA(rank=4), Own(), Shared(), Mask()
for adapter in types:
  made = surgery.attach(base, adapter, to='**')
  surgery.merge(made).write(folder / f'{{adapter.name}}.msgpack')
computed = [v for v in computed if not isinstance(v, jax.core.Tracer)]
assert len(computed) >= len(types), len(computed)
elsewhere = [(v.shape, v.devices()) for v in computed if not on_cpu(v)]
assert not elsewhere, elsewhere
assert drawn and all(map(on_cpu, drawn))
# The bits are those of params on the other platform.
for adapter in types:
  live = surgery.merge(surgery.attach(saved, adapter, to='**'))[KERNEL].value
  assert {{fast}} == live.devices()
  found = surgery.open(folder / f'{{adapter.name}}.msgpack')
  same(live, found[KERNEL].load())
""")


def test_jax_that_must_do_without_a_cpu_is_told_what_to_add(monkeypatch):
  def local_devices(backend):
    raise RuntimeError(f'Unknown backend {backend}')

  monkeypatch.setattr(devices, '_default', lambda: 'cuda')
  monkeypatch.setattr(jax, 'local_devices', local_devices)
  monkeypatch.setattr(type(jax.config), 'read', lambda self, name: 'cuda')
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((4, 4)))
  with pytest.raises(
    surgery.SurgeryError, match=r'Add it behind the others, JAX_PLATFORMS=cuda'
  ):
    surgery.attach(params.locked(), surgery.LoRA(rank=2), to='**')
  # In the caller's program it is drawn where that runs.
  shapes = jax.eval_shape(
    lambda p: surgery.attach(p, surgery.LoRA(rank=2), to='**'), params.locked()
  )
  assert (4, 2) == shapes['net', 'lora_a'].value.shape


def test_numpy_s_params_get_weights_of_jax():
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(np.ones((4, 4), 'float32'))
  made = surgery.attach(params.locked(), surgery.LoRA(rank=2), to='**')
  assert isinstance(made['net', 'lora_a'].value, jax.Array)
  assert isinstance(made['net', 'kernel'].value, np.ndarray)
