"""Dropout on the input of an adapter's branch."""

import operator

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live.models import MLP, close, mlp, normal, stirred
from tests.live.test_factored import layer

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
  loss = lambda h: (fast(h.merge(rest), X)[0] ** 2).sum()
  gradients = jax.jit(jax.grad(loss))(half)
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
