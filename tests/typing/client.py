"""A client of the library: what a type checker must accept, and what not.

A line that must be an error ends in `# error`; tests/typing/test_client.py runs
mypy and pyright on this file and compares. It is never run.
"""

from typing import Any, assert_type

import blox as bx
import jax
import jax.numpy as jnp

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
