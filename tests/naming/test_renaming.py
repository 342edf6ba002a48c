import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery import errors
from surgery.naming import paths, renaming


def renamed(rule, *shown):
  rules = [
    renaming.parse(r) for r in ([rule] if isinstance(rule, str) else rule)
  ]
  found = renaming.targets(rules, [paths.parse(s) for s in shown])
  return {paths.show(old): paths.show(new) for old, new in found.items()}


@pytest.mark.parametrize(
  ('rule', 'old', 'new'),
  [
    ('net/head -> net/output', 'net/head', 'net/output'),
    ('net/head -> net/output', 'net/head/kernel', 'net/output/kernel'),
    ('net -> a/b/c', 'net/head/kernel', 'a/b/c/head/kernel'),
    ('net/head/kernel->kernel', 'net/head/kernel', 'kernel'),
    ('net/** -> **', 'net/head/kernel', 'head/kernel'),
    ('** -> model/**', 'net/head/kernel', 'model/net/head/kernel'),
    ('**/head -> **/tail', 'head/kernel', 'tail/kernel'),
    ('**/head -> **/tail', 'a/b/head/kernel', 'a/b/tail/kernel'),
    ('**/a/** -> **/b/**', 'x/a/y/a/z', 'x/a/y/b/z'),
    ('**/kernel -> **/w', 'net/kernel/kernel', 'net/kernel/w'),
    ('net/* -> *', 'net/a/b', 'a/b'),
    ('*/x/h*k -> y/*/*', 'net/x/h12k', 'y/net/12'),
    ('h?/x -> ?/x', 'ha/x', 'a/x'),
    ('h[ab]/[!c] -> [ab]/[!c]h', 'ha/d', 'a/dh'),
    ('{a,b}/w -> {x,y}/w', 'b/w', 'y/w'),
    ('{a,b}/{c,d} -> {c,d}/{a,b}', 'a/d', 'c/b'),
    ('x{,s}/w -> y{,z}/w', 'xs/w', 'yz/w'),
    ('{a/b,c}/w -> {d,e/f}/w', 'a/b/w', 'd/w'),
    ('{a/b,c}/w -> {d,e/f}/w', 'c/w', 'e/f/w'),
    ('{a,ab}c -> {x,y}z', 'abc', 'yz'),
    ('h<i> -> block_<i>', 'h7/k', 'block_7/k'),
    ('h<i> -> h<i+1>', 'h9', 'h10'),
    ('h<i> -> h<i-1>', 'h10', 'h9'),
    ('h<i> -> h<i*2>', 'h3', 'h6'),
    ('h<i> -> s<i//4>/h<i%4>', 'h7/k', 's1/h3/k'),
    ('s<i>/h<j> -> h<j>/s< i + 1 >', 's1/h2', 'h2/s2'),
    ('h<i>/x<i> -> h<i>', 'h3/x3', 'h3'),
    ('h<i> -> h<i+1>', 'h009', 'h010'),
    ('h<i> -> h<i+1>', 'h00', 'h01'),
    ('h<i> -> h<i+1>', 'h99', 'h100'),
    ('h<i> -> b<i>', 'h007', 'b007'),
    ('a\\*b -> c\\*d', 'a*b/k', 'c*d/k'),
    ('a\\/b -> c/d', 'a\\/b', 'c/d'),
    ('c -> a\\/b', 'c/k', 'a\\/b/k'),
    ('a\\->b -> c', 'a->b', 'c'),
    ('a\\<b -> <b>'.replace('<b>', 'c'), 'a<b', 'c'),
    ('a b -> c d', 'a b', 'c d'),
    ('a\\  -> \\ b ', 'a ', ' b'),
    ('a\\\\ -> b', 'a\\\\', 'b'),
    ('lora_a.x -> y', 'lora_a.x', 'y'),
    (r're:(.*)/h(\d+)/k -> \2/\1', 'net/h12/k', '12/net'),
    (r're:(?P<a>\w+)/k -> \g<a>', 'net/k', 'net'),
    (r're:(.*)/w -> \1/k', 'a\\/b/w', 'a\\/b/k'),
  ],
)
def test_a_path_gets_its_new_name(rule, old, new):
  assert {old: new} == renamed(rule, old)


@pytest.mark.parametrize(
  ('rule', 'path'),
  [
    ('net/head -> x', 'net/header'),
    ('net/head -> x', 'a/net/head'),
    ('h<i> -> x', 'h'),
    ('h<i> -> x', 'hx'),
    ('h<i>/x<i> -> h<i>', 'h3/x4'),
    ('* -> x/*', ''),
    ('h?/x -> ?/x', 'h/x'),
    ('net/*/k -> *', 'net/a/b/k'),
    (r're:net -> x', 'net/k'),
  ],
)
def test_other_paths_are_not_matched(rule, path):
  assert renaming.parse(rule).apply(paths.parse(path)) is None


def test_the_first_rule_that_matches_decides():
  rules = ['net/head -> net/head', 'net -> model']
  assert {
    'net/head/k': 'net/head/k',
    'net/a/k': 'model/a/k',
  } == renamed(rules, 'net/head/k', 'net/a/k')


def test_rules_hold_at_once():
  assert {'a/k': 'b/k', 'b/k': 'a/k'} == renamed(
    ['a -> b', 'b -> a'], 'a/k', 'b/k', 'c/k'
  )


@pytest.mark.parametrize(
  ('rule', 'message'),
  [
    ('net/head', "rule 'net/head': expected 'OLD -> NEW', found 0 arrows"),
    ('a -> b -> c', 'found 2 arrows'),
    ('-> b', 'found nothing on the left'),
    (
      'net -> ',
      "found nothing on the right. To take a level away write 'net/[*][*] -> ",
    ),
    (3, r"a rule is text, 'OLD -> NEW', found 3 \(int\)"),
    ('a/* -> b', "1 '[*]' on the left and 0 on the right"),
    ('a/* -> b/*/*', "1 '[*]' on the left and 2 on the right"),
    ('**/a -> b', "1 '[*][*]' on the left and 0 on the right"),
    ('{a,b} -> c', "1 '{…}' on the left and 0 on the right"),
    ('a? -> b', "1 '[?]' on the left and 0 on the right"),
    ('a[bc] -> b', "1 '.….' on the left and 0 on the right.*re:…"),
    ('{a,b} -> {x,y,z}', 'braces with 2 names on the left, and with 3 on the'),
    ('{a*,b} -> {x,y}', r"braces hold names, found '\*' in them"),
    ('{a,b -> c', r"a '{' without its '}'. Write '\\{'"),
    ('a,b} -> c', r"a '}' without its '{'"),
    ('a[b -> c', r"a '\[' without its '\]'"),
    ('a[z-a]/* -> [z]/*', 'cannot be read'),
    ('a** -> b**', r"a '\*\*' stands alone between slashes"),
    ('h<i+1> -> h<i>', "write '<i>' on the left"),
    ('h -> h<i>', "'<i>' stands on the right but not on the left"),
    ('h<i> -> h<j>', "'<j>' stands on the right but not on the left"),
    ('h<i> -> h<i//0>', "'<i//0>' divides by 0"),
    ('h<i> -> h<i**2>', r"expected '<i>', or '<i\+1>'.* found '<i\*\*2>'"),
    ('a<b -> c', r"found '<b'. Write '\\<' for the character"),
    ('net -> net/', 'the new name has an empty part. Remove the slash'),
    ('type:Linear -> x', "rules are about paths, found 'type:Linear'"),
    ('!a -> x', "rules are about paths, found '!a'"),
    ('a -> re:b', "rules are about paths, found 're:b'"),
    ('re:( -> x', 'not a regular expression'),
    ('re:(.*)/a -> re:b', "rules are about paths, found 're:b'"),
    (r're:(.*)/a -> \1/*', r"'\*' means nothing on the right of a regular"),
    (r're:(.*)/a -> {\1,b}', "'{' means nothing on the right of a regular"),
    (r're:(.*)/a -> h<i>', "'<' means nothing on the right of a regular"),
    (r're:(.*)/a -> !\1', "rules are about paths, found '!"),
    (r're:(.*)/a -> \0/b', r"is a control character.*'\\g<0>'"),
    (r're:(.*)/a -> $1/b', r"'\$' means nothing on the right of a regular"),
    ('h[01] -> g[ab]', r"'\[01\]' on the left and '\[ab\]' on the right"),
    ('h[!01] -> g[01]', r"'\[!01\]' on the left and '\[01\]' on the right"),
    ('{a,a} -> {x,y}', 'braces on the left repeat a name'),
    ('h[a/b] -> [a/b]', r"a '\[' without its '\]'"),
    ('h[!] -> [!]', r"a '\[' without its '\]'"),
  ],
)
def test_what_cannot_be_read_is_refused(rule, message):
  with pytest.raises(errors.RenameError, match=message):
    renaming.parse(rule)


@pytest.mark.parametrize(
  ('rule', 'path', 'message'),
  [
    (
      'h<i> -> h<i-3>',
      'h2/k',
      "rule 'h<i> -> h<i-3>': h2/k would get the number -1, and numbers in "
      'names cannot be negative.',
    ),
    (
      'net/** -> **',
      'net',
      "rule 'net/** -> **': net would get the name '', which has an empty part.",
    ),
    (
      'net* -> *',
      'net/k',
      "rule 'net* -> *': net/k would get the name '/k', which has an empty part.",
    ),
    (r're:(a) -> \2', 'a', r"rule 're:(a) -> \\2': invalid group reference 2"),
  ],
)
def test_a_name_that_cannot_be_is_refused(rule, path, message):
  with pytest.raises(errors.RenameError) as raised:
    renamed(rule, path)
  assert message in str(raised.value)


def test_a_rule_that_matches_nothing_shows_the_nearest():
  with pytest.raises(
    errors.RenameError,
    match="rule 'net/quary -> x' matches nothing among 2 tensors. Nearest: "
    'net/query.',
  ):
    renamed('net/quary -> x', 'net/query/kernel', 'net/value/kernel')


def test_a_rule_that_never_decides_names_the_one_that_does():
  with pytest.raises(
    errors.RenameError,
    match="rule 'net/a -> y' has no effect: the earlier rule 'net -> x' "
    'decides all that it matches, e.g. net/a/k. Put it first.',
  ):
    renamed(['net -> x', 'net/a -> y'], 'net/a/k')


def test_no_tensors_are_said_to_be_none():
  with pytest.raises(errors.RenameError, match='there are no tensors'):
    renamed('a -> b')


def checked(**where):
  renaming.check_targets(
    {paths.parse(a.replace('_', '/')): paths.parse(b) for a, b in where.items()}
  )


def test_all_paths_that_become_one_are_named():
  with pytest.raises(
    errors.RenameError,
    match='rename: a/k and b/k would all be x/k; c/k and d/k would all be y/k.',
  ):
    checked(a_k='x/k', b_k='x/k', c_k='y/k', d_k='y/k', e='e')


def test_a_path_beneath_another_is_named_with_it():
  with pytest.raises(
    errors.RenameError,
    match=r'a/k \(from b\) would lie beneath the tensor a \(from a\)',
  ):
    checked(a='a', b='a/k')


def test_what_lay_beneath_a_tensor_before_may_stay():
  checked(a='a', a_k='a/k', b='c')


def test_many_collisions_are_counted():
  with pytest.raises(errors.RenameError, match='; and 5 more. Change'):
    checked(
      **{f'a{i}': f'x{i}' for i in range(25)},
      **{f'b{i}': f'x{i}' for i in range(25)},
    )


NAMES = st.text('ab*?{}[]<>/\\,!:->1.', min_size=1, max_size=4)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)


def escaped(path):
  return paths.literal(path).replace('<', '\\<').replace('->', '\\->')


@given(PATHS, PATHS, PATHS)
def test_any_name_can_be_written_literally(old, new, beneath):
  rule = renaming.parse(f'{escaped(old)} -> {escaped(new)}')
  assert new == rule.apply(old)
  assert new + beneath == rule.apply(old + beneath)


@given(st.integers(0, 10**20), st.integers(0, 10**9))
def test_numbers_go_up_and_down_again(number, by):
  up = renaming.parse(f'h<i> -> h<i+{by}>')
  down = renaming.parse(f'h<i> -> h<i-{by}>')
  path = (f'h{number}',)
  there = up.apply(path)
  assert there is not None
  assert path == down.apply(there)


def resolved(rule, *shown):
  return renaming.resolved(
    [renaming.parse(rule)], [paths.parse(s) for s in shown]
  )


@pytest.mark.parametrize(
  'rule',
  [
    '**/{query,vlaue} -> **/{q,v}',
    r're:(.*)/(query|vlaue)/kernel -> \1/\2',
    '{net,nte}/{query,value} -> {net,nte}/{query,value}',
  ],
)
def test_an_alternative_that_matches_nothing_is_refused(rule):
  with pytest.raises(errors.RenameError) as raised:
    resolved(rule, 'net/query/kernel', 'net/value/kernel')
  assert re.search(
    r"its alternative '(vlaue|nte)' matches nothing among 2 tensors. Nearest: "
    'net',
    str(raised.value),
  )


def test_each_alternative_has_to_match_not_each_combination():
  rule = '{a,b}/{c,d} -> {c,d}/{a,b}'
  assert {('c', 'a'), ('d', 'b')} == set(resolved(rule, 'a/c', 'b/d').values())


def test_an_alternative_that_an_earlier_rule_decides_matches():
  rules = [renaming.parse(r) for r in ('a -> x', '{a,b} -> {y,z}')]
  assert {('a',): ('x',), ('b',): ('z',)} == renaming.resolved(
    rules, [('a',), ('b',)]
  )


def test_what_a_regular_expression_matches_may_stay():
  rule = renaming.staying('re:new/.*')
  assert ('new', 'a') == rule.apply(('new', 'a'))
  assert rule.apply(('old', 'a')) is None


@pytest.mark.parametrize(
  'text',
  [
    'a/*',
    '{a,b}',
    'h<i>',
    'a[bc]',
    'a?',
    '**',
    're:a',
    'b::a',
    '!a',
    'a->b',
    '',
  ],
)
def test_what_is_no_name_is_refused(text):
  with pytest.raises(errors.RenameError):
    renaming.name(text, f'-> {text}')


@given(PATHS)
def test_any_name_is_read_as_it_was_written(path):
  assert path == renaming.name(escaped(path), '-> …')


def test_rules_of_other_programs_are_explained():
  universe = [('model', 'layers', '0', 'q_proj', 'weight')]
  with pytest.raises(errors.RenameError) as caught:
    renaming.resolved([renaming.parse('model.layers.<i> -> h.<i>')], universe)
  assert (
    'matches nothing among 1 tensors. Names are written with slashes here: '
    "'model/layers/<i>'."
  ) in str(caught.value)


def test_ranges_go_number_by_number():
  rule = renaming.parse('m/{8..10}/** -> n/{1..3}/**')
  assert ('n', '2', 'w') == rule.apply(('m', '9', 'w'))
  assert rule.apply(('m', '7', 'w')) is None
  with pytest.raises(errors.RenameError, match='3 names on the left'):
    renaming.parse('m/{8..10} -> n/{1..2}')
  with pytest.raises(errors.RenameError, match='more than 1000 numbers'):
    renaming.parse('m/{0..5000} -> n/{0..5000}')
