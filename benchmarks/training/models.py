"""Models written in blox as a user would, knowing of no adapter.

Each takes the layer classes that it is made of, so that the same model exists
with LoRA written into its layers (`by_hand.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layers:
  """Classes that models are made of."""

  linear: Any = bx.Linear
  conv: Any = bx.Conv
  lstm: Any = bx.LSTM


BLOX = Layers()


class MLP(bx.Module):
  """Layers of one width."""

  def __init__(
    self,
    graph: bx.Graph,
    rng: bx.Rng,
    width: int,
    depth: int,
    layers: Layers = BLOX,
  ) -> None:
    super().__init__(graph)
    self.layers = [
      layers.linear(graph.child(f'linear{k}'), width, rng) for k in range(depth)
    ]

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns outputs, of the shape of `x`, `(tokens, width)`, and params."""
    for layer in self.layers:
      x, params = layer(params, jax.nn.relu(x))
    return x, params


class Block(bx.Module):
  """Attention and an MLP of four times the width, each after a norm."""

  def __init__(
    self,
    graph: bx.Graph,
    rng: bx.Rng,
    width: int,
    heads: int,
    layers: Layers,
  ) -> None:
    super().__init__(graph)
    self.heads = heads
    self.norm1 = bx.LayerNorm(graph.child('norm1'))
    self.norm2 = bx.LayerNorm(graph.child('norm2'))
    linear = lambda name, size: layers.linear(graph.child(name), size, rng)
    self.query = linear('query', width)
    self.key = linear('key', width)
    self.value = linear('value', width)
    self.out = linear('out', width)
    self.up = linear('up', 4 * width)
    self.down = linear('down', width)

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns outputs, of the shape of `x`, and params."""
    y, params = self.norm1(params, x)
    heads = (*x.shape[:-1], self.heads, -1)
    q, params = self.query(params, y)
    k, params = self.key(params, y)
    v, params = self.value(params, y)
    q, k, v = q.reshape(heads), k.reshape(heads), v.reshape(heads)
    scores = jnp.einsum('bshd,bthd->bhst', q, k) / q.shape[-1] ** 0.5
    y = jnp.einsum('bhst,bthd->bshd', jax.nn.softmax(scores), v)
    y, params = self.out(params, y.reshape(x.shape))
    x = x + y
    y, params = self.norm2(params, x)
    y, params = self.up(params, y)
    y, params = self.down(params, jax.nn.gelu(y))
    return x + y, params


class Transformer(bx.Module):
  """Blocks without an embedding, on `(batch, sequence, width)`."""

  def __init__(
    self,
    graph: bx.Graph,
    rng: bx.Rng,
    width: int,
    depth: int,
    heads: int = 8,
    layers: Layers = BLOX,
  ) -> None:
    super().__init__(graph)
    self.blocks = [
      Block(graph.child(f'block{k}'), rng, width, heads, layers)
      for k in range(depth)
    ]

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns outputs, of the shape of `x`, and params."""
    for block in self.blocks:
      x, params = block(params, x)
    return x, params


class ConvNet(bx.Module):
  """Five 3×3 convolutions and a linear head, on images."""

  def __init__(
    self,
    graph: bx.Graph,
    rng: bx.Rng,
    layers: Layers = BLOX,
  ) -> None:
    super().__init__(graph)
    sizes = ((32, 1), (64, 1), (64, 2), (128, 1), (128, 2))
    self.convs = [
      layers.conv(graph.child(f'conv{k}'), (3, 3), channels, rng, strides)
      for k, (channels, strides) in enumerate(sizes)
    ]
    self.head = layers.linear(graph.child('head'), 10, rng)

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns logits, `(batch, 10)`, and params."""
    for conv in self.convs:
      x, params = conv(params, x)
      x = jax.nn.relu(x)
    return self.head(params, x.mean((1, 2)))


class Recurrent(bx.Module):
  """An LSTM over time and a linear readout, on `(batch, time, features)`."""

  def __init__(
    self,
    graph: bx.Graph,
    rng: bx.Rng,
    width: int,
    layers: Layers = BLOX,
  ) -> None:
    super().__init__(graph)
    self.lstm = layers.lstm(graph.child('lstm'), width, rng)
    self.readout = layers.linear(graph.child('readout'), width, rng)

  def __call__(self, params: bx.Params, x: Any) -> Any:
    """Returns outputs, `(batch, time, width)`, and params."""
    (x, _), params = self.lstm.apply(params, x)
    return self.readout(params, x)
