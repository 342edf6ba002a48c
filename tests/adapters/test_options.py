"""Options of an adapter type: checks that an author cannot switch off."""

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
    ({'rewrite': ('bias',)}, "'rewrite' is no part .* mean 'rewrites'"),
    ({'frozens': ()}, "'frozens' is no part .* mean 'frozen'"),
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
