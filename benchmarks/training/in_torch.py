"""The same models in torch, adapted by PEFT, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import torch
from torch.nn import functional

from .by_hand import RANK, SCALE


class MLP(torch.nn.Module):
  """Layers of one width, with the names of `models.MLP`."""

  def __init__(self, width: int, depth: int) -> None:
    super().__init__()
    self.depth = depth
    for k in range(depth):
      setattr(self, f'linear{k}', torch.nn.Linear(width, width))

  def forward(self, x: Any) -> Any:
    """Returns outputs, of the shape of `x`."""
    for k in range(self.depth):
      x = getattr(self, f'linear{k}')(functional.relu(x))
    return x


class Block(torch.nn.Module):
  """Attention and MLP, with the names of `models.Block`."""

  def __init__(self, width: int, heads: int) -> None:
    super().__init__()
    self.heads = heads
    self.norm1 = torch.nn.LayerNorm(width)
    self.norm2 = torch.nn.LayerNorm(width)
    self.query = torch.nn.Linear(width, width)
    self.key = torch.nn.Linear(width, width)
    self.value = torch.nn.Linear(width, width)
    self.out = torch.nn.Linear(width, width)
    self.up = torch.nn.Linear(width, 4 * width)
    self.down = torch.nn.Linear(4 * width, width)

  def forward(self, x: Any) -> Any:
    """Returns outputs, of the shape of `x`."""
    y = self.norm1(x)
    heads = (*x.shape[:-1], self.heads, -1)
    q, k, v = (
      f(y).reshape(heads).transpose(1, 2)
      for f in (self.query, self.key, self.value)
    )
    y = functional.scaled_dot_product_attention(q, k, v)
    x = x + self.out(y.transpose(1, 2).reshape(x.shape))
    y = functional.gelu(self.up(self.norm2(x)), approximate='tanh')
    return x + self.down(y)


class Transformer(torch.nn.Module):
  """Blocks, with the names of `models.Transformer`."""

  def __init__(self, width: int, depth: int, heads: int = 8) -> None:
    super().__init__()
    self.depth = depth
    for k in range(depth):
      setattr(self, f'block{k}', Block(width, heads))

  def forward(self, x: Any) -> Any:
    """Returns outputs, of the shape of `x`."""
    for k in range(self.depth):
      x = getattr(self, f'block{k}')(x)
    return x


# What blox calls it, and whether torch has it transposed.
_NAMES = {
  'weight': ('kernel', True),
  'lora_A.weight': ('lora_a', True),
  'lora_B.weight': ('lora_b', True),
}


def _blox_name(name: str) -> tuple[tuple[str, ...], bool]:
  """Returns the blox path of a parameter of PEFT, and if it is transposed."""
  name = name.removeprefix('base_model.model.')
  name = name.replace('.base_layer', '').replace('.default', '')
  *layer, last = name.split('.')
  if layer[-1].startswith('lora_'):
    last = f'{layer.pop()}.{last}'
  if layer[-1].startswith('norm'):
    return (*layer, {'weight': 'scale'}.get(last, last)), False
  last, transposed = _NAMES.get(last, (last, False))
  return (*layer, last), transposed


def column(
  model: Any, values: Mapping[tuple[str, ...], Any], x: Any, rate: float
) -> tuple[Any, float, dict[tuple[str, ...], Any]]:
  """Returns a step, the loss before it, and gradients by blox path.

  Args:
    model: one of the above.
    values: weights by path, as blox names them.
    x: inputs.
    rate: learning rate.
  """
  adapted = {path[-2] for path in values if path[-1] == 'lora_a'}
  model = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=RANK,
      lora_alpha=int(SCALE * RANK),
      lora_dropout=0.0,
      target_modules=sorted(adapted),
    ),
  )
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      path, transposed = _blox_name(name)
      value = np.array(values[path])
      parameter.copy_(torch.from_numpy(value.T if transposed else value))
  inputs = torch.from_numpy(np.array(x))
  trains = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
  optimizer = torch.optim.SGD([p for _, p in trains], rate)

  def loss_and_gradients() -> Any:
    optimizer.zero_grad()
    loss = (model(inputs) ** 2).mean()
    loss.backward()
    return loss

  def step() -> None:
    loss_and_gradients()
    optimizer.step()

  loss = float(loss_and_gradients().detach())
  gradients = {}
  for name, parameter in trains:
    path, transposed = _blox_name(name)
    gradient = parameter.grad.numpy().copy()
    gradients[path] = gradient.T if transposed else gradient
  return step, loss, gradients
