"""What configurations of known architectures state of a model's tensors.

Of each architecture that is listed here a statement has a formula: how many
layers are numbered, how long an axis is, which layers are of which kind. A
configuration with others inside (`text_config`, `vision_config`) is divided
into parts, each with the tensors that it describes and an architecture of its
own.

Sources: the classes `…Config` and `…Model` of transformers 5.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from surgery.model.checkpoint import Leaf
  from surgery.naming.paths import Path

  Tensors = Mapping[Path, Leaf]

Config = Mapping[str, Any]


# Formulae.


@dataclasses.dataclass(frozen=True)
class Axis:
  """The length of an axis of the tensors whose paths end in a pattern.

  Attributes:
    pattern: a regular expression for the end of a path.
    axis: the axis, from the end where it is negative.
  """

  pattern: str
  axis: int

  def __call__(self, tensors: Tensors) -> set[int]:
    """Returns the lengths that there are."""
    return {
      shape[self.axis]
      for _, shape in matched(self.pattern, tensors)
      if -len(shape) <= self.axis < len(shape)
    }

  def __str__(self) -> str:
    return f'axis {self.axis} of {shown(self.pattern)}'


@dataclasses.dataclass(frozen=True)
class Count:
  """The number of numbered layers; none where numbers are missing.

  Attributes:
    pattern: a regular expression for the end of a path, with a group for the
      number.
  """

  pattern: str

  def __call__(self, tensors: Tensors) -> set[int]:
    """Returns the number, if there is one."""
    found = {int(match[1]) for match, _ in matched(self.pattern, tensors)}
    return {len(found)} if found == set(range(len(found))) and found else set()

  def __str__(self) -> str:
    return f'layers of {shown(self.pattern)}'


@dataclasses.dataclass(frozen=True)
class Experts:
  """The number of numbered experts of each layer that has some.

  Attributes:
    pattern: a regular expression for the end of a path, with a group for the
      layer and one for the expert.
  """

  pattern: str

  def __call__(self, tensors: Tensors) -> set[int]:
    """Returns the numbers that layers have."""
    layers: dict[str, set[int]] = {}
    for match, _ in matched(self.pattern, tensors):
      layers.setdefault(match[1], set()).add(int(match[2]))
    gaps = any(found != set(range(len(found))) for found in layers.values())
    return set() if gaps else {len(found) for found in layers.values()}

  def __str__(self) -> str:
    return f'experts of {shown(self.pattern)}'


Measure = Axis | Count | Experts


@dataclasses.dataclass(frozen=True)
class PerLayer:
  """What a configuration states of each layer.

  Attributes:
    key: the key that states it in full.
    items: what is stated of each of some number of layers, as transformers
      derives it where the key is missing.
    stating: the keys and values that state such items.
    why: what it is, for plans.
  """

  key: str
  items: Callable[[Config, int], list[Any]]
  stating: Callable[[Config, list[Any]], Mapping[str, Any]]
  why: str = 'an item for each layer'


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What the configuration of an architecture states of its tensors.

  Attributes:
    layers: by key the number of layers.
    sizes: by key the length of an axis, or the number of experts.
    heads: by key the number of heads; the axis has `heads * head size` places.
    hidden: key of the size that the head size divides by default.
    head_size: key of the size of a head, None if it cannot be stated.
    default_head_size: the size of a head where the configuration could state it
      and does not; None if it follows from `hidden`.
    head: paths of what `tie_word_embeddings` leaves out; none if it has no
      such head.
    tied: whether it is left out by default.
    implied: keys that are a multiple of another where they are null or missing,
      with that one.
    per_layer: what is stated of each layer.
    experts: key of the number of experts.
    router: the number of experts that the routers know.
    chosen: key of the number of experts that a token goes to.
  """

  layers: Mapping[str, Count] = dataclasses.field(default_factory=dict)
  sizes: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
  heads: Mapping[str, Axis] = dataclasses.field(default_factory=dict)
  hidden: str = 'hidden_size'
  head_size: str | None = 'head_dim'
  default_head_size: int | None = None
  head: str | None = 'lm_head/weight'
  tied: bool = False
  implied: Mapping[str, tuple[str, int]] = dataclasses.field(
    default_factory=dict
  )
  per_layer: tuple[PerLayer, ...] = ()
  experts: str | None = None
  router: Axis | None = None
  chosen: str = 'num_experts_per_tok'

  def name(self, key: str, config: Config) -> str:
    """Returns the name by which a configuration has a key.

    Transformers reads some keys by two names, and writes one or the other.
    """
    other = _ALSO.get(key, key)
    return other if key not in config and other in config else key


_ALSO = {'num_experts': 'num_local_experts', 'num_local_experts': 'num_experts'}


def matched(
  pattern: str, tensors: Tensors
) -> Iterator[tuple[re.Match[str], tuple[int, ...]]]:
  """Yields tensors whose paths end in a pattern, with their shapes."""
  regex = _compiled(pattern)
  for path, leaf in tensors.items():
    match = regex.fullmatch('/'.join(path))
    if match is not None and leaf.shape is not None:
      yield match, leaf.shape


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
  return re.compile(f'(?:.*/)?{pattern}')


def number(pattern: str, path: Path) -> int | None:
  """Returns the number of the layer that a tensor belongs to, if any."""
  match = _compiled(pattern).fullmatch('/'.join(path))
  return None if match is None else int(match[1])


def shown(pattern: str) -> str:
  """Returns a pattern as people read paths."""
  plain = pattern.replace(r'(\d+)', '<i>', 1).replace(r'(\d+)', '<j>')
  return plain.replace(r'\d+', '*').replace('.*', '**')


# What is stated of each layer.


def _listed(key: str, default: Callable[[Config, int], list[Any]]) -> PerLayer:
  """Returns a list with an item for each layer, or what stands for it."""

  def items(config: Config, layers: int) -> list[Any]:
    value = config.get(key)
    # Llama 4 takes an empty list for none.
    return value if isinstance(value, list) and value else default(
      config, layers
    )  # fmt: skip

  return PerLayer(key, items, lambda config, some: {key: some})


def _numbered(
  key: str,
  default: Callable[[Config, int], list[bool]] | None = None,
  beside: Mapping[str, Any] | None = None,
) -> PerLayer:
  """Returns a list of the numbers of those layers that are of some kind.

  Args:
    key: its key.
    default: which layers are of that kind, where other keys decide too.
    beside: what other keys have to be for the list alone to decide.
  """

  def items(config: Config, layers: int) -> list[Any]:
    if default is not None:
      return default(config, layers)
    return [k in (config.get(key) or ()) for k in range(layers)]

  def stating(config: Config, some: list[Any]) -> Mapping[str, Any]:
    numbers = [k for k, one in enumerate(some) if one]
    changed = {k: v for k, v in (beside or {}).items() if config.get(k, v) != v}
    return {key: numbers, **changed}

  return PerLayer(key, items, stating, 'the numbers of such layers')


def _every(key: str, default: int, other: str, one: str) -> PerLayer:
  """Returns the kinds of layers, of which each so-manieth is of another kind.

  Args:
    key: the key of how many.
    default: how many where the key is missing.
    other: the kind of most layers.
    one: the kind of each so-manieth.
  """

  def kinds(config: Config, layers: int) -> list[Any]:
    every = config.get(key, config.get(f'_{key}', default))
    if not isinstance(every, int) or every < 1:
      every = default
    return [other if (k + 1) % every else one for k in range(layers)]

  return _listed('layer_types', kinds)


def _windows(config: Config, layers: int) -> list[Any]:
  """Returns the kinds of Qwen's layers: the last ones may have a window."""
  first = config.get('max_window_layers', 28)
  window = config.get('use_sliding_window') and config.get(
    'sliding_window', 4096
  )
  return [
    'sliding_attention' if window and k >= first else 'full_attention'
    for k in range(layers)
  ]


def _qwen_windows() -> PerLayer:
  """Returns the kinds of Qwen's layers, which two keys may state."""
  listed = _listed('layer_types', _windows)

  def stating(config: Config, kinds: list[Any]) -> Mapping[str, Any]:
    first = kinds.count('full_attention')
    told: dict[str, Any] = {}
    if config.get('use_sliding_window'):
      # Programs that know no `layer_types` read this one.
      moved = {**config, 'layer_types': None, 'max_window_layers': first}
      if _windows(moved, len(kinds)) == kinds:
        told['max_window_layers'] = first
    if config.get('layer_types') or not told:
      told['layer_types'] = kinds
    return told

  return dataclasses.replace(listed, stating=stating)


def _qwen_moe_windows(config: Config, layers: int) -> list[Any]:
  window = config.get('use_sliding_window')
  first = config.get('max_window_layers', 28)
  return [
    'sliding_attention'
    if window and k % 2 == 0 and k < first
    else 'full_attention'
    for k in range(layers)
  ]


def _qwen_dense(config: Config, layers: int) -> list[bool]:
  """Returns which layers of a Qwen with experts have none."""
  step = config.get('decoder_sparse_step', 1)
  only = config.get('mlp_only_layers') or ()
  return [k in only or bool((k + 1) % step) for k in range(layers)]


def _llama4_sparse(config: Config, layers: int) -> list[bool]:
  """Returns which layers of a Llama 4 have experts."""
  said = config.get('moe_layers')
  if isinstance(said, list):
    return [k in said for k in range(layers)]
  step = config.get('interleave_moe_layer_step', 1)
  return [step > 0 and (k + 1) % step == 0 for k in range(layers)]


def _llama4_rotary(config: Config, layers: int) -> list[Any]:
  """Returns 1 for each layer with rotary positions."""
  step = config.get('no_rope_layer_interval', 4)
  return [int((k + 1) % step != 0) for k in range(layers)]


_LLAMA4_ROTARY = _listed('no_rope_layers', _llama4_rotary)


def _llama4_kinds(config: Config, layers: int) -> list[Any]:
  rotary = _LLAMA4_ROTARY.items(config, layers)
  return ['chunked_attention' if one else 'full_attention' for one in rotary]


# Architectures.

_LAYER = r'layers/(\d+)'


def _llama(**more: Any) -> Architecture:
  """Returns what Llama and those that are built as it is have in common."""
  said: dict[str, Any] = {
    'layers': {'num_hidden_layers': Count(rf'{_LAYER}/.*')},
    'heads': {
      'num_attention_heads': Axis(rf'{_LAYER}/self_attn/q_proj/weight', 0),
      'num_key_value_heads': Axis(rf'{_LAYER}/self_attn/k_proj/weight', 0),
    },
    'sizes': {
      **_EMBEDDED,
      'intermediate_size': Axis(rf'{_LAYER}/mlp/gate_proj/weight', 0),
    },
    'implied': {'num_key_value_heads': ('num_attention_heads', 1)},
  }
  return Architecture(**{**said, **more})


_EMBEDDED = {
  'vocab_size': Axis('embed_tokens/weight', 0),
  'hidden_size': Axis('embed_tokens/weight', 1),
}
_QWEN = _llama(per_layer=(_qwen_windows(),))
_QWEN3 = dataclasses.replace(_QWEN, default_head_size=128)
_GEMMA = _llama(tied=True, default_head_size=256)
_GEMMA2 = dataclasses.replace(
  _GEMMA,
  per_layer=(_every('', 2, 'sliding_attention', 'full_attention'),),
)
_GEMMA3 = dataclasses.replace(
  _GEMMA,
  per_layer=(
    _every('sliding_window_pattern', 6, 'sliding_attention', 'full_attention'),
  ),
)
_MIXTRAL = _llama(
  sizes={
    **_EMBEDDED,
    'intermediate_size': Axis(
      rf'{_LAYER}/block_sparse_moe/experts/\d+/w1/weight', 0
    ),
    'num_local_experts': Experts(
      rf'{_LAYER}/block_sparse_moe/experts/(\d+)/.*'
    ),
  },
  experts='num_local_experts',
  router=Axis(rf'{_LAYER}/block_sparse_moe/gate/weight', 0),
)


def _qwen_moe(kinds: PerLayer, **sizes: Axis) -> Architecture:
  """Returns a Qwen with experts."""
  dense = _numbered('mlp_only_layers', _qwen_dense, {'decoder_sparse_step': 1})
  return _llama(
    sizes={
      **_EMBEDDED,
      'intermediate_size': Axis(rf'{_LAYER}/mlp/gate_proj/weight', 0),
      'moe_intermediate_size': Axis(
        rf'{_LAYER}/mlp/experts/\d+/gate_proj/weight', 0
      ),
      'num_experts': Experts(rf'{_LAYER}/mlp/experts/(\d+)/.*'),
      **sizes,
    },
    experts='num_experts',
    router=Axis(rf'{_LAYER}/mlp/gate/weight', 0),
    per_layer=(kinds, dense),
  )


_QWEN2_MOE = _qwen_moe(
  _listed('layer_types', _qwen_moe_windows),
  shared_expert_intermediate_size=Axis(
    rf'{_LAYER}/mlp/shared_expert/gate_proj/weight', 0
  ),
)
# It has no kinds of layers.
_QWEN3_MOE = _qwen_moe(_listed('layer_types', lambda config, n: [None] * n))
_LLAMA4 = _llama(
  sizes={
    **_EMBEDDED,
    'intermediate_size': Axis(
      rf'{_LAYER}/feed_forward/shared_expert/gate_proj/weight', 0
    ),
    'intermediate_size_mlp': Axis(
      rf'{_LAYER}/feed_forward/gate_proj/weight', 0
    ),
    'num_local_experts': Axis(rf'{_LAYER}/feed_forward/experts/down_proj', 0),
  },
  experts='num_local_experts',
  router=Axis(rf'{_LAYER}/feed_forward/router/weight', 0),
  default_head_size=128,
  per_layer=(
    _LLAMA4_ROTARY,
    _listed('layer_types', _llama4_kinds),
    _numbered('moe_layers', _llama4_sparse),
  ),
)

_BERT_LAYER = r'encoder/layer/(\d+)'
_BERT = Architecture(
  layers={'num_hidden_layers': Count(rf'{_BERT_LAYER}/.*')},
  sizes={
    'vocab_size': Axis('embeddings/word_embeddings/weight', 0),
    'hidden_size': Axis('embeddings/word_embeddings/weight', 1),
    'max_position_embeddings': Axis('embeddings/position_embeddings/weight', 0),
    'type_vocab_size': Axis('embeddings/token_type_embeddings/weight', 0),
    'intermediate_size': Axis(rf'{_BERT_LAYER}/intermediate/dense/weight', 0),
  },
  heads={
    'num_attention_heads': Axis(
      rf'{_BERT_LAYER}/attention/self/query/weight', 0
    )
  },
  head_size=None,
  head='cls/predictions/decoder/weight',
  tied=True,
)
_ROBERTA = dataclasses.replace(_BERT, head='lm_head/decoder/weight')
_DISTILBERT_LAYER = r'transformer/layer/(\d+)'
_DISTILBERT = Architecture(
  layers={'n_layers': Count(rf'{_DISTILBERT_LAYER}/.*')},
  sizes={
    'vocab_size': Axis('embeddings/word_embeddings/weight', 0),
    'dim': Axis('embeddings/word_embeddings/weight', 1),
    'max_position_embeddings': Axis('embeddings/position_embeddings/weight', 0),
    'hidden_dim': Axis(rf'{_DISTILBERT_LAYER}/ffn/lin1/weight', 0),
  },
  heads={'n_heads': Axis(rf'{_DISTILBERT_LAYER}/attention/q_lin/weight', 0)},
  hidden='dim',
  head_size=None,
  head='vocab_projector/weight',
  tied=True,
)
_GPT2 = Architecture(
  layers={'n_layer': Count(r'h/(\d+)/.*')},
  sizes={
    'vocab_size': Axis('wte/weight', 0),
    'n_embd': Axis('wte/weight', 1),
    'n_positions': Axis('wpe/weight', 0),
    'n_inner': Axis(r'h/(\d+)/mlp/c_fc/weight', 1),
  },
  heads={'n_head': Axis(r'h/(\d+)/attn/c_proj/weight', 0)},
  hidden='n_embd',
  head_size=None,
  tied=True,
  implied={'n_inner': ('n_embd', 4)},
)
_T5 = Architecture(
  layers={
    'num_layers': Count(r'encoder/block/(\d+)/.*'),
    'num_decoder_layers': Count(r'decoder/block/(\d+)/.*'),
  },
  sizes={
    'vocab_size': Axis('shared/weight', 0),
    'd_model': Axis('shared/weight', 1),
    'd_ff': Axis(r'block/(\d+)/layer/\d+/DenseReluDense/wo/weight', 1),
    'relative_attention_num_buckets': Axis(
      'SelfAttention/relative_attention_bias/weight', 0
    ),
  },
  heads={'num_heads': Axis(r'block/(\d+)/layer/0/SelfAttention/q/weight', 0)},
  hidden='d_model',
  head_size='d_kv',
  default_head_size=64,
  tied=True,
  implied={'num_decoder_layers': ('num_layers', 1)},
)
_VIT = Architecture(
  layers={'num_hidden_layers': Count(rf'{_BERT_LAYER}/.*')},
  sizes={
    'hidden_size': Axis('embeddings/cls_token', 2),
    'num_channels': Axis('embeddings/patch_embeddings/projection/weight', 1),
    'patch_size': Axis('embeddings/patch_embeddings/projection/weight', 2),
    'intermediate_size': Axis(rf'{_BERT_LAYER}/intermediate/dense/weight', 0),
  },
  heads={
    'num_attention_heads': Axis(
      rf'{_BERT_LAYER}/attention/attention/query/weight', 0
    )
  },
  head_size=None,
  head=None,
)

# Encoders of images and of texts beside them.

_CLIP_LAYER = r'encoder/layers/(\d+)'


def _clip(**sizes: Axis) -> Architecture:
  return Architecture(
    layers={'num_hidden_layers': Count(rf'{_CLIP_LAYER}/.*')},
    sizes={
      **sizes,
      'intermediate_size': Axis(rf'{_CLIP_LAYER}/mlp/fc1/weight', 0),
    },
    heads={
      'num_attention_heads': Axis(rf'{_CLIP_LAYER}/self_attn/q_proj/weight', 0)
    },
    head_size=None,
    head=None,
  )


_PATCHES = {
  'hidden_size': Axis('embeddings/patch_embedding/weight', 0),
  'num_channels': Axis('embeddings/patch_embedding/weight', 1),
  'patch_size': Axis('embeddings/patch_embedding/weight', 2),
}
_TOKENS = {
  'vocab_size': Axis('embeddings/token_embedding/weight', 0),
  'hidden_size': Axis('embeddings/token_embedding/weight', 1),
  'max_position_embeddings': Axis('embeddings/position_embedding/weight', 0),
}
_CLIP_VISION = _clip(
  **_PATCHES, projection_dim=Axis('visual_projection/weight', 0)
)
_CLIP_TEXT = _clip(**_TOKENS, projection_dim=Axis('text_projection/weight', 0))
_CLIP_BOTH = Architecture(
  sizes={'projection_dim': Axis('text_projection/weight', 0)}, head=None
)
_SIGLIP_VISION = _clip(**_PATCHES)
_SIGLIP_TEXT = _clip(
  **_TOKENS, projection_size=Axis('text_model/head/weight', 0)
)
_LLAMA4_VISION = Architecture(
  layers={'num_hidden_layers': Count(r'model/layers/(\d+)/.*')},
  sizes={
    'hidden_size': Axis('class_embedding', 0),
    'intermediate_size': Axis(r'model/layers/(\d+)/mlp/fc1/weight', 0),
  },
  heads={
    'num_attention_heads': Axis(
      r'model/layers/(\d+)/self_attn/q_proj/weight', 0
    )
  },
  head_size=None,
  head=None,
)


def _qwen_vision(
  hidden: str, sizes: Mapping[str, Axis], per_layer: tuple[PerLayer, ...] = ()
) -> Architecture:
  return Architecture(
    layers={'depth': Count(r'blocks/(\d+)/.*')},
    sizes={
      hidden: Axis('patch_embed/proj/weight', 0),
      'temporal_patch_size': Axis('patch_embed/proj/weight', 2),
      'patch_size': Axis('patch_embed/proj/weight', 3),
      **sizes,
    },
    # Those of `qkv` are three times as many.
    heads={'num_heads': Axis(r'blocks/(\d+)/attn/proj/weight', 1)},
    hidden=hidden,
    head_size=None,
    head=None,
    per_layer=per_layer,
  )


_QWEN2_VISION = _qwen_vision(
  'embed_dim', {'hidden_size': Axis('merger/mlp/2/weight', 0)}
)
_QWEN2_5_VISION = _qwen_vision(
  'hidden_size',
  {
    'intermediate_size': Axis(r'blocks/(\d+)/mlp/gate_proj/weight', 0),
    'out_hidden_size': Axis('merger/mlp/2/weight', 0),
  },
  (_numbered('fullatt_block_indexes'),),
)

ARCHITECTURES: Mapping[str, Architecture] = {
  'llama': _llama(),
  'mistral': _llama(implied={}),
  'mixtral': _MIXTRAL,
  'qwen2': _QWEN,
  'qwen2_moe': _QWEN2_MOE,
  'qwen3': _QWEN3,
  'qwen3_moe': _QWEN3_MOE,
  'gemma': _GEMMA,
  'gemma2': _GEMMA2,
  'gemma3_text': _GEMMA3,
  'bert': _BERT,
  'roberta': _ROBERTA,
  'xlm-roberta': _ROBERTA,
  'distilbert': _DISTILBERT,
  'gpt2': _GPT2,
  't5': _T5,
  'mt5': _T5,
  'vit': _VIT,
  'clip': _CLIP_BOTH,
  'clip_text_model': _CLIP_TEXT,
  'clip_vision_model': _CLIP_VISION,
  'siglip_text_model': _SIGLIP_TEXT,
  'siglip_vision_model': _SIGLIP_VISION,
  'llama4_text': _LLAMA4,
  'llama4_vision_model': _LLAMA4_VISION,
  'qwen2_vl_text': _QWEN,
  'qwen2_5_vl_text': _QWEN,
  'qwen2_vl_vision': _QWEN2_VISION,
  'qwen2_5_vl_vision': _QWEN2_5_VISION,
}


# Parts.

# Configurations inside of others: what they describe is told by the names of
# towers in paths, since these lie differently in files of different ages.
_VISION = re.compile(r'vis(ion|ual)(_.*)?|image_encoder|vit')
_AUDIO = re.compile(r'(audio|speech)(_.*)?')
_TEXT_KEYS = ('text_config', 'llm_config', 'language_config')
_ROLES: Mapping[str, str] = {
  **dict.fromkeys(_TEXT_KEYS, 'text'),
  'vision_config': 'vision',
  # Older files of CLIP have these, too, and they decide.
  'text_config_dict': 'text',
  'vision_config_dict': 'vision',
  'audio_config': 'audio',
}
# What a part is where it does not say, by the whole and the role.
_KINDS: Mapping[str, Mapping[str, str]] = {
  'clip': {'text': 'clip_text_model', 'vision': 'clip_vision_model'},
  'siglip': {'text': 'siglip_text_model', 'vision': 'siglip_vision_model'},
  'gemma3': {'text': 'gemma3_text', 'vision': 'siglip_vision_model'},
  'paligemma': {'text': 'gemma', 'vision': 'siglip_vision_model'},
  'llava': {'text': 'llama', 'vision': 'clip_vision_model'},
  'llama4': {'text': 'llama4_text', 'vision': 'llama4_vision_model'},
  'qwen2_vl': {'text': 'qwen2_vl_text', 'vision': 'qwen2_vl_vision'},
  'qwen2_5_vl': {'text': 'qwen2_5_vl_text', 'vision': 'qwen2_5_vl_vision'},
}


@dataclasses.dataclass(frozen=True)
class Part:
  """A configuration, or one inside of it, and what it describes.

  Attributes:
    above: its key in the whole; empty for the whole itself.
    kind: the name of the architecture, empty where nothing says one.
    role: which tensors it describes: `text`, `vision`, `audio`, or all.
    architecture: what it states; None if that is not known.
  """

  above: str
  kind: str
  role: str
  architecture: Architecture | None

  def has(self, path: Path) -> bool:
    """Whether the part describes a tensor."""
    return not self.role or self.role == _role(path)

  def of(self, tensors: Tensors) -> Tensors:
    """Returns the tensors that the part describes."""
    if not self.role:
      return tensors
    return {path: leaf for path, leaf in tensors.items() if self.has(path)}

  def key(self, name: str) -> str:
    """Returns a key with dots between levels."""
    return f'{self.above}.{name}' if self.above else name


def _role(path: Path) -> str:
  for name in path:
    if _VISION.fullmatch(name):
      return 'vision'
    if _AUDIO.fullmatch(name):
      return 'audio'
  return 'text'


def parts(config: Config) -> Sequence[Part]:
  """Returns the parts of a configuration, those inside first."""
  kind = str(config.get('model_type') or '')
  kinds = _KINDS.get(kind, {})
  inner = [key for key in _ROLES if isinstance(config.get(key), dict)]
  found = []
  for key in inner:
    said, role = str(config[key].get('model_type') or ''), _ROLES[key]
    # Older files call parts as they call the whole.
    if not said or said == kind:
      said = kinds.get(role, said)
    found.append(Part(key, said, role, ARCHITECTURES.get(said)))
  flat = not any(key in _TEXT_KEYS for key in inner)
  if inner and flat and 'text' in kinds:
    # The language model is described by the whole itself.
    found.append(Part('', kind, 'text', ARCHITECTURES.get(kinds['text'])))
  else:
    found.append(Part('', kind, '', ARCHITECTURES.get(kind)))
  return found
