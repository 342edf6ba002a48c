"""Calls that `factored` cannot rewrite are dense, and never wrong."""

import collections
import dataclasses
import types
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import surgery
from tests.factoring.test_transform import Layer, X, both, layer, states
from tests.live import models
from tests.live.models import close, normal

# That it is said is in test_fallback.py.
pytestmark = pytest.mark.filterwarnings('ignore::surgery.DenseFallbackWarning')

# How a gradient is taken: compiled, or each operation by itself.
COMPILED = pytest.mark.parametrize('compiled', [True, False])


@pytest.fixture(scope='module')
def net():
  return layer(lambda k, x: x @ k, (6, 5))


def gradients(model, params, compiled=True, out=lambda result: result[0]):
  """Returns the loss and the gradients of a model."""
  half, rest = surgery.freeze(params).split()
  loss = lambda half: (out(model(half.merge(rest), X)) ** 2).sum()
  grad = jax.value_and_grad(loss)
  return (jax.jit(grad) if compiled else grad)(half)


def same(model, params, compiled=True, **options):
  """Asserts that a model is the same through `factored`."""
  expected = gradients(model, params, compiled, **options)
  fast = surgery.factored(model)
  close(expected, gradients(fast, params, compiled, **options))


# Effects.


@COMPILED
def test_effects_happen_once(net, compiled):
  model, params = net
  happened = []

  def noisy(params, x):
    y, params = model(params, x)
    jax.debug.callback(lambda: happened.append('debug'))
    io_callback(lambda: happened.append('ordered'), None, ordered=True)

    def body(carry, row):
      jax.debug.callback(lambda _: happened.append('scan'), row)
      return carry, model(params, row[None])[0]

    return y + jax.lax.scan(body, 0, x)[1].sum(1), params

  gradients(surgery.factored(noisy), params, compiled)
  jax.effects_barrier()
  assert ['debug', 'ordered', *['scan'] * 3] == sorted(happened)


# What is done to a kernel before it is used. Each of these was wrong once.


def squared_across_a_scan(k, x):
  s = k * k
  ys = jax.lax.scan(lambda c, v: (c, v @ jnp.tanh(s)), 0, x)[1]
  return ys + x @ jnp.tanh(k)


def begins_before_the_array(k, x):
  start = (x[0, 0] * 0).astype('int32') - 4
  return x @ jax.lax.dynamic_index_in_dim(k, start, keepdims=False)


# name: how the kernel is used, its shape, options of attach, what it becomes.
USES = {
  'a square made dense in a scan': (
    squared_across_a_scan, (6, 5), {}, 'dense (scan, tanh)',
  ),
  'a square into checkpoint': (
    lambda k, x: x @ jax.checkpoint(lambda s: s / s.sum(0))(k**2),
    (6, 5), {}, 'dense (remat2)',
  ),
  'a square into cond': (
    lambda k, x: x @ jax.lax.cond(
      x[0, 0] > 0, lambda s: s, lambda s: 2 * s, k**2
    ),
    (6, 5), {}, 'dense (cond)',
  ),
  'a slice that begins before the array': (
    begins_before_the_array, (3, 6, 5), {'stacked': 1}, 'factored',
  ),
  'scaled by rows and by columns': (
    lambda k, x: x @ (k * jnp.arange(6.0)[:, None] / jnp.arange(1.0, 6.0)),
    (6, 5), {}, 'factored',
  ),
  'both axes summed over': (
    lambda k, x: jnp.einsum('io,iox->x', k, x[:, :2, None] * jnp.ones(4)),
    (3, 2), {}, 'factored',
  ),
  'one of a stack, by take': (
    lambda k, x: x @ jnp.take(k, jnp.argmax(x) % 3, axis=0),
    (3, 6, 5), {'stacked': 1}, 'factored',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', USES)
def test_uses_that_are_easily_mistaken(name):
  use, shape, options, becomes = USES[name]
  model, params = layer(use, shape, **options)
  both(model, params, X)
  assert [becomes] == states(model, params, X)


class Squares(surgery.Adapter):
  """A low-rank update of the square of what lies below."""

  name = 'squares'

  def init(self, site, key):
    del key
    return {
      'a': jnp.ones((*site.in_shape, 2)),
      'b': jnp.ones((2, *site.out_shape)),
    }

  def apply(self, site, name, base, weights):
    del site, name
    return surgery.LowRank(base**2, weights['a'], weights['b'])


def test_a_low_rank_value_on_the_square_of_another(net):
  model, params = net
  host = models.host(Squares)
  params = surgery.attach(
    params, Squares(), to='**/layer', name='outer', host=host
  )
  both(model, models.stirred(params), X)


# The low-rank value by itself.


def test_the_tangent_of_a_narrow_base_is_wide():
  base, a, b = (
    normal(0, (6, 5), 'bfloat16'), normal(1, (6, 2)), normal(2, (2, 5)),
  )  # fmt: skip
  dense = lambda base: surgery.LowRank(base, a, b).dense()
  value, tangent = jax.jvp(dense, (base,), (base,))
  assert jnp.float32 == value.dtype == tangent.dtype
  close(base.astype('float32'), tangent)
  assert jnp.bfloat16 == jax.grad(lambda w: dense(w).sum())(base).dtype


def test_a_key_for_each_of_a_batch_and_one_value():
  base, a, b = normal(0, (6, 5)), normal(1, (6, 2)), normal(2, (2, 5))
  keys = jax.random.split(jax.random.key(0), 3)
  value = lambda key: surgery.LowRank(base, a, b, 1.0, 0.5, key).dense()
  expected = np.asarray(base) + np.asarray(a) @ np.asarray(b)
  close([expected] * 3, list(jax.vmap(value)(keys)))


# Values that a model keeps.


class Net(bx.Module):
  """A module around a layer, which does something with what it computes."""

  hidden: Any
  of_class: Any = None

  def __init__(self, keep):
    graph = bx.Graph('net')
    super().__init__(graph.child('around'))
    self.layer = Layer(graph.child('layer'), (6, 5), lambda k, x: x @ k)
    self.keep, self.many, self.by_name = keep, [], {}
    self.last, self.space = collections.deque(), types.SimpleNamespace()

  def __call__(self, params, x):
    y, params = self.layer(params, x)
    self.keep(self, y)
    return y, params


# What all of a process share.
KEPT: list[Any] = []

# name: what a module does with a value, and how it is read afterwards.
KEEPERS = {
  'an attribute': (
    lambda net, y: setattr(net, 'hidden', y), lambda net: net.hidden,
  ),
  'an attribute that is made anew': (
    lambda net, y: (setattr(net, 'hidden', None), setattr(net, 'hidden', y + 1)),
    lambda net: net.hidden,
  ),
  'a nested module': (
    lambda net, y: setattr(net.layer, 'seen', y), lambda net: net.layer.seen,
  ),
  'a list': (lambda net, y: net.many.append(y), lambda net: sum(net.many)),
  'a dict': (
    lambda net, y: net.by_name.setdefault('h', []).append(y),
    lambda net: sum(net.by_name['h']),
  ),
  'a deque': (lambda net, y: net.last.append(y), lambda net: sum(net.last)),
  'an object': (
    lambda net, y: setattr(net.space, 'h', y), lambda net: net.space.h,
  ),
  'its class': (
    lambda net, y: setattr(Net, 'of_class', y), lambda net: net.of_class,
  ),
  'a global list': (lambda net, y: KEPT.append(y), lambda net: sum(KEPT)),
}  # fmt: skip


@COMPILED
@pytest.mark.parametrize('name', KEEPERS)
def test_values_that_a_module_keeps_can_be_read_after_the_call(
  net, name, compiled
):
  keep, read = KEEPERS[name]
  results = []
  for wrap in (lambda model: model, surgery.factored):
    KEPT.clear()
    model = Net(keep)
    out = lambda result, model=model: result[0] + read(model)
    results.append(gradients(wrap(model), net[1], compiled, out=out))
  close(*results)
  KEPT.clear()
  Net.of_class = None


def test_a_value_is_kept_once_though_the_model_also_decides_by_values(net):
  def keep(module, y):
    module.many.append(y)
    if y.sum() > 0:
      module.by_name['positive'] = True

  model = Net(keep)
  out = lambda result: result[0] + sum(model.many)
  gradients(surgery.factored(model), net[1], compiled=False, out=out)
  assert 1 == len(model.many)


def _in_a_closure(model):
  kept = []

  def call(params, x):
    y, params = model(params, x)
    kept.append(y)
    return y, params

  return call, lambda: sum(kept)


def _in_a_list_of_modules(model):
  inner = Net(lambda module, y: setattr(module, 'hidden', y))
  modules = [inner]
  return lambda params, x: modules[0](params, x), lambda: inner.hidden


def _in_a_callable(model):
  class Wrapper:
    hidden: Any

    def __call__(self, params, x):
      self.hidden, params = model(params, x)
      return self.hidden, params

  wrapper = Wrapper()
  return wrapper, lambda: wrapper.hidden


@pytest.mark.parametrize(
  'make', [_in_a_closure, _in_a_list_of_modules, _in_a_callable]
)
def test_values_that_a_function_keeps_can_be_read_after_the_call(net, make):
  results = []
  for wrap in (lambda model: model, surgery.factored):
    call, read = make(net[0])
    out = lambda result, read=read: result[0] + read()
    results.append(gradients(wrap(call), net[1], out=out))
  close(*results)


def test_a_model_that_keeps_nothing_new_stays_factored(net):
  model = Net(lambda module, y: module.many.append(1))
  model.hidden = jnp.ones(3)
  jax.grad(lambda x: setattr(model, 'hidden', x) or x.sum())(X)
  assert ['factored'] == states(model, net[1], X)


def test_nothing_outlives_the_trace_of_a_model(net):
  model, params = net
  with jax.checking_leaks():
    assert ['factored'] == states(model, params, X)


def test_a_model_that_promotes_no_dtypes_stays_factored():
  def use(k, x):
    y = x.astype('bfloat16') @ k.astype('bfloat16')
    return jax.lax.cond(y[0, 0] > 0, jnp.sin, jnp.cos, y)

  model, params = layer(use, (6, 5))
  with jax.numpy_dtype_promotion('strict'):
    (state,) = states(model, params, X)
  assert 'factored in bfloat16, stored in float32' == state


# Arguments.


def test_an_argument_that_a_model_writes_to(net):
  model, params = net

  def call(params, x, store):
    y, params = model(params, x)
    store['h'] = y
    return y, params

  def twice(wrap):
    def run(params, x):
      store = {}
      y, params = wrap(call)(params, x, store)
      return y * store['h'], params

    return run

  close(
    gradients(twice(lambda call: call), params),
    gradients(twice(surgery.factored), params),
  )


@dataclasses.dataclass
class Batch:
  x: Any
  name: str
  weight: float = 2.0


# name: what is beside params and input, and how a model uses it.
BESIDE = {
  'a dict whose keys JAX cannot sort': (
    {1: 2.0, 'a': 3.0}, lambda y, beside: y * beside[1],
  ),
  'an object': (
    Batch(X[:, :5], 'train'),
    lambda y, beside: (y + beside.x) * beside.weight,
  ),
  'strings, numbers and None': (
    {'mode': 'double', 'times': 3, 'shift': 0.5, 'nothing': None},
    lambda y, beside: (
      y * beside['times'] + beside['shift']
      if beside['mode'] == 'double' and beside['nothing'] is None else None
    ),
  ),
  'a function': (jnp.tanh, lambda y, beside: beside(y)),
}  # fmt: skip


@COMPILED
@pytest.mark.parametrize('name', BESIDE)
def test_arguments_of_any_kind(net, name, compiled):
  model, params = net
  beside, use = BESIDE[name]

  def call(params, x, option, *, keyword):
    y, params = model(params, x)
    return use(use(y, option), keyword), params

  bound = lambda f: lambda p, x: f(p, x, beside, keyword=beside)
  close(
    gradients(bound(call), params, compiled),
    gradients(bound(surgery.factored(call)), params, compiled),
  )


def test_arguments_beside_arrays_are_known_to_the_model(net):
  """A model may decide by them, and stays factored."""
  model, params = net

  def call(params, x, deep, beside):
    for _ in range(beside['times'] if deep else 0):
      x = jnp.tanh(x)
    return model(params, x)

  explained = surgery.explain(call, params, X, True, {'times': 2})
  assert ['factored'] == [use.state for use in explained.values()]
  half, rest = surgery.freeze(params).split()
  loss = lambda f: jax.jit(
    jax.grad(lambda h: f(h.merge(rest), X, True, {'times': 2})[0].sum())
  )(half)
  close(loss(call), loss(surgery.factored(call)))


# Results.


@dataclasses.dataclass
class Result:
  y: Any
  name: str = 'result'


def _generator(y):
  yield y
  yield 2 * y


# name: what a model returns, and how it is read.
RESULTS = {
  'a data class': (lambda y: Result(y), lambda result: result.y),
  'a generator': (_generator, sum),
  'a generator in a tuple': (
    lambda y: ((v for v in (y, y)), 1), lambda result: sum(result[0]),
  ),
  'a function': (lambda y: lambda: 2 * y, lambda result: result()),
  'a dict whose keys JAX cannot sort': (
    lambda y: {1: y, 'a': 3}, lambda result: result[1] * result['a'],
  ),
  'strings, numbers, None, shapes': (
    lambda y: {
      'y': y, 'name': 'y', 'n': 2, 'none': None, 'shape': y.shape, 'f': 0.5,
    },
    lambda result: (
      result['y'] * result['n'] * result['f']
      if result['shape'] == (3, 5) and result['name'] == 'y'
      and result['none'] is None else None
    ),
  ),
  'an array alone': (lambda y: y, lambda result: result),
}  # fmt: skip


@COMPILED
@pytest.mark.parametrize('name', RESULTS)
def test_results_of_any_kind(net, name, compiled):
  model, params = net
  make, read = RESULTS[name]
  call = lambda params, x: make(model(params, x)[0])
  same(call, params, compiled, out=read)


def test_a_model_that_decides_by_values(net):
  model, params = net

  def call(params, x):
    y, params = model(params, x)
    for _ in range(int(abs(y.sum())) % 3 + 1):
      y = 2 * y if y.sum() > 0 else -y
    return y * float(np.asarray(jax.lax.stop_gradient(y)).size), params

  same(call, params, compiled=False)


def test_what_a_model_raises_is_raised_as_it_is(net):
  class OwnError(Exception):
    pass

  def call(params, x):
    model, adapted = net
    model(adapted, x)
    raise OwnError('of the model')

  with pytest.raises(OwnError, match='of the model') as caught:
    gradients(surgery.factored(call), net[1])
  assert caught.value.__context__ is None


def test_a_function_that_names_what_is_not_there_yet(net):
  model, params = net
  if not params:
    later = None

  def call(params, x):
    return model(params, x) if params else later

  same(call, params)
