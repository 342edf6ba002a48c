"""VeRA, VB-LoRA, MiSS and BAT in the folders of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import surgery

Arrays = Mapping[str, Any]


class PeftVeRA(surgery.PeftMapping):
  """`vera_lambda_b` `(out,)`, `vera_lambda_d` `(r,)`, and what modules share.

  That is `vera_A` `(r, in)` and `vera_B` `(out, r)`, as large as the largest
  module; PEFT draws them again by torch where they are not saved.
  """

  peft_type = 'VERA'
  bias = True
  conv1d = True
  names = ('vera_lambda_b', 'vera_lambda_d')
  shared: ClassVar[Mapping[str, str]] = {'vera_a': 'vera_A', 'vera_b': 'vera_B'}
  fields: ClassVar[Mapping[str, str]] = {'r': 'rank', 'd_initial': 'd_initial'}
  defaults: ClassVar[Mapping[str, Any]] = {
    'r': 256,
    'd_initial': 0.1,
    'save_projection': True,
  }
  ignored = ('init_weights', 'projection_prng_key', 'vera_dropout')

  def check(self, config: Mapping[str, Any]) -> None:
    """Raises where the random matrices are not saved.

    Raises:
      ConfigError: saying how to save them.
    """
    if not config['save_projection']:
      raise surgery.ConfigError(
        'save_projection is false, so the random matrices are not in the '
        'folder, and only torch draws them again. Save the adapter with '
        'save_projection=True.'
      )

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the number of outputs; inputs are those of the base."""
    return None, next(iter(module.shapes.get('vera_lambda_b', ())), None)

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns both vectors."""
    del layer
    return {
      'lambda_d': tensors['vera_lambda_d'],
      'lambda_b': tensors['vera_lambda_b'],
    }

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns both vectors."""
    del layer
    return {
      'vera_lambda_b': weights['lambda_b'],
      'vera_lambda_d': weights['lambda_d'],
    }

  def shared_weights(self, tensors: Arrays) -> dict[str, Any]:
    """Returns the matrices, turned."""
    return {name: value.T for name, value in tensors.items()}

  def shared_tensors(self, weights: Arrays) -> dict[str, Any]:
    """Returns the matrices, turned back."""
    return {name: value.T for name, value in weights.items()}

  def config(self, adapter: Any, layers: Any) -> dict[str, Any]:
    """Returns the rank; the random matrices are saved."""
    return {**super().config(adapter, layers), 'save_projection': True}


class PeftVBLoRA(surgery.PeftMapping):
  """`vblora_logits_A` `(r, in / length, vectors)`, `…_B`, and the bank."""

  peft_type = 'VBLORA'
  bias = True
  conv1d = True
  names = ('vblora_logits_A', 'vblora_logits_B')
  shared: ClassVar[Mapping[str, str]] = {'vector_bank': 'vblora_vector_bank'}
  fields: ClassVar[Mapping[str, str]] = {
    'r': 'rank',
    'num_vectors': 'num_vectors',
    'vector_length': 'vector_length',
    'topk': 'topk',
  }
  defaults: ClassVar[Mapping[str, Any]] = {
    'r': 4,
    'num_vectors': 256,
    'vector_length': 256,
    'topk': 2,
  }
  ignored = (
    'init_logits_std',
    'init_vector_bank_bound',
    'init_weights',
    'vblora_dropout',
  )
  off: ClassVar[Mapping[str, str]] = {
    'save_only_topk_weights': 'logits are lost but for those that count'
  }

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns how many vectors make the inputs and the outputs."""
    length = module.config['vector_length']
    a = module.shapes.get('vblora_logits_A', ())
    b = module.shapes.get('vblora_logits_B', ())
    return (
      a[1] * length if len(a) > 1 else None,
      b[0] * length if b else None,
    )

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns both logits."""
    del layer
    return {
      'logits_a': tensors['vblora_logits_A'],
      'logits_b': tensors['vblora_logits_B'],
    }

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns both logits."""
    del layer
    return {
      'vblora_logits_A': weights['logits_a'],
      'vblora_logits_B': weights['logits_b'],
    }


class _PeftMiSS(surgery.PeftMapping):
  """What MiSS and BAT have: linear layers alone."""

  peft_type = 'MISS'
  names = ('miss_block',)
  bias = True
  fields: ClassVar[Mapping[str, str]] = {'r': 'rank'}
  defaults: ClassVar[Mapping[str, Any]] = {
    'r': 64,
    'mini_r': 1,
    'init_weights': True,
  }
  ignored = ('miss_dropout',)

  def check_linear(self, layer: surgery.PeftLayer) -> None:
    """Raises for what PEFT has no MiSS for.

    Raises:
      SiteError: naming it.
    """
    if layer.kind != 'linear':
      raise surgery.SiteError(
        f'{layer.name}: PEFT has MISS for linear layers alone, and this is of '
        f'kind {layer.kind!r}.'
      )


class PeftMiSS(_PeftMiSS):
  """`miss_block` `(r, out)`, or `(r, mini_r)` with `init_weights: mini`."""

  def reads(self, config: Mapping[str, Any]) -> bool:
    """MiSS, whether its blocks are repeated along the outputs or not."""
    return config.get('init_weights') != 'bat'

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns rows and columns of the block."""
    mini = module.config['init_weights'] == 'mini'
    columns = module.config['mini_r'] if mini else None
    return {**super().options(module), 'columns': columns}

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the outputs, unless blocks are repeated along them."""
    shape = module.shapes['miss_block']
    mini = module.config['init_weights'] == 'mini'
    return None, (None if mini or len(shape) != 2 else shape[1])

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns the block."""
    self.check_linear(layer)
    return {'miss_block': tensors['miss_block']}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns the block."""
    self.check_linear(layer)
    return {'miss_block': weights['miss_block']}

  def config(self, adapter: Any, layers: Any) -> dict[str, Any]:
    """Returns rows and columns, each the same for all modules.

    Raises:
      ConfigError: for columns that differ.
    """
    found = [one.columns for one, _ in layers.values()] or [adapter.columns]
    if len(set(found)) > 1:
      raise surgery.ConfigError(
        "adapter type 'miss', option 'columns': PEFT has one value of 'mini_r' "
        f'for all modules, found {found[0]} and others.'
      )
    return {
      **super().config(adapter, layers),
      'mini_r': found[0] or 1,
      'init_weights': 'mini' if found[0] else True,
    }


class PeftBAT(_PeftMiSS):
  """`miss_block` `(out / r, r, r)`, which PEFT applies to `(out, in)`."""

  def reads(self, config: Mapping[str, Any]) -> bool:
    """MiSS that begins as BAT."""
    return config.get('init_weights') == 'bat'

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the outputs of all blocks."""
    shape = module.shapes['miss_block']
    return None, (shape[0] * shape[1] if len(shape) == 3 else None)

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns the blocks, turned."""
    self.check_linear(layer)
    return {'bat_block': tensors['miss_block'].transpose(0, 2, 1)}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns the blocks, turned back."""
    self.check_linear(layer)
    return {'miss_block': weights['bat_block'].transpose(0, 2, 1)}

  def config(self, adapter: Any, layers: Any) -> dict[str, Any]:
    """Returns the rows of a block."""
    return {**super().config(adapter, layers), 'init_weights': 'bat'}
