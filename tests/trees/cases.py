"""One small model in each framework, with the same shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import freeze

X = np.random.default_rng(0).normal(size=(3, 8)).astype('float32')


@dataclasses.dataclass(frozen=True)
class Case:
  """A model of one framework.

  Attributes:
    name: the framework.
    make: makes the model, or its params.
    call: what a user's own function would be.
    kernels: a selector of its two kernels.
    bias: a selector of its two biases.
    kernel: the first kernel, of a model.
    is_module: whether the structure is one of code.
  """

  name: str
  make: Callable[[], Any]
  call: Callable[[Any, Any], Any]
  kernels: str
  bias: str
  kernel: Callable[[Any], Any]
  is_module: bool = False


# Plain dicts.


def _plain() -> Any:
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, 'float32')
  return {
    'layers': [
      {'kernel': draw(8, 16), 'bias': draw(16)},
      {'kernel': draw(16, 4), 'bias': draw(4)},
    ],
    'steps': 3,
  }


def _call_plain(params: Any, x: Any) -> Any:
  first, second = params['layers']
  hidden = jax.nn.relu(x @ first['kernel'] + first['bias'])
  return hidden @ second['kernel'] + second['bias']


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """A layer of a user's own."""

  kernel: Any
  bias: Any


def _dataclass() -> Any:
  first, second = _plain()['layers']
  return {'net': (Layer(**first), Layer(**second))}


def _call_dataclass(params: Any, x: Any) -> Any:
  first, second = params['net']
  hidden = jax.nn.relu(x @ first.kernel + first.bias)
  return hidden @ second.kernel + second.bias


# haiku.


HAIKU = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))


# linen.


class Linen(nn.Module):
  """Two dense layers."""

  boxes: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    init = nn.initializers.lecun_normal()
    if self.boxes:
      init = nn.with_partitioning(init, (None, 'model'))
    x = nn.relu(nn.Dense(16, kernel_init=init, name='first')(x))
    return nn.Dense(4, kernel_init=init, name='second')(x)


class Normed(nn.Module):
  """With statistics."""

  @nn.compact
  def __call__(self, x: Any) -> Any:
    x = nn.Dense(16, name='first')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True, name='norm')(x))
    return nn.Dense(4, name='second')(x)


def _linen(module: nn.Module) -> Any:
  return module.init(jax.random.key(0), X)


def _call_linen(params: Any, x: Any) -> Any:
  return Linen().apply({'params': params}, x)


# nnx.


class Nnx(nnx.Module):
  """Two linear layers, and a norm that keeps statistics."""

  def __init__(self, rngs: nnx.Rngs) -> None:
    self.first = nnx.Linear(8, 16, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(16, 4, rngs=rngs)])
    self.norm = nnx.BatchNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x: Any, train: bool = False) -> Any:
    x = self.norm(self.first(x), use_running_average=not train)
    x = self.dropout(nnx.relu(x), deterministic=not train)
    return self.layers[0](x)


# equinox.


CASES = {
  case.name: case
  for case in (
    Case(
      'plain',
      _plain,
      _call_plain,
      '**/kernel',
      '**/bias',
      lambda p: p['layers'][0]['kernel'],
    ),
    Case(
      'dataclass',
      _dataclass,
      _call_dataclass,
      '**/kernel',
      '**/bias',
      lambda p: p['net'][0].kernel,
    ),
    Case(
      'haiku',
      lambda: HAIKU.init(jax.random.key(0), X),
      HAIKU.apply,
      '**/w',
      '**/b',
      lambda p: p['mlp/~/linear_0']['w'],
    ),
    Case(
      'linen',
      lambda: _linen(Linen())['params'],
      _call_linen,
      '**/kernel',
      '**/bias',
      lambda p: p['first']['kernel'],
    ),
    Case(
      'frozen',
      lambda: freeze(_linen(Linen())['params']),
      _call_linen,
      '**/kernel',
      '**/bias',
      lambda p: p['first']['kernel'],
    ),
    Case(
      'boxed',
      lambda: _linen(Linen(boxes=True))['params'],
      _call_linen,
      '**/kernel',
      '**/bias',
      lambda p: p['first']['kernel'].value,
    ),
    Case(
      'variables',
      lambda: _linen(Normed()),
      Normed().apply,
      '**/kernel',
      'params/{first,second}/bias',
      lambda p: p['params']['first']['kernel'],
    ),
    Case(
      'nnx',
      lambda: Nnx(nnx.Rngs(0)),
      lambda model, x: model(x),
      '**/kernel',
      '{first,layers/0}/bias',
      lambda model: model.first.kernel[...],
      True,
    ),
    Case(
      'equinox',
      lambda: eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0)),
      lambda model, x: jax.vmap(model)(x),
      '**/weight',
      '**/bias',
      lambda model: model.layers[0].weight,
      True,
    ),
  )
}
