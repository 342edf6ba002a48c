"""IA3, LN tuning and trainable tokens in the folders of PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import surgery

Arrays = Mapping[str, Any]
Layers = Mapping[str, tuple[Any, Mapping[str, tuple[int, ...]]]]


class PeftIA3(surgery.PeftMapping):
  """`ia3_l` `(out, 1)`, or `(1, in)` where a module is feed-forward.

  Of a convolution it is `(1, out, 1…)` or `(1, in, 1…)`: one number a channel,
  where this type has one for each tap.
  """

  peft_type = 'IA3'
  names = ('ia3_l',)
  conv1d = True
  ignored = ('init_ia3_weights',)
  defaults: ClassVar[Mapping[str, Any]] = {'feedforward_modules': None}

  def options(self, module: surgery.PeftModule) -> dict[str, Any]:
    """Returns whether a module is feed-forward, by PEFT's own rule."""
    return {'feedforward': self._is_forward(module)}

  def _is_forward(self, module: surgery.PeftModule) -> bool:
    said = module.config['feedforward_modules'] or []
    if isinstance(said, str):
      try:
        return re.fullmatch(said, module.name) is not None
      except re.error as error:
        raise surgery.ConfigError(
          f'feedforward_modules: {said!r} is no regular expression: {error}.'
        ) from None
    # Ends of names, dots or not, as PEFT has it.
    return any(module.name.endswith(one) for one in said)

  def kind(self, module: surgery.PeftModule) -> str | None:
    """A vector of a convolution has an axis for each of its kernel's."""
    return 'conv' if len(module.shapes['ia3_l']) > 2 else 'linear'

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the one number that the vector says."""
    shape = module.shapes['ia3_l']
    count = shape[1] if len(shape) > 2 else max(shape, default=0)
    return (count, None) if self._is_forward(module) else (None, count)

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns `scale`."""
    scale = tensors['ia3_l'].reshape(-1)
    if not layer.options['feedforward']:
      return {'scale': layer.outputs(scale)}
    taps = math.prod(layer.kernel)
    whole = scale.repeat(taps).reshape(layer.features)
    return {'scale': layer.inputs(whole)}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns `ia3_l`.

    Raises:
      SiteError: if taps of a convolution have scales of their own.
    """
    scale, taps = weights['scale'], (1,) * len(layer.kernel)
    if not layer.options['feedforward']:
      found = layer.torch_outputs(scale)
      return {'ia3_l': found.reshape(1, -1, *taps) if taps else found[:, None]}
    whole = layer.torch_inputs(scale)
    first = whole.reshape(len(whole), -1)[:, 0]
    if (whole != first.reshape(-1, *taps)).any():
      raise surgery.SiteError(
        f'{layer.name}: its scales differ from tap to tap, and PEFT has one '
        'for each channel.'
      )
    return {'ia3_l': first.reshape(1, -1, *taps)}

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Returns the names of feed-forward modules."""
    del adapter
    names = sorted(n for n, (one, _) in layers.items() if one.feedforward)
    return {'feedforward_modules': names}


class PeftLNTuning(surgery.PeftMapping):
  """Norms as they were trained, in place of the base's.

  PEFT stores what scale and bias have become, where this type stores by how
  much they changed, which only beside its base is the same. So a folder is read
  as what is saved with an adapter, and written again as it was.
  """

  peft_type = 'LN_TUNING'
  replaced: ClassVar[Mapping[str, str]] = {
    'ln_tuning_layers.weight': 'weight',
    'ln_tuning_layers.bias': 'bias',
  }

  def config(self, adapter: Any, layers: Layers) -> dict[str, Any]:
    """Refuses an adapter that is from no folder.

    Raises:
      ConfigError: saying what to do.
    """
    del adapter, layers
    raise surgery.ConfigError(
      "adapter type 'ln-tuning': its differences are no parameters of PEFT "
      'without their base. Merge it, and save the norms by modules_to_save of '
      'another adapter, or ship the model.'
    )

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Refuses, as `config` does."""
    del layer, weights
    return self.config(None, {})


class PeftTokens(surgery.PeftMapping):
  """`trainable_tokens_delta` `(tokens, features)`, which is no difference.

  Where a head is tied to the embedding, PEFT saves the rows for both.
  """

  peft_type = 'TRAINABLE_TOKENS'
  names = ('trainable_tokens_delta',)
  saves = False
  fields: ClassVar[Mapping[str, str]] = {'token_indices': 'tokens'}
  defaults: ClassVar[Mapping[str, Any]] = {'token_indices': []}
  ignored = ('init_weights',)

  def kind(self, module: surgery.PeftModule) -> str | None:
    """Rows are those of an embedding, also where it is a head."""
    del module
    return 'embedding'

  def sizes(self, module: surgery.PeftModule) -> tuple[int | None, int | None]:
    """Returns the number of features; rows are those of the base."""
    shape = module.shapes['trainable_tokens_delta']
    return None, (shape[1] if len(shape) == 2 else None)

  def weights(
    self, layer: surgery.PeftLayer, tensors: Arrays
  ) -> dict[str, Any]:
    """Returns the rows."""
    return {'token_rows': layer.outputs(tensors['trainable_tokens_delta'])}

  def tensors(
    self, layer: surgery.PeftLayer, weights: Arrays
  ) -> dict[str, Any]:
    """Returns the rows.

    Raises:
      SiteError: for what is no embedding.
    """
    if layer.kind != 'embedding':
      raise surgery.SiteError(
        f'{layer.name}: PEFT trains rows of embeddings, and this is of kind '
        f'{layer.kind!r}.'
      )
    return {
      'trainable_tokens_delta': layer.torch_outputs(weights['token_rows'])
    }
