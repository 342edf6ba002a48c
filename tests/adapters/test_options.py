"""Options of an adapter type: checks that an author cannot switch off."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import surgery


class Silent(surgery.Adapter):
  """Has a `__post_init__` that forgets `super()`."""

  name = 'silent'
  rank: int = surgery.field(default=8, ge=1, le=16, doc='A rank.')
  alpha: float = surgery.field(default=2, gt=0, doc='A scale.')

  def __post_init__(self):
    # What it is given is checked already: text would fail here.
    object.__setattr__(self, 'rank', self.rank + 0)

  def check(self):
    if self.alpha > self.rank:
      raise surgery.ConfigError(
        f"adapter type 'silent', option 'alpha': expected at most the rank, "
        f'{self.rank}, found {self.alpha}.'
      )

  def init(self, site, key):
    return {}

  def apply(self, site, name, base, weights):
    return base


class Inner(Silent):
  """Checks more, without `super()`."""

  name = 'inner'
  blocks: int = 2

  def check(self):
    if self.rank % self.blocks:
      raise ValueError(f'{self.blocks} blocks do not divide {self.rank}')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'rank': 0},
      "adapter type 'silent', option 'rank': expected a value >= 1",
    ),
    ({'rank': 'x'}, r"option 'rank': expected int, found 'x' \(str\)"),
    ({'rank': True}, 'expected int, found True'),
    ({'rang': 3}, "no option 'rang'. Did you mean 'rank'"),
    ({'alpha': float('nan')}, 'expected a finite number'),
    ({'alpha': 9}, "option 'alpha': expected at most the rank, 8, found 9.0"),
    ({'patterns': {'**/a': {'rank': 99}}}, 'expected a value <= 16, found 99'),
    ({'patterns': {'**/a': {'rang': 9}}}, "no option 'rang'"),
    ({'patterns': {'re:(': {'rank': 9}}}, 'not a regular expression'),
    ({'patterns': 3}, r'patterns: expected \{selector'),
    (
      {'patterns': {'**/a': {'rank': 1}}},
      r"patterns, '\*\*/a': .* at most the rank, 1, found 2\.0",
    ),
  ],
)
def test_a_post_init_without_super_loses_no_check(options, message):
  with pytest.raises(surgery.SurgeryError, match=message):
    Silent(**options)


def test_options_are_brought_to_their_types_all_the_same():
  adapter = Silent(alpha=3, patterns={'**/a': {'alpha': 4}})
  assert (3.0, float) == (adapter.alpha, type(adapter.alpha))
  assert (('**/a', (('alpha', 4.0),)),) == adapter.patterns
  assert float is type(Silent().alpha)
  assert Silent(alpha=2) == Silent() == Silent.from_config(Silent().config())


def test_what_a_post_init_sets_is_checked_too():
  class Setting(Silent):
    name = 'setting'

    def __post_init__(self):
      object.__setattr__(self, 'rank', 17)

  with pytest.raises(surgery.ConfigError, match='expected a value <= 16'):
    Setting()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 3}, "adapter type 'inner': 2 blocks do not divide 3"),
    ({'alpha': 9}, 'expected at most the rank, 8, found 9.0'),
    ({'patterns': {'**': {'rank': 5}}}, r"patterns, '\*\*': .*do not divide 5"),
  ],
)
def test_checks_of_all_classes_are_made(options, message):
  with pytest.raises(surgery.ConfigError, match=message):
    Inner(**options)
  assert 4 == Inner(rank=4).rank


def test_a_check_holds_for_what_a_file_says():
  with pytest.raises(surgery.ConfigError, match='do not divide 3'):
    Inner.from_config({'rank': 3})


@pytest.mark.parametrize('method', ['check', '__post_init__'])
def test_a_check_that_fails_is_the_types_mistake(method):
  def wrong(self):
    self.ranks

  failing = type('Failing', (Silent,), {'name': 'failing', method: wrong})
  with pytest.raises(
    surgery.PluginError,
    match=f"adapter type 'failing': {method} failed: AttributeError: .*'ranks'",
  ):
    failing()


def test_a_check_that_returns_something_is_the_types_mistake():
  class Returning(Silent):
    name = 'returning'

    def check(self):
      return 'rank is odd'

  with pytest.raises(
    surgery.PluginError, match="check returned 'rank is odd', expected None"
  ):
    Returning()


@pytest.mark.parametrize(
  ('said', 'message'),
  [
    ({'rewrite': ('bias',)}, "'rewrite' is not part .* mean 'rewrites'"),
    ({'frozens': ()}, "'frozens' is not part .* mean 'frozen'"),
    ({'counter': ('a',)}, "mean 'counters'"),
    ({'mergable': False}, "mean 'mergeable'"),
    ({'serve': lambda self, site: None}, "mean 'serves'"),
    ({'shardings': lambda self, site, weight: None}, "mean 'sharding'"),
    ({'mergeable': 'no'}, "mergeable: expected True or False, found 'no'"),
    ({'adds': 1}, 'adds: expected True or False, found 1'),
    ({'name': ('a',)}, 'has no name'),
  ],
)
def test_a_class_that_says_what_nobody_reads_is_refused(said, message):
  with pytest.raises(surgery.PluginError, match=message):
    type('Odd', (Silent,), {'name': 'odd', **said})()


def test_what_is_a_types_own_is_not_mistaken():
  members = {'name': 'own', 'scale': 3, '_rewrite': 1, 'merge': None}
  assert 8 == type('Own', (Silent,), members)().rank


class Mixed(surgery.Adapter):
  """Has options of all kinds."""

  name = 'mixed'
  flag: bool = False
  text: str = ''
  number: float | None = None
  sizes: tuple[int, ...] = ()

  def init(self, site, key):
    return {}

  def apply(self, site, name, base, weights):
    return base


@pytest.mark.parametrize(
  ('option', 'value', 'expected'),
  [
    ('flag', np.bool_(True), True),
    ('text', np.str_('a'), 'a'),
    ('number', np.float64(0.1), 0.1),
    ('number', np.float32(0.1), 0.10000000149011612),
    ('number', np.float16(0.5), 0.5),
    ('number', ml_dtypes.bfloat16(0.25), 0.25),
    ('number', np.int8(3), 3.0),
    ('sizes', (np.int64(2), np.uint8(3), 4), (2, 3, 4)),
  ],
)
def test_scalars_of_numpy_are_those_of_python(option, value, expected):
  alone = getattr(Mixed(**{option: value}), option)
  ((_, ((_, by_pattern),)),) = Mixed(patterns={'a': {option: value}}).patterns
  for found in (alone, by_pattern):
    assert expected == found
    kinds = [type(v) for v in (found if isinstance(found, tuple) else [found])]
    assert all(kind.__module__ == 'builtins' for kind in kinds)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': np.float32(4)}, r'expected int, found np.float32\(4.0\)'),
    ({'rank': np.bool_(True)}, 'expected int, found np.True_'),
    ({'rank': np.int64(0)}, 'expected a value >= 1, found 0'),
    ({'rank': np.array(4)}, 'expected int, found array'),
    ({'alpha': np.float32('nan')}, 'expected a finite number, found nan'),
    ({'alpha': np.complex64(1)}, 'expected float'),
  ],
)
def test_scalars_of_numpy_are_checked(options, message):
  with pytest.raises(surgery.ConfigError, match=message):
    Silent(**options)


def test_a_configuration_of_numpy_is_that_of_python():
  given: dict[str, Any] = {
    'rank': np.int64(4),
    'alpha': np.float32(8),
    'rslora': np.bool_(1),
  }
  one = surgery.LoRA(**given)
  other = surgery.LoRA(rank=4, alpha=8.0, rslora=True)
  assert other == one
  assert hash(other) == hash(one)
  assert json.dumps(other.config()) == json.dumps(one.config())
