"""Whole models through `factored`: values, gradients, and what they return."""

from __future__ import annotations

import functools
import math
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from tests.live import models, test_awkward_models
from tests.live.models import close, normal
from tests.live.test_awkward_models import CASES, Model, X

LORA = surgery.LoRA(rank=2)
# Names of models of that module, and of some more below.
_built = test_awkward_models._built


def compared(call, weights, params_of, oracle_of, tolerance=2e-5):
  """Asserts that a model through `factored` is what it is on dense params.

  Args:
    call: takes params, and returns outputs and params.
    weights: what is differentiated.
    params_of: makes adapted params of them.
    oracle_of: makes plain params of them.
    tolerance: of values, five times that of gradients.
  """
  changed = []

  def loss(weights, model, make):
    params = make(weights)
    out, after = model(params)
    out = jax.tree.leaves(out)
    total = sum((o.astype(jnp.float32) ** 2).sum() for o in out)
    # What is no adapter's business: statistics, keys, biases.
    others = [p for p in params.keys() if _known(params[p])]
    changed.append({p for p in others if not _same(params[p], after[p])})
    return total, (out, {p: after[p].value for p in changed[-1]})

  @jax.jit
  def both(weights):
    grad = jax.value_and_grad(loss, has_aux=True)
    fast = surgery.factored(call)
    return grad(weights, call, oracle_of), grad(weights, fast, params_of)

  (dense, grads), (fast, grads_) = both(weights)
  close((dense[0], dense[1][0]), (fast[0], fast[1][0]), tolerance)
  close(grads, grads_, 5 * tolerance)
  assert changed[0] == changed[1]
  for path, value in dense[1][1].items():
    if jnp.issubdtype(value.dtype, jnp.floating):
      close(value, fast[1][1][path], tolerance)
    else:
      assert models.bits(value) == models.bits(fast[1][1][path])


def _known(param):
  leaves = jax.tree.leaves(param.value)
  return not any(isinstance(v, jax.core.Tracer) for v in leaves)


def _same(one, other):
  pair = map(jax.tree.leaves, (one.value, other.value))
  return all(a is b for a, b in zip(*pair, strict=True))


def compare(case):
  """Compares a case with the oracle."""
  weights, rest = case.adapted.split(models.is_weight)
  compared(
    case.call,
    weights,
    lambda w: w.merge(rest),
    lambda w: models.dense(w.merge(rest), outs=case.outs),
    max(2e-5, case.tolerance),
  )


def becomes(call, params):
  """Returns what becomes of parameters, each way once."""
  return {str(use) for use in surgery.explain(call, params).values()}


# Models that interception finds awkward.

# What cannot stay factored in them, and why.
DENSE = {
  'custom_vjp_over_the_kernel': {'dense (custom_vjp_call)'},
  'gru': {'factored'},
  'bfloat16': {'factored in bfloat16'},
}


@pytest.mark.filterwarnings('ignore::surgery.DenseFallbackWarning')
@pytest.mark.parametrize('make', CASES, ids=lambda make: make.__name__)
def test_an_awkward_model_is_the_same_and_stays_factored(make):
  case = make()
  compare(case)
  expected = DENSE.get(make.__name__, {'factored'})
  assert expected == becomes(case.call, case.adapted)


# Layers of blox.


def conv_transpose():
  x = normal(0, (2, 6, 3))
  return _built(lambda g, r: bx.ConvTranspose(g.child('layer'), 3, 5, r), x), x


def conv_same_length():
  x = normal(0, (2, 5, 6, 2))
  make = lambda g, r: bx.Conv(
    g.child('layer'), (3, 2), 4, r, strides=2, padding='VALID'
  )
  return _built(make, x), x


def embed():
  x = jnp.array([[0, 6, 2], [1, 1, 3]])
  return _built(lambda g, r: bx.Embed(g.child('layer'), 7, 4, r), x), x


def normed():
  def call(self, p, x):
    x, p = self.one(p, x)
    x, p = self.layer(p, x)
    return self.two(p, x)

  make = lambda g, r: Model(
    g.child('m'),
    call,
    one=bx.LayerNorm(g.child('one')),
    layer=bx.Linear(g.child('layer'), 4, r),
    two=bx.RMSNorm(g.child('two')),
  )
  return _built(make, X), X


@pytest.mark.parametrize(
  'make', [conv_transpose, conv_same_length, embed, normed]
)
def test_layers_of_blox(make):
  (graph, model, base), x = make()
  params = surgery.attach(base, LORA, to='**/layer', graph=graph)
  params = models.stirred(params)
  weights, rest = params.split(models.is_weight)
  call = lambda p: model(p, x)
  # Merging is another way to the same arrays.
  compared(
    call, weights, lambda w: w.merge(rest), lambda w: merged(w.merge(rest))
  )
  assert {'factored'} == becomes(call, params)


def merged(params):
  """Returns plain params that hold what layers are answered."""
  result = bx.Params()
  chains = params.records.chains
  for path, param in params.items():
    if path in chains:
      value, _ = params._get(path, None, None)
      param = param.replace(value=value)
    if not models.is_weight(path, param):
      result[path] = param
  return result.locked()


# Types of adapters, one or more.


class Dora(surgery.LoRA):
  """DoRA whose norm is differentiated too."""

  name = 'dora-by-norm'
  adds = False

  def init(self, site, key):
    axes = tuple(range(len(site.in_shape)))
    norm = jnp.sqrt((site.base() ** 2).sum(axes))
    return {**super().init(site, key), 'magnitude': norm}

  def apply(self, site, name, base, weights):
    v = super().apply(site, name, base, weights).dense()
    axes = tuple(range(len(site.in_shape)))
    return v * (weights['magnitude'] / jnp.sqrt((v**2).sum(axes)))


def _attached(base, *adapters):
  host = models.host(Dora, models.Shared, models.Scale, models.ScaleAside)
  for i, adapter in enumerate(adapters):
    base = surgery.attach(
      base, adapter, to='**/layer', name=f'a{i}', host=host, seed=i
    )
  return models.stirred(base)


def linear():
  x = X
  return _built(lambda g, r: bx.Linear(g.child('layer'), 4, r), x), x


def conv():
  x = normal(0, (2, 5, 5, 2))
  return _built(lambda g, r: bx.Conv(g.child('layer'), (3, 3), 4, r), x), x


# name: adapters, innermost first, and what becomes of kernels.
TYPES = {
  'two': ([LORA, surgery.LoRA(rank=1, alpha=3.0)], {'factored'}),
  'rslora': ([surgery.LoRA(rank=2, rslora=True)], {'factored'}),
  'dora': ([Dora(rank=2)], {'factored'}),
  'lora on dora': ([Dora(rank=2), LORA], {'factored'}),
  'scaled': ([LORA, models.Scale()], {'factored', 'dense (not low-rank)'}),
  'scale aside': ([models.ScaleAside()], {'factored'}),
  'scale of lora': ([LORA, models.ScaleAside()], {'factored'}),
  'lora on a scale': ([models.ScaleAside(), LORA], {'factored'}),
}


@pytest.mark.parametrize('make', [linear, conv])
@pytest.mark.parametrize('name', TYPES)
def test_types_of_adapters(name, make):
  (_, model, base), x = make()
  adapters, expected = TYPES[name]
  params = _attached(base, *adapters)
  weights, rest = params.split(models.is_weight)
  call = lambda p: model(p, x)
  compared(
    call, weights, lambda w: w.merge(rest), lambda w: merged(w.merge(rest))
  )
  assert becomes(call, params) <= expected | {'dense (not low-rank)'}
  kernel = surgery.explain(call, params)['net', 'layer', 'kernel']
  assert 'factored' == str(kernel)


@pytest.mark.filterwarnings('ignore::surgery.DenseFallbackWarning')
def test_a_scale_of_inputs_stays_aside_where_they_are_not_taps():
  adapter = models.ScaleAside(inputs=True)
  for make, expected in (
    (linear, 'factored'),
    (conv, 'dense (conv_general_dilated)'),
  ):
    (_, model, base), x = make()
    params = _attached(base, adapter)
    weights, rest = params.split(models.is_weight)
    call = lambda p, model=model, x=x: model(p, x)
    whole = lambda w, rest=rest: w.merge(rest)
    compared(call, weights, whole, lambda w, whole=whole: merged(whole(w)))
    kernel = surgery.explain(call, params)['net', 'layer', 'kernel']
    assert expected == str(kernel)


def test_rslora_is_scaled_by_the_root_of_the_rank():
  (_, model, base), x = linear()
  params = _attached(base, surgery.LoRA(rank=4, alpha=3.0, rslora=True))
  w, bias, a, b = (
    np.asarray(params['net', 'layer', n].value, np.float64)
    for n in ('kernel', 'bias', 'lora_a.a0', 'lora_b.a0')
  )
  expected = np.asarray(x) @ (w + 3 / math.sqrt(4) * a @ b) + bias
  fast = jax.jit(surgery.factored(lambda p: model(p, x)))
  close(expected, fast(params)[0])


def test_designed_in_lora_in_plain_params():
  model, params, x = models.mlp((5, 3), layer=surgery.LoraLinear, rank=2)
  params = models.stirred(params)
  assert type(params) is bx.Params
  weights, rest = params.split(models.is_weight)
  call = lambda p: model(p, x)
  compared(
    call,
    weights,
    lambda w: w.merge(rest),
    lambda w: models.dense(w.merge(rest)),
  )
  assert {'factored'} == becomes(call, params)


def test_plain_params_and_disabled_adapters_are_the_models_own():
  model, base, x = models.mlp((5, 3))
  adapted = surgery.attach(base, LORA, to='**')
  for params in (base, surgery.disable(models.stirred(adapted))):
    grad = lambda f, p=params: jax.jit(jax.grad(lambda x: f(p, x)[0].sum()))(x)
    np.testing.assert_array_equal(grad(model), grad(surgery.factored(model)))


# What a model returns and remembers.


def test_a_models_own_randomness_goes_on_as_it_would():
  case = test_awkward_models.dropout_on_the_same_rng()
  fast = surgery.factored(case.call)
  one, two = jax.jit(case.call), jax.jit(fast)
  params = other = case.adapted
  for _ in range(2):
    (y, params), (y_, other) = one(params), two(other)
    close(y, y_)
    models.assert_equal_params(params, other)


def test_statistics_are_those_of_a_dense_model_and_the_rest_is_untouched():
  case = test_awkward_models.batchnorm_cnn_in_training()
  _, expected = jax.jit(case.call)(case.adapted)
  untouched = []

  def step(params):
    out, after = surgery.factored(case.call)(params)
    untouched.extend(
      path for path in params.keys() if after[path].value is params[path].value
    )
    return out, after

  _, actual = jax.jit(step)(case.adapted)
  assert jax.tree.structure(expected) == jax.tree.structure(actual)
  statistics = {p for p in expected.keys() if 'running' in p[-1]}
  assert {*expected.keys()} - statistics == {*untouched}
  for path in statistics:
    close(expected[path].value, actual[path].value)
    assert not np.array_equal(actual[path].value, case.adapted[path].value)


# Functions around models.


MODEL, BASE, INPUT = models.mlp((5, 3))
ADAPTED = models.stirred(surgery.attach(BASE, LORA, to='**'))


def loss_of_globals(params, x):
  y, params = MODEL(params, x)
  return (y**2).mean(), params


def with_keywords(params, *, x, scale=2.0, mode='none'):
  y, params = MODEL(params, x)
  if mode == 'double':
    y = 2 * y
  return (y * scale).sum(), params


class Trainer:
  def __init__(self):
    self.model = MODEL

  def loss(self, params, x):
    return self(params, x)

  def __call__(self, params, x):
    y, params = self.model(params, x)
    return (y**2).sum(), params


# name: a function that gives a loss and params, and how it is called.
FUNCTIONS: dict[str, tuple[Any, Any]] = {
  'of globals': (loss_of_globals, lambda f, p: f(p, INPUT)),
  'of keywords': (
    with_keywords,
    lambda f, p: f(p, x=INPUT, scale=jnp.float32(3), mode='double'),
  ),
  'a method': (Trainer().loss, lambda f, p: f(p, INPUT)),
  'a callable': (Trainer(), lambda f, p: f(p, x=INPUT)),
  'a partial': (
    functools.partial(with_keywords, scale=0.5), lambda f, p: f(p, x=INPUT),
  ),
  'compiled': (jax.jit(loss_of_globals), lambda f, p: f(p, INPUT)),
  'params last': (
    lambda x, params: loss_of_globals(params, x),
    lambda f, p: f(INPUT, params=p),
  ),
  'a list of losses': (
    lambda ps, x: (sum(loss_of_globals(p, x)[0] for p in ps), ps[0]),
    lambda f, p: f([p, p], INPUT),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_around_a_model(name):
  function, call = FUNCTIONS[name]
  half, rest = surgery.freeze(ADAPTED).split()

  @jax.jit
  def both(half):
    grad = lambda f: jax.value_and_grad(
      lambda h: call(f, h.merge(rest)), has_aux=True
    )(half)
    return grad(function), grad(surgery.factored(function))

  ((dense, after), grads), ((fast, after_), grads_) = both(half)
  close((dense, grads), (fast, grads_))
  models.assert_equal_params(after, after_)


def test_a_call_of_which_nothing_is_traced_is_the_models_own():
  y, after = surgery.factored(MODEL)(ADAPTED, INPUT)
  expected, _ = MODEL(ADAPTED, INPUT)
  assert models.bits(expected) == models.bits(y)
  assert all(after[p].value is q.value for p, q in ADAPTED.items())
