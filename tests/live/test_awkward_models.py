"""Models that interception finds awkward: each right, or refused at once.

Every model here is compared with itself on plain params that hold `W + s·A·B`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models

LORA = surgery.LoRA(rank=2)


@dataclasses.dataclass
class Case:
  """A model, and how it is adapted.

  Attributes:
    call: takes params, and returns outputs and params.
    params: locked params, of the base.
    to: selector.
    attach: further arguments of `attach`.
    outs: number of output axes of what is adapted.
    tolerance: of outputs.
  """

  call: Callable[[Any], Any]
  params: bx.Params
  to: Any = '**/layer'
  attach: dict[str, Any] = dataclasses.field(default_factory=dict)
  outs: int = 1
  tolerance: float = 1e-5

  @functools.cached_property
  def adapted(self):
    params = surgery.attach(self.params, LORA, to=self.to, **self.attach)
    return models.stirred(params)

  def out(self, params):
    """Returns outputs as a list."""
    return jax.tree.leaves(self.call(params)[0])

  @functools.cached_property
  def base_out(self):
    return self.out(self.params)

  @functools.cached_property
  def adapted_out(self):
    return self.out(self.adapted)

  @functools.cached_property
  def compiled(self):
    """Outputs and gradients, adapted and by the oracle, of one program."""
    weights, rest = self.adapted.split(models.is_weight)

    def loss(weights, oracle):
      params = weights.merge(rest)
      if oracle:
        params = models.dense(params, outs=self.outs)
      out = self.out(params)
      return sum((o.astype(jnp.float32) ** 2).sum() for o in out), out

    @jax.jit
    def both(weights):
      grad = jax.grad(loss, has_aux=True)
      return grad(weights, True), grad(weights, False)

    return both(weights)


class Model(bx.Module):
  """A module whose call is a function."""

  def __init__(self, graph, call, **parts):
    super().__init__(graph)
    self.call = call
    self.__dict__.update(parts)

  def __call__(self, params, *args):
    return self.call(self, params, *args)


def _built(make, *args, seed=0):
  """Returns a model's call and its initialised params.

  Args:
    make: takes graph and rng, and returns a module.
    *args: of the call.
    seed: of the Rng.
  """
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = make(graph, rng)
  params = rng.seed(bx.Params(), seed=seed)
  # Shapes from the model, values from numpy: nothing needs to be compiled.
  _, shapes = jax.eval_shape(model, params, *args)
  count = itertools.count()

  def filled(struct):
    value = models.normal(next(count), struct.shape, struct.dtype)
    return value if len(struct.shape) > 1 else 0.5 + abs(value)

  for path, param in shapes.items():
    if path not in params:
      params[path] = param.replace(value=jax.tree.map(filled, param.value))
  return graph, model, params.locked()


X = models.normal(0, (3, 4))


def lstm():
  x = models.normal(0, (2, 5, 3))
  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'),
      lambda self, p, x: self.inner.apply(p, x),
      inner=bx.LSTM(g.child('lstm'), 4, r),
    ),
    x,
  )
  return Case(lambda p: model(p, x), params, '**/gates')


def gru():
  x = models.normal(0, (2, 5, 3))
  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'),
      lambda self, p, x: self.inner.apply(p, x),
      inner=bx.GRU(g.child('gru'), 4, r),
    ),
    x,
  )
  return Case(lambda p: model(p, x), params, 'net/gru')


def lstm_static():
  x = models.normal(0, (2, 3, 3))
  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'),
      lambda self, p, x: self.inner.apply(p, x),
      inner=bx.LSTM(g.child('lstm'), 4, r, is_static=True),
    ),
    x,
  )
  return Case(lambda p: model(p, x), params, '**/gates')


def batchnorm_cnn_in_training():
  x = models.normal(0, (2, 6, 6, 2))

  def call(self, p, x):
    x, p = self.conv(p, x)
    x, p = self.norm(p, x, is_training=True)
    x, p = self.head(p, jax.nn.relu(x).mean((1, 2)))
    return (x, p[('net', 'norm', 'running_mean')].value), p

  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'),
      call,
      conv=bx.Conv(g.child('layer'), (3, 3), 4, r),
      norm=bx.BatchNorm(g.child('norm')),
      head=bx.Linear(g.child('head'), 3, r),
    ),
    x,
  )
  return Case(lambda p: model(p, x), params, ['**/layer', '**/head'])


def tied_embedding():
  tokens = jnp.array([[0, 3, 5], [1, 1, 2]])

  def call(self, p, tokens):
    x, p = self.embed(p, tokens)
    return self.embed.attend(p, jnp.tanh(x))

  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'), call, embed=bx.Embed(g.child('layer'), 7, 4, r)
    ),
    tokens,
  )
  return Case(lambda p: model(p, tokens), params)


def shared_layer():
  def call(self, p, x):
    for _ in range(3):
      x, p = self.layer(p, jnp.tanh(x))
    return x, p

  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'), call, layer=bx.Linear(g.child('layer'), 4, r)
    ),
    X,
  )
  return Case(lambda p: model(p, X), params)


def injected_layer():
  class Outer(bx.Module):
    def __init__(self, graph, inner):
      super().__init__(graph)
      self.inner = inner

    def __call__(self, params, x):
      return self.inner(params, x)

  def call(self, p, x):
    x, p = self.outer(p, x)
    return self.outer.inner(p, x)

  def make(g, r):
    inner = bx.Linear(g.child('elsewhere').child('layer'), 4, r)
    return Model(g.child('m'), call, outer=Outer(g.child('outer'), inner))

  _, model, params = _built(make, X)
  return Case(lambda p: model(p, X), params)


def keyword_and_positional_calls():
  class Layer(bx.Module):
    def __call__(self, params, x):
      a, params = self.get_param(
        params=params,
        name='kernel',
        shape=(4, 4),
        init=jax.nn.initializers.ones,
      )
      b, params = self.get_param(params, 'kernel')
      c, params = bx.Module.get_param(self, params, 'kernel', None, None)
      return x @ (a + b + c), params

  _, model, params = _built(lambda g, r: Layer(g.child('layer')), X)
  return Case(lambda p: model(p, X), params)


def bfloat16():
  class Layer(bx.Module):
    def __call__(self, params, x):
      kernel, params = self.get_param(
        params,
        'kernel',
        (4, 4),
        lambda k, s, d: models.normal(3, s, d),
        jnp.bfloat16,
      )
      assert jnp.bfloat16 == kernel.dtype
      return x.astype(jnp.bfloat16) @ kernel, params

  _, model, params = _built(lambda g, r: Layer(g.child('layer')), X)
  return Case(lambda p: model(p, X), params, tolerance=1e-2)


def dropout_on_the_same_rng():
  def call(self, p, x):
    x, p = self.first(p, x)
    x, p = self.dropout(p, x, is_training=True)
    return self.second(p, x)

  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'),
      call,
      first=bx.Linear(g.child('layer'), 4, r),
      dropout=bx.Dropout(g.child('dropout'), 0.5, r),
      second=bx.Linear(g.child('second'), 4, r),
    ),
    X,
  )
  return Case(lambda p: model(p, X), params, ['**/layer', '**/second'])


def einsum_kernel():
  class Heads(bx.Module):
    def __call__(self, params, x):
      kernel, params = self.get_param(
        params, 'kernel', (4, 2, 3), lambda k, s, d: models.normal(5, s)
      )
      return jnp.einsum('bd,dhk->bhk', x, kernel), params

  _, model, params = _built(lambda g, r: Heads(g.child('layer')), X)
  return Case(lambda p: model(p, X), params, attach={'layout': 'ioo'}, outs=2)


def einsum_kernel_by_default():
  case = einsum_kernel()
  return dataclasses.replace(case, attach={}, outs=1)


def _linear(call):
  _, model, params = _built(
    lambda g, r: Model(
      g.child('m'), call, layer=bx.Linear(g.child('layer'), 4, r)
    ),
    X,
  )
  return Case(lambda p: model(p, X), params)


def checkpointed():
  return _linear(
    lambda self, p, x: jax.checkpoint(lambda p, x: self.layer(p, x))(p, x)
  )


def inside_while():
  def call(self, p, x):
    _, p = self.layer(p, x)
    step = lambda i, x: jnp.tanh(self.layer(p, x)[0])
    return jax.lax.fori_loop(0, 3, step, x), p

  return _linear(call)


def inside_cond():
  def call(self, p, x):
    yes = lambda p, x: self.layer(p, x)
    no = lambda p, x: (x, self.layer(p, x)[1])
    return jax.lax.cond(x.sum() < 100, yes, no, p, x)

  return _linear(call)


def inside_vmap():
  def call(self, p, x):
    _, p = self.layer(p, x)
    return jax.vmap(lambda x: self.layer(p, x)[0])(x), p

  return _linear(call)


def inside_inner_jit_and_grad():
  def call(self, p, x):
    _, p = self.layer(p, x)
    inner = jax.jit(lambda p, x: self.layer(p, x)[0].sum())
    return jax.grad(inner, 1)(p, x), p

  return _linear(call)


def split_and_merged_inside():
  def call(self, p, x):
    trainable, rest = p.split()
    y, q = self.layer(trainable.merge(rest), x)
    odd, even = q.split(lambda path, param: 'bias' in path)
    return y, even.merge(odd)

  return _linear(call)


def custom_vjp_over_the_kernel():
  @jax.custom_vjp
  def dot(x, w):
    return x @ w

  dot.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
  )

  class Layer(bx.Module):
    def __call__(self, params, x):
      kernel, params = self.get_param(
        params, 'kernel', (4, 4), lambda k, s, d: models.normal(5, s)
      )
      return dot(x, kernel), params

  _, model, params = _built(lambda g, r: Layer(g.child('layer')), X)
  return Case(lambda p: model(p, X), params)


def slots():
  class Layer(bx.Linear):
    __slots__ = ('extra',)

  _, model, params = _built(lambda g, r: Layer(g.child('layer'), 4, r), X)
  return Case(lambda p: model(p, X), params)


def frozen_module():
  class Layer(bx.Linear):
    def __setattr__(self, name, value):
      if name in self.__dict__:
        raise AttributeError(f'{name} is frozen')
      super().__setattr__(name, value)

  _, model, params = _built(lambda g, r: Layer(g.child('layer'), 4, r), X)
  return Case(lambda p: model(p, X), params)


def get_param_as_property():
  class Layer(bx.Linear):
    @property
    def get_param(self):
      return lambda *args, **kwargs: bx.Module.get_param(self, *args, **kwargs)

  _, model, params = _built(lambda g, r: Layer(g.child('layer'), 4, r), X)
  return Case(lambda p: model(p, X), params)


def weight_norm():
  class Layer(bx.Linear):
    def get_param(self, params, name, *args, **kwargs):
      value, params = super().get_param(params, name, *args, **kwargs)
      if name == 'kernel':
        norm = jnp.linalg.norm(value, axis=0, keepdims=True)
        gain, params = super().get_param(
          params, 'gain', value.shape[-1:], jax.nn.initializers.ones
        )
        value = gain * value / norm
      return value, params

  _, model, params = _built(lambda g, r: Layer(g.child('layer'), 4, r), X)
  return Case(lambda p: model(p, X), params)


def lazily_made_layer():
  def call(self, p, x):
    if not hasattr(self, 'layer'):
      self.layer = bx.Linear(self.graph.child('layer'), 4, self.rng)
    return self.layer(p, x)

  _, model, params = _built(lambda g, r: Model(g.child('m'), call, rng=r), X)
  return Case(lambda p: model(p, X), params)


def no_rng():
  graph = bx.Graph('net')
  layer = bx.Linear(graph.child('layer'), 4, None)
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(models.normal(1, (4, 4)))
  params['net', 'layer', 'bias'] = bx.Param(models.normal(2, (4,)))
  return Case(lambda p: layer(p, X), params.locked())


def two_roots():
  one, two = bx.Graph('one'), bx.Graph('two')
  rng = bx.Rng(one.child('rng'))
  first = bx.Linear(one.child('layer'), 4, rng)
  second = bx.Linear(two.child('layer'), 4, rng)

  def call(p):
    x, p = first(p, X)
    return second(p, x)

  _, params = call(rng.seed(bx.Params(), seed=0))
  return Case(call, params.locked())


def odd_names():
  names = ['a/b', 'x.y[0]', 'c:d  e', 'größe 层', '{a,b}!**']
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layers = [bx.Linear(graph.child(n), 4, rng) for n in names]

  def call(p):
    x = X
    for layer in layers:
      x, p = layer(p, x)
    return x, p

  _, params = call(rng.seed(bx.Params(), seed=0))
  return Case(call, params.locked(), '**/kernel')


def pytree_beside():
  class Layer(bx.Linear):
    def __call__(self, params, x):
      extra, params = self.get_param(
        params,
        'extra',
        (),
        lambda k, s, d: {'a': jnp.ones(4), 'b': (jnp.ones(4), None)},
      )
      y, params = super().__call__(params, x)
      return y * extra['a'] + extra['b'][0], params

  _, model, params = _built(lambda g, r: Layer(g.child('layer'), 4, r), X)
  return Case(lambda p: model(p, X), params, ['**/layer', 'all'])


def layer_with_its_own_lora_a():
  class Layer(bx.Linear):
    def __call__(self, params, x):
      own, params = self.get_param(
        params, 'lora_a', (4,), lambda k, s, d: models.normal(9, s)
      )
      y, params = super().__call__(params, x)
      return y + own, params

  _, model, params = _built(lambda g, r: Layer(g.child('layer'), 4, r), X)
  return Case(lambda p: model(p, X), params)


def scan_over_stacked_layers():
  graph = bx.Graph('net')
  layer = bx.Linear(graph.child('layer'), 4, None)
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(models.normal(1, (5, 4, 4)))
  params['net', 'layer', 'bias'] = bx.Param(models.normal(2, (5, 4)))

  def call(p):
    def body(x, p):
      return jnp.tanh(layer(p, x)[0]), None

    return jax.lax.scan(body, X, p)[0], p

  return Case(call, params.locked(), attach={'stacked': 1})


def ensemble_under_vmap():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(graph.child('layer'), 4, rng)

  def init(seed):
    return layer(rng.seed(bx.Params(), seed=jax.random.key(seed)), X)[1]

  params = jax.jit(jax.vmap(init))(jnp.arange(3)).locked()
  return Case(
    lambda p: (jax.vmap(lambda p: layer(p, X)[0])(p), p),
    params,
    attach={'stacked': 1, 'graph': graph},
  )


def conv_with_groups():
  x = models.normal(0, (2, 6, 4))
  _, model, params = _built(
    lambda g, r: bx.Conv(g.child('layer'), 3, 4, r, feature_group_count=2), x
  )
  return Case(lambda p: model(p, x), params)


def inside_sequential():
  def make(g, r):
    layers = [
      bx.Linear(g.child('layer'), 4, r),
      jax.nn.relu,
      bx.Linear(g.child('other'), 4, r),
    ]
    return bx.Sequential(g.child('all'), layers)

  _, model, params = _built(make, X)
  return Case(lambda p: model(p, X), params)


def named_parameters_of_a_cell():
  """A cell of raw matrices under names of its own."""

  class Cell(bx.Module):
    def __call__(self, params, x):
      for name in ('w_in', 'w_out'):
        w, params = self.get_param(
          params, name, (4, 4), lambda k, s, d, n=name: models.normal(len(n), s)
        )
        x = jnp.tanh(x @ w)
      return x, params

  _, model, params = _built(lambda g, r: Cell(g.child('layer')), X)
  return Case(lambda p: model(p, X), params)


CASES = [
  lstm,
  gru,
  lstm_static,
  batchnorm_cnn_in_training,
  tied_embedding,
  shared_layer,
  injected_layer,
  keyword_and_positional_calls,
  bfloat16,
  dropout_on_the_same_rng,
  einsum_kernel,
  einsum_kernel_by_default,
  checkpointed,
  inside_while,
  inside_cond,
  inside_vmap,
  inside_inner_jit_and_grad,
  split_and_merged_inside,
  custom_vjp_over_the_kernel,
  slots,
  frozen_module,
  get_param_as_property,
  weight_norm,
  lazily_made_layer,
  no_rng,
  two_roots,
  odd_names,
  pytree_beside,
  layer_with_its_own_lora_a,
  scan_over_stacked_layers,
  ensemble_under_vmap,
  conv_with_groups,
  inside_sequential,
  named_parameters_of_a_cell,
]


@pytest.fixture(scope='module', params=CASES, ids=lambda case: case.__name__)
def case(request):
  return request.param()


def test_outputs_are_those_of_a_dense_model(case):
  ((_, expected), _) = case.compiled
  models.close(expected, case.adapted_out, case.tolerance)


def test_jitted_outputs_are_those_of_a_dense_model(case):
  ((_, expected), (_, actual)) = case.compiled
  models.close(expected, actual, case.tolerance)


def test_gradients_are_those_of_a_dense_model(case):
  ((expected, _), (actual, _)) = case.compiled
  models.close(expected, actual, 5 * case.tolerance)


def test_the_adapter_takes_part(case):
  assert not all(map(np.allclose, case.base_out, case.adapted_out))


def test_structure_of_params_survives_the_call(case):
  _, after = jax.eval_shape(case.call, case.adapted)
  assert jax.tree.structure(case.adapted) == jax.tree.structure(after)


def test_merged_gives_the_same_bits_as_adapted(case):
  merged = surgery.merge(case.adapted)
  assert bx.Params is type(merged)
  assert jax.tree.structure(case.params) == jax.tree.structure(merged)
  assert _bits(case.adapted_out) == _bits(case.out(merged))


def test_disabled_is_the_base_bit_for_bit(case):
  disabled = surgery.disable(case.adapted)
  assert _bits(case.base_out) == _bits(case.out(disabled))


def test_detached_is_the_base_itself(case):
  detached = surgery.detach(case.adapted)
  assert jax.tree.structure(case.params) == jax.tree.structure(detached)
  models.assert_equal_params(case.params, detached)


def test_randomness_of_the_model_goes_on_as_without(case):
  _, expected = case.call(case.params)
  _, actual = case.call(case.adapted)
  for path, param in expected.items():
    if 'rng' in path:
      assert models.bits(param.value) == models.bits(actual[path].value)


def test_every_adapted_parameter_is_asked_for(case):
  sites = surgery.check(case.call, case.adapted)
  assert surgery.adapters(case.adapted)[0].sites == sites


def _bits(arrays):
  return [models.bits(a) for a in arrays]


# Refused, before anything changes.


class Writer(bx.Linear):
  """A layer that writes its kernel back at every call."""

  def __call__(self, params, x):
    y, params = super().__call__(params, x)
    kernel, params = self.get_param(params, 'kernel')
    return y, self.set_param(params, 'kernel', kernel * 0.9)


def test_a_layer_that_writes_its_kernel_is_refused_at_the_call():
  _, model, base = _built(lambda g, r: Writer(g.child('layer'), 4, r), X)
  params = surgery.attach(base, LORA, to='**/layer')
  before = params['net', 'layer', 'kernel'].value
  with pytest.raises(surgery.AdapterError, match=r'net/layer/kernel.*writes'):
    model(params, X)
  with pytest.raises(surgery.AdapterError, match='writes'):
    jax.jit(model)(params, X)
  assert before is params['net', 'layer', 'kernel'].value
  expected, _ = model(base, X)
  actual, _ = model(surgery.disable(params), X)
  assert models.bits(expected) == models.bits(actual)


def test_a_layer_that_changes_the_shape_of_a_parameter_is_told():
  case = no_rng()
  params = case.adapted.unlocked()
  params['net', 'layer', 'kernel'] = bx.Param(models.normal(1, (4, 5)))
  with pytest.raises(
    surgery.SiteError, match=r'shape \(4, 4\), found \(4, 5\)'
  ):
    case.call(params)
  with pytest.raises(surgery.SiteError, match=r'shape \(4, 4\)'):
    surgery.merge(params)


def test_weights_that_are_not_stacked_with_their_parameter_are_refused():
  case = no_rng()
  weights, rest = case.adapted.split(models.is_weight)
  stacked = jax.tree.map(lambda w: jnp.stack([w, w]), rest)
  with pytest.raises(surgery.SiteError, match='stacked axes'):
    surgery.merge(weights.merge(stacked))


def test_a_wrong_number_of_stacked_axes_is_refused():
  case = scan_over_stacked_layers()
  with pytest.raises(surgery.SurgeryError, match='stacked'):
    surgery.attach(
      case.params, LORA, to='**/layer', stacked=1, layout={'**/kernel': 'iio'}
    )


def test_a_stack_that_was_not_told_is_noticed_inside_of_the_scan():
  case = scan_over_stacked_layers()
  two = jax.tree.map(lambda w: w[:2], case.params)
  params = surgery.attach(two, LORA, to='**/layer')
  # Rank 2 and two layers: JAX sees nothing wrong.
  with pytest.raises(surgery.SiteError, match='net/layer'):
    case.call(params)


def test_a_graph_tells_of_the_stack():
  case = scan_over_stacked_layers()
  graph = bx.Graph('net')
  bx.Linear(graph.child('layer'), 4, None)
  expected = surgery.attach(case.params, LORA, to='**/layer', stacked=1)
  actual = surgery.attach(case.params, LORA, to='**/layer', graph=graph)
  assert list(expected.keys()) == list(actual.keys())
  models.assert_equal_params(expected, actual)


def test_shared_weights_can_be_kept_out_of_a_scan():
  case = scan_over_stacked_layers()
  host = models.host(models.Shared)
  params = surgery.attach(
    case.params, models.Shared(), to='**/layer', stacked=1, host=host
  )
  params = models.stirred(params)
  shared, rest = params.split(lambda path, _: path[0] == 'surgery.default')
  graph = bx.Graph('net')
  layer = bx.Linear(graph.child('layer'), 4, None)

  def run(params_of, xs):
    body = lambda x, p: (jnp.tanh(layer(params_of(p), x)[0]), None)
    return jax.lax.scan(body, X, xs)[0]

  merged = surgery.merge(params, host=host)
  expected = run(lambda p: p, merged)
  models.close(expected, run(lambda p: p.merge(shared), rest))


@pytest.mark.parametrize(
  'dtype', ['float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2']
)
def test_narrow_floats_are_rounded_once(dtype):
  case = no_rng()
  base = case.params.unlocked()
  base['net', 'layer', 'kernel'] = bx.Param(models.normal(1, (4, 4), dtype))
  params = models.stirred(surgery.attach(base.locked(), LORA, to='**/layer'))
  w, a, b = (
    np.asarray(params['net', 'layer', name].value, np.float32)
    for name in ('kernel', 'lora_a', 'lora_b')
  )
  expected = jnp.asarray(w + 2 * a @ b, dtype)
  merged = surgery.merge(params)['net', 'layer', 'kernel'].value
  assert jnp.dtype(dtype) == merged.dtype
  close = np.asarray(expected, np.float32) == np.asarray(merged, np.float32)
  # Two orders of summation may fall on two sides of a boundary.
  assert close.mean() > 0.8


def test_conv_transpose_adapts_along_its_own_axes():
  """Its kernel is `(*spatial, out, in)`; the graph tells."""
  x = models.normal(0, (2, 6, 3))
  graph, model, base = _built(
    lambda g, r: bx.ConvTranspose(g.child('layer'), 3, 5, r), x
  )
  params = models.stirred(
    surgery.attach(base, LORA, to='**/layer', graph=graph)
  )
  a, b, w = (
    np.asarray(params['net', 'layer', name].value, np.float64)
    for name in ('lora_a', 'lora_b', 'kernel')
  )
  assert (3, 3, 2) == a.shape
  assert (2, 5) == b.shape
  kernel, _ = model.get_param(params, 'kernel')
  models.close(w + 2 * np.einsum('kir,ro->koi', a, b), kernel)
  assert _bits([model(params, x)[0]]) == _bits(
    [model(surgery.merge(params), x)[0]]
  )


def test_attend_sees_what_the_lookup_sees():
  case = tied_embedding()
  params = case.adapted
  embed = params['net', 'layer', 'embedding'].value
  a = params['net', 'layer', 'lora_a.default.embedding'].value
  b = params['net', 'layer', 'lora_b.default.embedding'].value
  kernel = np.asarray(embed) + 2 * np.asarray(a) @ np.asarray(b)
  tokens = jnp.array([[0, 3, 5], [1, 1, 2]])
  expected = np.tanh(kernel[tokens]) @ kernel.T
  models.close(expected, case.call(params)[0])
