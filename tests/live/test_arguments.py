# mypy: ignore-errors
"""Arguments of the wrong kind, or in the wrong order, are named."""

import pickle

import blox as bx
import jax.numpy as jnp
import pytest

import surgery


@pytest.fixture
def params():
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((4, 3)))
  return surgery.attach(params.locked(), surgery.LoRA(rank=1), to='net')


def model(params, x):
  return x, params


FILE = 'm.msgpack'
X = jnp.ones(4)
LORA = surgery.LoRA(rank=1)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda p: surgery.load_adapter(p, FILE),
      'load_adapter: expected a path, found AdaptedParams. '
      'Write surgery.load_adapter(path, params).',
    ),
    (
      lambda p: surgery.save_adapter(p, FILE),
      'save_adapter: expected a path, found AdaptedParams. '
      'Write surgery.save_adapter(path, params).',
    ),
    (
      lambda p: surgery.save(p, FILE),
      'save: expected a path, found AdaptedParams. '
      'Write surgery.save(path, params).',
    ),
    (
      lambda p: surgery.stack_adapters(p),
      'stack_adapters: expected a list of params, each with the adapter, found '
      'AdaptedParams. Write surgery.stack_adapters([first, second]).',
    ),
    (
      lambda p: surgery.stack_adapters({'a': p}),
      'stack_adapters: expected a list of params, each with the adapter, found '
      'dict. Write surgery.stack_adapters([first, second]).',
    ),
    (
      lambda p: surgery.factored(model)(X, p),
      "factored: expected bx.Params as 'params', found ArrayImpl, and params in "
      'another place. Call the factored model as the model: fast(params, x).',
    ),
    (
      lambda p: surgery.factored(
        bx.Linear(bx.Graph('a').child('b'), 3, None).__call__
      )(X, p),
      "factored: expected bx.Params as 'params', found ArrayImpl, and params in "
      'another place. Call the factored model as the model: '
      'fast(params, inputs).',
    ),
    (
      lambda p: surgery.load(p),
      'load: expected a path, found AdaptedParams. Write surgery.load(path).',
    ),
    (
      lambda p: surgery.open(p),
      'open: expected a path, found AdaptedParams. Write surgery.open(path).',
    ),
    (
      lambda p: surgery.check(p, model, X),
      'check: expected a module or a function, found AdaptedParams. '
      'Write surgery.check(model, params, …).',
    ),
    (
      lambda p: surgery.check(model, X, p),
      'check: expected bx.Params, found ArrayImpl. '
      'Write surgery.check(model, params, …).',
    ),
    (
      lambda p: surgery.explain(p, model, X),
      'explain: expected a module or a function, found AdaptedParams. '
      'Write surgery.explain(model, params, …).',
    ),
    (
      lambda p: surgery.factored(p),
      'factored: expected a module or a function, found AdaptedParams. '
      'Write surgery.factored(model).',
    ),
    (
      lambda p: surgery.attach(LORA, p, to='net'),
      'attach: expected bx.Params, found LoRA. '
      'Write surgery.attach(params, adapter, to=…).',
    ),
    (
      lambda p: surgery.freeze('**', p),
      'freeze: expected bx.Params, found str. Write surgery.freeze(params).',
    ),
    (
      lambda p: surgery.merge('default', p),
      'merge: expected bx.Params, found str. Write surgery.merge(params).',
    ),
    (
      lambda p: surgery.rename('a -> b', p),
      'rename: expected bx.Params, found str. '
      'Write surgery.rename(params, rules).',
    ),
    (
      lambda p: surgery.cast('bf16', p),
      'cast: expected bx.Params, found str. Write surgery.cast(params, to).',
    ),
    (
      lambda p: surgery.migrate({}, {}, p),
      'migrate: expected bx.Params, found dict. '
      'Write surgery.migrate(opt_state, before, after).',
    ),
    (
      lambda p: surgery.merge(p, 3),
      'merge: expected the name of an adapter, or several, found 3.',
    ),
    (
      lambda p: surgery.detach(p, [b'default']),
      "detach: expected the name of an adapter, or several, found [b'default'].",
    ),
    (
      lambda p: surgery.route([0], p),
      'route: expected params with an adapter, found list.',
    ),
    (
      lambda p: surgery.select('**', p),
      'select: expected bx.Params, a bx.Graph or a Checkpoint, found str.',
    ),
    (
      lambda p: surgery.apply({'drop': 'a'}, p),
      'apply: expected bx.Params, found dict. '
      'Write surgery.apply(model, recipe).',
    ),
  ],
)
def test_the_message_says_what_was_expected(params, call, message):
  with pytest.raises(surgery.SurgeryError) as caught:
    call(params)
  assert str(caught.value) == message
  assert str(pickle.loads(pickle.dumps(caught.value))) == message
