"""Relatives of LoRA in the folders of PEFT, all of them of its type `LORA`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

import surgery

Config = Mapping[str, Any]
Layers = Mapping[str, tuple[Any, Mapping[str, tuple[int, ...]]]]


class _Relative(surgery.PeftLoRA):
  """LoRA for modules alone: PEFT refuses its relatives for parameters."""

  experts = False
  off: ClassVar[Mapping[str, str]] = {
    **surgery.PeftLoRA.off,
    'target_parameters': 'PEFT has parameters of experts for plain LoRA alone',
  }


class PeftDoRA(_Relative):
  """LoRA with `lora_magnitude_vector` `(out,)`, or `(1, out, 1…)`."""

  names = (*surgery.PeftLoRA.names, 'lora_magnitude_vector')

  def reads(self, config: Config) -> bool:
    """LoRA with `use_dora`."""
    return bool(config.get('use_dora')) and not config.get('lora_bias')

  def weights(
    self, layer: surgery.PeftLayer, tensors: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the factors, and `magnitude`."""
    magnitude = tensors['lora_magnitude_vector'].reshape(-1)
    factors = super().weights(layer, tensors)
    return {**factors, 'magnitude': layer.outputs(magnitude)}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the factors, and the magnitude as PEFT has it."""
    magnitude = layer.torch_outputs(weights['magnitude'])
    if layer.kernel:
      magnitude = magnitude.reshape(1, -1, *(1,) * len(layer.kernel))
    factors = super().tensors(layer, weights)
    return {**factors, 'lora_magnitude_vector': magnitude}

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns LoRA's configuration with `use_dora`."""
    return {**super().config(adapter, layers), 'use_dora': True}


class PeftBiasLoRA(_Relative):
  """LoRA with `lora_B.bias` `(out,)`."""

  names = (*surgery.PeftLoRA.names, 'lora_B.bias')

  def reads(self, config: Config) -> bool:
    """LoRA with `lora_bias`."""
    return bool(config.get('lora_bias')) and not config.get('use_dora')

  def weights(
    self, layer: surgery.PeftLayer, tensors: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the factors, and `lora_bias`."""
    bias = layer.outputs(tensors['lora_B.bias'])
    return {**super().weights(layer, tensors), 'lora_bias': bias}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the factors, and the bias of the second one."""
    bias = layer.torch_outputs(weights['lora_bias'])
    return {**super().tensors(layer, weights), 'lora_B.bias': bias}

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns LoRA's configuration with `lora_bias`."""
    return {**super().config(adapter, layers), 'lora_bias': True}


class _Decomposed(_Relative):
  """LoRA that took a part of the base out of it, as PEFT does when it loads.

  PEFT computes that part again of the base that it is given, and its scale is
  in `B` here, as these types of ours have none. What is not from a folder is
  written as PEFT writes differences: as LoRA of twice the rank, whose second
  half takes away what the first began with.
  """

  begins: str

  def reads(self, config: Config) -> bool:
    """LoRA with this beginning."""
    others = config.get('use_dora') or config.get('lora_bias')
    return config.get('init_lora_weights') == self.begins and not others

  def check(self, config: Config) -> None:
    """Does nothing: the beginning is known."""

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns the rank, by the patterns for this module."""
    return {'rank': super().options(module)['rank']}

  def _scale(self, layer: surgery.PeftLayer) -> float:
    rank = layer.value('r', 'rank_pattern')
    alpha = layer.value('lora_alpha', 'alpha_pattern')
    rslora = layer.config['use_rslora']
    return float(alpha / (math.sqrt(rank) if rslora else rank))

  def weights(
    self, layer: surgery.PeftLayer, tensors: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns `lora_a`, and `lora_b` with the scale in it."""
    found = super().weights(layer, tensors)
    scaled = found['lora_b'].astype('float32') * self._scale(layer)
    return {**found, 'lora_b': scaled}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the factors without the scale, or those of the difference."""
    if layer.config:
      plain = weights['lora_b'] / np.float32(self._scale(layer))
      return super().tensors(layer, {**weights, 'lora_b': plain})
    a = np.concatenate([weights['lora_a'], weights['lora_a0']], -1)
    b = np.concatenate([weights['lora_b'], -weights['lora_b0']], 0)
    return super().tensors(layer, {'lora_a': a, 'lora_b': b})

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns twice the ranks, and alphas that make the scale one."""
    doubled = {}
    for name, (_, shapes) in layers.items():
      *front, rank = shapes['lora_a']
      one = surgery.LoRA(rank=2 * rank, alpha=2 * rank)
      doubled[name] = one, {'lora_a': (*front, 2 * rank)}
    whole = surgery.LoRA(rank=2 * adapter.rank, alpha=2 * adapter.rank)
    return super().config(whole, doubled)


class PeftPiSSA(_Decomposed):
  """The part is made of the largest singular values, and unique."""

  begins = 'pissa'
  drawn = ('lora_a0', 'lora_b0')


class PeftOLoRA(_Decomposed):
  """The part is made of a QR decomposition of `(out, in)`, in torch's order."""

  begins = 'olora'

  def weights(
    self, layer: surgery.PeftLayer, tensors: Mapping[str, Any]
  ) -> dict[str, Any]:
    """Returns the factors, and those that the base begins with."""
    found = super().weights(layer, tensors)
    assert layer.base is not None
    matrix = layer.base().reshape(layer.site.in_size, -1).T
    q, r = np.linalg.qr(matrix)
    rank = found['lora_a'].shape[-1]
    first = layer.inputs(r[:rank].T.reshape(*layer.features, rank))
    scaled = q[:, :rank].T * np.float32(self._scale(layer))
    return {**found, 'lora_a0': first, 'lora_b0': layer.outputs(scaled)}
