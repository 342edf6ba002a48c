"""LoRA in the folders of PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from surgery import errors
from surgery.contract.peft import (
  CONV,
  EMBEDDING,
  Arrays,
  PeftLayer,
  PeftMapping,
  PeftModule,
  Shapes,
)

# Beginnings that leave the base as it is: what was trained is all there is.
_PLAIN = (None, True, False, 'gaussian', 'eva', 'orthogonal', 'mica')
# Beginnings that took a part out of the base, which PEFT can put into `A` and
# `B` when it saves.
_DIFFERENCES = ('pissa', 'olora', 'corda', 'lora_ga')


class PeftLoRA(PeftMapping):
  """`A` `(r, in)` and `B` `(out, r)`, or `(r, in, *kernel)` and `(out, r, 1…)`.

  Embeddings have `A` `(r, rows)` and `B` `(features, r)`. The scale is in the
  configuration alone: `lora_alpha / r`, with `use_rslora` `lora_alpha / √r`,
  where `alpha_pattern` and `rank_pattern` may have others for some modules. For
  experts that are stacked in one parameter `A` is `(experts·r, in)` and `B`
  `(out, r·experts)`.
  """

  peft_type = 'LORA'
  names: ClassVar[tuple[str, ...]] = (
    'lora_A.weight',
    'lora_B.weight',
    'lora_embedding_A',
    'lora_embedding_B',
  )
  defaults: ClassVar[Mapping[str, Any]] = {
    'r': 8,
    'lora_alpha': 8,
    'rank_pattern': {},
    'alpha_pattern': {},
    'use_rslora': False,
    'lora_dropout': 0.0,
    'init_lora_weights': True,
    'use_dora': False,
    'lora_bias': False,
    'target_parameters': None,
    'trainable_token_indices': None,
  }
  ignored = (
    'corda_config',
    'eva_config',
    'loftq_config',
    'lora_ga_config',
    'megatron_core',
    'qalora_group_size',
    'runtime_config',
  )
  off: ClassVar[Mapping[str, str]] = {
    'alora_invocation_tokens': 'it is for some tokens of a text only',
    'arrow_config': 'a router chooses among adapters for each token',
    'kasa_config': 'the base is truncated by a decomposition',
    'layer_replication': 'layers of the base are repeated first; repeat them '
    'with the step `repeat`',
    'megatron_config': 'its layers are those of Megatron',
    'monteclora_config': 'its weights are drawn anew in each call',
    'use_bdlora': 'its factors are blocks on a diagonal',
    'use_qalora': 'inputs are pooled before the factors',
    'velora_config': 'its activations are compressed',
  }
  drawn = ('lora_dropout',)
  bias = True
  conv1d = True
  experts = True

  def reads(self, config: Mapping[str, Any]) -> bool:
    """LoRA itself, not one of its relatives."""
    return not (
      config.get('use_dora')
      or config.get('lora_bias')
      or config.get('init_lora_weights') in ('pissa', 'olora')
    )

  def check(self, config: Mapping[str, Any]) -> None:
    """Raises for beginnings that changed the base, and are not on record.

    Raises:
      ConfigError: naming the beginning.
    """
    begins = config['init_lora_weights']
    if begins in _PLAIN:
      return
    name = str(begins)
    if name == 'loftq':
      how = 'PEFT cannot save it as a difference from the unchanged base'
    elif name.startswith(_DIFFERENCES):
      how = (
        'Save it again with PEFT as a difference from the unchanged base: '
        'save_pretrained(…, path_initial_model_for_weight_conversion=FOLDER), '
        'where FOLDER has the adapter as it was before training'
      )
    else:
      raise errors.ConfigError(
        f'init_lora_weights is {begins!r}, which is not known, and may have '
        'changed the base. If it did not, set it to true in '
        'adapter_config.json; otherwise merge the adapter with PEFT.'
      )
    raise errors.ConfigError(
      f'init_lora_weights is {begins!r}, which changed the base when '
      f'training began, and the folder does not hold how. {how}. Or save the '
      'changed base as training had it (get_base_model().save_pretrained), '
      'take it instead of the original, and set init_lora_weights to true in '
      'adapter_config.json.'
    )

  def kind(self, module: PeftModule) -> str | None:
    """Embeddings have tensors of other names."""
    if any('embedding' in name for name in module.shapes):
      return EMBEDDING
    a = module.shapes.get('lora_A.weight', ())
    return CONV if len(a) > 2 else 'linear'

  def sizes(self, module: PeftModule) -> tuple[int | None, int | None]:
    """Returns what `A` and `B` say."""
    some = module.shapes
    a = some.get('lora_A.weight') or some.get('lora_embedding_A') or ()
    b = some.get('lora_B.weight') or some.get('lora_embedding_B') or ()
    return (a[1] if len(a) > 1 else None), (b[0] if b else None)

  def options(self, module: PeftModule) -> dict[str, Any]:
    """Returns rank, alpha and the rest, by the patterns for this module."""
    config = module.config
    return {
      'rank': module.value('r', 'rank_pattern'),
      'alpha': module.value('lora_alpha', 'alpha_pattern'),
      'rslora': config['use_rslora'],
      'dropout': config['lora_dropout'],
    }

  def weights(self, layer: PeftLayer, tensors: Arrays) -> dict[str, Any]:
    """Returns `lora_a` and `lora_b`."""
    if layer.kind == EMBEDDING:
      a, b = tensors['lora_embedding_A'], tensors['lora_embedding_B']
    else:
      a, b = tensors['lora_A.weight'], tensors['lora_B.weight']
    if layer.stack:
      return self._of_experts(layer, a, b)
    b = b.reshape(b.shape[0], -1)  # Of a convolution (out, r, 1, 1).
    return {
      'lora_a': layer.inputs(a.transpose(*range(1, a.ndim), 0)),
      'lora_b': layer.outputs(b.T),
    }

  def _of_experts(self, layer: PeftLayer, a: Any, b: Any) -> dict[str, Any]:
    count, site = math.prod(layer.stack), layer.site
    # The ranks of an expert are neighbours in A, and far apart in B.
    a = a.reshape(count, -1, a.shape[-1]).transpose(0, 2, 1)
    b = b.reshape(b.shape[0], -1, count).transpose(2, 1, 0)
    return {
      'lora_a': a.reshape(*layer.stack, *site.in_shape, -1),
      'lora_b': b.reshape(*layer.stack, -1, *site.out_shape),
    }

  def tensors(self, layer: PeftLayer, weights: Arrays) -> dict[str, Any]:
    """Returns `A` and `B`, under their names for this kind of module."""
    if layer.stack:
      count, site = math.prod(layer.stack), layer.site
      a = weights['lora_a'].reshape(count, site.in_size, -1).transpose(0, 2, 1)
      b = weights['lora_b'].reshape(count, -1, site.out_size)
      return {
        'lora_A.weight': a.reshape(-1, site.in_size),
        'lora_B.weight': b.transpose(2, 1, 0).reshape(site.out_size, -1),
      }
    a = layer.torch_inputs(weights['lora_a'])
    a = a.transpose(a.ndim - 1, *range(a.ndim - 1))
    b = layer.torch_outputs(weights['lora_b']).T
    if layer.kind == EMBEDDING:
      return {'lora_embedding_A': a, 'lora_embedding_B': b}
    return {
      'lora_A.weight': a,
      'lora_B.weight': b.reshape(*b.shape, *(1,) * len(layer.kernel)),
    }

  def config(
    self, adapter: Any, layers: Mapping[str, tuple[Any, Shapes]]
  ) -> dict[str, Any]:
    """Returns ranks and alphas; those of some modules as patterns.

    PEFT has one `use_rslora` and one dropout for all; where ours differ, an
    `alpha` is chosen that makes the same scale.

    Raises:
      ConfigError: for dropouts that differ.
    """
    rslora = adapter.rslora
    dropouts = list(dict.fromkeys(a.dropout for a, _ in layers.values()))
    if len(dropouts) > 1:
      raise errors.ConfigError(
        f"adapter type '{adapter.name}', option 'dropout': PEFT has one value "
        f'for all modules, found {dropouts[0]} and {dropouts[1]}.'
      )
    ranks, alphas = {}, {}
    for name, (one, shapes) in layers.items():
      # The rank that there is, where ranks were pruned.
      rank = ranks[name] = shapes['lora_a'][-1]
      unchanged = rank == one.rank and one.rslora == rslora
      if unchanged and one.alpha is not None:
        alphas[name] = one.alpha
      else:
        alphas[name] = one.scale * (math.sqrt(rank) if rslora else rank)
    r, rank_pattern = self.by_pattern(ranks, adapter.rank)
    alpha, alpha_pattern = self.by_pattern(alphas, adapter.scale * adapter.rank)
    return {
      'r': r,
      'lora_alpha': alpha,
      'rank_pattern': rank_pattern,
      'alpha_pattern': alpha_pattern,
      'use_rslora': rslora,
      'lora_dropout': dropouts[0] if dropouts else adapter.dropout,
      'use_dora': False,
      'lora_bias': False,
      'init_lora_weights': True,
    }
