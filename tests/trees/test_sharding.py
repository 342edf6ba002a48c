"""Boxes and shardings on four devices, which are those of a child process."""

import os
import pathlib
import subprocess
import sys

import surgery

SCRIPT = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
import surgery
mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
model = nn.Sequential([nn.Dense(16, kernel_init=init), nn.relu, nn.Dense(4)])
x = np.random.default_rng(0).normal(size=(8, 8)).astype('float32')
params = model.init(jax.random.key(0), x)['params']
specs = nn.get_partition_spec(params)
is_box = lambda v: isinstance(v, nn.Partitioned)
put = lambda v, s: jax.tree.map(lambda one: jax.device_put(one, NamedSharding(mesh, s)), v)
params = jax.tree.map(put, params, specs, is_leaf=is_box)
tree = surgery.attach(params, surgery.LoRA(rank=2), to='**/kernel')
tree = surgery.with_weights(tree, 'default', jax.tree.map(lambda w: w + 0.1, surgery.weights(tree)))
b = tree.weights['layers_0']['lora_b']
assert isinstance(b, nn.Partitioned) and (None, 'model') == tuple(b.names), b
assert (2, 8) == b.value.addressable_shards[0].data.shape, b.value.sharding
spec = nn.get_partition_spec(tree)
assert P(None, 'model') == spec.weights['layers_0']['lora_b']
expected = model.apply({'params': jax.device_get(surgery.merge(tree))}, x)
fast = surgery.factored(model.apply, strict=True)
rows = jax.device_put(x, NamedSharding(mesh, P('data')))
with jax.set_mesh(mesh):
  np.testing.assert_allclose(expected, jax.jit(fast)({'params': tree}, rows), rtol=1e-4, atol=1e-5)
whole = jax.tree.map(lambda v: jax.device_put(v, NamedSharding(mesh, P())), jax.device_get(nn.meta.unbox(jax.device_get(params))))
plain = surgery.attach(whole, surgery.LoRA(rank=2), to='**/kernel')
plain = surgery.with_weights(plain, 'default', jax.tree.map(lambda w: w + 0.1, surgery.weights(plain)))
expected = model.apply({'params': surgery.merge(plain)}, x)
@jax.jit
@jax.shard_map(mesh=mesh, in_specs=(P(), P('data')), out_specs=P('data'))
def run(tree, x):
  return fast({'params': tree}, x)
np.testing.assert_allclose(expected, run(plain, rows), rtol=1e-4, atol=1e-5)
with jax.set_mesh(mesh):
  net = nnx.Linear(8, 16, rngs=nnx.Rngs(0), kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, 'model')))
  net = surgery.attach(net, surgery.LoRA(rank=2), to='kernel')
weight = net.weights['lora_b']
assert (None, 'model') == tuple(weight.get_metadata()['out_sharding'])
assert (2, 8) == weight[...].addressable_shards[0].data.shape, weight[...].sharding
print('done')
"""


def test_weights_are_sharded_as_the_base_and_used_so():
  ran = subprocess.run(
    [sys.executable, '-W', 'error', '-c', SCRIPT],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(surgery.__file__).parent.parent,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    },
  )
  assert 0 == ran.returncode, ran.stderr
  assert 'done' == ran.stdout.strip()
