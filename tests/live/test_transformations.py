"""Adapted params under JAX's transformations, Python's copies and threads."""

from __future__ import annotations

import concurrent.futures
import copy
import os
import pathlib
import pickle
import subprocess
import sys

import blox as bx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

import surgery
from surgery.model import records
from tests.live import models

LORA = surgery.LoRA(rank=2)
LAYER = ('net', 'mlp', 'hidden0')


@pytest.fixture(scope='module')
def net():
  return models.mlp()


@pytest.fixture(scope='module')
def adapted(net):
  return models.stirred(_attach(net[1]))


def _attach(params, name='default', **kwargs):
  kwargs = {'to': '**/hidden*', **kwargs}
  return surgery.attach(params, LORA, name=name, **kwargs)


# What a transformation must keep.


def test_flatten_and_unflatten_keep_all(adapted):
  leaves, structure = jax.tree.flatten(adapted)
  back = jax.tree.unflatten(structure, leaves)
  assert adapted.records == back.records
  models.assert_equal_params(adapted, back)


def test_leaves_are_those_of_plain_params(adapted):
  plain = bx.Params()
  for path, param in adapted.items():
    plain[path] = param
  leaves = jax.tree.leaves(plain)
  assert all(
    a is b for a, b in zip(leaves, jax.tree.leaves(adapted), strict=True)
  )


def test_map_keeps_the_class(adapted):
  doubled = jax.tree.map(lambda w: w, adapted)
  assert isinstance(doubled, surgery.AdaptedParams)
  assert adapted.records == doubled.records


def test_map_over_adapted_and_plain_is_refused_by_jax(net, adapted):
  with pytest.raises(ValueError, match='AdaptedParams'):
    jax.tree.map(lambda a, b: a, adapted, net[1])


def test_split_and_merge_give_it_back(adapted):
  one, two = surgery.freeze(adapted).split()
  models.assert_equal_params(surgery.freeze(adapted), one.merge(two))
  models.assert_equal_params(surgery.freeze(adapted), two.merge(one))


def test_a_half_alone_says_what_is_missing(net, adapted):
  model, _, x = net
  weights, rest = adapted.split(models.is_weight)
  with pytest.raises(
    surgery.AdapterError, match=r'lora_a.*[Mm]erge the halves'
  ):
    model(rest, x)
  with pytest.raises(surgery.AdapterError, match='Merge the halves'):
    model(weights, x)


def test_lock_and_unlock_keep_all(adapted):
  unlocked = adapted.unlocked()
  assert adapted.records == unlocked.records
  assert not unlocked.is_locked
  assert jax.tree.structure(adapted) == jax.tree.structure(unlocked.locked())


def test_a_new_layer_under_unlocked_params_is_not_adapted(net, adapted):
  layer = bx.Linear(
    bx.Graph('net').child('hidden9'),
    3,
    None,
    kernel_init=jax.nn.initializers.ones,
  )
  _, params = layer(adapted.unlocked(), jnp.ones((1, 4)))
  assert ('net', 'hidden9', 'lora_a') not in params
  assert adapted.records == params.locked().records


def test_eval_shape(net, adapted):
  model, _, x = net
  out, params = jax.eval_shape(model, adapted, x)
  assert (7, 3) == out.shape
  assert jax.tree.structure(adapted) == jax.tree.structure(params)
  call = jax.jit(lambda p: model(p, x)[0])
  models.close(model(adapted, x)[0], call(adapted))


def test_vmap_over_tenants(net, adapted):
  """One base, several tenants' weights in a batch."""
  model, base, x = net
  tenants = [models.stirred(_attach(base), seed) for seed in range(3)]
  weights = [t.split(models.is_weight)[0] for t in tenants]
  rest = adapted.split(models.is_weight)[1]
  stacked = jax.tree.map(lambda *w: jnp.stack(w), *weights)
  out = jax.vmap(lambda w: model(w.merge(rest), x)[0])(stacked)
  for tenant, one in zip(tenants, out, strict=True):
    models.close(model(models.dense(tenant), x)[0], one)


def test_adapted_params_as_the_carry_of_a_scan(net, adapted):
  model, _, x = net
  weights, rest = adapted.split(models.is_weight)

  def body(weights, x):
    loss = lambda w: (model(w.merge(rest), x)[0] ** 2).sum()
    grads = jax.grad(loss)(weights)
    return jax.tree.map(lambda w, g: w - 0.01 * g, weights, grads), loss(
      weights
    )

  xs = jnp.stack([x] * 3)
  actual, losses = jax.lax.scan(body, weights, xs)
  expected = weights
  step = jax.jit(body)
  for x in xs:
    expected, _ = step(expected, x)
  models.close(expected, actual)
  assert losses[-1] < losses[0]


def test_jvp_of_grad(net, adapted):
  model, _, x = net
  weights, rest = adapted.split(models.is_weight)

  def product(params_of):
    loss = lambda w: (model(params_of(w.merge(rest)), x)[0] ** 2).sum()
    return jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (w,))[1])(weights)

  models.close(product(models.dense), product(lambda p: p), 1e-4)


def test_device_put(net, adapted):
  model, _, x = net
  moved = jax.device_put(adapted, jax.devices()[0])
  assert adapted.records == moved.records
  models.close(model(adapted, x)[0], model(moved, x)[0])


def test_block_until_ready_and_transfer_to_the_host(adapted):
  host = jax.device_get(jax.block_until_ready(adapted))
  assert adapted.records == host.records


# Donation.


def _fresh(base):
  """Returns adapted params that share no buffer with any others."""
  return _attach(jax.tree.map(jnp.copy, base), to=['**/hidden*', '**/output'])


def test_donating_attached_params(net):
  model, base, x = net
  params = _fresh(base)
  expected = model(params, x)[0]
  step = jax.jit(lambda p: (model(p, x)[0], p), donate_argnums=0)
  out, after = step(params)
  models.close(expected, out)
  models.close(expected, step(after)[0])


def test_donating_params_with_two_adapters(net):
  model, base, x = net
  params = _attach(_fresh(base), 'two')
  step = jax.jit(lambda p: (model(p, x)[0], p), donate_argnums=0)
  models.close(model(base, x)[0], step(params)[0])


def test_donating_params_initialised_with_an_adapter(net):
  model, _, x = net
  params = _attach(model.rng.seed(bx.Params(), seed=0))
  params = jax.jit(model)(params, x)[1].locked()
  step = jax.jit(lambda p: (model(p, x)[0], p), donate_argnums=0)
  step(step(params)[1])


def test_no_two_weights_share_a_buffer(net):
  params = _attach(_fresh(net[1]), 'two')
  pointers = [
    q.value.unsafe_buffer_pointer()
    for p, q in params.items()
    if models.is_weight(p, q)
  ]
  assert len(pointers) == len(set(pointers))


# Merging containers.


def test_two_containers_unite_their_adapters(net):
  model, base, x = net
  one, two = (
    models.stirred(_attach(base, name, seed=seed), seed)
    for seed, name in enumerate(('one', 'two'))
  )
  both = one.merge(two)
  assert ('one', 'two') == both.records.names
  models.close(model(models.dense(both), x)[0], model(both, x)[0])
  assert [0, 1] == [a.seed for a in both.records.adapters]


def test_containers_whose_adapters_differ_are_refused(net):
  one = _attach(net[1])
  two = _attach(net[1], to='**/hidden0')
  with pytest.raises(
    surgery.AdapterError, match="both have an adapter 'default'"
  ):
    one.merge(two)
  with pytest.raises(surgery.AdapterError, match='both have'):
    one.merge(surgery.disable(one))


def test_containers_whose_orders_differ_are_refused(net):
  one = _attach(_attach(net[1], 'a'), 'b')
  two = _attach(_attach(net[1], 'b'), 'a')
  with pytest.raises(surgery.AdapterError, match='orders'):
    one.merge(two)


def test_containers_of_two_models_unite():
  parts = []
  for name in ('one', 'two'):
    graph = bx.Graph(name)
    layer = bx.Linear(graph.child('layer'), 4, None)
    params = bx.Params()
    params[name, 'layer', 'kernel'] = bx.Param(models.normal(1, (4, 4)))
    params[name, 'layer', 'bias'] = bx.Param(models.normal(2, (4,)))
    params = surgery.attach(params.locked(), LORA, to='**/layer', name=name)
    parts.append((layer, models.stirred(params)))
  (one, a), (two, b) = parts
  both = a.merge(b)
  x = models.normal(0, (2, 4))
  models.close(one(a, x)[0], one(both, x)[0])
  models.close(two(b, x)[0], two(both, x)[0])


def test_plain_params_take_values_but_no_adapters(net, adapted):
  _, base, _ = net
  back = adapted.merge(base)
  assert adapted.records == back.records
  models.assert_equal_params(adapted, back)


def test_lock_states_that_differ_are_refused_as_by_blox(adapted):
  with pytest.raises(ValueError, match='Locked mismatch'):
    adapted.merge(adapted.unlocked())


NAMES = st.lists(st.sampled_from('abcdef'), unique=True)


def _records(names):
  site = surgery.Site(
    ('l',), (surgery.ParamSpec('kernel', (4, 4), 'float32', 'io'),)
  )
  record = records.SiteRecord(site, {}, LORA)
  return records.Records(
    records.AdapterRecord(n, LORA, sites={site.path: record}) for n in names
  )


def _keeps_order(part, whole):
  return [n for n in whole if n in part] == list(part)


@hypothesis.given(NAMES, NAMES)
def test_united_records_keep_both_orders_or_are_refused(a, b):
  common = [n for n in a if n in b]
  if common != [n for n in b if n in a]:
    with pytest.raises(surgery.AdapterError):
      records.unite(_records(a), _records(b))
    return
  names = records.unite(_records(a), _records(b)).names
  assert set(a) | set(b) == set(names)
  assert _keeps_order(a, names)
  assert _keeps_order(b, names)


@hypothesis.given(NAMES)
def test_uniting_with_itself_or_nothing_changes_nothing(a):
  one, none = _records(a), _records([])
  assert one is records.unite(one, one)
  assert one is records.unite(one, none)
  assert one is records.unite(none, one)


@hypothesis.given(NAMES, st.data())
def test_what_only_the_left_has_lies_inside(names, data):
  common = data.draw(st.lists(st.sampled_from(names or ['x']), unique=True))
  common = [n for n in names if n in common]
  left, right = [*common, 'left'], [*common, 'right']
  united = records.unite(_records(left), _records(right)).names
  assert (*common, 'left', 'right') == united


@hypothesis.given(NAMES)
def test_equal_records_are_one_object(names):
  one = _records(names)
  assert one is _records(names)
  assert one is pickle.loads(pickle.dumps(one))
  assert hash(one) == hash(_records(names))


# Copies.


@pytest.mark.parametrize(
  'duplicate',
  [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
  ids=['copy', 'deepcopy', 'pickle'],
)
def test_copies_are_equal_and_answer_the_same(net, adapted, duplicate):
  model, _, x = net
  other = duplicate(adapted)
  assert jax.tree.structure(adapted) == jax.tree.structure(other)
  models.assert_equal_params(adapted, other)
  assert models.bits(model(adapted, x)[0]) == models.bits(model(other, x)[0])
  assert models.bits(model(adapted, x)[0]) == models.bits(
    model(surgery.merge(other), x)[0]
  )


def test_another_process_reads_a_pickle(adapted, tmp_path):
  file = tmp_path / 'params.pickle'
  file.write_bytes(pickle.dumps(adapted))
  script = (
    'import pathlib, pickle, sys, numpy, surgery\n'
    'params = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n'
    'again = surgery.attach(surgery.detach(params), surgery.LoRA(rank=2),\n'
    "                       to='**/hidden*')\n"
    'assert again.records == params.records\n'
    'value = surgery.merge(params)["net", "mlp", "hidden0", "kernel"].value\n'
    'print(numpy.asarray(value).tobytes().hex())\n'
  )
  ran = _python(script, str(file))
  expected = surgery.merge(adapted)[(*LAYER, 'kernel')].value
  assert models.bits(expected)[2].hex() == ran.strip()


def _python(script, *args, devices=1):
  flags = f'--xla_force_host_platform_device_count={devices}'
  root = pathlib.Path(surgery.__file__).parent.parent
  ran = subprocess.run(
    [sys.executable, '-W', 'error', '-c', script, *args],
    capture_output=True,
    text=True,
    check=False,
    cwd=root,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': flags,
      # As here, see conftest.py: bits are compared.
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    },
  )
  assert 0 == ran.returncode, ran.stderr
  return ran.stdout


# Threads.


def test_two_threads_run_two_adaptations_of_one_model(net):
  model, base, x = net

  def adapt(seed):
    params = models.stirred(_attach(base, f'tenant{seed % 2}', seed=seed), seed)
    out = model(params, x)[0]
    disabled = model(surgery.disable(params), x)[0]
    merged = model(surgery.merge(params), x)[0]
    return params, out, merged, disabled

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = list(pool.map(adapt, range(8)))
  expected = models.bits(model(base, x)[0])
  for params, out, merged, disabled in results:
    models.close(model(models.dense(params), x)[0], out)
    assert models.bits(out) == models.bits(merged)
    assert expected == models.bits(disabled)


# What people see.


def test_repr_tells_of_adapters(adapted):
  text = repr(surgery.disable(_attach(adapted, 'two'), 'two'))
  assert text.startswith('AdaptedParams[locked]({')
  assert "('net', 'mlp', 'hidden0', 'lora_a')" in text
  lora = 'LoRA(rank=2, alpha=None, rslora=False, dropout=0.0)'
  assert f'# default: {lora} on 2 sites' in text
  assert text.endswith('on 2 sites, disabled')


def test_repr_tells_of_a_search(net):
  params = _attach(net[0].rng.seed(bx.Params(), seed=0))
  assert repr(params).endswith('on 0 sites, looking for sites')


def test_repr_works_while_traced(adapted):
  texts = []
  jax.eval_shape(lambda p: texts.append(repr(p)) or 0, adapted)
  assert texts[0].startswith('AdaptedParams')


# treescope looks at a class that numpy has deprecated.
@pytest.mark.filterwarnings('ignore:The chararray class:DeprecationWarning')
def test_display_shows_adapters_weights(net, adapted, monkeypatch):
  treescope = pytest.importorskip('treescope')
  shown = []
  monkeypatch.setattr(treescope, 'show', shown.append)
  bx.display(net[0].root, adapted)
  text = treescope.render_to_text(shown[0])
  assert 'MLP' in text
  assert len(list(adapted.keys())) == 12


# Several devices.

DEVICES = """
import functools
import blox as bx, jax, jax.numpy as jnp, numpy as np, surgery
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.live import models

assert 4 == len(jax.devices())
model, base, x = models.mlp((8, 8, 4), inputs=4)
x = jnp.concatenate([x, x[:1]])
params = models.stirred(
  surgery.attach(base, surgery.LoRA(rank=2), to='**/hidden*'))
weights, rest = params.split(models.is_weight)
mesh = Mesh(np.array(jax.devices()), ('data',))
put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
dense = models.dense(params)
expected = model(dense, x)[0]

# shard_map over the batch.
call = jax.shard_map(lambda p, x: model(p, x)[0], mesh=mesh,
                     in_specs=(P(), P('data')), out_specs=P('data'))
models.close(expected, jax.jit(call)(params, x))

# Its gradient.
def loss(oracle, w):
  p = w.merge(rest)
  if oracle:
    return (model(models.dense(p), x)[0] ** 2).sum()
  return (call(p, x) ** 2).sum()
grad = lambda oracle: jax.jit(jax.grad(functools.partial(loss, oracle)))
models.close(grad(True)(weights), grad(False)(weights))

# Shardings that follow the metadata, and out_shardings.
_, base, x = models.mlp((8, 8, 4), kernel_metadata={'sharding': (None, 'data')})
params = models.stirred(
  surgery.attach(base, surgery.LoRA(rank=2), to='**/hidden*'))
shardings = jax.tree.unflatten(jax.tree.structure(params), [
  NamedSharding(mesh, P(*params[path].sharding))
  for path in sorted(params.keys())])
expected = model(models.dense(params), x)[0]
placed = jax.device_put(params, shardings)
b = placed['net', 'mlp', 'hidden0', 'lora_b'].value
assert (2, 2) == b.addressable_shards[0].data.shape, b.sharding
step = jax.jit(lambda p: (model(p, x)[0], p), out_shardings=(None, shardings),
               donate_argnums=0)
out, after = step(placed)
models.close(expected, out)
assert params.records == after.records
models.close(expected, model(after, x)[0])
merged = surgery.merge(after)
models.close(expected, jax.jit(lambda p: model(p, x)[0])(merged))
kernel = merged['net', 'mlp', 'hidden0', 'kernel'].value
assert (4, 2) == kernel.addressable_shards[0].data.shape
print('fine')
"""


def test_on_four_devices():
  assert 'fine\n' == _python(DEVICES, devices=4)
