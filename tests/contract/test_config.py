"""Options: read from text and JSON, checked by type and range."""

import json
import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.contract import config


class Many(surgery.Adapter):
  """Has an option of every kind."""

  name = 'many'
  flag: bool = False
  count: int = surgery.field(default=1, ge=0, lt=100, doc='How many.')
  factor: float = surgery.field(default=1.0, gt=0, le=2)
  limit: float | None = surgery.field(default=None, gt=0)
  kind: Literal['sum', 'mean', 3] = 'sum'
  label: str = ''
  either: int | str = 0
  sizes: tuple[int, ...] = ()
  pair: tuple[int, float] = (1, 1.0)
  nested: tuple[tuple[int, ...], ...] = ()
  some: tuple[float, ...] | None = None

  def init(self, site, key):
    return {}

  def apply(self, site, name, base, weights):
    return base


READ = [
  ('flag', 'true', True),
  ('flag', 'False', False),
  ('count', '8', 8),
  ('factor', '2', 2.0),
  ('factor', '1e-3', 1e-3),
  ('limit', 'none', None),
  ('limit', 'null', None),
  ('limit', '0.5', 0.5),
  ('kind', 'mean', 'mean'),
  ('kind', '3', 3),
  ('label', '8', '8'),
  ('label', 'none', 'none'),
  ('either', '8', 8),
  ('either', 'all', 'all'),
  ('sizes', '[1, 2]', (1, 2)),
  ('sizes', '[]', ()),
  ('pair', '[1, 2]', (1, 2.0)),
  ('nested', '[[1], [2, 3]]', ((1,), (2, 3))),
  ('some', '[1, 2.5]', (1.0, 2.5)),
  ('some', 'none', None),
]


@pytest.mark.parametrize(('option', 'text', 'expected'), READ)
def test_text_is_read_by_the_type_of_the_option(option, text, expected):
  actual = getattr(Many(**config.parse(Many, {option: text})), option)
  assert (expected, type(expected)) == (actual, type(actual))


@pytest.mark.parametrize(
  ('option', 'text', 'message'),
  [
    ('flag', 'yes', "expected bool, found 'yes' (str)"),
    ('count', '1.5', "expected int, found '1.5' (str)"),
    ('count', '', "expected int, found '' (str)"),
    ('factor', 'x', "expected float, found 'x' (str)"),
    ('factor', 'nan', 'expected a finite number, found nan'),
    ('factor', 'inf', 'expected a finite number, found inf'),
    ('limit', 'off', "expected float | None, found 'off' (str)"),
    ('kind', 'max', "expected Literal['sum', 'mean', 3], found 'max' (str)"),
    ('sizes', '1,2', "expected tuple[int, ...], found '1,2' (str)"),
    ('sizes', '[1.5]', 'expected tuple[int, ...], found (1.5,) (tuple)'),
    ('pair', '[1]', 'expected tuple[int, float], found (1,) (tuple)'),
    ('some', '[NaN]', 'expected a finite number, found (nan,)'),
  ],
)
def test_text_that_cannot_be_read_is_refused_by_option(option, text, message):
  given = config.parse(Many, {option: text})
  expected = f"adapter type 'many', option '{option}': {message}"
  with pytest.raises(surgery.ConfigError, match=re.escape(expected)):
    Many(**given)


@pytest.mark.parametrize(
  ('option', 'value', 'message'),
  [
    ('count', -1, 'a value >= 0, found -1'),
    ('count', 100, 'a value < 100, found 100'),
    ('factor', 0, 'a value > 0, found 0'),
    ('factor', 2.5, 'a value <= 2, found 2.5'),
    ('limit', 0.0, 'a value > 0, found 0.0'),
    ('count', True, 'expected int, found True (bool)'),
    ('count', 1.0, 'expected int, found 1.0 (float)'),
    ('flag', 1, 'expected bool, found 1 (int)'),
    ('kind', True, 'found True (bool)'),
    ('sizes', [1], 'expected tuple[int, ...], found [1] (list)'),
    ('label', None, 'expected str, found None (NoneType)'),
  ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(
  option, value, message
):
  with pytest.raises(surgery.ConfigError, match=re.escape(message)):
    Many(**{option: value})
  with pytest.raises(surgery.ConfigError, match=re.escape(message)):
    Many(patterns={'**': {option: value}})


def test_none_has_no_range():
  assert None is Many(limit=None).limit


def test_an_integer_for_a_float_is_the_same_configuration():
  one = Many(factor=2, some=(1, 2), patterns={'**/a': {'limit': 3}})
  two = Many(factor=2.0, some=(1.0, 2.0), patterns={'**/a': {'limit': 3.0}})
  assert one == two
  assert hash(one) == hash(two)
  assert {float} == {type(one.factor), *map(type, one.some or ())}


def test_an_integer_stays_one_where_both_are_allowed():
  class Both(Many):
    name = 'both'
    number: int | float = 0

  assert int is type(Both(number=2).number)


@pytest.mark.parametrize('read', [config.parse, config.from_json])
def test_an_unknown_option_is_refused_with_the_nearest(read):
  with pytest.raises(
    surgery.ConfigError, match=r"no option 'cuont'. Did you mean 'count'\?"
  ):
    read(Many, {'cuont': '1'})


def test_a_type_without_options_says_so():
  class Bare(surgery.Adapter):
    name = 'bare'

  with pytest.raises(
    surgery.ConfigError, match=r"no option 'rank'. It has no options."
  ):
    config.parse(Bare, {'rank': '1'})


values = st.fixed_dictionaries(
  {},
  optional={
    'flag': st.booleans(),
    'count': st.integers(0, 99),
    'factor': st.floats(1e-6, 2),
    'limit': st.none() | st.floats(1e-6, 1e6) | st.integers(1, 5),
    'kind': st.sampled_from(['sum', 'mean', 3]),
    'label': st.text(),
    'either': st.integers() | st.text(),
    'sizes': st.lists(st.integers(), max_size=3).map(tuple),
    'pair': st.tuples(st.integers(), st.integers(0, 9)),
    'nested': st.lists(
      st.lists(st.integers(), max_size=2).map(tuple), max_size=2
    ).map(tuple),
    'some': st.none() | st.lists(st.floats(0, 1), max_size=2).map(tuple),
  },
)


@given(values, values)
def test_a_configuration_comes_back_from_json(options, special):
  adapter = Many(**options, patterns={'**/a': special})
  back = Many.from_config(json.loads(json.dumps(adapter.config())))
  assert adapter == back
  assert hash(adapter) == hash(back)
  assert adapter.config() == back.config()


@pytest.mark.parametrize(
  ('annotation', 'expected'),
  [
    (bool, True),
    (int | None, True),
    (Literal[1], True),
    (tuple[tuple[str, ...], int], True),
    (bytes, False),
    (complex, False),
    (dict, False),
    (list[int], False),
    (tuple[bytes, ...], False),
    (int | bytes, False),
  ],
)
def test_an_option_has_a_type_that_json_does_not_change(annotation, expected):
  assert expected == config.supported(annotation)
