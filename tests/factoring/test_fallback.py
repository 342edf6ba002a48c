"""Nothing falls back to dense parameters in silence."""

from __future__ import annotations

import re
import warnings

import blox as bx
import jax
import jax.numpy as jnp
import pytest

import surgery
from surgery import jaxcompat
from surgery.factoring import rules, walking
from surgery.factoring.walking import Kind, Note, Walk
from surgery.testing import cases, check
from tests.factoring.test_transform import X, layer
from tests.live import models

PATH = 'net/layer/kernel'


def use(use, shape=(6, 5), **options):
  return layer(use, shape, **options)


def grad(model, params):
  """Returns the gradients of a factored model, traced anew."""
  half, rest = surgery.freeze(params).split()
  loss = lambda half: (model(half.merge(rest), X)[0] ** 2).sum()
  return jax.grad(loss)(half)


def warned(model, params, **options):
  """Returns the messages of the warnings of a call."""
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    grad(surgery.factored(model, **options), params)
  assert all(w.category is surgery.DenseFallbackWarning for w in found)
  return [str(w.message) for w in found]


@pytest.fixture
def product():
  return use(lambda k, x: x @ k)


@pytest.fixture
def tanh():
  return use(lambda k, x: x @ jnp.tanh(k))


# Uses that have no rule.


def test_a_use_without_a_rule_is_warned_of(tanh):
  (message,) = warned(*tanh)
  path = surgery.adapters(tanh[1])[0].sites[0]
  assert '/'.join(path) in message
  assert "'tanh' needs the dense array" in message
  assert 'surgery.explain(model, params' in message


def test_a_use_with_a_rule_is_not_warned_of(product):
  assert [] == warned(*product)


def test_params_without_adapters_are_not_warned_of(tanh):
  model, params = tanh
  params = surgery.detach(params)
  fast = surgery.factored(model, strict=True)
  jax.jit(lambda p: fast(p, X)[0])(params)


def test_a_call_of_which_nothing_is_traced_is_not_warned_of(tanh):
  model, params = tanh
  surgery.factored(model, strict=True)(params, X)


def test_a_disabled_adapter_is_not_warned_of(tanh):
  model, params = tanh
  params = surgery.disable(params)
  jax.jit(lambda p: surgery.factored(model, strict=True)(p, X)[0])(params)


def test_each_reason_is_warned_of_once_by_a_factored_model():
  model, params = use(lambda k, x: x @ jnp.tanh(k) + x @ jnp.tanh(k))
  fast = surgery.factored(model)
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    grad(fast, params)
    grad(fast, params)
  assert 1 == len(found)


def test_each_of_two_reasons_is_named():
  model, params = use(lambda k, x: x @ jnp.tanh(k) + x @ jnp.sin(k))
  first, second = warned(model, params)
  assert "'tanh'" in first
  assert "'sin'" in second


def test_under_jit_a_program_is_warned_of_once(tanh):
  model, params = tanh
  fast = jax.jit(lambda p: surgery.factored(model)(p, X)[0])
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    fast(params)
    fast(params)
  assert 1 == len(found)


def test_an_error_of_a_warning_is_raised_each_time(tanh):
  model, params = tanh
  fast = surgery.factored(model)
  for _ in range(2):
    with pytest.raises(surgery.DenseFallbackWarning, match='tanh'):
      grad(fast, params)


def test_a_warning_points_to_the_caller(tanh):
  model, params = tanh
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    grad(surgery.factored(model), params)
  assert __file__ == found[0].filename


def test_under_vmap_it_is_warned_of(tanh):
  model, params = tanh
  fast = surgery.factored(model)
  with pytest.warns(surgery.DenseFallbackWarning, match='tanh'):
    jax.vmap(lambda x: fast(params, x[None])[0])(X)
  with pytest.warns(surgery.DenseFallbackWarning, match='tanh'):
    both = jax.tree.map(lambda v: jnp.stack([v, v]), params)
    jax.vmap(lambda p: surgery.factored(model)(p, X)[0])(both)


def test_strict_raises(tanh):
  with pytest.raises(surgery.AdapterError, match=r"layer/kernel is.*'tanh'"):
    grad(surgery.factored(tanh[0], strict=True), tanh[1])


def test_strict_keeps_what_is_factored(product):
  model, params = product
  jax.tree.map(
    lambda a, b: models.close(a, b),
    grad(model, params),
    grad(surgery.factored(model, strict=True), params),
  )


def test_many_parameters_of_one_reason_are_one_warning():
  losses: dict[tuple[str, ...], list[Note]] = {
    ('net', str(i)): [Note('tanh')] for i in range(12)
  }
  with pytest.warns(surgery.DenseFallbackWarning) as found:
    surgery.factoring.fallback.report(losses, strict=False, seen=set())
  (message,) = [str(w.message) for w in found]
  assert 'net/0, net/1' in message
  assert 'net/9 and 2 more are dense' in message


# Calls that are not followed.


def test_a_low_rank_value_in_a_call_that_is_not_followed():
  @jax.custom_vjp
  def odd(params, x):
    return model(params, x)[0]

  def backward(residuals, y):
    return jax.vjp(lambda p, x: model(p, x)[0], *residuals)[1](y)

  odd.defvjp(lambda p, x: (odd(p, x), (p, x)), backward)
  model, params = use(lambda k, x: x @ k)
  call = lambda p, x: (odd(p, x), p)
  fast = surgery.factored(call)
  with pytest.warns(surgery.DenseFallbackWarning, match='custom_vjp_call'):
    jax.jit(lambda p: fast(p, X)[0])(params)
  found = surgery.explain(call, params, X)
  assert ['dense (custom_vjp_call)'] == [str(use) for use in found.values()]


def test_dropout_in_a_call_that_is_not_followed_is_refused():
  model, params = use(lambda k, x: x @ k)
  params = surgery.attach(
    surgery.detach(params),
    surgery.LoRA(rank=2, dropout=0.5),
    to='**/layer',
  )
  odd = jax.custom_jvp(lambda p, x: model(p, x)[0])
  odd.defjvp(lambda primals, tangents: jax.jvp(odd.fun, primals, tangents))
  fast = surgery.factored(lambda p, x: (odd(p, x), p))
  with pytest.raises(surgery.AdapterError, match=r'dropout.*custom_jvp_call'):
    jax.jit(lambda p: fast(p, X)[0])(params)


class Keeps(bx.Module):
  """Keeps what it computed on itself."""

  def __init__(self, graph, inner):
    super().__init__(graph)
    self.inner = inner

  def __call__(self, params, x):
    y, params = self.inner(params, x)
    self.kept = y
    return y, params


def test_a_call_that_is_dense_as_a_whole_is_warned_of(product):
  model, params = product
  keeps = Keeps(bx.Graph('top').child('keeps'), model)
  (message,) = warned(keeps, params)
  assert 'layer/kernel is dense: a module keeps an interm' in message
  with pytest.raises(surgery.AdapterError, match='keeps an intermediate'):
    grad(surgery.factored(keeps, strict=True), params)


def test_an_error_of_the_model_is_raised_as_it_is(product):
  model, params = product

  def broken(params, x):
    raise ZeroDivisionError('mine')

  with pytest.raises(ZeroDivisionError, match='mine'):
    grad(surgery.factored(broken, strict=True), params)


def test_an_effect_without_results_is_followed():
  def noisy(k, x):
    jax.debug.callback(lambda: None)
    return x @ k

  model, params = use(noisy)
  jax.jit(lambda p: surgery.factored(model, strict=True)(p, X)[0])(params)


# What `apply` does.


class Lossy(surgery.Adapter):
  """Makes its low-rank value dense."""

  name = 'lossy'

  def init(self, site, key):
    return surgery.LoRA.init(surgery.LoRA(rank=2), site, key)

  def apply(self, site, name, base, weights):
    value = surgery.LowRank(base, weights['lora_a'], weights['lora_b'])
    return jnp.tanh(value.dense())


class Plain(Lossy):
  """Gives no low-rank value."""

  name = 'plain'

  def apply(self, site, name, base, weights):
    return base + weights['lora_a'] @ weights['lora_b']


class Jitted(Lossy):
  """Gives a low-rank value out of a compiled function."""

  name = 'jitted'

  def apply(self, site, name, base, weights):
    made = jax.jit(lambda w, a, b: surgery.LowRank(w, a, b).dense())
    return made(base, weights['lora_a'], weights['lora_b'])


def typed(kind):
  model, params = use(lambda k, x: x @ k)
  params = surgery.attach(
    surgery.detach(params),
    kind(),
    to='**/layer',
    host=models.host(kind),
  )
  return model, models.stirred(params)


def test_what_apply_makes_dense_is_named():
  (message,) = warned(*typed(Lossy))
  assert "`apply` made a low-rank value dense by 'tanh'" in message


def test_explain_names_what_apply_makes_dense():
  model, params = typed(Lossy)
  (found,) = surgery.explain(model, params, X).values()
  assert {'tanh inside apply': 1} == found.dense
  assert 'dense (tanh inside apply)' == str(found)


def test_a_type_that_gives_no_low_rank_value_is_not_warned_of():
  model, params = typed(Plain)
  assert [] == warned(model, params, strict=True)
  (found,) = surgery.explain(model, params, X).values()
  assert 'dense (not low-rank)' == str(found)


def test_a_low_rank_value_out_of_a_call_stays_factored():
  assert [] == warned(*typed(Jitted))


# Failures of the walk itself.


def misled(name, **changed):
  """Returns `check` of a JAX that gives a primitive other parameters."""
  usual = jaxcompat.check
  return lambda n, params: usual(
    n, {**params, **changed} if n == name else params
  )


@pytest.fixture(
  params=['a primitive with an unknown parameter', 'an exception in a rule']
)
def broken(request, monkeypatch):
  """A walk that fails, and what is said of it."""
  if 'exception' in request.param:

    def rule(*operands, **params):
      raise KeyError('lost')

    monkeypatch.setitem(rules.RULES, 'dot_general', rule)
    return "'dot_general' raised KeyError: 'lost'"
  monkeypatch.setattr(jaxcompat, 'check', misled('dot_general', twist=3))
  return f"JAX {jax.__version__} gives the primitive 'dot_general'"


def test_a_failure_is_told_from_a_use_without_a_rule(product, broken):
  (message,) = warned(*product)
  assert 'surgery itself failed: ' + broken in message
  assert 'Nothing is wrong with the model' in message


def test_a_failure_gives_the_dense_result(product, broken):
  model, params = product
  expected = grad(model, params)
  with pytest.warns(surgery.DenseFallbackWarning):
    found = grad(surgery.factored(model), params)
  jax.tree.map(lambda a, b: models.close(a, b), expected, found)


def test_a_failure_is_an_error_if_strict(product, broken):
  with pytest.raises(surgery.AdapterError, match=re.escape(broken)):
    grad(surgery.factored(product[0], strict=True), product[1])


def test_explain_shows_a_failure(product, broken):
  (found,) = surgery.explain(*product, X).values()
  assert f'dense (failure of surgery: {broken}' in str(found)


def test_a_failure_breaks_the_law_of_the_kit(broken):
  with pytest.raises(
    cases.Broken, match=r'low_rank_values_stay_factored.*failure of surgery'
  ):
    check(
      surgery.LoRA(rank=2),
      laws=['low_rank_values_stay_factored'],
      kinds=['linear'],
    )


def test_a_walk_that_finds_no_view_breaks_the_law_of_the_kit(monkeypatch):
  """As where JAX makes of a low-rank value something that is not known."""
  monkeypatch.setattr(
    Walk, 'low_rank', lambda walk, eqn, inputs: walk.bound(eqn, inputs)[0]
  )
  with pytest.raises(cases.Broken, match='as large as a kernel'):
    check(
      surgery.LoRA(rank=2),
      laws=['low_rank_values_stay_factored'],
      kinds=['linear'],
    )


@pytest.mark.parametrize('kind', ['scan', 'jit', 'checkpoint'])
def test_a_failure_in_a_call_leaves_it_as_it_is(monkeypatch, kind):
  run = {
    'scan': lambda k, x: jax.lax.scan(lambda c, v: (c, v @ k), 0, x)[1],
    'jit': lambda k, x: jax.jit(jnp.matmul)(x, k),
    'checkpoint': lambda k, x: jax.checkpoint(jnp.matmul)(x, k),
  }[kind]
  model, params = use(run)
  expected = grad(model, params)
  usual = jaxcompat.check

  def check_(name, given):
    if name in ('scan', 'jit', 'remat2', 'checkpoint', 'remat', 'pjit'):
      raise jaxcompat.Unfamiliar(f'{name} is not known')
    usual(name, given)

  monkeypatch.setattr(jaxcompat, 'check', check_)
  with pytest.warns(surgery.DenseFallbackWarning, match='is not known'):
    found = grad(surgery.factored(model), params)
  jax.tree.map(lambda a, b: models.close(a, b), expected, found)


def test_a_failure_of_the_walk_as_a_whole_is_warned_of(product, monkeypatch):
  def closed(*_):
    raise KeyError('lost')

  model, params = product
  with monkeypatch.context() as patched:
    patched.setattr(walking.Walk, 'tagged', closed)
    with pytest.warns(surgery.DenseFallbackWarning, match="KeyError: 'lost'"):
      jax.jit(lambda p: surgery.factored(model)(p, X)[0])(params)


def test_every_kind_of_loss_has_a_message():
  losses = {Kind.USE, Kind.APPLY, Kind.CALL, Kind.FAILURE}
  assert losses == {k for k in Kind if Note('', k).is_loss}
  assert losses == surgery.factoring.fallback._REASONS.keys()
