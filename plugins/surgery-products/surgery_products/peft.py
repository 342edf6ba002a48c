"""LoHa and LoKr in the folders of PEFT.

PEFT's matrices are `(out, in)` and these types' `(in, out)`, so each product is
turned: `(P·Q)ᵀ = Qᵀ·Pᵀ`, and `(C ⊗ D)ᵀ = Cᵀ ⊗ Dᵀ`.
"""

from __future__ import annotations

import math
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
  """`lokr_w1` `(out₁, in₁)`, and `lokr_w2` `(out₂, in₂, *taps)` or factors.

  PEFT cuts the channels of a convolution and leaves its kernel whole, which is
  what the option `taps` does.
  """

  peft_type = 'LOKR'
  names = (
    'lokr_w1',
    'lokr_w1_a',
    'lokr_w1_b',
    'lokr_w2',
    'lokr_w2_a',
    'lokr_w2_b',
  )
  defaults: ClassVar[Mapping[str, Any]] = {
    **_Products.defaults,
    'decompose_factor': -1,
    'decompose_both': False,
  }
  off: ClassVar[Mapping[str, str]] = {
    'use_effective_conv2d': 'its convolutions are products of three matrices',
  }

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns rank, alpha, factor, and what is cut."""
    return {
      **super().options(module),
      'factor': module.config['decompose_factor'],
      'both': module.config['decompose_both'],
      'factor_first': self._is_first(module),
      'taps': module.kind == 'conv',
    }

  def _factors(self, module: surgery.PeftModule) -> list[tuple[int, ...]]:
    """Returns the shapes of both factors, `(out, in, …)`."""
    some = module.shapes
    return [
      some.get(name)
      or some.get(f'{name}_a', ())[:1] + some.get(f'{name}_b', ())[1:2]
      for name in ('lokr_w1', 'lokr_w2')
    ]

  def _is_first(self, module: surgery.PeftModule) -> bool:
    """Whether a large factor is the size of the first product.

    It is in PEFT, and not in files of LyCORIS; the shapes tell.
    """
    factor = module.config['decompose_factor']
    one, two = self._factors(module)
    # Channels of a convolution may be counted together with taps.
    sides = 1 if module.kind == 'conv' and len(two) == 2 else 2
    for small, large in zip(one[:sides], two[:sides], strict=False):
      if factor == large > small:
        return False
    return bool(factor > 0)

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the products of both factors' sizes.

    Where the large factor is a product, inputs are channels and taps together.
    """
    one, two = self._factors(module)
    if len(one) != 2 or len(two) < 2:
      return None, None
    return one[1] * two[1], one[0] * two[0]

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns the factors, turned."""
    self._check(layer)
    found = {}
    for name in ('w1', 'w2'):
      if f'lokr_{name}' in tensors:
        one = tensors[f'lokr_{name}']
        found[name] = one.reshape(len(one), -1).T
      else:
        found[f'{name}_a'] = tensors[f'lokr_{name}_b'].T
        found[f'{name}_b'] = tensors[f'lokr_{name}_a'].T
    return found

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns the factors, turned back."""
    self._check(layer)
    found = {}
    for name in ('w1', 'w2'):
      if name in weights:
        taps = layer.kernel if name == 'w2' else ()
        one = weights[name].T
        count = one.shape[1] // math.prod(taps)
        found[f'lokr_{name}'] = one.reshape(len(one), count, *taps)
      else:
        found[f'lokr_{name}_a'] = weights[f'{name}_b'].T
        found[f'lokr_{name}_b'] = weights[f'{name}_a'].T
    return found

  def _check(self, layer: surgery.PeftLayer) -> None:
    """Raises for a convolution whose channels and taps are cut together.

    Raises:
      SiteError: naming it.
    """
    if not layer.options['taps'] and any(size != 1 for size in layer.kernel):
      raise surgery.SiteError(
        f'{layer.name}: LoKr of a convolution with a kernel of {layer.kernel} '
        'is another product in PEFT, where only channels are cut. Attach it '
        'with taps=True.'
      )
    factor = layer.options['factor']
    first = layer.options['factor_first'] or factor < 1
    sides = layer.features[0], layer.site.out_size
    if not first and any(n % factor == 0 and factor**2 > n for n in sides):
      raise surgery.SiteError(
        f'{layer.name}: factor {factor} is the larger one of a side of '
        f'{sides[0]}×{sides[1]}, and PEFT takes it for the size of the first '
        'product, not of the second. Attach it with factor_first=True.'
      )

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns the options of both, and what is one for all modules.

    Raises:
      ConfigError: for factors that differ.
    """
    found = {}
    for option, key in (
      ('factor', 'decompose_factor'),
      ('both', 'decompose_both'),
    ):
      some = dict.fromkeys(getattr(one, option) for one, _ in layers.values())
      if len(some) > 1:
        raise surgery.ConfigError(
          f"adapter type 'lokr', option {option!r}: PEFT has one value of "
          f'{key} for all modules, found {list(some)}.'
        )
      found[key] = next(iter(some), getattr(adapter, option))
    return {**super().config(adapter, layers), **found}
