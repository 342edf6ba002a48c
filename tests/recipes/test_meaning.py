"""What steps cannot mean is refused: typos in alternatives, rules, names."""

import re

import numpy as np
import pytest

import surgery
from tests.recipes.models import HOST, applied, held, values

NET = {
  'h/0/query/kernel': np.ones((4, 4), np.float32),
  'h/0/value/kernel': np.ones((4, 4), np.float32),
  'h/0/value/bias': np.ones(4, np.float32),
  'h/1/query/kernel': np.ones((4, 4), np.float32),
  'h/1/value/kernel': np.ones((4, 4), np.float32),
  'norm/scale': np.ones(4, np.float32),
}
TUNED = {path: 2 * value for path, value in NET.items()}
WRONG = '**/{query,vlaue}/kernel'
RULE = f'{WRONG} -> **/{{q,v}}/kernel'


STEPS = [
  {'drop': WRONG},
  {'unfreeze': WRONG},
  {'permute': {'select': WRONG, 'axis': 0, 'order': [3, 2, 1, 0]}},
  {'reshape': {'select': WRONG, 'shape': [16]}},
  {'resize-vocab': {'select': WRONG, 'size': 5}},
  {'factorise': {'rules': f'{WRONG} -> **/{{query,vlaue}}/{{a,b}}', 'rank': 1}},
  {'concat': '{h,g}/<i>/query/kernel -> {h,g}/kernel'},
  {'matmul': '{h,g}/<i>/query/kernel -> {h,g}/kernel'},
  {'unstack': '{norm,g}/scale -> {norm,g}/scale/<i>'},
  {'subtract': f'other::{WRONG}'},
  {'fold-norm': 'h/0/{value,g} -> {norm,g}'},
  {'keep': WRONG},
  {'keep': ['h', f'!{WRONG}']},
  {'freeze': WRONG},
  {'cast': {'to': 'bf16', 'keep': WRONG}},
  {'cast': {'to': 'bf16', 'keep': f'{WRONG}=f32'}},
  {'scale': {'select': WRONG, 'by': 2}},
  {'transpose': WRONG},
  {'slice': {'select': WRONG, 'axis': 0, 'keep': [0]}},
  {'pad': {'select': WRONG, 'axis': 0, 'after': 1}},
  {'fill': WRONG},
  {'random': WRONG},
  {'assert': {'exists': WRONG}},
  {'assert': {'count': {'of': WRONG, 'is': 2}}},
  {'assert': {'dtype': {'of': WRONG, 'is': 'f32'}}},
  {'assert': {'finite': WRONG}},
  {'assert': {'unchanged-except': WRONG}},
  {'attach': {'adapter': 'lora', 'to': WRONG}},
  {
    'attach': {
      'adapter': 'lora',
      'to': '**/query',
      'layout': {WRONG: 'io', 'all': 'io'},
    }
  },
  {
    'attach': {'adapter': 'lora', 'to': '**/query', 'stacked': {WRONG: 0}},
  },
  {
    'attach': {
      'adapter': 'lora',
      'to': ['**/query', '**/value'],
      'set': {'patterns': {WRONG: {'rank': 2}}},
    }
  },
  {'rename': RULE},
  {'move': {'rules': RULE, 'overwrite': True}},
  {'copy': RULE},
  {'copy': f'other::{WRONG}'},
  {'fill': RULE},
  {'add': f'other::{WRONG}'},
  {'tie': f'{WRONG} -> **/{{value,query}}/kernel'},
  {'untie': RULE},
  {'stack': 'h/<i>/{query,vlaue}/kernel -> h/{query,vlaue}/kernel'},
  {'split': '**/{query,vlaue}/kernel -> **/{query,vlaue}/{a,b}'},
  {'renumber': {'layers': '{h,g}/<i>', 'start': 1}},
  {'repeat': {'layers': '{h,g}/<i>', 'numbers': [0]}},
  {'combine': {'with': 'other', 'set': {'weight': {WRONG: 0.5}}}},
  {'extract-lora': {'tuned': 'other', 'rank': {WRONG: 1}}},
  {'extract-lora': {'tuned': 'other', 'to': WRONG, 'rank': 1}},
  {'extract-lora': {'tuned': 'other', 'keep-whole': WRONG, 'rank': 1}},
  {'mean': {'select': WRONG, 'axis': 0}},
  {'interpolate': {'select': WRONG, 'to': 8}},
  {'multiply': f'other::{WRONG}'},
  {'clamp': {'select': WRONG, 'max': 1}},
  {'prune': {'select': WRONG, 'share': 0.5}},
]


@pytest.mark.parametrize('step', STEPS, ids='-'.join)
def test_each_alternative_has_to_match_something(step):
  with pytest.raises(surgery.SurgeryError) as raised:
    after = surgery.Recipe([step], inputs={'model': None, 'other': None}).apply(
      held(NET), other=held(TUNED), host=HOST
    )
    for check in after.checks:
      check.run()
  assert re.search("alternative '(vlaue|g)'", str(raised.value))


def test_no_step_that_takes_selectors_or_rules_is_left_out():
  # What takes names of adapters, or paths as they are.
  others = {
    'combine-adapters',
    'detach',
    'disable',
    'enable',
    'extract',
    'map',
    'merge',
    'prune-ranks',
  }
  ours = set(surgery.Host(entry_points=False).passes)
  assert ours == others | {name for step in STEPS for name in step}


@pytest.mark.parametrize(
  ('condition', 'holds'),
  [
    ({'not': {'exists': '**/{query,lora_a}'}}, False),
    ({'not': {'exists': ['**/query', '**/lora_a']}}, False),
    ({'not': {'exists': '**/{lora_a,lora_b}'}}, True),
    ({'not': {'all': [{'exists': '**/{query,lora_a}'}]}}, False),
    ({'not': {'any': [{'exists': '**/{query,lora_a}'}]}}, False),
    ({'not': {'any': [{'exists': '**/{lora_a,lora_b}'}]}}, True),
    ({'not': {'not': {'exists': '**/query'}}}, True),
    ({'count': {'of': '**/{query,lora_a}', 'is': 0}}, False),
    ({'count': {'of': '**/{lora_a,lora_b}', 'is': 0}}, True),
  ],
)
def test_what_must_not_be_there_is_found_by_any_alternative(condition, holds):
  recipe = surgery.Recipe([{'assert': condition}])
  if holds:
    recipe.apply(held(NET), host=HOST)
  else:
    with pytest.raises(surgery.SurgeryError, match=r'found (h/0|2)'):
      recipe.apply(held(NET), host=HOST)


@pytest.mark.parametrize(
  ('step', 'message'),
  [
    ({'fill': {'rules': '-> a/*', 'shape': [2], 'dtype': 'f32'}}, 'one tensor'),
    ({'fill': {'rules': '-> {a,b}', 'shape': [2], 'dtype': 'f32'}}, 'one tensor'),
    ({'random': {'rules': '-> h<i>', 'shape': [2], 'dtype': 'f32'}}, 'one tens'),
    ({'fill': {'rules': '-> re:a', 'shape': [2], 'dtype': 'f32'}}, 'about paths'),
    ({'fill': {'rules': '-> a -> b', 'shape': [2], 'dtype': 'f32'}}, 'name of a'),
    ({'fill': {'rules': '->', 'shape': [2], 'dtype': 'f32'}}, 'name of a tensor'),
    ({'copy': 'norm -> re:new'}, 'about paths'),
    ({'copy': 'other::type:Linear'}, 'about paths'),
    ({'copy': 'other::!norm'}, 'about paths'),
    ({'copy': 'other::norm -> other::new'}, 'about paths'),
    ({'copy': r're:(n.*)/.* -> re:\1'}, 'about paths'),
    ({'copy': r're:(n.*)/.* -> \1/*'}, 'means nothing on the right'),
    ({'rename': 'h/[01] -> h/[ab]'}, r"'\[01\]' on the left"),
    ({'copy': ['norm -> a', 'norm -> a']}, 'is given twice'),
    ({'add': ['other::norm/*', 'other::norm/*']}, 'is given twice'),
    ({'cast': {'to': 'bf16', 'keep': ['**', '**/scale=f32']}}, 'has no effect'),
    ({'drop': 'h**'}, 'stands alone'),
  ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(step, message):
  recipe = surgery.Recipe([step], inputs={'model': None, 'other': None})
  with pytest.raises(surgery.SurgeryError, match=message):
    recipe.apply(held(NET), other=held(TUNED), host=HOST)


def test_a_regular_expression_alone_copies_under_the_same_names():
  other = {'new/a': np.zeros(2), 'new/b': np.ones(2), 'old': np.ones(2)}
  recipe = surgery.Recipe(
    [{'copy': 'other::re:new/.*'}], inputs={'model': None, 'other': None}
  )
  after = values(recipe.apply(held(NET), other=held(other), host=HOST))
  assert {'new/a', 'new/b'} == after.keys() - NET.keys()


def test_a_name_may_have_any_character_behind_a_backslash():
  step = {'fill': {'rules': r'-> a\*\{b\}', 'shape': [2], 'dtype': 'f32'}}
  assert 'a*{b}' in applied(NET, step)


def test_what_is_kept_may_be_all_but_something():
  after = applied(NET, {'cast': {'to': 'bf16', 'keep': '!norm'}})
  assert {'norm/scale'} == {
    p for p, v in after.items() if v.dtype.name == 'bfloat16'
  }


def test_statistics_of_a_norm_that_is_not_there_are_refused():
  recipe = surgery.Recipe(
    [{'fold-norm': {'rules': 'h/0/value -> norm', 'statistics': 'nrom -> x'}}]
  )
  with pytest.raises(surgery.SurgeryError, match="'nrom -> x' matches nothing"):
    recipe.apply(held(NET), host=HOST)
