"""The kit itself: broken adapters, each caught by the law that it breaks."""

import random
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery import testing
from surgery.testing import models

# What each of them does right: a scale of outputs, on layers with a bias too.


class _Scale(surgery.Adapter):
  name = 'scale'
  rewrites: ClassVar[tuple[str, ...]] = ('kernel', 'bias')

  def init(self, site, key):
    return {'s': jnp.ones(site.out_shape)}

  def apply(self, site, name, base, weights):
    return base * weights['s']


class NotTheIdentity(_Scale):
  name = 'not_the_identity'

  def init(self, site, key):
    return {'s': 2 * jnp.ones(site.out_shape)}


class WithoutEffect(_Scale):
  name = 'without_effect'

  def apply(self, site, name, base, weights):
    s = weights['s']
    return base + (s - jax.lax.stop_gradient(s))


class NotFinite(_Scale):
  """Its gradient is not a number where it begins."""

  name = 'not_finite'

  def apply(self, site, name, base, weights):
    return base * (1 + jnp.sqrt((weights['s'] - 1) ** 2))


class ReEncoded(_Scale):
  """What is merged is not what layers got."""

  name = 're_encoded'

  @surgery.hookimpl
  def surgery_merge_param(self, site, adapter):
    return lambda value: value * 1.000001


class Unused(_Scale):
  name = 'unused'

  def init(self, site, key):
    return {'s': jnp.ones(site.out_shape), 'spare': jnp.zeros(3)}


class NoSum(_Scale):
  """It says that it adds, so that the order would not matter."""

  name = 'no_sum'
  adds = True

  def apply(self, site, name, base, weights):
    return base * weights['s'] + (weights['s'] - 1) ** 2


class SaysThatItAdds(_Scale):
  """Two of them may be merged in any order, but not one and a LoRA."""

  name = 'says_that_it_adds'
  adds = True


class DrawnByItself(_Scale):
  name = 'drawn_by_itself'

  def init(self, site, key):
    noise = np.random.default_rng().normal(size=site.out_shape)
    return {'s': jnp.asarray(noise, 'float32')}


class Moody(_Scale):
  name = 'moody'

  def apply(self, site, name, base, weights):
    weight = 1 + random.random()
    return base * (1 + weight * (weights['s'] - 1))


class HidesNaN(_Scale):
  name = 'hides_nan'

  def apply(self, site, name, base, weights):
    return base * jnp.nan_to_num(weights['s'])


class Boundless(_Scale):
  """It takes any rank."""

  name = 'boundless'
  rank: int = surgery.field(default=2, ge=1)


class Surprised(Boundless):
  """It fails for a rank that is too large, and does not say why."""

  name = 'surprised'

  def init(self, site, key):
    assert self.rank <= min(site.in_size, site.out_size)
    return super().init(site, key)


class Bounded(Boundless):
  """It has an option that its range alone bounds, and one that sites bound."""

  name = 'bounded'
  rank: int = surgery.field(default=2, ge=1, le=8)
  block: int = surgery.field(default=1, ge=1)

  def init(self, site, key):
    if site.out_size % self.block:
      raise surgery.SiteError(f'blocks of {self.block} do not fit.')
    return super().init(site, key)


class Fixed(surgery.Adapter):
  """It adds no weights at all."""

  name = 'fixed'

  def init(self, site, key):
    return {}

  def apply(self, site, name, base, weights):
    return 2 * base


class FixedHidesNaN(Fixed):
  name = 'fixed_hides_nan'

  def apply(self, site, name, base, weights):
    return 2 * jnp.nan_to_num(base)


class Forgetful(_Scale):
  """It is read back with other options."""

  name = 'forgetful'
  power: float = surgery.field(default=1.0)

  def apply(self, site, name, base, weights):
    return base * weights['s'] ** self.power

  @classmethod
  def from_config(cls, data):
    return cls()


class Fussy(_Scale):
  """It serves no layer where JAX has 64 bits."""

  name = 'fussy'

  def serves(self, site):
    return 'it is too long' if jax.config.jax_enable_x64 else None


class Greedy(_Scale):
  """It serves layers that it is declared not to serve."""

  name = 'greedy'


class IgnoresItsKey(_Scale):
  """It draws the same numbers for each seed and each site."""

  name = 'ignores_its_key'

  def init(self, site, key):
    noise = jax.random.normal(jax.random.key(0), site.out_shape)
    return {'s': 1 + 0.1 * noise}


class DrawnOnce(_Scale):
  """As numpy draws, with a seed of its own."""

  name = 'drawn_once'

  def init(self, site, key):
    numbers = np.random.default_rng(0)
    return {'s': 1 + numbers.normal(size=site.out_shape).astype('float32')}


class Cosine(_Scale):
  """Its numbers are computed, and look drawn."""

  name = 'cosine'

  def init(self, site, key):
    return {'s': 1 + jnp.cos(jnp.arange(site.out_size)).reshape(site.out_shape)}


class Stored(_Scale):
  """Takes the shape as it is stored for inputs and outputs."""

  name = 'stored'
  rewrites = ('kernel',)

  def init(self, site, key):
    return {'s': jnp.ones(site.primary.shape)}


class StoredSide(_Scale):
  """Is wrong where a kernel is turned, and fails nowhere."""

  name = 'stored_side'
  rewrites = ('kernel',)

  def apply(self, site, name, base, weights):
    return base * weights['s'] + (weights['s'] - 1) * site.primary.shape[0]


class Blocks(_Scale):
  """Scales blocks of four outputs."""

  name = 'blocks'
  rewrites = ('kernel',)

  def init(self, site, key):
    if site.out_size % 4:
      raise surgery.SiteError(
        f'{"/".join(site.path)}: blocks of 4 do not divide {site.out_size}.'
      )
    return {'s': jnp.ones(site.out_size // 4)}

  def apply(self, site, name, base, weights):
    return base * jnp.repeat(weights['s'], 4).reshape(site.out_shape)


class Dropped(surgery.Adapter):
  """LoRA of rank one with dropout, which counts or does not."""

  name = 'dropped'
  adds = True

  def init(self, site, key):
    words = jax.random.bits(surgery.named_key(key, 'key'), (2,), 'uint32')
    a = jax.random.normal(surgery.named_key(key, 'a'), (*site.in_shape, 1))
    return {
      'a': a,
      'b': jnp.zeros((1, *site.out_shape)),
      'key': jnp.append(words, jnp.uint32(0)),
    }

  def apply(self, site, name, base, weights):
    *words, count = weights['key']
    key = jax.random.wrap_key_data(jnp.stack(words), impl='threefry2x32')
    key = jax.random.fold_in(key, count)
    return surgery.LowRank(base, weights['a'], weights['b'], 1.0, 0.1, key)


class ScaledByShape(surgery.LoRA):
  """Its scale follows the rank that there is, where options do not."""

  name = 'scaled_by_shape'

  def apply(self, site, name, base, weights):
    a, b = weights['lora_a'], weights['lora_b']
    return surgery.LowRank(base, a, b, 2 / b.shape[0])


class OtherAxis(surgery.LoRA):
  """Says an axis that is as long as the rank in convolutions alone."""

  name = 'other_axis'
  rank_axes: ClassVar[Mapping[str, int]] = {'lora_a': 1, 'lora_b': 0}


class Multiplies(surgery.LoRA):
  """Inherits `adds`, and does not add."""

  name = 'multiplies'

  def apply(self, site, name, base, weights):
    a, b = weights['lora_a'], weights['lora_b']
    return base * (1 + jnp.tensordot(a, b, 1))


SAVING = {
  'saved_is_loaded',
  'an_adapter_is_saved_alone',
  'file_merge_is_live_merge',
}

BROKEN: dict[str, Any] = {
  'not the identity': (NotTheIdentity(), {}, {'identity_at_start'}),
  'declared otherwise': (
    _Scale(),
    {'identity': False},
    {'identity_at_start'},
  ),
  'without effect': (WithoutEffect(), {}, {'random_weights_do_something'}),
  'not finite': (NotFinite(), {}, {'outputs_are_finite'}),
  're-encoded': (ReEncoded(), {}, {'merged_is_adapted'}),
  'unused': (Unused(), {}, {'training_changes_the_adapter_alone'}),
  'no sum': (
    NoSum(),
    {},
    {
      'several_adapters_work_together',
      'what_adds_does_not_look_at_the_base',
    },
  ),
  'says that it adds': (
    SaysThatItAdds(),
    {},
    {'what_adds_does_not_look_at_the_base'},
  ),
  'drawn by itself': (
    DrawnByItself(),
    {'identity': False},
    {
      'seeds_decide_the_weights',
      'what_is_drawn_depends_on_the_seed',
      'how_axes_are_stored_does_not_matter',
      'settings_of_jax_change_nothing',
    },
  ),
  'fussy': (Fussy(), {}, {'settings_of_jax_change_nothing'}),
  'moody': (
    Moody(),
    {},
    {
      'two_calls_give_the_same',
      'how_axes_are_stored_does_not_matter',
      'shards_give_the_eager_result',
      'transformations_give_the_eager_result',
    },
  ),
  'hides NaN': (HidesNaN(), {}, {'what_is_not_finite_is_not_merged'}),
  'boundless': (Boundless(), {}, {'what_is_too_large_is_refused'}),
  'surprised': (Surprised(), {}, {'what_is_too_large_is_refused'}),
  'not as large': (
    Bounded(),
    {'too_large': {'block': 5}},
    {'what_is_too_large_is_refused'},
  ),
  'nothing trains': (
    Fixed(),
    {'identity': False},
    {'training_changes_the_adapter_alone'},
  ),
  'trains all the same': (
    _Scale(),
    {'trains': False},
    {'training_changes_the_adapter_alone'},
  ),
  'hides NaN of the base': (
    FixedHidesNaN(),
    {'identity': False, 'trains': False},
    {'what_is_not_finite_is_not_merged'},
  ),
  'merged all the same': (
    _Scale(),
    {'mergeable': False},
    {'what_cannot_be_merged_is_refused'},
  ),
  'forgetful': (Forgetful(power=2.0), {}, {'configuration_is_data', *SAVING}),
}


BROKEN |= {
  'ignores its key': (
    IgnoresItsKey(),
    {'identity': False},
    {'what_is_drawn_depends_on_the_seed'},
  ),
  'drawn once': (
    DrawnOnce(),
    {'identity': False},
    {'what_is_drawn_depends_on_the_seed'},
  ),
  'computed, and it is not said': (
    Cosine(),
    {'identity': False},
    {'what_is_drawn_depends_on_the_seed'},
  ),
  'drawn, and declared to be computed': (
    surgery.LoRA(rank=2),
    {'seeded': False},
    {'what_is_drawn_depends_on_the_seed'},
  ),
  'as stored': (Stored(), {}, {'how_axes_are_stored_does_not_matter'}),
  'a side as stored': (
    StoredSide(),
    {},
    {'how_axes_are_stored_does_not_matter'},
  ),
}


def test_what_is_computed_may_be_declared():
  testing.check(
    Cosine(), identity=False, seeded=False,
    laws=['what_is_drawn_depends_on_the_seed'],
  )  # fmt: skip


def test_a_type_says_which_sizes_it_needs():
  laws = ['identity_at_start', 'random_weights_do_something']
  laws += ['how_axes_are_stored_does_not_matter']
  testing.check(Blocks(), multiple_of=4, laws=laws, dtypes=['float32'])
  with pytest.raises(
    testing.Broken, match=r'blocks of 4 do not divide 5.*multiple_of = 4 makes'
  ) as caught:
    testing.check(Blocks(), laws=laws)
  with pytest.raises(testing.Broken, match='multiple_of=2'):
    testing.check(Blocks(), multiple_of=2, laws=laws)
  assert 'multiple_of' not in str(caught.value).partition('Reproduce')[2]
  wrongs: list[Any] = [0, -1, 2.0, True]
  for wrong in wrongs:
    with pytest.raises(surgery.ConfigError, match='multiple_of: expected a'):
      testing.check(Blocks(), multiple_of=wrong)


@pytest.mark.parametrize('kind', models.KINDS)
def test_all_numbers_of_inputs_and_outputs_are_multiples(kind):
  for times in (1, 3):
    known = []

    class Looks(surgery.Adapter):
      name = 'looks'
      rewrites = ('scale',) if kind == 'norm' else ('kernel',)

      def serves(self, site):
        known.append((site.in_size, site.out_size))  # noqa: B023
        return None

      def init(self, site, key):
        return {}

      def apply(self, site, name, base, weights):
        return base

    model = models.model(kind, multiple_of=times)
    host = surgery.Host(plugins=[Looks], only=())
    models.attached(model, Looks(), host)
    assert known
    for inputs, outputs in known:
      assert kind == 'norm' or 0 == inputs % times
      assert 0 == outputs % times
    if kind in ('linear', 'no_bias', 'conv', 'embed'):
      # Mistaking one side for the other must show.
      assert all(inputs != outputs for inputs, outputs in known)


def test_block_wise_types_conform_by_their_test_class():
  class Test(testing.AdapterConformance):
    adapter = Blocks()
    multiple_of = 4

  assert {4} == {case.declared.multiple_of for case in Test.cases()}


@pytest.mark.parametrize(
  ('counters', 'said'),
  [((), r'\(\)'), (('keys',), "'keys'"), (('a',), "'a'")],
)
def test_dropout_without_a_counter_is_refused(counters, said):
  type_ = type('Wrong', (Dropped,), {'name': 'wrong', 'counters': counters})
  with pytest.raises(
    testing.Broken,
    match=rf'`counters`, .*{said}.*, names no vector of integers.*: key\.',
  ):
    testing.check(type_(), laws=['identity_at_start'])


@pytest.mark.parametrize(
  ('adapter', 'kind'),
  [(ScaledByShape(rank=3), 'linear'), (OtherAxis(rank=2), 'conv')],
)
def test_pruning_a_rank_that_is_not_masking_it_is_caught(adapter, kind):
  law = 'pruning_a_rank_is_masking_it'
  with pytest.raises(testing.Broken) as caught:
    testing.check(adapter, laws=[law], kinds=[kind])
  inherited = "is inherited from LoRA. If it is not true of 'scaled_by_shape', "
  assert (kind == 'linear') == (inherited in str(caught.value))
  testing.check(surgery.LoRA(rank=3), laws=[law])


def test_what_a_type_inherits_is_told_where_it_does_not_hold():
  law = 'what_adds_does_not_look_at_the_base'
  hint = (
    "`adds = True` is inherited from LoRA. If it is not true of 'multiplies', "
    'set adds = False in the class.'
  )
  with pytest.raises(testing.Broken, match=re.escape(hint)):
    testing.check(Multiplies(rank=2), laws=[law])

  class Said(Multiplies):
    name = 'said'
    adds = True

  with pytest.raises(testing.Broken) as caught:
    testing.check(Said(rank=2), laws=[law])
  assert 'inherited' not in str(caught.value)


def test_dropout_with_a_counter_is_right():
  type_ = type('Right', (Dropped,), {'name': 'right', 'counters': ('key',)})
  testing.check(type_(), kinds=['linear'], dtypes=['float32'])


def test_what_is_right_is_right():
  assert {} == testing.broken(_Scale(), kinds=['linear'], dtypes=['float32'])


@pytest.mark.parametrize('name', BROKEN)
def test_each_is_caught_by_its_law(name):
  adapter, declared, laws = BROKEN[name]
  found = testing.broken(
    adapter, kinds=['linear'], dtypes=['float32'], **declared
  )
  assert laws == found.keys(), found
  for law, error in found.items():
    if isinstance(error, testing.Broken):
      assert law == error.law
      assert f"law '{law}' is broken by" in str(error)
      assert 'Reproduce: surgery.testing.check(' in str(error)


def test_what_is_too_large_may_be_said_or_nothing():
  for adapter, too_large in (
    (Boundless(), {}),
    (Bounded(), None),
    (Bounded(), {'block': 10_000}),
    (surgery.LoRA(rank=2), None),
  ):
    testing.check(
      adapter, too_large=too_large, laws=['what_is_too_large_is_refused']
    )


def test_an_error_of_a_plugin_is_none_of_a_rank_that_is_too_large():
  with pytest.raises(testing.Broken, match='expected a SiteError that names'):
    testing.check(Surprised(), laws=['what_is_too_large_is_refused'])


def test_what_is_served_but_declared_unsupported_is_caught():
  found = testing.broken(
    Greedy(), unsupported=['conv'], kinds=['linear', 'conv'],
    dtypes=['float32'], laws=['refuses', 'two_calls_give_the_same'],
  )  # fmt: skip
  assert {'refuses'} == found.keys()
  assert 'expected an error, and there was none' in str(found['refuses'])


class Shift(surgery.Adapter):
  name = 'shift'
  rewrites = ('scale', 'bias')

  def init(self, site, key):
    return {f's_{p.name}': jnp.zeros(p.out_shape) for p in site.params}

  def apply(self, site, name, base, weights):
    return base + weights[f's_{name}']

  def serves(self, site):
    return None if site.name == 'scale' else 'it is no scale'


def test_types_for_vectors_are_looked_at_on_norms():
  laws = ['training_changes_the_adapter_alone', 'identity_at_start', 'refuses']
  testing.check(
    Shift(), kinds=['norm', 'linear'], unsupported=['linear'],
    dtypes=['float32'], laws=laws,
  )  # fmt: skip


def test_types_for_matrices_are_not_looked_at_on_norms():
  class Scale(testing.AdapterConformance):
    adapter = _Scale()

  kinds = {case.kind for case in Scale.cases()}
  assert {'linear', 'no_bias', 'conv', 'embed', 'einsum', 'stacked'} == kinds


def test_a_failure_says_where_by_how_much_and_how_to_see_it_again():
  with pytest.raises(testing.Broken) as told:
    testing.check(NotTheIdentity(), kinds=['conv'])
  text = str(told.value)
  assert 'on conv layers of float32' in text
  assert re.search(r'differ by up to [\d.]+', text)
  assert 'The law: A new adapter changes no output' in text
  [command] = re.findall(r'Reproduce: (.*)', text)
  assert "laws=['identity_at_start'], kinds=['conv']" in command


def test_what_reproduces_a_failure_says_all_that_was_declared():
  declared: dict[str, Any] = {
    'identity': False, 'unsupported': ['conv'], 'trains': False,
    'too_large': {'block': 7}, 'mergeable': False,
  }  # fmt: skip
  with pytest.raises(testing.Broken) as told:
    testing.check(Greedy(), kinds=['conv'], laws=['refuses'], **declared)
  [command] = re.findall(r'Reproduce: (.*)', str(told.value))
  names = {
    'surgery': surgery, 'Greedy': Greedy,
  }  # fmt: skip
  with pytest.raises(testing.Broken) as again:
    eval(command, names)
  assert str(told.value) == str(again.value)


class Wrong(_Scale):
  name = 'wrong'

  def apply(self, site, name, base, weights):
    return base[None]


class Picky(_Scale):
  name = 'picky'

  def serves(self, site):
    return 'it is picky' if site.name == 'kernel' else None


@pytest.mark.parametrize(
  ('adapter', 'said'),
  [
    (Wrong(), 'PluginError: attach: net/layers/query'),
    (Picky(), "say so: unsupported = ('linear',)"),
  ],
)
def test_what_is_raised_names_the_law_too(adapter, said):
  with pytest.raises(testing.Broken) as told:
    testing.check(adapter, kinds=['linear'], laws=['identity_at_start'])
  assert said in str(told.value)
  assert "law 'identity_at_start' is broken" in str(told.value)
  assert 'Reproduce: surgery.testing.check(' in str(told.value)


def test_a_type_is_no_adapter():
  with pytest.raises(surgery.ConfigError, match=r'found _Scale. Give one with'):
    testing.check(_Scale)  # type: ignore[arg-type]

  class Scale(testing.AdapterConformance):
    adapter = _Scale  # type: ignore[assignment]

  with pytest.raises(surgery.ConfigError, match='expected an adapter'):
    Scale.cases()


def test_an_option_that_is_not_there_cannot_be_too_large():
  with pytest.raises(
    testing.Broken, match="too_large: .* has no option 'blok'"
  ):
    testing.check(
      Bounded(),
      too_large={'blok': 3},
      laws=['what_is_too_large_is_refused'],
    )


def test_laws_and_kinds_that_are_not_known_are_refused():
  with pytest.raises(surgery.ConfigError, match="Did you mean 'conv'"):
    testing.check(_Scale(), kinds=['konv'])
  with pytest.raises(surgery.ConfigError, match='no law is called'):
    testing.check(_Scale(), laws=['x'])


def test_every_law_has_a_sentence():
  for name, law in testing.LAWS.items():
    assert law.__doc__ and law.__doc__.split('\n')[0].endswith('.'), name


def test_pytest_finds_the_laws_of_a_type(tmp_path):
  (tmp_path / 'test_mine.py').write_text(
    textwrap.dedent("""
      import jax.numpy as jnp
      import surgery
      from surgery.testing import AdapterConformance

      class Mine(surgery.Adapter):
        name = 'mine'
        def init(self, site, key):
          return {'s': 2 * jnp.ones(site.out_shape)}
        def apply(self, site, name, base, weights):
          return base * weights['s']

      class TestMine(AdapterConformance):
        adapter = Mine()
        unsupported = ('embed', 'conv', 'einsum', 'stacked', 'no_bias')

      class TestNone(AdapterConformance):
        adapter = Mine()
        identity = False
        unsupported = TestMine.unsupported
    """)
  )
  done = subprocess.run(
    [
      sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
      str(tmp_path), '-k', 'identity and float32',
    ],
    capture_output=True,
    text=True,
  )  # fmt: skip
  assert '1 failed, 1 passed' in done.stdout, done.stdout
  assert 'test_law[identity_at_start-linear-float32]' in done.stdout
  assert "law 'identity_at_start' is broken by" in done.stdout
