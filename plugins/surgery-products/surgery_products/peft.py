"""LoHa and LoKr in the folders of PEFT.

PEFT's matrices are `(out, in)` and these types' `(in, out)`, so each product is
turned: `(P·Q)ᵀ = Qᵀ·Pᵀ`, and `(C ⊗ D)ᵀ = Cᵀ ⊗ Dᵀ`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import surgery

Arrays = Mapping[str, Any]
Layers = Mapping[str, tuple[Any, Mapping[str, tuple[int, ...]]]]


class _Products(surgery.PeftMapping):
  """What both have: ranks and alphas, for some modules by pattern."""

  ignored = (
    'init_weights',
    'module_dropout',
    'rank_dropout',
    'rank_dropout_scale',
  )
  defaults: ClassVar[Mapping[str, Any]] = {
    'r': 8,
    'alpha': 8,
    'rank_pattern': {},
    'alpha_pattern': {},
  }

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns rank and alpha, by the patterns for this module."""
    return {
      'rank': module.value('r', 'rank_pattern'),
      'alpha': module.value('alpha', 'alpha_pattern'),
    }

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns ranks and alphas; those of some modules as patterns."""
    alpha = lambda one: one.rank if one.alpha is None else one.alpha
    ranks = {name: one.rank for name, (one, _) in layers.items()}
    alphas = {name: alpha(one) for name, (one, _) in layers.items()}
    r, rank_pattern = self.by_pattern(ranks, adapter.rank)
    usual, alpha_pattern = self.by_pattern(alphas, alpha(adapter))
    return {
      'r': r,
      'alpha': usual,
      'rank_pattern': rank_pattern,
      'alpha_pattern': alpha_pattern,
    }


class PeftLoHa(_Products):
  """`hada_wᵢ_a` `(out, r)` and `hada_wᵢ_b` `(r, in)`, of convolutions flat."""

  peft_type = 'LOHA'
  names = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
  off: ClassVar[Mapping[str, str]] = {
    'use_effective_conv2d': 'its convolutions are products of four matrices'
  }

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns what the first product says, but for convolutions' inputs."""
    a = module.shapes.get('hada_w1_a', ())
    b = module.shapes.get('hada_w1_b', ())
    return (b[1] if len(b) > 1 else None), (a[0] if a else None)

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns the four matrices, turned."""
    found = {}
    for i in '12':
      rows = tensors[f'hada_w{i}_b'].T.reshape(*layer.features, -1)
      found[f'w{i}_a'] = layer.inputs(rows).reshape(layer.site.in_size, -1)
      found[f'w{i}_b'] = tensors[f'hada_w{i}_a'].T
    return found

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns the four matrices, turned back."""
    found = {}
    for i in '12':
      rows = weights[f'w{i}_a'].reshape(*layer.site.in_shape, -1)
      columns = layer.torch_inputs(rows).reshape(layer.site.in_size, -1).T
      found[f'hada_w{i}_a'] = weights[f'w{i}_b'].T
      found[f'hada_w{i}_b'] = columns
    return found


class PeftLoKr(_Products):
  """`lokr_w1` `(out₁, in₁)`, and `lokr_w2` `(out₂, in₂)` or its factors.

  PEFT cuts the channels of a convolution and leaves its kernel whole, which is
  another product than ours; only those of one tap are read.
  """

  peft_type = 'LOKR'
  names = ('lokr_w1', 'lokr_w2', 'lokr_w2_a', 'lokr_w2_b')
  defaults: ClassVar[Mapping[str, Any]] = {
    **_Products.defaults,
    'decompose_factor': -1,
  }
  off: ClassVar[Mapping[str, str]] = {
    'decompose_both': 'its small factor is a product, too',
    'use_effective_conv2d': 'its convolutions are products of three matrices',
  }

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns rank, alpha and factor."""
    factor = module.config['decompose_factor']
    return {**super().options(module), 'factor': factor}

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the products of both factors' sizes."""
    some = module.shapes
    one = some.get('lokr_w1', ())
    a, b = some.get('lokr_w2_a', ()), some.get('lokr_w2_b', ())
    two = some.get('lokr_w2') or (a[:1] + b[1:2])
    if len(one) != 2 or len(two) < 2:
      return None, None
    return one[1] * two[1], one[0] * two[0]

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns the factors, turned."""
    self._check(layer)
    found = {'w1': tensors['lokr_w1'].T}
    if 'lokr_w2' in tensors:
      two = tensors['lokr_w2']
      return {**found, 'w2': two.reshape(two.shape[:2]).T}
    return {
      **found,
      'w2_a': tensors['lokr_w2_b'].T,
      'w2_b': tensors['lokr_w2_a'].T,
    }

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns the factors, turned back."""
    self._check(layer)
    found = {'lokr_w1': weights['w1'].T}
    if 'w2' in weights:
      two = weights['w2'].T
      taps = (1,) * len(layer.kernel)
      return {**found, 'lokr_w2': two.reshape(*two.shape, *taps)}
    return {
      **found,
      'lokr_w2_a': weights['w2_b'].T,
      'lokr_w2_b': weights['w2_a'].T,
    }

  def _check(self, layer: surgery.PeftLayer) -> None:
    """Raises for a convolution with a kernel.

    Raises:
      SiteError: naming it.
    """
    if any(size != 1 for size in layer.kernel):
      raise surgery.SiteError(
        f'{layer.name}: LoKr of a convolution with a kernel of {layer.kernel} '
        'is another product in PEFT, where only channels are cut.'
      )

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns the options of both, and the factor, one for all modules.

    Raises:
      ConfigError: for factors that differ.
    """
    factors = list(dict.fromkeys(one.factor for one, _ in layers.values()))
    if len(factors) > 1:
      raise surgery.ConfigError(
        "adapter type 'lokr', option 'factor': PEFT has one value of "
        f'decompose_factor for all modules, found {factors}.'
      )
    factor = factors[0] if factors else adapter.factor
    return {**super().config(adapter, layers), 'decompose_factor': factor}
