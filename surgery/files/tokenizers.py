"""Vocabularies, as `tokenizer.json` of Hugging Face's tokenizers has them.

Only what decides about rows of embeddings is read: which token has which
number, and how a token is put together of smaller ones. Text is never cut into
words here, so that no library is needed: a token of one vocabulary is looked
up in another as it is written there.

Source: `tokenizers` 0.22, `models/*/serialization.rs`, `added_vocabulary.rs`.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.files import strict_json

NAME = 'tokenizer.json'
# What belongs to a tokenizer in a model folder.
FILES = (
  'tokenizer*',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  '*.tiktoken',
  'spiece.model',
  'sentencepiece*.model',
  'tekken.json',
  'chat_template*',
)
# Of these, what a longer vocabulary leaves as it is.
_KEPT = ('tokenizer_config.json', 'special_tokens_map.json', 'chat_template*')
_TYPES = ('BPE', 'WordPiece', 'WordLevel', 'Unigram')
# A character that no piece has costs so much more than the rarest piece.
_UNKNOWN = 10.0
# Options of a pre-tokeniser that do not change what a token means.
_OF_OFFSETS = ('trim_offsets',)
# What an added token says, where it says nothing.
_PLAIN = {
  'single_word': False,
  'lstrip': False,
  'rstrip': False,
  'normalized': False,
  'special': False,
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A vocabulary, and what it was read from.

  Attributes:
    path: the file.
    data: what it says.
    ids: numbers of all tokens, added ones too.
    added: what is said of added tokens, by their text.
  """

  path: pathlib.Path
  data: Mapping[str, Any]
  ids: Mapping[str, int]
  added: Mapping[str, Mapping[str, Any]]

  @functools.cached_property
  def size(self) -> int:
    """One more than the largest number."""
    return max(self.ids.values(), default=-1) + 1

  @functools.cached_property
  def tokens(self) -> Mapping[int, str]:
    """Tokens by number."""
    return {number: token for token, number in self.ids.items()}

  @property
  def kind(self) -> str:
    """The kind of model: BPE, WordPiece, WordLevel or Unigram."""
    return _kind(self.data['model'])

  @functools.cached_property
  def _parts(self) -> _Parts:
    return _Parts(self)

  def parts(self, token: str, plain: bool = False) -> list[int]:
    """Returns the numbers of the smaller tokens that a token consists of.

    Args:
      token: a token of another vocabulary.
      plain: whether it is plain text, as added tokens are.

    Returns:
      Numbers in order; without what this vocabulary has no token for.
    """
    return self._parts(token, plain)


def found(origin: str) -> pathlib.Path | None:
  """Returns the `tokenizer.json` beside a saved model, if there is one."""
  if not origin:
    return None
  path = pathlib.Path(origin)
  beside = (path if path.is_dir() else path.parent) / NAME
  return beside if beside.is_file() else None


def read(path: str | os.PathLike[str]) -> Tokenizer:
  """Reads a vocabulary.

  Args:
    path: a `tokenizer.json`, or the folder that has one.

  Raises:
    FormatError: if it is none, or a number or token occurs twice.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    file = file / NAME
  if not file.is_file():
    raise errors.FormatError(f'{file}: there is no such file.{_hint(file)}')
  data = strict_json.loads(file.read_bytes(), str(file))
  with errors.within(str(file)):
    model = data.get('model')
    if not isinstance(model, dict) or _kind(model) not in _TYPES:
      raise errors.FormatError(
        'expected a tokenizer.json with a model of the type '
        f'{", ".join(_TYPES)}, found '
        f'{model.get("type") if isinstance(model, dict) else model!r:.80}.'
      )
    ids = _numbers(model)
    tokens: dict[int, str] = {}
    for token, number in ids.items():
      _place(tokens, token, number)
    added = {}
    for one in _added(data):
      text, number = one['content'], one['id']
      if ids.setdefault(text, number) != number:
        raise errors.FormatError(
          f'the token {text!r} has two numbers, {ids[text]} and {number}. '
          'Leave out one of them.'
        )
      if tokens.get(number) != text:
        _place(tokens, text, number)
      added[text] = one
  return Tokenizer(file, data, ids, added)


def _hint(file: pathlib.Path) -> str:
  """Says what to do where there are other files of a tokenizer."""
  folder = file.parent
  there = []
  if file.name == NAME and folder.is_dir():
    there = sorted(p.name for p in folder.iterdir() if is_part(p.name))
  if not there:
    return ' Give the tokenizer.json of the model.'
  return (
    f' There is {there[0]}, and only tokenizer.json is read. '
    "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained("
    'FOLDER) writes one.'
  )


def is_part(name: str, patterns: Sequence[str] = FILES) -> bool:
  """Whether a file of a model folder belongs to the tokenizer."""
  return any(fnmatch.fnmatchcase(name, one) for one in patterns)


def _kind(model: Mapping[str, Any]) -> str:
  """Returns the kind of model, which old files leave out."""
  said = model.get('type')
  if said is not None:
    return str(said)
  if isinstance(model.get('vocab'), list):
    return 'Unigram'
  return 'BPE' if 'merges' in model else 'WordPiece'


def _numbers(model: Mapping[str, Any]) -> dict[str, int]:
  """Returns the numbers of the model's own tokens.

  Raises:
    FormatError: if they cannot be read.
  """
  vocab = model.get('vocab')
  if _kind(model) == 'Unigram':
    if not isinstance(vocab, list) or not all(map(_is_piece, vocab)):
      raise errors.FormatError(
        'model: vocab: expected a list of pieces with scores.'
      )
    found: dict[str, int] = {}
    for number, (piece, _) in enumerate(vocab):
      if piece in found:
        raise errors.FormatError(
          f'the token {piece!r} has two numbers, {found[piece]} and {number}. '
          'Leave out one of them.'
        )
      found[piece] = number
    return found
  if not isinstance(vocab, dict) or not all(
    type(n) is int and n >= 0 for n in vocab.values()
  ):
    raise errors.FormatError('model: vocab: expected numbers by token.')
  return dict(vocab)


def _is_piece(one: Any) -> bool:
  return (
    isinstance(one, list)
    and len(one) == 2
    and isinstance(one[0], str)
    and isinstance(one[1], (int, float))
  )


def _added(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  said = data.get('added_tokens') or []
  good = isinstance(said, list) and all(
    isinstance(one, dict)
    and isinstance(one.get('content'), str)
    and type(one.get('id')) is int
    and one['id'] >= 0
    for one in said
  )
  if not good:
    raise errors.FormatError(
      'added_tokens: expected a list of objects with id and content.'
    )
  return list(said)


def _place(tokens: dict[int, str], token: str, number: int) -> None:
  """Gives a number to a token.

  Raises:
    FormatError: if another token has it.
  """
  if tokens.setdefault(number, token) != token:
    raise errors.FormatError(
      f'two tokens have the number {number}: {tokens[number]!r} and {token!r}. '
      'Their rows cannot be told apart; give one of them another number.'
    )


# What tokens mean.


def differing(a: Tokenizer, b: Tokenizer) -> list[str]:
  """Returns in what two tokenizers differ that changes what tokens mean."""
  ours, theirs = _pipeline(a), _pipeline(b)
  return [name for name, value in ours.items() if theirs[name] != value]


def _pipeline(one: Tokenizer) -> dict[str, Any]:
  model = one.data['model']
  return {
    'type': one.kind,
    'normalizer': one.data.get('normalizer'),
    'pre_tokenizer': _plain(one.data.get('pre_tokenizer')),
    'continuing_subword_prefix': model.get('continuing_subword_prefix') or '',
    'end_of_word_suffix': model.get('end_of_word_suffix') or '',
    'byte_fallback': bool(model.get('byte_fallback')),
  }


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items() if k not in _OF_OFFSETS}
  return [_plain(v) for v in value] if isinstance(value, list) else value


def conflict(a: Tokenizer, b: Tokenizer) -> tuple[int, str, str] | None:
  """Returns the first number that is another token's in the other one."""
  if a.ids == b.ids:
    return None
  both = sorted(a.tokens.keys() & b.tokens.keys())
  for number in both:
    if a.tokens[number] != b.tokens[number]:
      return number, a.tokens[number], b.tokens[number]
  return None


class _Parts:
  """From a token to the smaller ones of another vocabulary.

  Args:
    tokenizer: the vocabulary.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._ids = tokenizer.ids
    model = tokenizer.data['model']
    self._prefix = model.get('continuing_subword_prefix') or ''
    self._suffix = model.get('end_of_word_suffix') or ''
    self._fallback = bool(model.get('byte_fallback'))
    kind = tokenizer.kind
    if kind == 'BPE':
      # Of two rules for one pair the first decides.
      self._ranks: dict[tuple[str, str], int] = {}
      for pair in _merges(model):
        self._ranks.setdefault(pair, len(self._ranks))
    if kind == 'Unigram':
      self._scores = {piece: float(score) for piece, score in model['vocab']}
      self._worst = min(self._scores.values(), default=0.0) - _UNKNOWN
      self._longest = max(map(len, self._scores), default=1)
    self._cut = {
      'BPE': self._bpe,
      'WordPiece': self._wordpiece,
      'Unigram': self._unigram,
    }.get(kind, lambda token: [])
    said = json.dumps(
      [tokenizer.data.get(k) for k in ('normalizer', 'pre_tokenizer')],
      ensure_ascii=False,
    )
    self._bytes = '"ByteLevel"' in said
    self._spaces = '▁' in said

  def __call__(self, token: str, plain: bool) -> list[int]:
    if plain and self._bytes:
      token = ''.join(_BYTES[b] for b in token.encode())
    elif plain and self._spaces:
      token = token.replace(' ', '▁')
    pieces = self._cut(token) if token else []
    return [self._ids[one] for one in pieces if one in self._ids]

  def _bpe(self, token: str) -> list[str]:
    """Joins neighbours by the rule that was learned first, while there is one.

    Sennrich et al. 2016, "Neural machine translation of rare words with subword
    units".
    """
    ends = bool(self._suffix) and token.endswith(self._suffix)
    goes_on = bool(self._prefix) and token.startswith(self._prefix)
    text = token.removesuffix(self._suffix) if ends else token
    text = text.removeprefix(self._prefix) if goes_on else text
    symbols = list(text)
    for k in range(len(symbols)):
      if self._prefix and (k or goes_on):
        symbols[k] = self._prefix + symbols[k]
    if ends and symbols:
      symbols[-1] += self._suffix
    symbols = [piece for one in symbols for piece in self._known(one)]
    while len(symbols) > 1:
      pairs = itertools.pairwise(symbols)
      ranked = [self._ranks.get(pair, math.inf) for pair in pairs]
      best = min(ranked)
      if best == math.inf:
        break
      at = ranked.index(best)
      joined = symbols[at] + symbols[at + 1].removeprefix(self._prefix)
      symbols[at : at + 2] = [joined]
    return symbols

  def _known(self, symbol: str) -> list[str]:
    """Returns a character, or its bytes where the vocabulary has only these."""
    if symbol in self._ids or not self._fallback:
      return [symbol]
    return [f'<0x{byte:02X}>' for byte in symbol.encode()]

  def _wordpiece(self, token: str) -> list[str]:
    """Takes the longest piece again and again (Wu et al. 2016)."""
    goes_on = bool(self._prefix) and token.startswith(self._prefix)
    text = token.removeprefix(self._prefix) if goes_on else token
    pieces, at = [], 0
    while at < len(text):
      prefix = self._prefix if at or goes_on else ''
      end = next(
        (
          e
          for e in range(len(text), at, -1)
          if prefix + text[at:e] in self._ids
        ),
        None,
      )
      if end is None:
        return []
      pieces.append(prefix + text[at:end])
      at = end
    return pieces

  def _unigram(self, token: str) -> list[str]:
    """Finds the likeliest pieces (Kudo 2018; Viterbi's algorithm)."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(token) + 1):
      # A character alone is always possible, at a price.
      choices = [(best[end - 1][0] + self._worst, end - 1)]
      for start in range(max(0, end - self._longest), end):
        score = self._scores.get(token[start:end])
        if score is not None:
          choices.append((best[start][0] + score, start))
      best.append(max(choices, key=lambda c: c[0]))
    pieces: list[str] = []
    at = len(token)
    while at:
      start = best[at][1]
      pieces[:0] = self._known(token[start:at])
      at = start
    return pieces


def _byte_letters() -> list[str]:
  """Returns the letters for which byte-level vocabularies have bytes.

  Radford et al. 2019 (GPT-2): printable bytes stand for themselves, the others
  are numbered from 256 on.
  """
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(b if b in shown else next(others)) for b in range(256)]


_BYTES = _byte_letters()


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields the pairs that are joined.

  Raises:
    FormatError: for a rule that is no pair.
  """
  for one in model.get('merges') or ():
    pair = one.split(' ') if isinstance(one, str) else one
    if not isinstance(pair, list) or len(pair) != 2:
      raise errors.FormatError(
        f'model: merges: expected pairs of tokens, found {one!r:.80}.'
      )
    yield str(pair[0]), str(pair[1])


# Joined.


def union(every: Sequence[Tokenizer]) -> Tokenizer:
  """Returns a vocabulary that has the tokens of all.

  Those of the first keep their numbers, so that whatever names a token by its
  number stays true; others follow, in the order of the models and of their
  numbers. What else there is (normaliser, special tokens) is the first's.

  Args:
    every: vocabularies of one kind.

  Raises:
    FormatError: if they cannot be joined.
  """
  first = every[0]
  data = copy.deepcopy(dict(first.data))
  model = data['model']
  ids = dict(first.ids)
  added = {token: dict(one) for token, one in first.added.items()}
  next_ = first.size
  for other in every[1:]:
    if other.kind != first.kind:
      raise errors.FormatError(
        f'{first.path} is of the type {first.kind} and {other.path} of the '
        f'type {other.kind}, so they have no union. Take the tokens of one of '
        'the models.'
      )
    for token, _ in sorted(other.ids.items(), key=lambda item: item[1]):
      if token not in ids:
        ids[token] = next_
        next_ += 1
        if token in other.added:
          added[token] = {**_PLAIN, **other.added[token], 'id': ids[token]}
  with errors.within(str(first.path)):
    if first.kind == 'Unigram':
      model['vocab'] = _pieces(every, ids)
    else:
      # The library would number added tokens anew that the model has not.
      model['vocab'] = dict(sorted(ids.items(), key=lambda item: item[1]))
    if first.kind == 'BPE':
      model['merges'] = _joined(every)
    data['added_tokens'] = sorted(added.values(), key=lambda one: one['id'])
  return Tokenizer(first.path, data, ids, added)


def _pieces(
  every: Sequence[Tokenizer], ids: Mapping[str, int]
) -> list[list[Any]]:
  """Returns pieces with scores: their place is their number.

  Raises:
    FormatError: if there is a number that no token has.
  """
  scores: dict[str, float] = {}
  for one in reversed(every):
    scores.update(dict(one.data['model']['vocab']))
  order = sorted(ids, key=lambda token: ids[token])
  for number, token in enumerate(order):
    if ids[token] != number:
      raise errors.FormatError(
        f'no token has the number {number}, and pieces are numbered by their '
        'place. Take the tokens of one of the models.'
      )
  return [[token, scores.get(token, 0.0)] for token in order]


def _joined(every: Sequence[Tokenizer]) -> list[Any]:
  """Returns the rules of all models, each once, the first model's first."""
  pairs: dict[tuple[str, str], None] = {}
  for one in every:
    with errors.within(str(one.path)):
      pairs.update(dict.fromkeys(_merges(one.data['model'])))
  said = every[0].data['model'].get('merges') or []
  as_text = all(isinstance(one, str) for one in said)
  if as_text and not any(' ' in a + b for a, b in pairs):
    return [f'{a} {b}' for a, b in pairs]
  return [list(pair) for pair in pairs]


def along(tokenizer: Tokenizer, changed: bool) -> dict[str, pathlib.Path]:
  """Returns the files of a tokenizer's folder that go with it, by name.

  Args:
    tokenizer: the vocabulary.
    changed: whether it has more tokens than its files say; then only those go
      along that stay true.
  """
  folder = tokenizer.path.parent
  if tokenizer.path.name != NAME:
    return {} if changed else {NAME: tokenizer.path}
  wanted = _KEPT if changed else FILES
  return {
    path.name: path
    for path in sorted(folder.iterdir())
    if path.is_file() and is_part(path.name, wanted)
  }


def dumped(tokenizer: Tokenizer) -> bytes:
  """Returns a vocabulary as a `tokenizer.json`."""
  text = json.dumps(tokenizer.data, ensure_ascii=False, indent=2)
  return f'{text}\n'.encode()
