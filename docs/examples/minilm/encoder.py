"""A BERT encoder of blox's layers, with the names of `--map bert-blox`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import unicodedata
from collections.abc import Sequence

import blox as bx
import jax
import jax.numpy as jnp

Made = tuple[jax.Array, bx.Params]


@dataclasses.dataclass(frozen=True)
class Config:
  """What of a `config.json` the encoder needs."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_attention_heads: int
  num_hidden_layers: int
  max_position_embeddings: int
  type_vocab_size: int
  layer_norm_eps: float

  @classmethod
  def load(cls, folder: pathlib.Path) -> Config:
    """Reads it from a model folder."""
    said = json.loads((folder / 'config.json').read_text())
    return cls(**{f.name: said[f.name] for f in dataclasses.fields(cls)})


class Block(bx.Module):
  """A linear layer, whose sum with a residue is normalised."""

  def __init__(self, graph: bx.Graph, config: Config, rng: bx.Rng) -> None:
    super().__init__(graph)
    size, epsilon = config.hidden_size, config.layer_norm_eps
    self.dense = bx.Linear(graph.child('dense'), size, rng=rng)
    self.norm = bx.LayerNorm(graph.child('LayerNorm'), epsilon)

  def __call__(
    self, params: bx.Params, x: jax.Array, residue: jax.Array
  ) -> Made:
    """Returns features (…, hidden) of features (…, inputs)."""
    x, params = self.dense(params, x)
    return self.norm(params, x + residue)


class Layer(bx.Module):
  """Attention and a feed-forward layer, each with its residue."""

  def __init__(self, graph: bx.Graph, config: Config, rng: bx.Rng) -> None:
    super().__init__(graph)
    self.heads = config.num_attention_heads
    attention, inner = graph.child('attention'), graph.child('intermediate')
    own, size = attention.child('self'), config.hidden_size
    self.query = bx.Linear(own.child('query'), size, rng=rng)
    self.key = bx.Linear(own.child('key'), size, rng=rng)
    self.value = bx.Linear(own.child('value'), size, rng=rng)
    self.attended = Block(attention.child('output'), config, rng)
    wide = config.intermediate_size
    self.wide = bx.Linear(inner.child('dense'), wide, rng=rng)
    self.output = Block(graph.child('output'), config, rng)

  def __call__(self, params: bx.Params, x: jax.Array, mask: jax.Array) -> Made:
    """Returns features (texts, tokens, hidden) of such."""
    split = lambda a: a.reshape(*a.shape[:-1], self.heads, -1)
    query, params = self.query(params, x)
    key, params = self.key(params, x)
    value, params = self.value(params, x)
    met = jax.nn.dot_product_attention(
      split(query), split(key), split(value), mask=mask[:, None, None, :]
    )
    x, params = self.attended(params, met.reshape(x.shape), x)
    wide, params = self.wide(params, x)
    return self.output(params, jax.nn.gelu(wide, approximate=False), x)


class Embeddings(bx.Module):
  """The sum of the embeddings of words, positions and types, normalised."""

  def __init__(self, graph: bx.Graph, config: Config, rng: bx.Rng) -> None:
    super().__init__(graph)

    def table(name: str, rows: int) -> bx.Embed:
      return bx.Embed(graph.child(name), rows, config.hidden_size, rng)

    self.words = table('word_embeddings', config.vocab_size)
    self.places = table('position_embeddings', config.max_position_embeddings)
    self.types = table('token_type_embeddings', config.type_vocab_size)
    self.norm = bx.LayerNorm(graph.child('LayerNorm'), config.layer_norm_eps)

  def __call__(self, params: bx.Params, ids: jax.Array) -> Made:
    """Returns features (texts, tokens, hidden) of tokens."""
    words, params = self.words(params, ids)
    places, params = self.places(params, jnp.arange(ids.shape[1]))
    types, params = self.types(params, jnp.zeros_like(ids))
    return self.norm(params, words + places + types)


class Sentences:
  """Sentence embeddings: the mean of a text's tokens, of length 1.

  Args:
    graph: the root of the model's names.
    config: the sizes.
  """

  def __init__(self, graph: bx.Graph, config: Config) -> None:
    rng = bx.Rng(graph.child('rng'))
    layers = graph.child('encoder').child('layer')
    self.embeddings = Embeddings(graph.child('embeddings'), config, rng)
    self.layers = [
      Layer(layers.child(str(k)), config, rng)
      for k in range(config.num_hidden_layers)
    ]

  def features(
    self, params: bx.Params, ids: jax.Array, mask: jax.Array
  ) -> Made:
    """Returns features (texts, tokens, hidden) of tokens (texts, tokens)."""
    x, params = self.embeddings(params, ids)
    for layer in self.layers:
      x, params = layer(params, x, mask)
    return x, params

  def __call__(
    self, params: bx.Params, ids: jax.Array, mask: jax.Array
  ) -> Made:
    """Returns embeddings (texts, hidden) of tokens (texts, tokens)."""
    x, params = self.features(params, ids, mask)
    weights = mask[..., None].astype(x.dtype)
    mean = (x * weights).sum(1) / weights.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True), params


class Tokenizer:
  """WordPiece of uncased BERT, from the `vocab.txt` of a model folder."""

  def __init__(self, folder: pathlib.Path) -> None:
    lines = (folder / 'vocab.txt').read_text(encoding='utf-8').splitlines()
    self.ids = {word: number for number, word in enumerate(lines)}

  def __call__(self, texts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and which of them are no padding, (texts, tokens)."""
    rows = [['[CLS]', *self._pieces(text), '[SEP]'] for text in texts]
    length = max(map(len, rows))
    padded = [row + ['[PAD]'] * (length - len(row)) for row in rows]
    ids = jnp.array([[self.ids[word] for word in row] for row in padded])
    return ids, ids != self.ids['[PAD]']

  def _pieces(self, text: str) -> list[str]:
    plain = unicodedata.normalize('NFD', text.lower())
    plain = ''.join(c for c in plain if unicodedata.category(c) != 'Mn')
    # Punctuation is a word of its own.
    spaced = ''.join(
      c if c.isalnum() or c.isspace() else f' {c} ' for c in plain
    )
    return [piece for word in spaced.split() for piece in self._split(word)]

  def _split(self, word: str) -> list[str]:
    pieces, start = [], 0
    while start < len(word):
      mark = '##' if start else ''
      ends = range(len(word), start, -1)
      end = next((e for e in ends if mark + word[start:e] in self.ids), None)
      if end is None:
        return ['[UNK]']
      pieces.append(mark + word[start:end])
      start = end
    return pieces
