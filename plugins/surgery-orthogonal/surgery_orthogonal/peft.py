"""OFT, BOFT and HRA in the folders of PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import surgery

Arrays = Mapping[str, Any]
Layers = Mapping[str, tuple[Any, Mapping[str, tuple[int, ...]]]]


class _Turning(surgery.PeftMapping):
  """What all have: they turn the inputs, of convolutions in torch's order."""

  bias = True

  def order(
    self, layer: surgery.PeftLayer, rows: Any, back: bool = False
  ) -> Any:
    """Returns rows `(in, …)` of torch's order in that of the site, or back."""
    rest = rows.shape[1:]
    if back:
      return layer.torch_inputs(
        rows.reshape(*layer.site.in_shape, *rest)
      ).reshape(-1, *rest)
    return layer.inputs(rows.reshape(*layer.features, *rest)).reshape(-1, *rest)


class PeftOFT(_Turning):
  """`oft_R.weight` `(blocks, block_size·(block_size - 1) / 2)`."""

  peft_type = 'OFT'
  names = ('oft_R.weight',)
  conv1d = True
  defaults: ClassVar[Mapping[str, Any]] = {
    'r': 0,
    'oft_block_size': 32,
    'use_cayley_neumann': True,
    'num_cayley_neumann_terms': 5,
  }
  ignored = ('eps', 'init_weights', 'module_dropout')
  off: ClassVar[Mapping[str, str]] = {
    'block_share': 'all blocks of a layer are one',
    'coft': 'rotations are kept small in a call',
  }

  def check(self, config: Mapping[str, Any]) -> None:
    """Raises for a series that releases before 0.18 computed otherwise.

    Raises:
      ConfigError: naming the release.
    """
    said = str(config.get('peft_version') or '0')
    numbers = [int(n) for n in re.findall(r'\d+', said)[:2]]
    if config['use_cayley_neumann'] and numbers < [0, 18]:
      raise surgery.ConfigError(
        f'peft_version is {config.get("peft_version")!r}, and releases before '
        '0.18 computed use_cayley_neumann by another series. Merge it with '
        'that release.'
      )

  def _check(self, layer: surgery.PeftLayer) -> None:
    """Raises for a convolution with a kernel.

    Raises:
      SiteError: naming it.
    """
    if any(size != 1 for size in layer.kernel):
      raise surgery.SiteError(
        f'{layer.name}: a convolution with a kernel of {layer.kernel}. PEFT '
        'turns the patches that it sees in a call, and adds them up where they '
        'overlap, which no kernel computes; its merge is something else.'
      )

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns the size of blocks, and how rotations are computed."""
    config = module.config
    terms = config['num_cayley_neumann_terms']
    return {
      'block_size': self._size(module),
      'terms': terms if config['use_cayley_neumann'] else None,
    }

  def _size(self, module: surgery.PeftModule) -> int:
    """Returns the rows of a block.

    PEFT takes another than the configured size where that does not divide the
    inputs, so the tensor says it, and has to agree where it can.
    """
    shape = module.shapes['oft_R.weight']
    blocks, numbers = shape if len(shape) == 2 else (0, 0)
    size = (1 + math.isqrt(1 + 8 * numbers)) // 2
    said = module.config['oft_block_size']
    if said and blocks * size % said == 0:
      return int(said)
    return size

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the inputs: as many as all blocks have rows."""
    shape = module.shapes['oft_R.weight']
    numbers = shape[-1] if shape else 0
    return (shape[0] if shape else 0) * (
      (1 + math.isqrt(1 + 8 * numbers)) // 2
    ), None

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns `oft_q`."""
    self._check(layer)
    return {'oft_q': tensors['oft_R.weight']}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns `oft_R.weight`."""
    self._check(layer)
    return {'oft_R.weight': weights['oft_q']}

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns the size of blocks, and how rotations are computed.

    Raises:
      ConfigError: for sizes or numbers of terms that differ.
    """
    said = [(one.block_size, one.terms) for one, _ in layers.values()]
    several = list(dict.fromkeys(said))
    if len(several) > 1:
      raise surgery.ConfigError(
        "adapter type 'oft': PEFT has one size of blocks and one number of "
        f'terms for all modules, found {several[0]} and {several[1]}.'
      )
    size, terms = several[0] if several else (adapter.block_size, adapter.terms)
    return {
      'r': 0,
      'oft_block_size': size,
      'use_cayley_neumann': terms is not None,
      **({} if terms is None else {'num_cayley_neumann_terms': terms}),
    }


class PeftBOFT(_Turning):
  """`boft_R` `(factors, blocks, size, size)` and `boft_s` `(out, 1)`.

  The scale of a convolution is `(1, out)`.

  Of each block of `boft_R` only the skew-symmetric part counts; PEFT trains
  and saves all of it.
  """

  peft_type = 'BOFT'
  names = ('boft_R', 'boft_s')
  conv1d = True
  defaults: ClassVar[Mapping[str, Any]] = {
    'boft_block_size': 4,
    'boft_block_num': 0,
    'boft_n_butterfly_factor': 1,
  }
  ignored = ('boft_dropout', 'init_weights')

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns blocks and factors; that there are whole matrices."""
    config = module.config
    return {
      'block_size': config['boft_block_size'] or None,
      'blocks': config['boft_block_num'] or None,
      'factors': config['boft_n_butterfly_factor'],
      'whole': True,
    }

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the rows of all blocks, and the scaled outputs."""
    r = module.shapes.get('boft_R', ())
    s = module.shapes.get('boft_s', ())
    return (r[1] * r[2] if len(r) == 4 else None), (max(s) if s else None)

  def _check(self, layer: surgery.PeftLayer) -> None:
    """Raises where blocks are cut out of another order of inputs.

    Raises:
      SiteError: naming the convolution.
    """
    if layer.channels_last and any(size != 1 for size in layer.kernel):
      raise surgery.SiteError(
        f'{layer.name}: a convolution with a kernel of {layer.kernel}, whose '
        'inputs are in another order in torch, (in, *kernel), and are cut into '
        "other blocks there. Use the checkpoint in torch's order of axes."
      )

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns `boft_r` and `boft_s`."""
    self._check(layer)
    scale = layer.outputs(tensors['boft_s'].reshape(-1))
    return {'boft_r': tensors['boft_R'], 'boft_s': scale}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns `boft_R` and `boft_s`."""
    import numpy as np

    self._check(layer)
    scale = layer.torch_outputs(weights['boft_s'])
    scale = scale[None] if layer.kind == 'conv' else scale[:, None]
    if 'boft_r' in weights:
      return {'boft_R': weights['boft_r'], 'boft_s': scale}
    numbers = weights['boft_q']
    size = (1 + math.isqrt(1 + 8 * numbers.shape[-1])) // 2
    upper = np.triu_indices(size, 1)
    skew = np.zeros((*numbers.shape[:-1], size, size), numbers.dtype)
    skew[..., upper[0], upper[1]] = numbers
    return {'boft_R': skew - skew.swapaxes(-1, -2), 'boft_s': scale}

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns blocks and factors.

    Raises:
      ConfigError: for some that differ.
    """
    said = [(o.block_size, o.blocks, o.factors) for o, _ in layers.values()]
    several = list(dict.fromkeys(said))
    if len(several) > 1:
      raise surgery.ConfigError(
        "adapter type 'boft': PEFT has one size and number of blocks and one "
        f'number of factors for all modules, found {several[0]} and '
        f'{several[1]}.'
      )
    size, blocks, factors = (
      several[0]
      if several
      else (adapter.block_size, adapter.blocks, adapter.factors)
    )
    return {
      'boft_block_size': 0 if blocks else size or 4,
      'boft_block_num': blocks or 0,
      'boft_n_butterfly_factor': factors,
    }


class PeftHRA(_Turning):
  """`hra_u` `(in, r)`."""

  peft_type = 'HRA'
  names = ('hra_u',)
  fields: ClassVar[Mapping[str, str]] = {'r': 'rank'}
  defaults: ClassVar[Mapping[str, Any]] = {'r': 8}
  ignored = ('init_weights',)
  off: ClassVar[Mapping[str, str]] = {
    'apply_GS': 'the vectors are made orthogonal first'
  }

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the inputs."""
    return next(iter(module.shapes['hra_u']), None), None

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns `hra_u`."""
    return {'hra_u': self.order(layer, tensors['hra_u'])}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns `hra_u`."""
    return {'hra_u': self.order(layer, weights['hra_u'], back=True)}
