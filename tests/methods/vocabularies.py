"""Models with tokenizers, and what their combination is, row by row."""

import json

import numpy as np

import surgery


def bpe(tokens, merges=(), *, added=(), normalizer=None, ids=None):
  """Returns a `tokenizer.json` that numbers tokens in their order."""
  ids = ids or {token: number for number, token in enumerate(tokens)}
  behind = [token for token in added if token not in ids]
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {
        'id': ids[token] if token in ids else len(ids) + behind.index(token),
        'content': token,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
      }
      for token in added
    ],
    'normalizer': normalizer,
    'pre_tokenizer': None,
    'post_processor': None,
    'decoder': None,
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': None,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': False,
      'byte_fallback': False,
      'ignore_merges': False,
      'vocab': ids,
      'merges': [list(pair) for pair in merges],
    },
  }


def saved(folder, said, tensors, config=None):
  """Writes a model folder; returns it."""
  folder.mkdir()
  model = surgery.Checkpoint(
    {
      tuple(name.split('/')): surgery.Leaf(
        lambda value=value: value, value.shape, str(value.dtype)
      )
      for name, value in tensors.items()
    }
  )
  model.write(folder / 'model.safetensors')
  (folder / 'tokenizer.json').write_text(json.dumps(said))
  (folder / 'config.json').write_text(
    json.dumps({'model_type': 'llama', **(config or {})})
  )
  return folder


def values(folder):
  model = surgery.open(folder)
  return {'/'.join(p): np.asarray(leaf.load()) for p, leaf in model.items()}


def ids(folder):
  """Returns the numbers of tokens that a folder's tokenizer has."""
  said = json.loads((folder / 'tokenizer.json').read_text())
  found = dict(said['model']['vocab'])
  found.update({one['content']: one['id'] for one in said['added_tokens']})
  return found


def expected(tokens, models, missing, parts=None, decides=None):
  """Returns the rows of each model for tokens, by plain loops.

  Args:
    tokens: the tokens of the result in order.
    models: pairs of numbers by token, and rows.
    missing: what a row holds that a model lacks.
    parts: by model and token the smaller tokens.
    decides: which model's rows are taken first for `other`.
  """
  found = []
  for k, (numbers, rows) in enumerate(models):
    wide = rows.astype(np.float64)
    mean = wide[sorted(numbers.values())].mean(0)
    made = []
    for token in tokens:
      others = [
        m[token] for j, (m, _) in enumerate(models) if j != k and token in m
      ]
      if token in numbers:
        made.append(wide[numbers[token]])
      elif missing == 'zero':
        made.append(np.zeros_like(mean))
      elif missing == 'mean' or (missing == 'other' and not others):
        made.append(mean)
      elif missing == 'parts':
        cut = [numbers[p] for p in parts(k, token) if p in numbers]
        made.append(wide[cut].mean(0) if cut else mean)
      elif decides is not None and decides != k and token in models[decides][0]:
        numbers_, rows_ = models[decides]
        made.append(rows_[numbers_[token]].astype(np.float64))
      else:
        made.append(
          np.mean(
            [
              r[m[token]].astype(np.float64)
              for j, (m, r) in enumerate(models)
              if j != k and token in m
            ],
            axis=0,
          )
        )
    found.append(np.stack(made).astype(rows.dtype))
  return found
