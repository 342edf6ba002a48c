"""What a `config.json` states of a model's tensors, and edits to it.

Of architectures that are listed here each statement has a formula: how many
layers are numbered, how long an axis is. The formulae are evaluated on the
tensors that were read and on those that are written. Only what differs between
the two is changed in the configuration, and only where the configuration agreed
with the tensors before. So a statement that no step touched stays as it was,
whatever it means.

Sources: the classes `…Config` and `…Model` of transformers 5.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery import errors

if TYPE_CHECKING:
  from surgery.model.checkpoint import Leaf
  from surgery.naming.paths import Path

  Tensors = Mapping[Path, Leaf]

# The dtypes in which transformers loads a model by name.
_DTYPES = ('float64', 'float32', 'float16', 'bfloat16')
_DTYPE_KEYS = ('dtype', 'torch_dtype')


@dataclasses.dataclass(frozen=True)
class Change:
  """A statement of a configuration that is changed.

  Attributes:
    key: its key, with dots between levels.
    old: what it was; None where it was not stated.
    new: what it is.
    why: the tensors that decide it, or the option.
  """

  key: str
  old: Any
  new: Any
  why: str

  def to_json(self) -> dict[str, Any]:
    """Returns it as a plan shows it."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Edited:
  """A configuration for what is written.

  Attributes:
    config: the configuration.
    changes: what was changed.
    warnings: statements that look stale, a sentence each.
  """

  config: Mapping[str, Any]
  changes: tuple[Change, ...] = ()
  warnings: tuple[str, ...] = ()


# Formulae.


@dataclasses.dataclass(frozen=True)
class _Axis:
  """The length of an axis of the tensors whose paths end in a pattern."""

  pattern: str
  axis: int

  def __call__(self, tensors: Tensors) -> set[int]:
    return {
      shape[self.axis]
      for _, shape in _matched(self.pattern, tensors)
      if -len(shape) <= self.axis < len(shape)
    }

  def __str__(self) -> str:
    return f'axis {self.axis} of {_shown(self.pattern)}'


@dataclasses.dataclass(frozen=True)
class _Count:
  """The number of numbered layers; none where numbers are missing."""

  pattern: str

  def __call__(self, tensors: Tensors) -> set[int]:
    found = {int(match[1]) for match, _ in _matched(self.pattern, tensors)}
    return {len(found)} if found == set(range(len(found))) and found else set()

  def __str__(self) -> str:
    return f'layers of {_shown(self.pattern)}'


_Measure = _Axis | _Count


@dataclasses.dataclass(frozen=True)
class _Architecture:
  """What the configuration of an architecture states of its tensors.

  Attributes:
    layers: by key the number of layers.
    sizes: by key the length of an axis.
    heads: by key the number of heads; the axis has `heads * head size` places.
    hidden: key of the size that the head size divides by default.
    head_size: key of the size of a head, None if it cannot be stated.
    head: paths of what `tie_word_embeddings` leaves out.
    tied: whether it is left out by default.
    whole: keys that may be null for a multiple of another, with that one.
  """

  layers: Mapping[str, _Count]
  sizes: Mapping[str, _Axis]
  heads: Mapping[str, _Axis]
  hidden: str = 'hidden_size'
  head_size: str | None = 'head_dim'
  head: str = 'lm_head/weight'
  tied: bool = False
  whole: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)


def _llama(tied: bool = False) -> _Architecture:
  """Returns what Llama and those that are built as it is have in common."""
  layer = r'layers/(\d+)'
  return _Architecture(
    layers={'num_hidden_layers': _Count(rf'{layer}/.*')},
    sizes={
      'vocab_size': _Axis('embed_tokens/weight', 0),
      'hidden_size': _Axis('embed_tokens/weight', 1),
      'intermediate_size': _Axis(rf'{layer}/mlp/gate_proj/weight', 0),
    },
    heads={
      'num_attention_heads': _Axis(rf'{layer}/self_attn/q_proj/weight', 0),
      'num_key_value_heads': _Axis(rf'{layer}/self_attn/k_proj/weight', 0),
    },
    tied=tied,
  )


_BERT_LAYER = r'encoder/layer/(\d+)'
_BERT = _Architecture(
  layers={'num_hidden_layers': _Count(rf'{_BERT_LAYER}/.*')},
  sizes={
    'vocab_size': _Axis('embeddings/word_embeddings/weight', 0),
    'hidden_size': _Axis('embeddings/word_embeddings/weight', 1),
    'max_position_embeddings': _Axis(
      'embeddings/position_embeddings/weight', 0
    ),
    'type_vocab_size': _Axis('embeddings/token_type_embeddings/weight', 0),
    'intermediate_size': _Axis(rf'{_BERT_LAYER}/intermediate/dense/weight', 0),
  },
  heads={
    'num_attention_heads': _Axis(
      rf'{_BERT_LAYER}/attention/self/query/weight', 0
    )
  },
  head_size=None,
  head='cls/predictions/decoder/weight',
  tied=True,
)
_GPT2 = _Architecture(
  layers={'n_layer': _Count(r'h/(\d+)/.*')},
  sizes={
    'vocab_size': _Axis('wte/weight', 0),
    'n_embd': _Axis('wte/weight', 1),
    'n_positions': _Axis('wpe/weight', 0),
    'n_inner': _Axis(r'h/(\d+)/mlp/c_fc/weight', 1),
  },
  heads={'n_head': _Axis(r'h/(\d+)/attn/c_proj/weight', 0)},
  hidden='n_embd',
  head_size=None,
  tied=True,
  whole={'n_inner': ('n_embd', 4)},
)
_T5 = _Architecture(
  layers={
    'num_layers': _Count(r'encoder/block/(\d+)/.*'),
    'num_decoder_layers': _Count(r'decoder/block/(\d+)/.*'),
  },
  sizes={
    'vocab_size': _Axis('shared/weight', 0),
    'd_model': _Axis('shared/weight', 1),
    'd_ff': _Axis(r'block/(\d+)/layer/\d+/DenseReluDense/wo/weight', 1),
    'relative_attention_num_buckets': _Axis(
      'SelfAttention/relative_attention_bias/weight', 0
    ),
  },
  heads={'num_heads': _Axis(r'block/(\d+)/layer/0/SelfAttention/q/weight', 0)},
  hidden='d_model',
  head_size='d_kv',
  tied=True,
)
_VIT = _Architecture(
  layers={'num_hidden_layers': _Count(rf'{_BERT_LAYER}/.*')},
  sizes={
    'hidden_size': _Axis('embeddings/cls_token', 2),
    'num_channels': _Axis('embeddings/patch_embeddings/projection/weight', 1),
    'patch_size': _Axis('embeddings/patch_embeddings/projection/weight', 2),
    'intermediate_size': _Axis(rf'{_BERT_LAYER}/intermediate/dense/weight', 0),
  },
  heads={
    'num_attention_heads': _Axis(
      rf'{_BERT_LAYER}/attention/attention/query/weight', 0
    )
  },
  head_size=None,
)

ARCHITECTURES: Mapping[str, _Architecture] = {
  'llama': _llama(),
  'mistral': _llama(),
  'qwen2': _llama(),
  'qwen3': _llama(),
  'gemma': _llama(tied=True),
  'gemma2': _llama(tied=True),
  'gemma3_text': _llama(tied=True),
  'bert': _BERT,
  'gpt2': _GPT2,
  't5': _T5,
  'vit': _VIT,
}
# Of a head's size where a configuration that could state it does not.
_HEAD_SIZES = {'gemma': 256, 'gemma2': 256, 'gemma3_text': 256, 'qwen3': 128}


def _matched(
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


def _shown(pattern: str) -> str:
  """Returns a pattern as people read paths."""
  return pattern.replace(r'(\d+)', '<i>').replace(r'\d+', '*').replace(
    '.*', '**'
  )  # fmt: skip


# Edits.


def edited(
  config: Mapping[str, Any],
  before: Tensors | None,
  after: Tensors,
  *,
  given: Mapping[str, Any] | None = None,
  tied: bool = False,
  sources: Callable[[str], Sequence[int] | None] = lambda pattern: None,
) -> Edited:
  """Returns the configuration of what is written.

  Args:
    config: the configuration of what was read.
    before: the tensors that it described; None where they are not known.
    after: the tensors that are written.
    given: what the user states, by key with dots; it decides.
    tied: whether a step left out the head because the embedding stands for it.
    sources: returns for a pattern of numbered layers the old number of each new
      layer, or None where that is not known.

  Raises:
    SurgeryError: for a key of `given` beneath something that is no object.
  """
  editing = _Editing(config, before, after, given or {})
  kind = str(config.get('model_type', ''))
  known = ARCHITECTURES.get(kind)
  if known is not None:
    editing.known(kind, known, tied, sources)
  elif before is not None:
    editing.unknown(kind)
  editing.dtype()
  editing.given()
  return Edited(
    editing.config, tuple(editing.changes), tuple(dict.fromkeys(editing.said))
  )


class _Editing:
  """A configuration while it is edited."""

  def __init__(
    self,
    config: Mapping[str, Any],
    before: Tensors | None,
    after: Tensors,
    given: Mapping[str, Any],
  ) -> None:
    self.config = dict(config)
    self.changes: list[Change] = []
    self.said: list[str] = []
    self._before = before
    self._after = after
    self._given = given

  def _set(self, key: str, new: Any, why: str) -> None:
    """States something, unless the user does."""
    old = self.config.get(key)
    if key in self._given or old == new:
      return
    self.config[key] = new
    self.changes.append(Change(key, old, new, why))

  def _warn(self, text: str) -> None:
    self.said.append(text)

  def known(
    self,
    kind: str,
    one: _Architecture,
    tied: bool,
    sources: Callable[[str], Sequence[int] | None],
  ) -> None:
    """Edits the configuration of an architecture that is known."""
    measures: dict[str, _Measure] = {**one.layers, **one.sizes}
    found = [m(self._after) for m in (*measures.values(), *one.heads.values())]
    if not any(found):
      self._warn(
        f'config.json describes {kind!r}, and no tensor that is written has '
        'a name of that architecture, so it is copied as it is.'
      )
      return
    size = self._head_size(kind, one)
    for key, measure in measures.items():
      old = self.config.get(key)
      self._measured(key, measure, 1, one)
      new = self.config.get(key)
      if key in one.layers and isinstance(old, int) and old != new:
        self._per_layer(key, old, new, sources(measure.pattern))
    for key, measure in one.heads.items():
      if size is not None:
        self._measured(key, measure, size, one)
    self._state_head_size(kind, one, size)
    self._tie(one, tied)
    self._check_tokens()
    self._check_labels()

  def _measured(
    self, key: str, measure: _Measure, by: int, one: _Architecture
  ) -> None:
    """States what a formula gives, if it gives something else than before."""
    after = measure(self._after)
    before = None if self._before is None else measure(self._before)
    if after == before:
      return
    stated = self._stated(key, one)
    if not after:
      if before and key in self.config:
        self._warn(
          f'{key} is {self.config[key]} in config.json, and no tensor tells it '
          f'any more ({measure}).'
        )
      return
    if len(after) > 1:
      self._warn(
        f'{key}: config.json has one number, and the tensors have '
        f'{_listed(after)} ({measure}).'
      )
      return
    [size] = after
    if size % by:
      self._warn(
        f'{key}: {size} places cannot be heads of {by} each ({measure}).'
      )
      return
    if before is not None and stated is not None and before != {stated * by}:
      self._warn(
        f'{key} is {stated} in config.json and {_listed(before)} in the '
        f'tensors that were read ({measure}), so it is left as it is.'
      )
      return
    if stated != size // by:
      self._set(key, size // by, str(measure))

  def _stated(self, key: str, one: _Architecture) -> int | None:
    """Returns what the configuration states, or states by leaving it out."""
    value = self.config.get(key)
    if value is None and key in one.whole:
      other, factor = one.whole[key]
      # The other may have been changed already; it decides all the same.
      base = self.config.get(other)
      return base * factor if isinstance(base, int) else None
    if value is None and key == 'num_key_value_heads':
      value = self.config.get('num_attention_heads')
    return value if isinstance(value, int) else None

  def _head_size(self, kind: str, one: _Architecture) -> int | None:
    """Returns the size of a head, which no step changes."""
    stated = self.config.get(one.head_size) if one.head_size else None
    if isinstance(stated, int) and stated > 0:
      return stated
    if kind in _HEAD_SIZES:
      return _HEAD_SIZES[kind]
    hidden = self.config.get(one.hidden)
    heads = self.config.get(next(iter(one.heads)))
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
      return hidden // heads
    return None

  def _state_head_size(
    self, kind: str, one: _Architecture, size: int | None
  ) -> None:
    """Sees to it that the size of a head is what it was."""
    if size is None or not self.changes:
      return
    if one.head_size and self.config.get(one.head_size) is not None:
      return
    if kind in _HEAD_SIZES:
      return
    first = next(iter(one.heads))
    hidden, heads = self.config.get(one.hidden), self.config.get(first)
    if not isinstance(hidden, int) or not isinstance(heads, int) or not heads:
      return
    if hidden == heads * size:
      return
    if one.head_size:
      self._set(one.head_size, size, f'{one.hidden} is not {first} times it')
    else:
      self._warn(
        f'{first}: {heads} heads of {size} are not {one.hidden} = {hidden}, '
        f'which transformers expects of {kind!r}: it cannot load this model.'
      )

  def _per_layer(
    self, key: str, old: int, new: Any, source: Sequence[int] | None
  ) -> None:
    """Edits lists that have an item for each layer."""
    for name, value in list(self.config.items()):
      if not isinstance(value, list) or len(value) != old or old < 2:
        continue
      if isinstance(new, int) and all(item == value[0] for item in value):
        self._set(name, [value[0]] * new, f'an item for each of {key}')
      elif source is not None and len(source) == new:
        self._set(
          name, [value[k] for k in source], f'an item for each of {key}'
        )
      else:
        self._warn(
          f'{name} has {old} items in config.json, one for each of {key}, '
          f'which is {new} now. State it with --config {name}=….'
        )

  def _tie(self, one: _Architecture, tied: bool) -> None:
    """States whether the head is the embedding."""
    if self._before is None:
      return
    was, now = (
      any(True for _ in _matched(one.head, t))
      for t in (self._before, self._after)
    )
    key = 'tie_word_embeddings'
    stated = self.config.get(key, one.tied)
    if now and not was and stated:
      self._set(key, False, f'{one.head} is there')
    elif was and not now and not stated:
      if tied:
        self._set(key, True, f'{one.head} was tied')
      elif key not in self._given:
        self._warn(
          f'{one.head} is gone, and {key} is false in config.json: '
          'transformers would draw a new head. If the embedding stands for it, '
          f'state --config {key}=true.'
        )

  def _check_tokens(self) -> None:
    """Warns of tokens that the vocabulary has not any more."""
    size = self.config.get('vocab_size')
    if not isinstance(size, int):
      return
    if not any(change.key == 'vocab_size' for change in self.changes):
      return
    for name, value in tokens(self.config, size):
      self._warn(
        f'{name} is {value} in config.json, and the vocabulary has {size} '
        'tokens.'
      )

  def _check_labels(self) -> None:
    """Warns of names of classes that there are not any more."""
    names = self.config.get('id2label')
    if self._before is None or not isinstance(names, dict):
      return
    for pattern in ('classifier/weight', 'score/weight'):
      rows = _Axis(pattern, 0)
      was, now = rows(self._before), rows(self._after)
      if was != now and was == {len(names)} and now:
        self._warn(
          f'id2label has {len(names)} names in config.json, and {pattern} has '
          f'{_listed(now)} rows.'
        )

  def dtype(self) -> None:
    """States the dtype of most numbers."""
    now = _common_dtype(self._after)
    was = None if self._before is None else _common_dtype(self._before)
    keys = [k for k in _DTYPE_KEYS if isinstance(self.config.get(k), str)]
    if now is None or now == was:
      return
    for key in keys:
      stated = self.config[key].removeprefix('torch.')
      if was is not None and stated != was:
        self._warn(
          f'{key} is {stated} in config.json, and most numbers that were read '
          f'are {was}, so it is left as it is.'
        )
      elif now in _DTYPES:
        self._set(key, now, 'the dtype of most numbers')
      else:
        self._warn(
          f'{key} is {stated} in config.json, and most numbers are {now}, '
          'which transformers does not load by its name.'
        )

  def unknown(self, kind: str) -> None:
    """Warns of what looks stale where the architecture is not known."""
    assert self._before is not None
    was, now = _facts(self._before), _facts(self._after)
    stale = [
      f'{key} = {value}'
      for key, value in _numbers(self.config)
      if key not in self._given and _looks_stale(key, value, was, now)
    ]
    if stale:
      shown = repr(kind) if kind else 'of no model_type'
      self._warn(
        f'the architecture {shown} is not known, so config.json is copied; '
        f'these look stale: {", ".join(stale)}. State them with --config '
        'KEY=VALUE.'
      )

  def given(self) -> None:
    """States what the user does."""
    for key, value in self._given.items():
      *above, last = key.split('.')
      inside: Any = self.config
      for name in above:
        inner = inside.get(name, {})
        if not isinstance(inner, dict):
          raise errors.SurgeryError(
            f'--config {key}: {name!r} is {inner!r:.80} in config.json, and '
            'nothing lies beneath it.'
          )
        # Another level of the caller's configuration must not be changed.
        inside[name] = dict(inner)
        inside = inside[name]
      old = inside.get(last)
      if last not in inside or old != value or type(old) is not type(value):
        inside[last] = value
        self.changes.append(Change(key, old, value, 'given'))


def _listed(sizes: Iterable[int]) -> str:
  return ' and '.join(map(str, sorted(sizes))) or 'none'


def _common_dtype(tensors: Tensors) -> str | None:
  """Returns the floating dtype that most numbers have."""
  counts: collections.Counter[str] = collections.Counter()
  for leaf in tensors.values():
    if leaf.dtype is not None and 'float' in leaf.dtype and leaf.codes is None:
      counts[leaf.dtype] += leaf.size
  return max(counts, key=lambda name: counts[name], default=None)


# What looks stale where nothing is known.

_OF_LAYERS = re.compile(r'layer|depth|block')
_OF_AXES = re.compile(r'vocab|hidden|embd|embed|dim|d_model|d_ff|inner|size')


@dataclasses.dataclass(frozen=True)
class _Facts:
  """Numbers that tensors have.

  Attributes:
    layers: how many layers are numbered beneath some place.
    axes: lengths of axes.
  """

  layers: frozenset[int]
  axes: frozenset[int]


def _facts(tensors: Tensors) -> _Facts:
  numbered: dict[Path, set[str]] = {}
  axes: set[int] = set()
  for path, leaf in tensors.items():
    axes.update(leaf.shape or ())
    for at, name in enumerate(path):
      if name.isdigit():
        numbered.setdefault(path[:at], set()).add(name)
  return _Facts(frozenset(map(len, numbered.values())), frozenset(axes))


def _numbers(config: Mapping[str, Any], above: str = '') -> Iterator[Any]:
  """Yields whole numbers of a configuration, with their keys."""
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _numbers(value, f'{above}{key}.')
    elif type(value) is int and value > 1:
      yield f'{above}{key}', value


def _looks_stale(key: str, value: int, was: _Facts, now: _Facts) -> bool:
  """Whether a number was one of the tensors', and is none any more."""
  if _OF_LAYERS.search(key):
    return value in was.layers and value not in now.layers
  if _OF_AXES.search(key):
    return value in was.axes and value not in now.axes
  return False


def tokens(config: Mapping[str, Any], size: int) -> Iterator[tuple[str, Any]]:
  """Yields statements of tokens that a vocabulary of some size has not."""
  for name, value in config.items():
    values = value if isinstance(value, list) else [value]
    numbers = [v for v in values if type(v) is int]
    if name.endswith('_token_id') and any(v >= size for v in numbers):
      yield name, value


def value_of(text: str) -> Any:
  """Returns what `KEY=VALUE` states: JSON, or text where it is none."""
  try:
    return json.loads(text)
  except ValueError:
    return text


def shown(value: Any) -> str:
  """Returns a value as a plan shows it."""
  text = json.dumps(value, ensure_ascii=False, default=str)
  return text if len(text) <= 60 else f'{text[:59]}…'
