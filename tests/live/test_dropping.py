"""A call in which dropout does nothing is told where that can be seen."""

import jax
import pytest

import surgery
from surgery import jaxcompat
from tests.live.models import is_weight, mlp, stirred

MESSAGE = (
  "adapter 'default' has dropout, which has no effect in this call.*factored"
)


@pytest.fixture
def setting():
  model, params, x = mlp()
  lora = surgery.LoRA(rank=2, patterns={'**/hidden0': {'dropout': 0.5}})
  params = stirred(surgery.attach(params, lora, to='**/hidden*'))
  return model, params, x


def halves(params):
  return surgery.freeze(params).split()


def loss_of(model, x, **options):
  def loss(half, rest):
    y, after = model(half.merge(rest), x, **options)
    return (y**2).mean(), after.split()[1]

  return loss


@pytest.mark.parametrize(
  'wrap',
  [
    lambda f: jax.grad(f, has_aux=True),
    lambda f: jax.jit(jax.grad(f, has_aux=True)),
    lambda f: jax.jit(jax.value_and_grad(f, has_aux=True)),
    lambda f: jax.jacfwd(f, has_aux=True),
  ],
)
def test_training_without_factored_is_told(setting, wrap):
  model, params, x = setting
  with pytest.warns(surgery.DropoutWarning, match=MESSAGE):
    wrap(loss_of(model, x))(*halves(params))


def test_gradients_of_each_example_are_told(setting):
  model, params, x = setting
  half, rest = halves(params)
  one = lambda x: jax.grad(loss_of(model, x[None]), has_aux=True)(half, rest)
  with pytest.warns(surgery.DropoutWarning, match=MESSAGE):
    jax.vmap(one)(x)


@pytest.mark.parametrize('options', [{}, {'is_training': False}])
def test_factored_is_not_warned_of(setting, options):
  model, params, x = setting
  loss = loss_of(surgery.factored(model), x, **options)
  jax.jit(jax.grad(loss, has_aux=True))(*halves(params))


def test_without_dropout_or_training_nothing_is_told(setting):
  model, params, x = setting
  model(params, x)
  jax.jit(model)(params, x)
  # Of inputs, as in looking at what a model attends to.
  jax.grad(lambda x: model(params, x)[0].sum())(x)
  half, rest = params.split(lambda p, v: is_weight(p, v) and 'hidden1' in p)
  jax.grad(loss_of(model, x), has_aux=True)(half, rest)
  off = surgery.disable(params)
  jax.grad(lambda h, r: loss_of(model, x)(h, r)[0], argnums=0)(
    *off.split(lambda path, v: path[-1] in ('kernel', 'lora_a'))
  )


def test_check_says_that_a_call_drops_nothing(setting):
  model, params, x = setting
  with pytest.warns(surgery.DropoutWarning, match=MESSAGE):
    assert 2 == len(surgery.check(model, params, x))
  assert 2 == len(surgery.check(surgery.factored(model), params, x))

  def own(params, x, is_training=False):
    return model(params, x)

  surgery.check(own, params, x)
  with pytest.warns(surgery.DropoutWarning, match=MESSAGE):
    surgery.check(own, params, x, is_training=True)


def test_explain_says_where_factored_alone_drops(setting):
  model, params, x = setting
  found = surgery.explain(model, params, x)
  drops = {path[-2]: use.drops for path, use in found.items()}
  assert {'hidden0': True, 'hidden1': False} == drops
  lines = str(found).splitlines()
  assert lines[0].endswith('factored, dropout by surgery.factored alone')
  assert lines[1].endswith('factored')
  assert found.to_json()['net/mlp/hidden0/kernel']['drops'] is True


def test_what_is_differentiated_is_seen():
  seen = []

  def look(x):
    seen.append(jaxcompat.is_differentiated(x))
    return x * x

  jax.grad(look)(1.0)
  jax.jvp(look, (1.0,), (1.0,))
  jax.linearize(look, 1.0)
  jax.jit(look)(1.0)
  look(1.0)
  moved = 'surgery/jaxcompat.py: is_differentiated'
  assert [True, True, True, False, False] == seen, moved
