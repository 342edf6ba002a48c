"""Models of two vocabularies: rows follow tokens."""

import json
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import surgery
from surgery.editing import regions
from surgery.files import tokenizers
from surgery.model import grid as grids
from tests.methods.vocabularies import bpe, expected, ids, saved, values

A = ['<s>', '</s>', 'a', 'b', 'c', 'ab', 'abc']
B = ['</s>', '<s>', 'b', 'a', 'd', 'ba', 'bad', 'c']
MERGES_A = [('a', 'b'), ('ab', 'c')]
MERGES_B = [('b', 'a'), ('ba', 'd')]
SPECIAL = ['<s>', '</s>']
PARTS = {'ab': 'ab', 'abc': 'abc', 'd': '', 'ba': 'ba', 'bad': 'ba'}


def tensors(rows, seed, width=4, dtype='float32', **more):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return {
    'model/embed_tokens/weight': draw(rows, width),
    'model/layers/0/mlp/up/weight': draw(width, width),
    'lm_head/weight': draw(rows, width),
    **more,
  }


@pytest.fixture
def pair(tmp_path):
  """Two model folders, and what lies in them."""
  a, b = tensors(len(A) + 3, 0), tensors(len(B), 1)
  config = lambda rows, first: {
    'vocab_size': rows, 'bos_token_id': first, 'eos_token_id': [1 - first],
  }  # fmt: skip
  one = saved(
    tmp_path / 'a', bpe(A, MERGES_A, added=SPECIAL), a, config(len(A) + 3, 0)
  )
  two = saved(
    tmp_path / 'b', bpe(B, MERGES_B, added=SPECIAL), b, config(len(B), 1)
  )
  (one / 'generation_config.json').write_text('{"eos_token_id": 1}')
  (one / 'vocab.json').write_text('{}')
  (one / 'tokenizer_config.json').write_text('{"of": "a"}')
  (two / 'tokenizer_config.json').write_text('{"of": "b"}')
  return one, two, a, b


def parts(model, token):
  return [p for p in PARTS.get(token, '') if p in (A, B)[model]]


@pytest.mark.parametrize('missing', ['other', 'mean', 'zero', 'parts'])
@pytest.mark.parametrize('tokens', ['union', 0, 1])
def test_rows_follow_tokens(pair, missing, tokens):
  one, two, a, b = pair
  found = surgery.combine(
    [surgery.open(one), surgery.open(two)],
    weight=[0.7, 0.3],
    tokens=tokens,
    missing_rows=missing,
  )
  extra = [t for t in B if t not in A]
  wanted = {'union': A + extra, 0: A, 1: B}[tokens]
  numbers = [{t: k for k, t in enumerate(some)} for some in (A, B)]
  for name in ('model/embed_tokens/weight', 'lm_head/weight'):
    rows = expected(
      wanted,
      [(numbers[0], a[name]), (numbers[1], b[name])],
      missing,
      parts=parts,
    )
    want = 0.7 * rows[0].astype('f8') + 0.3 * rows[1].astype('f8')
    made = np.asarray(found[tuple(name.split('/'))].load())
    np.testing.assert_allclose(made[: len(wanted)], want, atol=1e-6)
    # Rows that are no token's are those of the model that has the tokens.
    padding = a[name][len(A) :] if tokens == 0 else a[name][:0]
    np.testing.assert_array_equal(made[len(wanted) :], padding)
  plain = 'model/layers/0/mlp/up/weight'
  np.testing.assert_allclose(
    np.asarray(found[tuple(plain.split('/'))].load()),
    0.7 * a[plain] + 0.3 * b[plain],
    atol=1e-6,
  )


def test_a_folder_has_the_tokenizer_of_all(pair, tmp_path, surgery_cli):
  one, two, a, b = pair
  out = tmp_path / 'out'
  result = surgery_cli(
    'combine', one, two, '--tokens', 'union', '-o', f'{out}/'
  )
  assert 0 == result.code, result.err
  extra = [t for t in B if t not in A]
  assert {t: k for k, t in enumerate(A + extra)} == ids(out)
  said = json.loads((out / 'tokenizer.json').read_text())
  assert [*MERGES_A, *MERGES_B] == [tuple(m) for m in said['model']['merges']]
  config = json.loads((out / 'config.json').read_text())
  assert (10, 0, [1]) == (
    config['vocab_size'], config['bos_token_id'], config['eos_token_id']
  )  # fmt: skip
  assert {'of': 'a'} == json.loads((out / 'tokenizer_config.json').read_text())
  # What says fewer tokens does not go along.
  assert not (out / 'vocab.json').exists()
  row = values(out)['lm_head/weight'][ids(out)['bad']]
  np.testing.assert_array_equal(b['lm_head/weight'][6], row)


def test_the_tokenizer_of_another_model_goes_along(pair, tmp_path, surgery_cli):
  one, two, a, b = pair
  out = tmp_path / 'out'
  result = surgery_cli('combine', one, two, '--tokens', two, '-o', f'{out}/')
  assert 0 == result.code, result.err
  assert (two / 'tokenizer.json').read_bytes() == (
    out / 'tokenizer.json'
  ).read_bytes()
  assert {'of': 'b'} == json.loads((out / 'tokenizer_config.json').read_text())
  assert not (out / 'vocab.json').exists()
  config = json.loads((out / 'config.json').read_text())
  assert (8, 1, [0]) == (
    config['vocab_size'], config['bos_token_id'], config['eos_token_id']
  )  # fmt: skip
  generation = json.loads((out / 'generation_config.json').read_text())
  assert {'eos_token_id': 0} == generation
  plan = surgery_cli(
    'combine', one, two, '--tokens', two, '-o', tmp_path / 'x.safetensors',
    '--dry-run',
  )  # fmt: skip
  assert f'{one}/model.safetensors has no row for 3 of 8 tokens' in plan.out
  assert '2 tokens of' in plan.out and 'are left out' in plan.out
  assert 'which only a folder' in plan.err


def test_a_recipe_and_the_verb_come_to_the_same(pair, tmp_path):
  one, two, a, b = pair
  step = {'with': ['two'], 'tokens': 'two', 'missing-rows': 'mean'}
  recipe = surgery.Recipe([{'combine': step}], inputs={'one': one, 'two': two})
  recipe.run(out=tmp_path / 'out.safetensors')
  live = surgery.combine(
    [surgery.open(one), surgery.open(two)], tokens=1, missing_rows='mean'
  )
  found = surgery.open(tmp_path / 'out.safetensors')
  for path, leaf in live.items():
    np.testing.assert_array_equal(leaf.load(), found[path].load())


def test_params_are_given_their_tokenizers(pair):
  one, two, a, b = pair
  params = [surgery.load(folder) for folder in (one, two)]
  with pytest.raises(surgery.SurgeryError, match='tokenizer is not known'):
    surgery.combine(params, tokens='union')
  found = surgery.combine(
    params, tokens='union', tokenizers=[one, two / 'tokenizer.json']
  )
  want = surgery.combine([surgery.open(one), surgery.open(two)], tokens='union')
  for path, leaf in want.items():
    np.testing.assert_array_equal(leaf.load(), found[path].value)


def test_the_base_says_what_a_token_is_that_others_lack(pair, tmp_path):
  one, two, a, b = pair
  c = tensors(len(B), 2)
  three = saved(tmp_path / 'c', bpe(B, MERGES_B, added=SPECIAL), c)
  models = [surgery.open(one), surgery.open(two)]
  base = surgery.open(three)
  found = surgery.combine(
    models, base=base, method='task_arithmetic', tokens='base', weight=[1, 1]
  )
  name = ('lm_head', 'weight')
  made, table = np.asarray(found[name].load()), c['lm_head/weight']
  for token in ('d', 'ba', 'bad'):
    # The first has it from the base, so that it adds nothing.
    k = B.index(token)
    np.testing.assert_allclose(b['lm_head/weight'][k], made[k], atol=1e-6)
  k = B.index('a')
  want = table[k] + (a['lm_head/weight'][A.index('a')] - table[k]) + (
    b['lm_head/weight'][k] - table[k]
  )  # fmt: skip
  np.testing.assert_allclose(made[k], want, atol=1e-6)
  with pytest.raises(surgery.ConfigError, match='there is no base'):
    surgery.combine(models, tokens='base')


@pytest.mark.parametrize('missing', ['other', 'mean', 'parts'])
@pytest.mark.parametrize('method', ['linear', 'ties', 'dare_ties'])
def test_copies_of_the_embedding_stay_copies(tmp_path, method, missing):
  folders = []
  for k, (tokens, merges) in enumerate([(A, MERGES_A), (B, MERGES_B), (A, [])]):
    table = tensors(len(tokens), k, width=5)
    embedding = table['model/embed_tokens/weight']
    table['lm_head/weight'] = embedding.copy()
    table['flax/lm_head/kernel'] = embedding.T.copy()
    folders.append(saved(tmp_path / f'{k}', bpe(tokens, merges), table))
  one, two, base = (surgery.open(folder) for folder in folders)
  options: dict[str, Any] = {}
  if method != 'linear':
    options = {'base': base, 'density': 0.5}
  found = surgery.combine(
    [one, two], method=method, tokens='union', missing_rows=missing, **options
  )
  after = {'/'.join(p): np.asarray(leaf.load()) for p, leaf in found.items()}
  embedding = after['model/embed_tokens/weight']
  np.testing.assert_array_equal(embedding, after['lm_head/weight'])
  np.testing.assert_array_equal(embedding.T, after['flax/lm_head/kernel'])


@pytest.mark.parametrize('missing', ['other', 'mean', 'parts'])
def test_a_row_with_nan_is_an_error(tmp_path, missing):
  a, b = tensors(len(A), 0), tensors(len(B), 1)
  b['lm_head/weight'][B.index('a'), 2] = np.nan
  b['lm_head/weight'][B.index('bad'), 1] = np.inf
  one = saved(tmp_path / 'a', bpe(A, MERGES_A), a)
  two = saved(tmp_path / 'b', bpe(B, MERGES_B), b)
  found = surgery.combine(
    [surgery.open(one), surgery.open(two)],
    tokens='union', missing_rows=missing, nonfinite='allow',
  )  # fmt: skip
  with pytest.raises(surgery.CastError, match='lm_head/weight: row .* has'):
    found['lm_head', 'weight'].load()
  found = surgery.combine(
    [surgery.open(one), surgery.open(two)], tokens=0, missing_rows='zero'
  )
  with pytest.raises(surgery.CastError, match='has nan at index'):
    found['lm_head', 'weight'].load()


def test_rows_of_one_number_and_different_tokens_are_not_mixed(pair):
  one, two, a, b = pair
  models = [surgery.open(one), surgery.open(two)]
  with pytest.raises(
    surgery.SurgeryError, match="token 0 is '<s>' in .* and '</s>' in"
  ):
    surgery.combine(models)
  same = tensors(len(A) + 3, 2)
  longer = saved(
    one.parent / 'c', bpe(A, MERGES_A, added=[*SPECIAL, '<pad>']), same
  )
  # A token more is no other token.
  surgery.combine([models[0], surgery.open(longer)])
  shuffled = tensors(len(A) + 3, 3)
  order = dict(zip(A, range(len(A) - 1, -1, -1), strict=True))
  other = saved(one.parent / 'd', bpe(A, MERGES_A, ids=order), shuffled)
  both = [models[0], surgery.open(other)]
  with pytest.raises(surgery.SurgeryError, match='tokens: ids'):
    surgery.combine(both)
  found = surgery.combine(both, tokens='ids')['lm_head', 'weight'].load()
  mean = (a['lm_head/weight'] + shuffled['lm_head/weight']) / 2
  np.testing.assert_allclose(found, mean, atol=1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda said: said['model']['vocab'].update(x=3),
      "two tokens have the number 3: 'a' and 'x'",
    ),
    (
      lambda said: said['added_tokens'].append({'id': 90, 'content': 'a'}),
      "the token 'a' has two numbers, 3 and 90",
    ),
    (
      lambda said: said['added_tokens'].append({'id': 3, 'content': 'x'}),
      "two tokens have the number 3: 'a' and 'x'",
    ),
    (
      lambda said: said.update(normalizer={'type': 'Lowercase'}),
      'differ in normalizer.*check-tokenizers: false',
    ),
    (
      lambda said: said.update(pre_tokenizer={'type': 'ByteLevel'}),
      'differ in pre_tokenizer',
    ),
    (
      lambda said: said['model'].update(type='WordLevel'),
      'differ in type',
    ),
    (lambda said: said.update(model=None), 'expected a tokenizer.json'),
    (
      lambda said: said['model'].update(vocab={'a': -1}),
      'expected numbers by token',
    ),
    (
      lambda said: said['model'].update(merges=['a b c']),
      "expected pairs of tokens, found 'a b c'",
    ),
  ],
)
def test_tokenizers_that_do_not_go_together_are_refused(pair, change, message):
  one, two, a, b = pair
  said = json.loads((two / 'tokenizer.json').read_text())
  change(said)
  (two / 'tokenizer.json').write_text(json.dumps(said))
  with pytest.raises(surgery.SurgeryError, match=message):
    surgery.combine([surgery.open(one), surgery.open(two)], tokens='union')


def test_other_ways_to_cut_text_on_request(pair):
  one, two, a, b = pair
  said = json.loads((two / 'tokenizer.json').read_text())
  said['normalizer'] = {'type': 'Lowercase'}
  (two / 'tokenizer.json').write_text(json.dumps(said))
  found = surgery.combine(
    [surgery.open(one), surgery.open(two)], tokens=0, check_tokenizers=False
  )
  assert (10, 4) == found['lm_head', 'weight'].shape


def test_only_tokenizer_json_is_read(pair):
  one, two, a, b = pair
  (two / 'tokenizer.json').rename(two / 'tokenizer.model')
  with pytest.raises(
    surgery.SurgeryError, match='only tokenizer.json is read.*save_pretrained'
  ):
    surgery.combine([surgery.open(one), surgery.open(two)], tokens='union')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'tokens': 2}, 'place of a model, from 0 to 1; found 2'),
    ({'tokens': 'c'}, "union, base, ids, or the place of a model.*found 'c'"),
    ({'tokens': 'union', 'missing_rows': 'x'}, "parts, found 'x'"),
    ({'missing_rows': 'mean'}, 'missing-rows: it is for rows that follow'),
    ({'vocab': {'**': 0}}, 'vocab: it is for rows that follow'),
    ({'tokens': 'union', 'tokenizers': ['x'] * 3}, 'a list of 2 files'),
    ({'tokens': 'union', 'tokenizers': ['x']}, 'x: there is no such file'),
  ],
)
def test_options_that_cannot_be_are_refused(pair, options, message):
  one, two, a, b = pair
  with pytest.raises(surgery.SurgeryError, match=message):
    surgery.combine([surgery.open(one), surgery.open(two)], **options)


def test_tensors_with_tokens_may_be_named(tmp_path):
  folders = []
  for k, tokens in enumerate((A, B)):
    rng = np.random.default_rng(k)
    draw = lambda *shape: rng.normal(size=shape).astype('f4')  # noqa: B023
    n = len(tokens)
    folders.append(
      saved(tmp_path / f'{k}', bpe(tokens), {'x': draw(n, 2), 'y': draw(2, n)})
    )
  models = [surgery.open(folder) for folder in folders]
  with pytest.raises(
    surgery.SurgeryError, match='no tensor looks like the emb'
  ):
    surgery.combine(models, tokens='union')
  found = surgery.combine(models, tokens='union', vocab={'x': 0, 'y': -1})
  assert ((10, 2), (2, 10)) == (found[('x',)].shape, found[('y',)].shape)
  with pytest.raises(
    surgery.SurgeryError, match=r'x is float32\[7,2\] in .* y|y is'
  ):
    surgery.combine(models, tokens='union', vocab={'x': 0})


def test_a_number_far_beyond_all_rows_is_refused(tmp_path):
  far = bpe([], ids={'a': 0, 'far': 10**12})
  one = saved(tmp_path / 'a', far, tensors(4, 0))
  two = saved(tmp_path / 'b', bpe(A), tensors(len(A), 1))
  axes = {'**/embed_tokens': 0, 'lm_head': 0}
  with pytest.raises(surgery.SurgeryError, match="'far' has the number 1000"):
    surgery.combine(
      [surgery.open(one), surgery.open(two)], tokens='union', vocab=axes
    )


def test_an_axis_that_may_be_another_is_not_taken_for_tokens(tmp_path):
  folders = [
    saved(tmp_path / f'{k}', bpe(A[::order]), tensors(len(A), k, len(A)))
    for k, order in enumerate((1, -1))
  ]
  models = [surgery.open(folder) for folder in folders]
  with pytest.raises(surgery.SurgeryError, match='it is not certain whether'):
    surgery.combine(models, tokens='union')


def test_a_token_without_a_row_is_one_that_the_model_lacks(tmp_path):
  a, b = tensors(len(A), 0), tensors(len(A) + 1, 1)
  said = bpe(A, MERGES_A, added=[*SPECIAL, '<pad>'])
  one = saved(tmp_path / 'a', said, a)
  two = saved(tmp_path / 'b', said, b)
  found = surgery.combine(
    [surgery.open(one), surgery.open(two)], tokens='union'
  )
  row = found['lm_head', 'weight'].load()[len(A)]
  np.testing.assert_array_equal(b['lm_head/weight'][len(A)], row)


words = st.lists(
  st.text('abc', min_size=1, max_size=4), min_size=1, max_size=12, unique=True
)


@hypothesis.settings(max_examples=25, deadline=None, database=None)
@hypothesis.given(
  first=words,
  second=words,
  missing=st.sampled_from(['other', 'mean', 'zero']),
  dtype=st.sampled_from(['float32', 'float16']),
  padding=st.integers(0, 3),
)
def test_any_vocabularies_come_to_what_plain_loops_do(
  tmp_path_factory, first, second, missing, dtype, padding
):
  hypothesis.assume(set(first) & set(second))
  tmp = tmp_path_factory.mktemp('models')
  tables, models = [], []
  for k, tokens in enumerate((first, second)):
    # Wider than tokens, so that no other axis is as long.
    table = tensors(len(tokens) + padding, k, width=20, dtype=dtype)
    tables.append(table)
    models.append(surgery.open(saved(tmp / str(k), bpe(tokens), table)))
  found = surgery.combine(models, tokens='union', missing_rows=missing)
  wanted = [*first, *(t for t in second if t not in first)]
  name = 'model/embed_tokens/weight'
  rows = expected(
    wanted,
    [
      ({t: n for n, t in enumerate(tokens)}, table[name])
      for tokens, table in zip((first, second), tables, strict=True)
    ],
    missing,
  )
  want = (rows[0].astype('f8') + rows[1].astype('f8')) / 2
  made = np.asarray(found[tuple(name.split('/'))].load())
  np.testing.assert_array_equal(made, want.astype(dtype))


def test_blocks_are_the_whole(pair, monkeypatch):
  one, two, a, b = pair
  models = [surgery.open(one), surgery.open(two)]
  for missing in ('other', 'mean', 'parts'):
    made = lambda: surgery.combine(
      models,
      tokens='union',
      missing_rows=missing,  # noqa: B023
    )
    want = {path: np.asarray(leaf.load()) for path, leaf in made().items()}
    with monkeypatch.context() as patch:
      small = lambda shape, most=7, grid=grids.grid: grid(shape, most)
      patch.setattr(regions, 'grid', small)
      patch.setattr('surgery.model.checkpoint.grid', small)
      patch.setattr(regions, '_HELD', 64)
      for path, leaf in made().items():
        found = np.concatenate([np.ravel(part) for part in leaf.parts()])
        np.testing.assert_array_equal(want[path].reshape(-1), found)


def test_configurations_that_differ_are_warned_of(tmp_path):
  said = {'rms_norm_eps': 1e-6, 'head_dim': 4, 'eos_token_id': 3}
  one = saved(tmp_path / 'a', bpe(A), tensors(len(A), 0), said)
  two = saved(
    tmp_path / 'b', bpe(A), tensors(len(A), 1),
    {'rms_norm_eps': 1e-5, 'rope_theta': 5e5, 'eos_token_id': 4},
  )  # fmt: skip
  models = [surgery.open(folder) for folder in (one, two)]
  with pytest.warns(UserWarning, match='not stated and 500000') as told:
    found = surgery.combine(models)
  assert (
    'differ in rms_norm_eps (1e-06 and 1e-05), rope_theta (not stated and '
    '500000.0); the result is described by the first'
  ) in found.remarks[0]
  assert [f'{found.remarks[0]}.'] == [str(one.message) for one in told]
  assert () == surgery.combine([models[0]] * 2).remarks


# Parts of tokens.


def read(tmp_path, said):
  (tmp_path / 'tokenizer.json').write_text(json.dumps(said))
  return tokenizers.read(tmp_path)


def test_parts_of_word_pieces(tmp_path):
  said = bpe(['[UNK]', 'un', '##aff', '##able', '##a', 'able'])
  said['model'] = {
    'type': 'WordPiece', 'unk_token': '[UNK]',
    'continuing_subword_prefix': '##', 'vocab': said['model']['vocab'],
  }  # fmt: skip
  one = read(tmp_path, said)
  assert [1, 2, 3] == one.parts('unaffable')
  assert [2, 3] == one.parts('##affable')
  assert [] == one.parts('xyz')


def test_parts_of_unigrams_are_the_likeliest(tmp_path):
  said = bpe([])
  said['model'] = {
    'type': 'Unigram', 'unk_id': 0, 'byte_fallback': True,
    'vocab': [['<unk>', 0], ['a', -3], ['b', -3], ['ab', -2], ['▁', -4],
              ['▁a', -3.5], ['<0xC3>', -9], ['<0xA9>', -9]],
  }  # fmt: skip
  one = read(tmp_path, said)
  assert [3, 3] == one.parts('abab')
  assert [4, 3] == one.parts('▁ab')
  assert [1, 6, 7] == one.parts('aé')


def test_parts_of_bytes_and_of_ends_of_words(tmp_path):
  said = bpe(['h', 'i</w>', 'i', 'hi</w>x', 'Ġ', 'Ã', '©'], [])
  said['model']['end_of_word_suffix'] = '</w>'
  assert [0, 1] == read(tmp_path, said).parts('hi</w>')
  said['model']['end_of_word_suffix'] = None
  said['pre_tokenizer'] = {'type': 'ByteLevel'}
  assert [4, 0, 5, 6] == read(tmp_path, said).parts(' hé', plain=True)


def test_pieces_of_two_vocabularies_keep_their_places(tmp_path):
  made = []
  for k, pieces in enumerate((['<unk>', 'a', 'b'], ['<unk>', 'c', 'a'])):
    said = bpe([], added=[])
    said['model'] = {
      'type': 'Unigram', 'unk_id': 0, 'vocab': [[p, -k - 1.0] for p in pieces]
    }  # fmt: skip
    said['added_tokens'] = [{'id': 3, 'content': f'<x{k}>', 'special': True}]
    (tmp_path / str(k)).mkdir()
    made.append(read(tmp_path / str(k), said))
  joined = tokenizers.union(made)
  assert ['<unk>', 'a', 'b', '<x0>', 'c', '<x1>'] == [
    piece for piece, _ in joined.data['model']['vocab']
  ]
  assert [-1, -1, -1, 0, -2, 0] == [s for _, s in joined.data['model']['vocab']]
  assert [3, 5] == [one['id'] for one in joined.data['added_tokens']]
