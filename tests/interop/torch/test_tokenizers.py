"""Vocabularies against the library of which `tokenizer.json` is."""

import json

import numpy as np
import pytest

import surgery
from surgery.files import tokenizers as ours

tokenizers = pytest.importorskip('tokenizers')

TEXTS = [
  ['the cat sat on the mat', 'a cat and a hat, the cat and the rat'] * 3,
  ['die Katze saß auf der Matte', 'der Hut und die Ratte, der Hut'] * 3,
]


def trained(kind, texts):
  from tokenizers import decoders, models, pre_tokenizers, trainers

  special = ['<s>', '</s>']
  if kind == 'BPE':
    one = tokenizers.Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=330,
      special_tokens=special,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
  elif kind == 'WordPiece':
    one = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    one.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
      vocab_size=60, special_tokens=['[UNK]', *special]
    )
  else:
    one = tokenizers.Tokenizer(models.Unigram())
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
      vocab_size=50, unk_token='<unk>', special_tokens=['<unk>', *special]
    )
  one.train_from_iterator(texts, trainer)
  one.add_tokens([f'<{kind}{len(texts[0])}>'])
  return one


@pytest.fixture(scope='module', params=['BPE', 'WordPiece', 'Unigram'])
def pair(request, tmp_path_factory):
  made = []
  for k, texts in enumerate(TEXTS):
    folder = tmp_path_factory.mktemp(f'{request.param}{k}')
    one = trained(request.param, texts)
    one.save(str(folder / 'tokenizer.json'))
    made.append((one, ours.read(folder)))
  return made


def test_numbers_are_those_of_the_library(pair):
  for theirs, one in pair:
    assert theirs.get_vocab() == dict(one.ids)


def test_parts_are_those_of_the_library(pair):
  (first, a), (second, b) = pair
  checked = 0
  for (theirs, one), other in (((first, a), b), ((second, b), a)):
    prefix = one.data['model'].get('continuing_subword_prefix')
    for token in other.ids:
      if token in one.ids or (prefix and token.startswith(prefix)):
        continue
      if token in other.added:
        want = theirs.encode(token, add_special_tokens=False).ids
      else:
        want = [t.id for t in theirs.model.tokenize(token)]
      unknown = {one.ids.get('[UNK]'), one.ids.get('<unk>')}
      if token in other.added and one.kind != 'BPE':
        continue  # Pre-tokenisers cut it first.
      assert [n for n in want if n not in unknown] == one.parts(
        token, token in other.added
      ), token
      checked += 1
  assert checked > 10


def test_the_library_reads_a_union(pair):
  (first, a), (second, b) = pair
  joined = ours.union([a, b])
  theirs = tokenizers.Tokenizer.from_str(ours.dumped(joined).decode())
  assert theirs.get_vocab() == dict(joined.ids)
  assert {**first.get_vocab()}.items() <= theirs.get_vocab().items()
  assert set(second.get_vocab()) <= set(theirs.get_vocab())
  # What both can write, it can.
  for text in (TEXTS[0][0], TEXTS[1][1]):
    found = theirs.encode(text)
    assert found.ids
    if a.kind == 'BPE':
      assert text == theirs.decode(found.ids)


def test_transformers_loads_a_merge_of_two_vocabularies(tmp_path, pair):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  folders = []
  for k, (_, one) in enumerate(pair):
    folder = tmp_path / f'{k}'
    config = transformers.LlamaConfig(
      vocab_size=one.size + 3 * k, hidden_size=16, intermediate_size=24,
      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
      bos_token_id=one.ids['<s>'], eos_token_id=one.ids['</s>'],
    )  # fmt: skip
    torch.manual_seed(k)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(one.path), bos_token='<s>', eos_token='</s>'
    )
    fast.save_pretrained(folder)
    folders.append(folder)
  out = tmp_path / 'out'
  recipe = surgery.Recipe(
    [{'combine': {'with': ['b'], 'tokens': 'union', 'missing-rows': 'parts'}}],
    inputs={'a': folders[0], 'b': folders[1]},
  )
  recipe.run(out=f'{out}/')
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  fast = transformers.AutoTokenizer.from_pretrained(out)
  wanted = ours.union([one for _, one in pair])
  assert dict(wanted.ids) == fast.get_vocab()
  table = model.get_input_embeddings().weight.detach().numpy()
  assert (wanted.size, 16) == table.shape
  assert pair[0][1].ids['</s>'] == model.config.eos_token_id
  rows = [
    np.asarray(surgery.open(folder)['model', 'embed_tokens', 'weight'].load())
    for folder in folders
  ]
  both = (rows[0][pair[0][1].ids['</s>']] + rows[1][pair[1][1].ids['</s>']]) / 2
  np.testing.assert_allclose(table[fast.eos_token_id], both, atol=1e-6)
  with torch.no_grad():
    logits = model(**fast(TEXTS[0][0], return_tensors='pt')).logits
  assert (
    json.loads((out / 'config.json').read_text())['vocab_size']
    == (logits.shape[-1])
  )
