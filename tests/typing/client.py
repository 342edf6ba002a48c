"""A client of the library: what a type checker must accept, and what not.

A line that must be an error ends in `# error`; tests/typing/test_client.py runs
mypy and pyright on this file and compares. It is never run.
"""

from typing import Any, assert_type

import blox as bx
import jax
import jax.numpy as jnp
import optax

import surgery

# What must pass.


class IA3(surgery.Adapter):
  """As in the README, with annotations."""

  name = 'ia3'
  power: float = surgery.field(default=1.0, ge=0.0)

  def init(self, site: surgery.Site, key: jax.Array) -> dict[str, jax.Array]:
    return {'scale': jnp.ones(site.out_shape)}

  def apply(
    self, site: surgery.Site, name: str, base: jax.Array, weights: Any
  ) -> jax.Array:
    scaled: jax.Array = base * weights['scale']
    return scaled


class Net(bx.Module):
  """A model with two ways to be called."""

  def __call__(
    self, params: bx.Params, x: jax.Array
  ) -> tuple[jax.Array, bx.Params]:
    return x, params

  def attend(self, params: bx.Params, x: jax.Array) -> jax.Array:
    return x


def model(params: bx.Params, x: jax.Array) -> tuple[jax.Array, bx.Params]:
  return x, params


def passes(params: bx.Params, x: jax.Array) -> None:
  adapted = surgery.attach(params, surgery.LoRA(rank=4), to='**/hidden*')
  other = surgery.attach(params, IA3(power=2.0), to=['a', '!b'], seed=1)
  again: surgery.AdaptedParams = surgery.freeze(adapted)
  plain: bx.Params = surgery.merge(adapted)
  base: bx.Params = surgery.detach(adapted, 'default')
  surgery.save('adapted.msgpack', adapted)
  params = surgery.load('adapted.msgpack')
  fast = surgery.factored(model)
  assert_type(fast(params, x)[0], jax.Array)
  net = Net(bx.Graph('net'))
  assert_type(surgery.factored(net)(params, x)[0], jax.Array)
  assert_type(surgery.factored(net.attend)(params, x), jax.Array)
  surgery.check(net, again, x)
  print(surgery.explain(model, adapted, x).to_json(), other, plain, base)


def trains(adapted: surgery.AdaptedParams, x: jax.Array) -> None:
  half, rest = adapted.split()
  assert_type(half, surgery.AdaptedParams)
  assert_type(half.merge(rest), surgery.AdaptedParams)
  assert_type(surgery.freeze(adapted), surgery.AdaptedParams)
  assert_type(surgery.disable(adapted), surgery.AdaptedParams)
  assert_type(surgery.attach(adapted, IA3(), to='a'), surgery.AdaptedParams)
  tx = surgery.optimizer(optax.chain(optax.adam(1e-3)), adapted)
  surgery.optimizer(optax.MultiSteps(optax.sgd(1.0), 2), (adapted, x))
  state = tx.init(half)
  surgery.migrate(state, adapted, surgery.merge(adapted), tx=tx)
  stacked = surgery.stack_adapters([adapted, adapted])
  stacked = surgery.stack_adapters((adapted, surgery.load('b.msgpack')))
  surgery.route(stacked, [0, 1])
  routed = surgery.route(stacked, jnp.array([0, 1]))
  y, _ = surgery.factored(model)(routed, x)
  y, params = model(adapted, y)
  # Params of blox, and what verbs make of them, are given for each other.
  taken: bx.Params = surgery.detach(adapted)
  model(surgery.merge(adapted), x)
  model(surgery.load('a.msgpack'), x)
  surgery.save('b.msgpack', surgery.trainable_mask(adapted))
  again: bx.Params = adapted.unlocked()
  print(taken, params, again, adapted['net', 'kernel'].value, len(adapted))


def files() -> None:
  checkpoint = surgery.open('m.msgpack')
  assert_type(checkpoint, surgery.Checkpoint)
  adapted = surgery.attach(checkpoint, surgery.LoRA(rank=4), to='all')
  assert_type(adapted, surgery.Checkpoint)
  assert_type(surgery.merge(adapted), surgery.Checkpoint)
  assert_type(surgery.detach(adapted), surgery.Checkpoint)
  assert_type(surgery.cast(adapted, 'bf16'), surgery.Checkpoint)
  assert_type(surgery.drop(adapted, '**/norm'), surgery.Checkpoint)
  adapted.write('out.msgpack', overwrite=True)


# What must not.


def refuses(params: bx.Params, adapted: surgery.AdaptedParams) -> None:
  surgery.atach(params, surgery.LoRA(rank=4), to='all')  # error
  surgery.attach('m.msgpack', surgery.LoRA(rank=4), to='all')  # error
  surgery.attach(adapted, surgery.LoRA(rank=4))  # error
  surgery.attach(adapted, surgery.LoRA, to='all')  # error
  surgery.LoRA(rnk=4)  # error
  surgery.merge('m.msgpack')  # error
  surgery.freeze(3)  # error
  surgery.cast('m.msgpack', 'bf16')  # error
  surgery.rename({}, 'a -> b')  # error
  surgery.save(adapted, 'm.msgpack')  # error
  surgery.load_adapter(adapted, 'a.msgpack')  # error
  surgery.check(adapted, model)  # error
  surgery.factored(model).apply  # error
  surgery.factored(Net(bx.Graph('net'))).attend  # error
  surgery.factored(model)(1, 2, 3, 4)  # error
  surgery.open('m.msgpack').write(3)  # error
  surgery.optimizer(adapted, adapted)  # error
  surgery.optimizer(adapted, optax.sgd(1.0))  # error
  surgery.factored(adapted)  # error
  surgery.stack_adapters(adapted)  # error
  surgery.migrate(adapted, adapted, jnp.ones(3))  # error
  surgery.migrate(1, adapted, adapted, tx=adapted)  # error
  surgery.route(jnp.ones(3), adapted)  # error
  surgery.route(adapted, adapted)  # error
  surgery.merge(adapted).records  # error
  number: int = adapted  # error
  back: surgery.AdaptedParams = surgery.merge(adapted)  # error
  print(number, back)
