"""Dropout on the input of an adapter's branch."""

import copy
import operator
import pickle

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.factoring.test_transform import layer
from tests.live.models import MLP, close, mlp, normal, stirred

DROP = surgery.LoRA(rank=2, alpha=3, dropout=0.5)
X = normal(1, (40, 6))


def linear(**options):
  return layer(lambda k, x: x @ k, (6, 5), adapter=DROP, **options)


def parts(params):
  get = lambda name: np.asarray(params['net', 'layer', name].value)
  return get('kernel'), get('lora_a'), get('lora_b')


def dropped(params, output):
  """Returns which elements of the input were dropped, worked out of outputs.

  With as many inputs as outputs of the branch known, x∘m·A·B·s is solved for.
  """
  w, a, b = parts(params)
  branch = (np.asarray(output, np.float64) - X @ w) / 1.5
  return np.linalg.lstsq(b.T.astype(np.float64), branch.T, rcond=None)[0].T, a


def test_in_training_elements_of_the_branch_are_dropped_and_others_doubled():
  model, params = linear()
  fast = surgery.factored(model)
  y, _ = fast(params, X, is_training=True)
  middle, a = dropped(params, y)
  # Each row of x∘m/keep·A is one of the 2^6 that masks can give.
  masks = np.array(np.meshgrid(*[[0, 2]] * 6)).reshape(6, -1).T
  kept = []
  for row, h in zip(np.asarray(X), middle, strict=True):
    apart = np.abs((masks * row) @ a - h).max(-1)
    assert apart.min() < 1e-4
    kept.append(masks[apart.argmin()] / 2)
  assert 0.4 < np.mean(kept) < 0.6
  assert len({tuple(k) for k in kept}) > 10


def test_outside_of_training_there_is_none():
  model, params = linear()
  fast = surgery.factored(model)
  y, after = fast(params, X, is_training=False)
  close(model(params, X)[0], y)
  assert np.array_equal(
    params['net', 'layer', 'lora_dropout'].value,
    after['net', 'layer', 'lora_dropout'].value,
  )


def test_each_call_has_other_masks_and_the_same_params_the_same():
  model, params = linear()
  fast = surgery.factored(model)
  one, after = fast(params, X)
  again, _ = fast(params, X)
  other, later = fast(after, X)
  assert np.array_equal(one, again)
  assert not np.allclose(one, other)
  count = lambda p: int(p['net', 'layer', 'lora_dropout'].value[2])
  assert [0, 1, 2] == [count(params), count(after), count(later)]


def test_eager_and_compiled_masks_are_the_same():
  model, params = linear()
  fast = surgery.factored(model)
  eager, after = fast(params, X)
  compiled, other = jax.jit(fast)(params, X)
  close(eager, compiled)
  assert int(after['net', 'layer', 'lora_dropout'].value[2]) == 1
  assert int(other['net', 'layer', 'lora_dropout'].value[2]) == 1


def test_layers_and_seeds_have_masks_of_their_own():
  model, params, _ = mlp(sizes=(6, 6), inputs=6)
  words = [
    tuple(np.asarray(param.value[:2]))
    for seed in (0, 1)
    for path, param in surgery.attach(params, DROP, to='**', seed=seed).items()
    if path[-1] == 'lora_dropout'
  ]
  assert 4 == len(words) == len(set(words))


class Trained(MLP):
  """Says whether it is in training as blox's layers do."""

  def __call__(self, params, x, is_training=True):
    del is_training
    return super().__call__(params, x)


def test_a_model_that_says_so_itself_decides_by_its_own_argument():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = Trained(graph.child('mlp'), [6, 5], rng)
  _, params = model(rng.seed(bx.Params(), seed=0), X)
  params = stirred(surgery.attach(params.locked(), DROP, to='**/hidden0'))
  fast = surgery.factored(model)
  dense = model(params, X)[0]
  assert not np.allclose(dense, fast(params, X)[0])
  assert not np.allclose(dense, fast(params, X, True)[0])
  close(dense, fast(params, X, False)[0])
  close(dense, fast(params, X, is_training=False)[0])


def test_the_rng_of_the_model_is_not_touched():
  model, params, x = mlp()
  adapted = surgery.attach(params, DROP, to='**')
  _, after = surgery.factored(model)(adapted, x)
  for path, param in params.items():
    if 'rng' in path:
      old, new = param.value, after[path].value
      if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        old, new = map(jax.random.key_data, (old, new))
      assert np.array_equal(old, new)


def test_the_mean_over_many_calls_is_the_value_without():
  model, params = linear()
  fast = jax.jit(surgery.factored(model))
  total, current = 0.0, params
  for _ in range(300):
    y, current = fast(current, X[:4])
    total = total + y
  expected = model(params, X[:4])[0]
  size = np.abs(np.asarray(expected) - X[:4] @ parts(params)[0]).max()
  assert np.abs(total / 300 - expected).max() < 0.5 * size


def test_gradients_are_those_of_the_same_masks():
  model, params = linear()
  fast = surgery.factored(model)
  half, rest = surgery.freeze(params).split()

  def counted(h):
    y, after = fast(h.merge(rest), X)
    return (y**2).sum(), after.split()[1]

  gradients, _ = jax.jit(jax.grad(counted, has_aux=True))(half)
  loss = lambda h: counted(h)[0]
  path = ('net', 'layer', 'lora_b')
  step = 1e-2
  for at in ((0, 0), (1, 3)):
    ends = [
      loss(
        jax.tree.map(
          lambda v, s=s, at=at: (
            v.at[at].add(s) if v.shape == half[path].value.shape else v
          ),
          half,
        )
      )
      for s in (step, -step)
    ]
    numeric = (ends[0] - ends[1]) / (2 * step)
    assert abs(numeric - gradients[path].value[at]) < 1e-2 * abs(numeric)


def test_each_layer_under_scan_has_masks_of_its_own():
  def use(k, x):
    return x @ k

  model, one = layer(use, (6, 6), adapter=DROP)
  three = jax.tree.map(lambda v: jnp.stack([v] * 3), one)
  path = ('net', 'layer', 'lora_dropout')
  words = jnp.arange(9, dtype='uint32').reshape(3, 3)
  three = three.unlocked()
  three[path] = three[path].replace(value=words)
  three = three.locked()
  fast = surgery.factored(model)

  def step(x, params):
    y, params = fast(params, x)
    return y, (y, params)

  _, (ys, after) = jax.jit(lambda p: jax.lax.scan(step, X, p))(three)
  assert np.array_equal([3, 6, 9], after[path].value[:, 2])
  y = X
  for number in range(3):
    single = jax.tree.map(operator.itemgetter(number), three)
    y, _ = fast(single, y)
    close(y, ys[number], 1e-4)


def test_masks_go_on_after_saving(tmp_path):
  model, params = linear()
  fast = surgery.factored(model)
  y, after = fast(params, X)
  surgery.save(tmp_path / 'm.msgpack', after)
  again = fast(surgery.load(tmp_path / 'm.msgpack'), X)[0]
  assert np.array_equal(fast(after, X)[0], again)
  assert not np.array_equal(y, again)


def test_a_layer_that_needs_the_dense_parameter_is_refused_in_training():
  model, params = layer(lambda k, x: x @ jnp.tanh(k), (6, 5), adapter=DROP)
  fast = surgery.factored(model)
  close(model(params, X)[0], fast(params, X, is_training=False)[0])
  with pytest.raises(surgery.AdapterError, match="'tanh' needs the dense"):
    fast(params, X)
  decides, params = layer(
    lambda k, x: x @ k if float(x.sum()) else x, (6, 5), adapter=DROP
  )
  with pytest.raises(surgery.AdapterError, match='the model decides by values'):
    surgery.factored(decides)(params, X)


def test_whether_it_is_training_must_be_known():
  model, params = linear()
  fast = surgery.factored(model)
  with pytest.raises(surgery.AdapterError, match='is_training is traced'):
    jax.jit(lambda t: fast(params, X, is_training=t)[0])(True)


@pytest.mark.parametrize('rate', [-0.1, 1.0])
def test_a_rate_is_a_share(rate):
  with pytest.raises(surgery.ConfigError, match='dropout'):
    surgery.LoRA(dropout=rate)


def test_it_is_attached_before_initialisation_too():
  model, params, x = mlp()
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  fresh = MLP(graph.child('mlp'), [6, 5, 3], rng)
  waiting = surgery.attach(rng.seed(bx.Params(), seed=42), DROP, to='**')
  _, adapted = fresh(waiting, x)
  adapted = adapted.locked()
  after = surgery.attach(params, DROP, to='**')
  for path in adapted.keys():
    if path[-1].startswith('lora'):
      assert np.array_equal(adapted[path].value, after[path].value), path


def test_adapters_merge_and_detach_as_without():
  model, params = linear()
  merged = surgery.merge(params)
  assert np.array_equal(model(params, X)[0], model(merged, X)[0])
  assert [('net', 'layer', 'kernel')] == list(surgery.detach(params).keys())


# Params that are thrown away.


def thrown_away(fast, params):
  half, rest = surgery.freeze(params).split()
  loss = lambda h: (fast(h.merge(rest), X)[0] ** 2).sum()
  return jax.grad(loss)(half)


def named(fast, params):
  @jax.jit
  def loss(params):
    y, after = fast(params, X)
    del after
    return (y**2).sum()

  return loss(params)


@pytest.mark.parametrize('use', [thrown_away, named])
def test_a_count_that_is_thrown_away_is_told(use, capsys):
  model, params = linear()
  fast = surgery.factored(model)
  with pytest.warns(UserWarning, match='thrown away.*has_aux=True') as found:
    use(fast, params)
  assert [__file__] == [w.filename for w in found]


def kept(fast, params):
  def loss(params):
    y, after = fast(params, X)
    return (y**2).sum(), after

  return jax.grad(loss, has_aux=True, allow_int=True)(params)


def scanned(fast, params):
  def step(params, _):
    y, params = fast(params, X)
    return params, y

  return jax.lax.scan(step, params, None, length=2)


@pytest.mark.parametrize(
  'use',
  [
    kept,
    scanned,
    lambda fast, params: jax.jit(fast)(params, X)[0],
    lambda fast, params: jax.jit(
      lambda p: fast(p, X, is_training=False)[0]
    )(params),
    lambda fast, params: fast(params, X)[0],  # A call to look at.
    lambda fast, params: jax.jit(
      lambda p: fast(fast(p, X)[1], X)
    )(params),
    lambda fast, params: jax.jit(
      lambda p: fast(p, X)[1]['net', 'layer', 'lora_dropout'].value
    )(params),
  ],
)  # fmt: skip
def test_nothing_is_told_where_the_count_goes_on(use):
  model, params = linear()
  use(surgery.factored(model), params)


def test_nothing_is_told_where_nothing_is_dropped():
  model, params = layer(lambda k, x: x @ k, (6, 5))
  thrown_away(surgery.factored(model), params)


def test_params_that_are_watched_are_copied_and_pickled():
  model, params = linear()
  held = []

  @jax.jit
  def call(p):
    _, after = surgery.factored(model)(p, X)
    held.append(copy.deepcopy(after._unread))
    held.append(pickle.loads(pickle.dumps(after._unread)))
    return after

  call(params)
  assert [True, True] == [one.read for one in held]


# Stacked layers.


SCANNED = lambda k, x: jax.lax.scan(lambda h, w: (h @ w, None), x, k)[0]
USES = {
  'scan': SCANNED,
  'turned': lambda k, x: jax.lax.scan(
    lambda h, w: (h @ w.T, None), x, k.swapaxes(1, 2)
  )[0],
  'remat': lambda k, x: jax.lax.scan(
    jax.checkpoint(lambda h, w: (h @ w, None)), x, k
  )[0],
  'unrolled': lambda k, x: x @ k[0] @ k[1] @ k[2],
  'indexed': lambda k, x: jax.lax.fori_loop(0, 3, lambda i, h: h @ k[i], x),
  'carried': lambda k, x: jax.lax.scan(
    lambda h, i: (h @ k[i], None), x, jnp.arange(3)
  )[0],
}


def stack(use, adapter=DROP, count=3):
  model, params = layer(use, (count, 6, 6), adapter=adapter, stacked=1)
  path = ('net', 'layer', 'lora_dropout')
  words = jnp.arange(3 * count, dtype='uint32').reshape(count, 3)
  changed = params.unlocked()
  changed[path] = params[path].replace(value=words.at[:, 2].set(0))
  return model, changed.locked()


def members(params):
  """Returns the params of each layer of a stack."""
  count = params['net', 'layer', 'kernel'].value.shape[0]
  model, one = layer(lambda k, x: x @ k, (6, 6), adapter=DROP)
  found = []
  for number in range(count):
    each = one.unlocked()
    for path, param in params.items():
      each[path] = one[path].replace(value=param.value[number])
    found.append(each.locked())
  return model, found


@pytest.mark.parametrize('use', USES)
def test_layers_of_a_stack_drop_what_each_would_alone(use):
  model, params = stack(USES[use])
  alone, each = members(params)
  expected = X
  for one in each:
    expected, _ = surgery.factored(alone)(one, expected)
  y, after = jax.jit(surgery.factored(model))(params, X)
  close(expected, y, 1e-3)
  assert not np.allclose(model(params, X)[0], y)
  count = after['net', 'layer', 'lora_dropout'].value[:, 2]
  assert np.array_equal([1, 1, 1], count)
  if use != 'indexed':  # A loop that may end at any time has no gradient.
    single = lambda many: sum_alone(alone, many)
    half, rest = surgery.freeze(params).split()
    found = jax.jit(jax.grad(lambda h: sum_alone(model, [h.merge(rest)])))(half)
    halves = [surgery.freeze(one).split() for one in each]
    rests = [one[1] for one in halves]
    wanted = jax.grad(
      lambda many: single(
        [h.merge(r) for h, r in zip(many, rests, strict=True)]
      )
    )([one[0] for one in halves])
    for path in half.keys():
      stacked = jnp.stack([one[path].value for one in wanted])
      size = np.abs(stacked).max()
      close(stacked / size, found[path].value / size, 1e-4)


def sum_alone(model, each):
  y = X
  for one in each:
    y, after = surgery.factored(model)(one, y)
    assert len(after)
  return (y**2).sum()


@pytest.mark.parametrize(
  ('use', 'shared'),
  [
    (lambda k, x: jax.vmap(jnp.dot)(x, k), False),
    (lambda k, x: jax.vmap(jnp.dot, (0, 0), 1)(x, k).swapaxes(0, 1), False),
    (lambda k, x: jnp.einsum('ebi,eij->ebj', x, k), False),
    (lambda k, x: jax.vmap(jnp.dot, (None, 0))(x, k), True),
    (lambda k, x: jnp.einsum('bi,eij->ebj', x, k), True),
  ],
)
def test_members_of_an_ensemble_drop_what_each_would_alone(use, shared):
  model, params = stack(use)
  alone, each = members(params)
  x = X if shared else normal(5, (3, 40, 6))
  y, _ = jax.jit(surgery.factored(model))(params, x)
  for number, one in enumerate(each):
    given = x if shared else x[number]
    close(surgery.factored(alone)(one, given)[0], y[number], 1e-4)


def test_a_part_of_a_parameter_that_is_looked_up_has_dropout_too():
  # One key for all heads: the part has it.
  use = lambda k, x: jax.lax.fori_loop(1, 2, lambda i, _: x @ k[i], x[:, :5])
  model, params = layer(use, (2, 6, 5), adapter=DROP)
  dense = model(params, X)[0]
  y, _ = surgery.factored(model)(params, X)
  assert not np.allclose(dense, y)


def test_a_scan_over_rows_that_would_all_drop_the_same_is_refused():
  use = lambda k, x: jax.lax.scan(lambda c, w: (c, x[:, :5] * w), 0, k)[1]
  model, params = layer(use, (6, 5), adapter=DROP)
  with pytest.raises(surgery.AdapterError, match="'scan' needs the dense"):
    surgery.factored(model)(params, X)


def test_convolutions_of_members_are_refused():
  from tests.factoring.test_transform import IMAGE, conv

  use = lambda k, x: jax.vmap(conv, (0, None))(k, x)
  model, params = layer(use, (2, 3, 2, 4, 5), adapter=DROP, stacked=1)
  with pytest.raises(surgery.AdapterError, match='needs the dense'):
    surgery.factored(model)(params, IMAGE)
