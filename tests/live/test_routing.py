"""Each row of a batch with an adapter of its own."""

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.factoring.test_transform import HEADS, IMAGE, X3, conv, layer
from tests.live import models
from tests.live.models import close, mlp, normal, stirred

LORA = surgery.LoRA(rank=2, alpha=3)


def tenants(params, count=3, **options):
  """Returns params with adapters that differ, of as many tenants."""
  base = surgery.attach(params, LORA, to='**', **options)
  return [stirred(base, seed=i) for i in range(count)]


def alone(model, params, x):
  """Returns what each row gives by itself, with its own params."""
  rows = [model(p, x[i : i + 1])[0] for i, p in enumerate(params)]
  return jnp.concatenate(rows)


def test_each_row_is_what_its_adapter_alone_gives():
  model, params, x = mlp()
  three = tenants(params)
  stacked = surgery.stack_adapters(three)
  index = [2, 0, 0, 1, 2, -1, 1]
  routed = surgery.route(stacked, index)
  expected = alone(model, [three[i] if i >= 0 else params for i in index], x)
  fast = surgery.factored(model)
  close(expected, fast(routed, x)[0])
  close(expected, jax.jit(lambda p, x: fast(p, x)[0])(routed, x))


@pytest.mark.parametrize(
  ('use', 'shape', 'x', 'options'),
  [
    (lambda k, x: x @ k, (6, 5), X3, {}),
    (lambda k, x: jnp.einsum('btd,dhk->bthk', x, k), (6, 2, 4), X3, HEADS),
    (lambda k, x: jnp.tanh(x @ k) @ k.T, (6, 5), X3, {}),
    (conv, (3, 2, 4, 5), IMAGE, {}),
    (lambda k, x: k[jnp.argsort(x, axis=-1)[..., 0]], (6, 5), X3, {}),
    (
      lambda k, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, k)[0],
      (3, 6, 6),
      X3,
      {'stacked': 1},
    ),
    (
      lambda k, x: jax.lax.scan(
        lambda h, v: (jnp.tanh(h + v @ k), None), x[:, 0] @ k, x.swapaxes(0, 1)
      )[0],
      (6, 5),
      X3,
      {},
    ),
  ],
)
def test_layers_of_many_kinds(use, shape, x, options):
  model, plain = layer(use, shape, **options)
  two = [stirred(plain, seed=i) for i in range(2)]
  routed = surgery.route(surgery.stack_adapters(two), [1, 0])
  fast = jax.jit(surgery.factored(model))
  close(alone(model, two[::-1], x), fast(routed, x)[0], 3e-5)


def test_gradients_reach_the_adapters_of_their_rows_alone():
  model, params, x = mlp()
  three = tenants(params)
  stacked = surgery.freeze(surgery.stack_adapters(three))
  fast = surgery.factored(model)

  def loss(half, rest):
    params = surgery.route(half.merge(rest), [2, 0, 0, 0, 2, 2, 2])
    return (fast(params, x)[0] ** 2).sum()

  gradients = jax.grad(loss)(*stacked.split())
  one, rest = surgery.freeze(three[0]).split()
  alone = jax.grad(
    lambda h: (model(h.merge(rest), x[jnp.array([1, 2, 3])])[0] ** 2).sum()
  )(one)
  for path, gradient in gradients.items():
    assert not np.asarray(gradient.value[1]).any()
    assert np.asarray(gradient.value[2]).any()
    close(alone[path].value, gradient.value[0])


def test_another_index_compiles_nothing_anew():
  model, params, x = mlp()
  stacked = surgery.stack_adapters(tenants(params))
  fast, traces = surgery.factored(model), []

  @jax.jit
  def call(params, x):
    traces.append(1)
    return fast(params, x)[0]

  one = call(surgery.route(stacked, [0] * 7), x)
  other = call(surgery.route(stacked, [1] * 7), x)
  assert 1 == len(traces)
  assert not np.allclose(one, other)


def test_an_index_that_is_traced():
  model, params, x = mlp()
  three = tenants(params)
  stacked = surgery.stack_adapters(three)
  fast = surgery.factored(model)
  call = jax.jit(lambda i: fast(surgery.route(stacked, i), x)[0])
  index = jnp.array([1, 1, 0, 2, 2, 0, 1])
  close(alone(model, [three[i] for i in index], x), call(index))


@pytest.mark.parametrize('dtype', ['int8', 'int32', 'uint32'])
@pytest.mark.parametrize('inside', [True, False])
def test_a_traced_index_of_no_adapter_gives_nan(dtype, inside):
  model, params, x = mlp()
  three = tenants(params)
  stacked = surgery.stack_adapters(three)
  fast = surgery.factored(model)
  wrong = [-2, 3, -128, 127] if dtype != 'uint32' else [3, 2**31, 2**32 - 1, 4]
  off = -1 if dtype != 'uint32' else 0
  index = np.array([*wrong, off, 0, 2], dtype)
  if inside:
    call = jax.jit(lambda i: fast(surgery.route(stacked, i), x)[0])
    y = call(index)
  else:
    route = jax.jit(lambda i: surgery.route(stacked, i))
    y, _ = fast(route(index), x)
  assert np.isnan(y[:4]).all()
  mine = [params if off < 0 else three[0], three[0], three[2]]
  close(alone(model, mine, x[4:]), y[4:])


def test_an_index_in_64_bits_is_not_narrowed_to_an_adapter():
  _, params, _ = mlp()
  stacked = surgery.stack_adapters(tenants(params))
  for index in ([2**32], np.array([2**32 - 1]), [-(2**32)]):
    with pytest.raises(surgery.AdapterError, match='there is no adapter'):
      surgery.route(stacked, index)


def test_the_base_alone_has_nothing_of_an_adapter_that_is_nan():
  model, params, x = mlp()
  two = tenants(params, 2)
  two[0] = jax.tree.map(lambda w: w, two[0])
  broken, rest = two[0].split(models.is_weight)
  two[0] = jax.tree.map(lambda w: w * jnp.nan, broken).merge(rest)
  routed = surgery.route(surgery.stack_adapters(two), [-1] * 7)
  close(model(params, x)[0], surgery.factored(model)(routed, x)[0])


def test_two_adapters_on_a_layer_of_which_one_is_routed():
  model, params, x = mlp()
  inner = stirred(surgery.attach(params, LORA, to='**', name='all'), seed=9)
  two = [
    stirred_only(surgery.attach(inner, LORA, to='**/hidden*'), i)
    for i in range(2)
  ]
  stacked = surgery.stack_adapters(two, names='default')
  routed = surgery.route(stacked, [0, 1, 0, 1, 0, 1, 0], names='default')
  expected = alone(model, [two[i % 2] for i in range(7)], x)
  close(expected, surgery.factored(model)(routed, x)[0])


def stirred_only(params, seed):
  weights, rest = params.split(
    lambda path, p: p.metadata.get('adapter') == 'default'
  )
  numbers = np.random.default_rng(seed)
  weights = jax.tree.map(
    lambda w: (
      jnp.asarray(numbers.normal(size=w.shape), w.dtype)
      if jnp.issubdtype(w.dtype, jnp.floating)
      else w
    ),
    weights,
  )
  return weights.merge(rest)


def test_a_thousand_adapters():
  model, params, x = mlp()
  base = surgery.attach(params, LORA, to='**')
  weights, rest = base.split(lambda path, p: 'adapter' in p.metadata)
  many = jax.tree.map(lambda w: normal(3, (1000, *w.shape)), weights)
  index = np.array([999, 0, 500, 1, 998, 2, 3])
  routed = surgery.route(many.merge(rest), index)
  each = [jax.tree.map(lambda w, i=i: w[i], many).merge(rest) for i in index]
  close(alone(model, each, x), surgery.factored(model)(routed, x)[0], 1e-4)


def test_what_cannot_be_routed_is_refused():
  model, params, x = mlp()
  three = tenants(params)
  stacked = surgery.stack_adapters(three)
  with pytest.raises(
    surgery.AdapterError, match='there is no adapter 3: 3 are'
  ):
    surgery.route(stacked, [0, 3])
  with pytest.raises(surgery.AdapterError, match=r'found float64\(2,\)'):
    surgery.route(stacked, np.array([0.0, 1.0]))
  with pytest.raises(
    surgery.AdapterError, match='lora_a of shape .* of one adap'
  ):
    surgery.route(three[0], [0])
  with pytest.raises(surgery.AdapterError, match='found Params'):
    surgery.route(params, [0])
  other = surgery.attach(params, surgery.LoRA(rank=1), to='**')
  with pytest.raises(
    surgery.AdapterError, match="'default' of params 1 differs"
  ):
    surgery.stack_adapters([three[0], other])
  with pytest.raises(surgery.SiteError, match='1 stacked axes'):
    model(stacked, x)
  with pytest.raises(surgery.AdapterError, match='cannot be merged'):
    surgery.merge(stacked)


def test_routed_params_need_factored_and_rows_in_front():
  model, params, x = mlp()
  routed = surgery.route(surgery.stack_adapters(tenants(params)), [0, 1, 2])
  with pytest.raises(
    surgery.AdapterError, match=r'Call surgery.factored\(model'
  ):
    model(routed, x)
  fast = surgery.factored(model)
  with pytest.raises(
    surgery.AdapterError, match=r'leading free axis is 7 of \(7, 4\), .* 3 rows'
  ):
    fast(routed, x)
  dense, plain = layer(lambda k, x: x @ jnp.tanh(k), (6, 5))
  stacked = surgery.stack_adapters([plain, plain])
  with pytest.raises(surgery.AdapterError, match="'tanh' needs the dense"):
    surgery.factored(dense)(surgery.route(stacked, [0, 1]), X3)


def test_routed_params_are_detached_and_disabled_as_others():
  model, params, x = mlp()
  routed = surgery.route(surgery.stack_adapters(tenants(params)), [0] * 7)
  plain = surgery.detach(routed)
  assert type(plain) is bx.Params
  assert sorted(params.keys()) == sorted(plain.keys())
  off = surgery.disable(routed)
  assert np.array_equal(model(params, x)[0], model(off, x)[0])


def test_dropout_is_refused_in_training_and_has_no_part_outside_of_it():
  model, params, x = mlp()
  drop = surgery.LoRA(rank=2, dropout=0.5)
  two = [
    stirred_only(surgery.attach(params, drop, to='**/hidden0'), seed)
    for seed in (0, 1)
  ]
  index = [0, 1, 1, 0, 0, 1, 0]
  routed = surgery.route(surgery.stack_adapters(two), index)
  fast = surgery.factored(model)
  with pytest.raises(
    surgery.AdapterError, match='routed params have no dropout'
  ):
    fast(routed, x)
  expected = alone(model, [two[i] for i in index], x)
  close(expected, fast(routed, x, is_training=False)[0])


class Nested(surgery.Adapter):
  """Its value has another one for its base."""

  name = 'nested'
  adds = True

  def init(self, site, key):
    del key
    return {
      'a': jnp.ones((*site.in_shape, 1)), 'b': jnp.ones((1, *site.out_shape)),
    }  # fmt: skip

  def apply(self, site, name, base, weights):
    inner = surgery.LowRank(base, weights['a'], weights['b'])
    return surgery.LowRank(inner, weights['a'], weights['b'])


def test_a_value_of_another_base_cannot_be_routed():
  model, base, x = models.mlp()
  host = models.host(Nested)
  params = surgery.attach(base, Nested(), to='**/hidden0', host=host)
  stack = surgery.stack_adapters([params, params])
  routed = surgery.route(stack, jnp.zeros(len(x), 'int32'))
  message = "'default' gives a low-rank value of another base than it was given"
  with pytest.raises(surgery.AdapterError, match=message):
    surgery.factored(model)(routed, x)


def test_an_empty_batch_gives_an_empty_result():
  model, params, x = mlp()
  stacked = surgery.stack_adapters(tenants(params))
  fast = surgery.factored(model)
  none = jnp.zeros(0, 'int32')
  assert (0, 3) == fast(surgery.route(stacked, none), x[:0])[0].shape
  compiled = jax.jit(lambda i, x: fast(surgery.route(stacked, i), x)[0])
  assert (0, 3) == compiled(none, x[:0]).shape
  with pytest.raises(surgery.AdapterError, match='an index for 0 rows'):
    fast(surgery.route(stacked, none), x)


@pytest.mark.parametrize(
  ('use', 'shape', 'x'),
  [
    (conv, (3, 2, 4, 5), IMAGE),
    (lambda k, x: k[jnp.argsort(x, axis=-1)[..., 0]], (6, 5), X3),
  ],
)
def test_an_empty_batch_of_images_and_of_tokens(use, shape, x):
  model, params = layer(use, shape)
  stacked = surgery.stack_adapters([params, params])
  routed = surgery.route(stacked, jnp.zeros(0, 'int32'))
  expected = model(params, x[:0])[0].shape
  assert expected == surgery.factored(model)(routed, x[:0])[0].shape


@pytest.mark.parametrize('order', [1, -1])
def test_an_adapter_that_only_one_of_them_has_is_refused(order):
  _, params, _ = mlp()
  one, two = tenants(params, 2)
  more = surgery.attach(two, LORA, to='**/hidden*', name='more')
  has, lacks = (1, 0) if order == 1 else (0, 1)
  message = f"params {has} have an adapter 'more', which params {lacks} lack"
  with pytest.raises(surgery.AdapterError, match=message):
    surgery.stack_adapters([one, more][::order], names='default')
  with pytest.raises(surgery.AdapterError, match=message):
    surgery.stack_adapters([one, more][::order])


def test_adapters_that_were_attached_in_another_order_are_refused():
  _, params, _ = mlp()
  attach = lambda p, name: surgery.attach(p, LORA, to='**', name=name)
  one = attach(attach(params, 'a'), 'b')
  two = attach(attach(params, 'b'), 'a')
  with pytest.raises(
    surgery.AdapterError, match='another order .*: b, a; a, b'
  ):
    surgery.stack_adapters([one, two])


def test_an_adapter_that_is_not_stacked_must_be_the_same_in_all():
  _, params, _ = mlp()
  inner = surgery.attach(params, LORA, to='**', name='all')
  two = [
    surgery.attach(stirred(inner, seed=i), LORA, to='**/hidden*')
    for i in range(2)
  ]
  with pytest.raises(
    surgery.BaseMismatchError, match=r'lora_[ab]\.all of params 1 has another'
  ):
    surgery.stack_adapters(two, names='default')


def moved(params, path, by=1.0):
  return params.unlocked().merge(
    one_param(path, params[path].replace(value=params[path].value + by))
  )


def one_param(path, param):
  params = bx.Params()
  params[path] = param
  return params


def test_another_base_is_refused_by_name():
  _, params, _ = mlp()
  one, two = tenants(params, 2)
  path = ('net', 'mlp', 'hidden1', 'bias')
  other = moved(two, path).locked()
  with pytest.raises(
    surgery.BaseMismatchError, match='net/mlp/hidden1/bias of params 1 has'
  ):
    surgery.stack_adapters([one, other])
  trusted = surgery.stack_adapters([one, other], check_base=False)
  assert np.array_equal(one[path].value, trusted[path].value)
  more = two.unlocked().merge(one_param(('net', 'new'), bx.Param(jnp.ones(2))))
  with pytest.raises(
    surgery.BaseMismatchError, match='net/new of params 1 is not in the first'
  ):
    surgery.stack_adapters([one, more.locked()])


def test_a_base_of_equal_values_is_one_base():
  _, params, _ = mlp()
  one, two = tenants(params, 2)
  path = ('net', 'rng', 'counter')
  counted = moved(two, path, 1).locked()  # A generator that was asked.
  copied = jax.tree.map(jnp.copy, counted)
  stacked = surgery.stack_adapters([one, copied])
  assert np.array_equal(one[path].value, stacked[path].value)


def test_params_without_a_base_and_traced_ones_are_stacked():
  _, params, _ = mlp()
  one, two = tenants(params, 2)
  weights, _ = two.split(lambda path, p: 'adapter' in p.metadata)
  expected = surgery.stack_adapters([one, two])
  models.assert_equal_params(expected, surgery.stack_adapters([one, weights]))
  stack = jax.jit(lambda a, b: surgery.stack_adapters([a, b]))
  models.assert_equal_params(expected, stack(one, two))
  with pytest.raises(surgery.AdapterError, match='lora_a is not in params 1'):
    surgery.stack_adapters([one, two.split(lambda p, _: p[-1] == 'bias')[0]])


@pytest.mark.parametrize('stacked', [0, 1])
def test_the_axis_of_tenants_is_none_of_the_mesh(stacked):
  axes = ('pipe', 'data', 'model')[1 - stacked :]
  params = bx.Params()
  value = jnp.ones((3, 4, 6)[1 - stacked :])
  params['net', 'h', 'kernel'] = bx.Param(value, metadata={'sharding': axes})
  one = surgery.attach(params.locked(), LORA, to='**', stacked=stacked)
  both = surgery.stack_adapters([one, one])
  front = axes[:stacked]
  assert (*front, 'data', None) == one['net', 'h', 'lora_a'].sharding
  assert (*front, None, 'data', None) == both['net', 'h', 'lora_a'].sharding
  assert (*front, None, None, 'model') == both['net', 'h', 'lora_b'].sharding
  for name in ('lora_a', 'lora_b'):
    weight = both['net', 'h', name]
    assert weight.value.ndim == len(weight.sharding)


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (lambda p: attached(p, rank=3), 'rank is 3 instead of 2'),
    (
      lambda p: attached(p, alpha=1.0, rslora=True),
      'alpha is 1.0 instead of 3.0, rslora is True instead of False',
    ),
    (
      lambda p: attached(p, to='**/hidden*'),
      'not attached to net/mlp/output/k',
    ),
    (lambda p: surgery.disable(attached(p)), 'it is disabled'),
    (
      lambda p: attached(p, patterns={'**/output': {'rank': 1}}),
      r"patterns is \{'\*\*/output': \{'rank': 1\}\} instead of None",
    ),
  ],
)
def test_it_is_said_in_what_adapters_differ(other, message):
  _, params, _ = mlp()
  with pytest.raises(
    surgery.AdapterError, match=f'params 1 differs from .*: .*{message}'
  ):
    surgery.stack_adapters([attached(params), other(params)])


def attached(params, to='**', **options):
  lora = surgery.LoRA(**{'rank': 2, 'alpha': 3, **options})
  return surgery.attach(params, lora, to=to)
