"""Layers with LoRA written into them, for the same params.

They ask for `lora_a` and `lora_b` beside the kernel, where `surgery.attach`
puts them, and add `s·(x·A)·B` before the bias.
"""

from __future__ import annotations

from typing import Any

import blox as bx
import jax

from .models import Layers

RANK = 8
SCALE = 2.0  # alpha is twice the rank.


def _adapted(layer: Any, params: Any) -> bool:
  return (*layer.graph.path, 'lora_a') in params


def _factors(layer: Any, params: Any, ins: Any, out: int) -> Any:
  a, params = layer.get_param(
    params, 'lora_a', (*ins, RANK), layer.kernel_init, rng=layer.rng
  )
  b, params = layer.get_param(
    params, 'lora_b', (RANK, out), layer.kernel_init, rng=layer.rng
  )
  return a, b, params


class Linear(bx.Linear):
  """`x·W + s·(x·A)·B + bias`, as one writes it."""

  def __call__(self, params: Any, inputs: Any, precision: Any = None) -> Any:
    """Returns outputs, `(…, out)`, and params."""
    if not _adapted(self, params):
      return super().__call__(params, inputs, precision)
    kernel, params = self.get_param(
      params,
      'kernel',
      (inputs.shape[-1], self.output_size),
      self.kernel_init,
      rng=self.rng,
    )
    a, b, params = _factors(self, params, inputs.shape[-1:], self.output_size)
    outputs = inputs @ kernel + SCALE * (inputs @ a) @ b
    bias, params = self.get_param(
      params, 'bias', (self.output_size,), self.bias_init, rng=self.rng
    )
    return outputs + bias, params


class FlatLinear(Linear):
  """The same with all but the last axis of `x` made one."""

  def __call__(self, params: Any, inputs: Any, precision: Any = None) -> Any:
    """Returns outputs, `(…, out)`, and params."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    outputs, params = super().__call__(params, flat, precision)
    return outputs.reshape(*inputs.shape[:-1], -1), params


class Conv(bx.Conv):
  """`x*W + s·(x*A)·B + bias`, with `A` a convolution of the same window."""

  def __call__(self, params: Any, inputs: Any, precision: Any = None) -> Any:
    """Returns outputs, `(batch, height, width, channels)`, and params."""
    if not _adapted(self, params):
      return super().__call__(params, inputs, precision)
    ins = (*self.kernel_size, inputs.shape[-1])
    kernel, params = self.get_param(
      params,
      'kernel',
      (*ins, self.output_channels),
      self.kernel_init,
      rng=self.rng,
    )
    a, b, params = _factors(self, params, ins, self.output_channels)
    convolve = lambda w: jax.lax.conv_general_dilated(
      inputs,
      w,
      (self.strides, self.strides),
      self.padding,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    outputs = convolve(kernel) + SCALE * convolve(a) @ b
    bias, params = self.get_param(
      params, 'bias', (self.output_channels,), self.bias_init, rng=self.rng
    )
    return outputs + bias, params


class LSTM(bx.LSTM):
  """An LSTM whose gates are `Linear` above."""

  def __init__(self, graph: bx.Graph, hidden_size: int, rng: bx.Rng) -> None:
    bx.RecurrenceBase.__init__(self, graph)
    self.hidden_size = hidden_size
    self.gates = Linear(graph.child('gates'), 4 * hidden_size, rng)


LAYERS = Layers(Linear, Conv, LSTM)
FLAT = Layers(FlatLinear, Conv, LSTM)
