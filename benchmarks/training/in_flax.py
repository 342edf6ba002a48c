"""The same models in flax nnx, with its own LoRA layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .by_hand import RANK, SCALE


def _linear(ins: int, outs: int) -> Any:
  return nnx.LoRALinear(ins, outs, lora_rank=RANK, rngs=nnx.Rngs(0))


class MLP(nnx.Module):
  """Layers of one width, with the names of `models.MLP`."""

  def __init__(self, width: int, depth: int) -> None:
    self.depth = depth
    for k in range(depth):
      setattr(self, f'linear{k}', _linear(width, width))

  def __call__(self, x: Any) -> Any:
    """Returns outputs, of the shape of `x`."""
    for k in range(self.depth):
      x = getattr(self, f'linear{k}')(jax.nn.relu(x))
    return x


class Block(nnx.Module):
  """Attention and MLP, with the names of `models.Block`."""

  def __init__(self, width: int, heads: int) -> None:
    self.heads = heads
    norm = lambda: nnx.LayerNorm(width, epsilon=1e-5, rngs=nnx.Rngs(0))
    self.norm1, self.norm2 = norm(), norm()
    self.query = _linear(width, width)
    self.key = _linear(width, width)
    self.value = _linear(width, width)
    self.out = _linear(width, width)
    self.up = _linear(width, 4 * width)
    self.down = _linear(4 * width, width)

  def __call__(self, x: Any) -> Any:
    """Returns outputs, of the shape of `x`."""
    y = self.norm1(x)
    heads = (*x.shape[:-1], self.heads, -1)
    q, k, v = (f(y).reshape(heads) for f in (self.query, self.key, self.value))
    scores = jnp.einsum('bshd,bthd->bhst', q, k) / q.shape[-1] ** 0.5
    y = jnp.einsum('bhst,bthd->bshd', jax.nn.softmax(scores), v)
    x = x + self.out(y.reshape(x.shape))
    return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
  """Blocks, with the names of `models.Transformer`."""

  def __init__(self, width: int, depth: int, heads: int = 8) -> None:
    self.depth = depth
    for k in range(depth):
      setattr(self, f'block{k}', Block(width, heads))

  def __call__(self, x: Any) -> Any:
    """Returns outputs, of the shape of `x`."""
    for k in range(self.depth):
      x = getattr(self, f'block{k}')(x)
    return x


def column(model: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
  """Returns a loss, what trains, the rest, and names of what trains.

  Args:
    model: one of the above.
    values: weights by path, as blox names them; layers without any of LoRA
      become plain ones. flax has no scale: it goes into `lora_b`.
  """
  for path, module in list(nnx.iter_modules(model)):
    for name, layer in list(vars(module).items()):
      if (
        isinstance(layer, nnx.LoRALinear)
        and (*path, name, 'lora_a') not in values
      ):
        sizes = layer.in_features, layer.out_features
        setattr(module, name, nnx.Linear(*sizes, rngs=nnx.Rngs(0)))
  state = nnx.to_flat_state(nnx.state(model, nnx.Param))
  new = []
  for path, variable in state:
    name = tuple(p for p in path if p != 'lora')
    value = values[name] * (SCALE if name[-1] == 'lora_b' else 1)
    assert value.shape == variable[...].shape, path
    # Copied: all columns run in one process, and share nothing.
    new.append((path, variable.replace(jnp.array(value))))
  nnx.update(model, nnx.from_flat_state(new))
  definition, trains, rest = nnx.split(model, nnx.LoRAParam, ...)

  def loss(trains: Any, rest: Any, x: Any) -> Any:
    return (nnx.merge(definition, trains, rest)(x) ** 2).mean()

  def named(gradients: Any) -> dict[tuple[str, ...], Any]:
    result = {}
    for path, variable in nnx.to_flat_state(gradients):
      name = tuple(p for p in path if p != 'lora')
      # d loss / dB is the scale times d loss / d(scale·B).
      scale = SCALE if name[-1] == 'lora_b' else 1
      result[name] = variable[...] * scale
    return result

  return loss, trains, rest, named
