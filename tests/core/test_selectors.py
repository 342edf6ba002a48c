import re

import pytest

from surgery.core import errors, selectors

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
    ('net/{embed,{head,tail}}', ['net/embed/embedding', 'net/head/kernel']),
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
