import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import errors
from surgery.naming import selectors

UNIVERSE = [
  ('net', 'embed', 'embedding'),
  ('net', 'block0', 'attention', 'query', 'kernel'),
  ('net', 'block0', 'attention', 'value', 'kernel'),
  ('net', 'block0', 'attention', 'value', 'bias'),
  ('net', 'block0', 'norm', 'scale'),
  ('net', 'block10', 'attention', 'query', 'kernel'),
  ('net', 'head', 'kernel'),
  ('net', 'odd/name', 'a.b[0]:c', 'kernel'),
]
TYPES = {
  ('net', 'block0', 'attention', 'query'): ('MyLinear', 'Linear'),
  ('net', 'head'): ('Linear',),
  ('net', 'embed'): ('Embed',),
}


def chosen(text, **options):
  types = lambda layer: TYPES.get(layer, ())
  match = selectors.resolve(selectors.parse(text), UNIVERSE, types, **options)
  return ['/'.join(path) for path in match.levels]


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('net/head', ['net/head/kernel']),
    ('net/head/kernel', ['net/head/kernel']),
    ('net/he?d', ['net/head/kernel']),
    ('net/he[!b]d', ['net/head/kernel']),
    ('**/norm', ['net/block0/norm/scale']),
    ('**/bias', ['net/block0/attention/value/bias']),
    ('net/*/norm', ['net/block0/norm/scale']),
    (
      '**/attention/{query,value}',
      [
        'net/block0/attention/query/kernel',
        'net/block0/attention/value/kernel',
        'net/block0/attention/value/bias',
        'net/block10/attention/query/kernel',
      ],
    ),
    ('net/{embed,{head,he*d}}', ['net/embed/embedding', 'net/head/kernel']),
    (
      r're:.*/block\d/.*/kernel',
      [
        'net/block0/attention/query/kernel',
        'net/block0/attention/value/kernel',
      ],
    ),
    ('net/odd\\/name', ['net/odd/name/a.b[0]:c/kernel']),
    ('**/a.b\\[0\\]\\:c', ['net/odd/name/a.b[0]:c/kernel']),
    ('type:Linear', ['net/block0/attention/query/kernel', 'net/head/kernel']),
    ('type:MyLinear', ['net/block0/attention/query/kernel']),
    (['net/embed', 'net/head'], ['net/embed/embedding', 'net/head/kernel']),
    (
      ['**/block0', '!**/attention'],
      ['net/block0/norm/scale'],
    ),
    (
      ['!**/kernel', '!net/embed'],
      ['net/block0/attention/value/bias', 'net/block0/norm/scale'],
    ),
  ],
)
def test_selector_chooses(text, expected):
  assert expected == chosen(text)


def test_everything_is_chosen_by_all_and_by_two_stars():
  assert len(UNIVERSE) == len(chosen('all')) == len(chosen('**'))


def test_a_name_that_is_part_of_another_does_not_match_it():
  assert 'net/block10/attention/query/kernel' not in chosen(
    'net/block1*0/nor*', missing='pass'
  )
  assert [] == chosen('net/block', missing='pass')


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      '**/atention',
      "selector '**/atention' matches nothing among 8 parameters. Nearest: "
      'net/block0/attention, net/block10/attention.',
    ),
    (
      ['net/head', '**/nrom'],
      "selector '**/nrom' matches nothing among 8 parameters. Nearest: "
      'net/block0/norm.',
    ),
    (
      ['net/head', '!net/hed'],
      "selector '!net/hed' matches nothing among 8 parameters. Nearest: "
      'net/head.',
    ),
    ('type:Liner', "selector 'type:Liner' matches nothing. Did you mean"),
    ('heads:8', "no plugin knows the term 'heads:'"),
    ('a{b', "a '{' without its '}'"),
    ('a}b', "a '}' without its '{'"),
    ('a[b', "a '[' without its ']'"),
    ('re:(', 'not a regular expression'),
    ('', 'it is empty'),
    ('!!a', "two '!'"),
    ('net/[]', "a '[' without its ']'"),
    ('net/[!]', "a '[' without its ']'"),
    ('net/h**', "a '**' stands alone between slashes, found 'h**'"),
    ('!', 'it is empty'),
    ([], 'an empty list'),
    (3, 'a selector is text or a list of texts, found 3 (int)'),
    ([{'a': 'b'}], "found {'a': 'b'} (dict)"),
    ('{' + ','.join('ab') + '}' + '{a,b}' * 10, 'more than 1000 patterns'),
  ],
)
def test_bad_selectors_say_what_is_wrong(text, message):
  with pytest.raises(errors.SelectorError, match=re.escape(message)):
    chosen(text)


def test_a_term_is_answered_by_who_is_asked():
  asked = []

  def term(text, layer):
    asked.append(text)
    return layer[-1] == 'head'

  assert ['net/head/kernel'] == chosen('mine:8', term=term)
  assert {'mine:8'} == set(asked)


def test_a_parameter_that_is_named_wins_over_its_layer():
  match = selectors.resolve(
    selectors.parse(['**/value', '**/value/bias']), UNIVERSE
  )
  item, at_layer = match.levels[('net', 'block0', 'attention', 'value', 'bias')]
  assert ('**/value/bias', False) == (item.text, at_layer)


def test_fifty_thousand_paths_are_searched_once_per_layer():
  # A law, not a time: layers are asked once, however many parameters.
  calls = []
  universe = [
    ('net', f'layer{i}', name) for i in range(50) for name in 'abcdef'
  ]

  def types(layer):
    calls.append(layer)
    return ('Linear',)

  selectors.resolve(selectors.parse('type:Linear'), universe, types)
  assert 50 == len(calls)


NETS = [
  ('h0', 'query', 'kernel'),
  ('h0', 'value', 'kernel'),
  ('h1', 'query', 'kernel'),
  ('a', 'x'),
  ('b', 'y'),
]


def found(text, universe=NETS):
  return selectors.resolve(selectors.parse(text), universe).levels


@pytest.mark.parametrize(
  ('text', 'alternative', 'near'),
  [
    ('**/{query,vlaue}', 'vlaue', 'h0/value'),
    (['h0', '!**/{query,vlaue}'], 'vlaue', 'h0/value'),
    ('{a/{x,w},b}', 'w', 'a'),
    ('{a,{b,c}}', 'c', 'a'),
    ('h[01]/{quer,valu}{y,e,s}', 's', 'h0/query'),
    ('re:.*/(query|vlaue)/kernel', 'vlaue', 'h0/value'),
    ('re:h0/.*|h2/.*', 'h2/.*', 'h1'),
    ('re:(?i)(H0|H2)/.*', 'H2', 'h0'),
    ('re:.*/(query|vlaue)?/?kernel', 'vlaue', 'h0/value'),
    ('re:(?:h0|/query|/kernel|/xx)+', '/xx', 'a/x'),
    ('re:h(?:0|(?P<n>1|7))/.*', '7', 'h0'),
    (r're:(h0|h2)/(q|v).*()\3', 'h2', 'h0'),
  ],
)
def test_an_alternative_that_matches_nothing_is_refused(
  text, alternative, near
):
  with pytest.raises(errors.SelectorError) as raised:
    found(text)
  message = str(raised.value)
  assert f'its alternative {alternative!r} matches nothing among 5' in message
  assert f'Nearest: {near}' in message


@pytest.mark.parametrize(
  'text',
  [
    # Each alternative, not each combination.
    '{a,b}/{x,y}',
    '{a/{x,x},b/{y,?}}',
    'h0/{query,value}',
    'h{0,1}{,}/query',
    # Those beneath layers, and of one path several.
    '{h0,h1,a}',
    're:(h0|h1)/(query|value)/kernel',
    're:(?:h0|/query|/kernel)+',
    're:(?!zz|yy)h.*',
    're:h0/(?#a|b)query[|(]*/kernel',
    r're:h0/query(\||/)kernel'.replace(r'\||', ''),
    'h[!01]*'.replace('!01', '01'),
  ],
)
def test_alternatives_that_take_part_in_a_match_are_fine(text):
  assert found(text)


def test_alternatives_may_be_missing_where_items_may():
  read = selectors.parse('**/{query,vlaue}')
  assert 2 == len(selectors.resolve(read, NETS, missing='pass').levels)


def test_a_regular_expression_may_begin_with_a_backslash():
  assert [('a', 'x'), ('b', 'y')] == list(found(r're:\w/\w'))


@pytest.mark.parametrize(
  ('text', 'names'),
  [
    ('[]a]', 'a]'),
    (r'[\]a]', 'a]'),
    ('[!]a]', 'bc-'),
    ('[a-c]', 'abc'),
    ('[a-]', 'a-'),
    (r'[a\-c]', 'a-c'),
    ('[^a]', 'bc-]'),
  ],
)
def test_brackets_hold_characters(text, names):
  universe = [(c,) for c in 'abc-]']
  assert {(c,) for c in names} == set(found(text, universe))


def test_a_parameter_called_all_is_not_everything():
  assert [('all',)] == list(found(r'\all', [('all',), ('b',)]))


words = st.sampled_from(['query', 'value', 'key'])


@given(st.lists(words, min_size=1), st.lists(words, min_size=1, unique=True))
def test_braces_mean_what_a_list_means(there, wanted):
  universe = [('h', name) for name in dict.fromkeys(there)]
  for text in (
    'h/{' + ','.join(wanted) + '}',
    're:h/(' + '|'.join(wanted) + ')',
    [f'h/{name}' for name in wanted],
  ):
    if set(wanted) <= set(there):
      assert {('h', n) for n in wanted} == set(found(text, universe))
    else:
      with pytest.raises(errors.SelectorError):
        found(text, universe)


LLAMA = [
  ('model', 'layers', str(k), 'self_attn', f'{name}_proj', 'weight')
  for k in range(2)
  for name in 'qkv'
]


@pytest.mark.parametrize(
  ('text', 'hint'),
  [
    (
      '**/q_proj.weight',
      "Names are written with slashes here: '**/q_proj/weight'.",
    ),
    (
      'model.layers.*.self_attn.{q,k}_proj',
      "Names are written with slashes here: 'model/layers/*/self_attn/{q,k}_pr",
    ),
    (
      r're:model\.layers\.\d+\..*',
      r"Names are written with slashes here: 're:model/layers/\\d+/.*'.",
    ),
    (
      'model/layers/<i>/self_attn',
      '<i> stands for a number only in rules (OLD -> NEW); in a selector write '
      "'*': 'model/layers/*/self_attn'.",
    ),
    ('model.layers.<i>', "in a selector write '*': 'model/layers/*'."),
    ('model.layers.<i+1>', '<i+1> stands for a number'),
    # What resembles it is found name by name.
    ('**/q_prj.weight', 'Nearest: model/layers/0/self_attn/q_proj, model/lay'),
    ('**/self_atn.q_proj', 'Nearest: model/layers/0/self_attn, model/layers'),
    # Slashes do not help here.
    ('**/x.y', 'Nearest: model'),
    (r'**/q_proj\.weight', 'Nearest: model'),
    ('model.layers.[', "a '[' without"),
  ],
)
def test_selectors_of_other_programs_are_explained(text, hint):
  with pytest.raises(errors.SelectorError, match=re.escape(hint)):
    selectors.resolve(selectors.parse(text), LLAMA)


def test_names_with_dots_of_their_own_are_matched_and_suggested():
  flat = [('.'.join(path),) for path in LLAMA]
  assert 2 == len(
    selectors.resolve(selectors.parse('*.q_proj.weight'), flat).levels
  )
  with pytest.raises(errors.SelectorError, match='Nearest: model.layers.0.'):
    selectors.resolve(selectors.parse('model.layers.0.self_atn.q_proj'), flat)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('h/{2..4}/w', 'h/{2,3,4}/w'),
    ('h{4..2}', 'h{4,3,2}'),
    ('h{08..11}', 'h{08,09,10,11}'),
    ('{a,1..3,b,7..7}', '{a,1,2,3,b,7}'),
    ('{a{1..2},b}', '{a{1,2},b}'),
    # Nothing but a range in braces.
    ('a..b', 'a..b'),
    ('1..3', '1..3'),
    (r'\\{1..3\\}', r'\\{1..3\\}'),
    ('{a..c}', '{a..c}'),
  ],
)
def test_a_range_in_braces_stands_for_its_numbers(text, expected):
  assert expected == selectors.ranged(text)


def test_ranges_select_and_each_number_has_to_match():
  universe = [('h', str(k), 'w') for k in range(12)]
  found = selectors.resolve(selectors.parse('h/{8..10}'), universe)
  assert universe[8:11] == list(found.levels)
  with pytest.raises(errors.SelectorError, match="alternative '12' matches"):
    selectors.resolve(selectors.parse('h/{10..12}'), universe)


def test_a_range_of_very_many_numbers_is_refused():
  with pytest.raises(errors.SelectorError, match='more than 1000 numbers'):
    selectors.parse('h/{0..1000000000}')
