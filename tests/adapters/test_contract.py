"""The contract: what the core asks of an adapter type, and what it gives."""

import re
import typing
from collections.abc import Mapping
from typing import Literal

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.contract import config

# Compiled as users do: bits are compared (see conftest.py).
OPTIMIZED = True


class Draw(surgery.Adapter):
  """Adds what it drew, in ways that XLA likes to fold together."""

  name = 'draw'
  adds = True
  scale: float = surgery.field(default=3.0, gt=0, le=10, doc='Divisor.')
  mode: Literal['a', 'b'] = 'a'
  sizes: tuple[int, ...] = ()

  def init(self, site, key):
    shape = site.in_shape + site.out_shape
    noise = jax.random.normal(surgery.named_key(key, 'noise'), shape)
    shift = jax.random.uniform(surgery.named_key(key, 'shift'), shape)
    return {'noise': noise / jnp.sqrt(self.scale), 'shift': shift * 0.1 + 0.7}

  def apply(self, site, name, base, weights):
    return base + weights['noise'] * weights['shift']


class ByPath(surgery.Adapter):
  """Depends on the site's path."""

  name = 'by_path'

  def init(self, site, key):
    return {'number': jnp.asarray(float(site.path[1][-1]))}

  def apply(self, site, name, base, weights):
    return base + weights['number'] + len(site.layer)


class FromBase(surgery.Adapter):
  """Depends on the base."""

  name = 'from_base'

  def init(self, site, key):
    return {'mean': site.base().mean()}

  def apply(self, site, name, base, weights):
    return base - weights['mean']


HOST = surgery.Host(plugins=[Draw, ByPath, FromBase])


def params_of(count, shape=(3, 2), dtype='float32'):
  params = bx.Params()
  for i in range(count):
    value = jnp.full(shape, i, dtype)
    params[('net', f'layer{i}', 'kernel')] = bx.Param(value)
  return params.locked()


def drawn(params):
  return {
    path: np.asarray(param.value)
    for path, param in params.items()
    if 'adapter' in param.metadata
  }


def assert_same(expected, actual):
  assert set(expected) == set(actual)
  for path, value in expected.items():
    assert value.tobytes() == actual[path].tobytes(), path


# Draws.


@pytest.mark.parametrize('count', [1, 2, 4, 5, 64, 70])
def test_a_site_gets_the_same_bits_alone_and_among_many(count):
  many = surgery.attach(params_of(count), Draw(), to='**', host=HOST)
  i = count - 1
  alone = bx.Params()
  path = ('net', f'layer{i}', 'kernel')
  alone[path] = bx.Param(jnp.zeros((3, 2)))
  one = surgery.attach(alone.locked(), Draw(), to='**', host=HOST)
  both = drawn(many)
  assert_same(drawn(one), {p: both[p] for p in drawn(one)})


def test_under_jit_the_same_bits_are_drawn():
  params = params_of(5)
  eager = surgery.attach(params, Draw(), to='**', host=HOST)
  jitted = jax.jit(lambda p: surgery.attach(p, Draw(), to='**', host=HOST))
  assert_same(drawn(eager), drawn(jitted(params)))


@pytest.mark.parametrize('jit', [False, True])
def test_before_initialisation_the_same_bits_are_drawn(jit):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  model = bx.Sequential(
    graph.child('mlp'),
    [bx.Linear(graph.child(f'layer{i}'), 4, rng=rng) for i in range(3)],
  )
  x = jnp.ones((2, 4))
  start = rng.seed(bx.Params(), seed=0)
  before = surgery.attach(start, Draw(), to='**', host=HOST)
  init = lambda p: model(p, x)[1]
  before = (jax.jit(init) if jit else init)(before).locked()
  after = surgery.attach(init(start).locked(), Draw(), to='**', host=HOST)
  assert_same(drawn(after), drawn(before))


def test_seed_name_and_path_each_give_other_bits():
  params = params_of(2)
  sets = [
    drawn(surgery.attach(params, Draw(), to='**', host=HOST, **how))
    for how in ({}, {'seed': 1}, {'name': 'other'})
  ]
  values = [v.tobytes() for d in sets for v in d.values()]
  assert len(values) == len(set(values)) == 12


def test_jaxs_default_generator_does_not_matter():
  params = params_of(1)
  expected = drawn(surgery.attach(params, Draw(), to='**', host=HOST))
  with jax.default_prng_impl('rbg'):
    actual = drawn(surgery.attach(params, Draw(), to='**', host=HOST))
  assert_same(expected, actual)


class Shared(surgery.Adapter):
  """Shares what it draws."""

  name = 'shared'

  def init_shared(self, sites, key):
    size = max(site.in_size for site in sites)
    noise = jax.random.normal(surgery.named_key(key, 'bank'), (size, 5))
    return {'bank': noise / jnp.sqrt(3.0) * 0.1 + 0.7}

  def init(self, site, key):
    return {'w': jnp.ones(site.out_shape)}

  def apply(self, site, name, base, weights):
    return base + weights['w'] * weights['bank'][: site.in_size].sum()


def test_what_sites_share_is_drawn_once_and_the_same_under_jit():
  host = surgery.Host(plugins=[Shared])
  attach = lambda p: surgery.attach(p, Shared(), to='**', host=host)
  eager = attach(params_of(2))
  assert ('surgery.default', 'bank') in eager
  assert_same(drawn(eager), drawn(jax.jit(attach)(params_of(2))))


def test_named_keys_differ_by_name_and_key():
  keys = [
    surgery.named_key(jax.random.key(seed), name)
    for seed in (0, 1)
    for name in ('lora_a', 'lora_b')
  ]
  assert 4 == len({jax.random.key_data(k).tobytes() for k in keys})
  again = surgery.named_key(jax.random.key(0), 'lora_a')
  assert jnp.array_equal(
    jax.random.key_data(keys[0]), jax.random.key_data(again)
  )


def test_weights_have_strong_types():
  # A weak one would turn strong in the first training step: another program.
  cls, host = broken(init=lambda self, site, key: {'w': jnp.full((2,), 0.1)})
  params = surgery.attach(params_of(1), cls(), to='**', host=host)
  assert not params[('net', 'layer0', 'w')].value.weak_type


def test_integers_do_not_train():
  cls, host = broken(
    init=lambda self, site, key: {'i': jnp.arange(2), 'w': jnp.ones(2)}
  )
  params = surgery.attach(params_of(1), cls(), to='**', host=host)
  assert not params[('net', 'layer0', 'i')].trainable
  assert params[('net', 'layer0', 'w')].trainable


# What a site says.


def test_an_adapter_that_asks_for_its_path_is_computed_site_by_site():
  params = surgery.attach(params_of(3), ByPath(), to='**', host=HOST)
  merged = surgery.merge(params, host=HOST)
  for i in range(3):
    assert jnp.all(merged[('net', f'layer{i}', 'kernel')].value == 2 * i + 2)


@pytest.mark.parametrize(
  'ask',
  [
    lambda site: int(site.path[-2][-1]),
    lambda site: [('net', f'layer{i}') for i in range(3)].index(site.layer),
    lambda site: int(site.layer == ('net', 'layer1')),
    lambda site: {('net', 'layer2'): 2}.get(site.layer, 0),
    lambda site: int(f'{site.layer}'[-3]),
  ],
)
def test_however_a_site_is_told_from_others_it_is_told_right(ask):
  cls, host = broken(
    init=lambda self, site, key: {'w': jnp.asarray(float(ask(site)))},
    apply=lambda self, site, name, base, weights: (
      0 * base + weights['w'] * 10 + ask(site)
    ),
  )
  params = surgery.attach(params_of(3), cls(), to='**', host=host)
  merged = surgery.merge(params, host=host)
  for i in range(3):
    path = ('net', f'layer{i}', 'kernel')
    spec = surgery.ParamSpec('kernel', (3, 2), 'float32', 'io')
    expected = 11 * ask(surgery.Site(path[:-1], (spec,)))
    assert jnp.all(merged[path].value == expected), path


def test_an_adapter_that_asks_for_its_base_gets_each_sites_own():
  params = surgery.attach(params_of(3), FromBase(), to='**', host=HOST)
  merged = surgery.merge(params, host=HOST)
  for i in range(3):
    assert jnp.all(merged[('net', f'layer{i}', 'kernel')].value == 0)


def test_a_base_is_not_there_outside_of_init_and_apply():
  site = surgery.Site(
    ('net',), (surgery.ParamSpec('kernel', (2, 3), 'float32', 'io'),)
  )
  with pytest.raises(surgery.SiteError, match='only inside of init'):
    site.base()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_arithmetic_is_float32_and_the_result_has_the_bases_dtype(dtype):
  seen = []

  class Third(surgery.Adapter):
    name = 'third'

    def init(self, site, key):
      return {'w': jnp.full(site.out_shape, 1 / 3, dtype)}

    def apply(self, site, name, base, weights):
      seen.append((base.dtype, weights['w'].dtype))
      return base * weights['w']

  host = surgery.Host(plugins=[Third], entry_points=False)
  params = surgery.attach(
    params_of(2, dtype=dtype), Third(), to='**', host=host
  )
  merged = surgery.merge(params, host=host)[('net', 'layer1', 'kernel')].value
  third = np.asarray(jnp.asarray(1 / 3, dtype)).astype(np.float32)
  assert jnp.dtype(dtype) == merged.dtype
  assert {(jnp.dtype('float32'),) * 2} == set(seen)
  assert np.all(np.asarray(merged) == third.astype(jnp.dtype(dtype)))


# What is refused.


def broken(**methods):
  """Returns a host with an adapter type of which some methods are replaced."""
  body = {
    'name': 'broken',
    '__module__': __name__,
    'init': lambda self, site, key: {'w': jnp.zeros(site.out_shape)},
    'apply': lambda self, site, name, base, weights: base,
    **methods,
  }
  cls = type('Broken', (surgery.Adapter,), body)
  return cls, surgery.Host(plugins=[cls], entry_points=False)


def fail(*args, **kwargs):
  raise ZeroDivisionError('oh')


def test_init_that_raises_is_named_with_its_site():
  cls, host = broken(init=fail)
  with pytest.raises(
    surgery.PluginError,
    match=r"net/layer0/kernel: init of 'broken' failed: ZeroDivisionError: oh",
  ):
    surgery.attach(params_of(2), cls(), to='**', host=host)


def test_apply_that_raises_is_named_with_its_site():
  cls, host = broken(apply=fail)
  with pytest.raises(
    surgery.PluginError,
    match=r"layer0/kernel: apply of 'broken' failed: ZeroDivisionError: oh",
  ):
    surgery.attach(params_of(2), cls(), to='**', host=host)


def test_apply_that_returns_another_shape_is_named_with_its_site():
  cls, host = broken(apply=lambda self, site, name, base, weights: base.T)
  with pytest.raises(
    surgery.PluginError,
    match=re.escape(
      "net/layer0/kernel: apply of 'broken' for parameter 'kernel' returned "
      'shape (2, 3), expected an array of shape (3, 2)'
    ),
  ):
    surgery.attach(params_of(1), cls(), to='**', host=host)


def test_apply_is_looked_at_once_for_sites_that_look_alike():
  seen = []

  def apply(self, site, name, base, weights):
    seen.append((name, base.shape, weights['w'].shape))
    return base

  cls, host = broken(apply=apply)
  surgery.attach(params_of(50), cls(), to='**', host=host)
  assert [('kernel', (3, 2), (2,))] == seen


def test_apply_gets_what_sites_share_when_it_is_looked_at():
  cls, host = broken(
    init_shared=lambda self, sites, key: {'s': jnp.ones((5, 2))},
    apply=lambda self, site, name, base, weights: base + weights['s'],
  )
  with pytest.raises(
    surgery.PluginError, match=r"layer0/kernel: apply of 'broken' failed: Type"
  ):
    surgery.attach(params_of(2), cls(), to='**', host=host)


def test_a_name_in_frozen_that_no_weight_has_is_refused():
  cls, host = broken(
    init=lambda self, site, key: {'factor': jnp.zeros(2)},
    init_shared=lambda self, sites, key: {'bank': jnp.ones(2)},
    frozen=('bank', 'fcator'),
  )
  with pytest.raises(
    surgery.PluginError,
    match=r"type 'broken': 'fcator' is declared in .* Did you mean 'factor'\?",
  ):
    surgery.attach(params_of(2), cls(), to='**', host=host)


def test_a_type_without_a_name_is_refused():
  class Nameless(surgery.Adapter):
    pass

  with pytest.raises(surgery.PluginError, match='Nameless has no name'):
    Nameless()


def test_a_type_without_apply_is_refused():
  class Half(surgery.Adapter):
    name = 'half'

    def init(self, site, key):
      return {}

  with pytest.raises(surgery.PluginError, match='has no method `apply`'):
    surgery.Host(plugins=[Half], entry_points=False)
  with pytest.raises(surgery.PluginError, match='has no method `apply`'):
    Half()


@pytest.mark.parametrize('name', ['name', 'init', 'config', 'frozen'])
def test_an_option_that_hides_the_contract_is_refused(name):
  body = {'name': 'odd', name: 'x', '__annotations__': {name: str}}
  cls, _ = broken()
  odd = type('Odd', (cls,), body)
  with pytest.raises(
    surgery.PluginError, match=f"Odd: '{name}' is part of the contract"
  ):
    odd()


@pytest.mark.parametrize(
  ('weights', 'shown'),
  [
    (None, 'NoneType'),
    ({3: 1.0}, r'\[3\]'),
    ({'a.b': 1.0}, r"\['a\.b'\]"),
    ({'a/b': 1.0}, r"\['a/b'\]"),
    ({'': 1.0}, r"\[''\]"),
  ],
)
def test_init_that_returns_no_weights_by_name_is_refused(weights, shown):
  cls, host = broken(init=lambda self, site, key: weights)
  with pytest.raises(
    surgery.PluginError,
    match=rf"net/layer0/kernel: init of 'broken' returned .*{shown}",
  ):
    surgery.attach(params_of(1), cls(), to='**', host=host)


def test_a_weight_that_is_both_shared_and_a_sites_own_is_refused():
  cls, host = broken(init_shared=lambda self, sites, key: {'w': jnp.ones(2)})
  with pytest.raises(
    surgery.PluginError, match="'broken' returns a weight 'w' from both init"
  ):
    surgery.attach(params_of(1), cls(), to='**', host=host)


def test_apply_that_returns_no_array_is_named_with_its_site():
  cls, host = broken(apply=lambda self, site, name, base, weights: None)
  with pytest.raises(
    surgery.PluginError, match=r"net/layer0/kernel: apply of 'broken' .*None"
  ):
    surgery.attach(params_of(1), cls(), to='**', host=host)


def test_what_a_type_serves_may_depend_on_the_options_of_a_site():
  class Picky(broken()[0]):
    name = 'picky'
    wide: bool = True

    def serves(self, site):
      return 'it is too narrow' if self.wide else None

  host = surgery.Host(plugins=[Picky], entry_points=False)
  adapter = Picky(patterns={'**/layer1': {'wide': False}})
  with pytest.raises(surgery.SiteError, match=r'layer0/kernel: it is too nar'):
    surgery.attach(params_of(2), adapter, to='**/layer0', host=host)
  params = surgery.attach(params_of(2), adapter, to='**', host=host)
  [info] = surgery.adapters(params)
  assert (('net', 'layer1', 'kernel'),) == info.sites


def test_an_option_that_a_file_cannot_hold_is_refused():
  class Odd(surgery.Adapter):
    name = 'odd'
    thing: bytes = b''

  with pytest.raises(
    surgery.PluginError, match="option 'thing': bytes cannot be saved"
  ):
    Odd()


def test_a_type_may_refuse_to_be_merged():
  cls, host = broken(mergeable=False)
  params = surgery.attach(params_of(1), cls(), to='**', host=host)
  with pytest.raises(surgery.AdapterError, match='cannot be merged'):
    surgery.merge(params, host=host)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (
      Draw,
      'expected a configured adapter, found the class Draw. Write Draw(…)',
    ),
    ('lora', "expected an adapter, e.g. surgery.LoRA(rank=8), found 'lora'"),
  ],
)
def test_what_is_no_adapter_is_refused(given, message):
  with pytest.raises(surgery.ConfigError, match=re.escape(message)):
    surgery.attach(params_of(1), given, to='**', host=HOST)


@pytest.mark.parametrize('name', ['', 'a.b', 'a/b', 3])
def test_a_bad_adapter_name_is_refused(name):
  with pytest.raises(surgery.AdapterError, match='without dots and slashes'):
    surgery.attach(params_of(1), Draw(), to='**', name=name, host=HOST)


# Options.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'scael': 1.0}, "has no option 'scael'. Did you mean 'scale'?"),
    ({'scale': '1'}, "option 'scale': expected float, found '1' (str)"),
    ({'scale': True}, "option 'scale': expected float, found True (bool)"),
    ({'scale': 0.0}, "option 'scale': expected a value > 0, found 0.0"),
    ({'scale': 11}, "option 'scale': expected a value <= 10, found 11"),
    ({'scale': float('nan')}, 'expected a finite number, found nan'),
    ({'mode': 'c'}, "option 'mode': expected Literal['a', 'b'], found 'c'"),
    ({'sizes': (1, 'x')}, "option 'sizes': expected tuple[int, ...]"),
    ({'patterns': 3}, 'patterns: expected {selector: {option: value}}'),
    ({'patterns': {'**': 3}}, "found the entry '**': 3"),
    ({'patterns': {'**': {'scael': 1.0}}}, "has no option 'scael'"),
    ({'patterns': {'a{': {}}}, "a '{' without its '}'"),
  ],
)
def test_a_wrong_option_is_refused(options, message):
  with pytest.raises(surgery.SurgeryError, match=re.escape(message)):
    Draw(**options)


def test_an_option_without_default_must_be_given():
  class Needs(surgery.Adapter):
    name = 'needs'
    rank: int

  with pytest.raises(
    surgery.ConfigError, match="option 'rank': a value is required"
  ):
    Needs()  # type: ignore[call-arg]
  with pytest.raises(
    surgery.ConfigError, match="option 'rank': a value is required"
  ):
    Needs.from_config({})


def test_a_configuration_comes_back_from_its_data():
  adapter = Draw(
    scale=2.0, mode='b', sizes=(1, 2), patterns={'**/a': {'scale': 4.0}}
  )
  assert adapter == Draw.from_config(adapter.config())
  assert hash(adapter) == hash(Draw.from_config(adapter.config()))
  assert adapter != Draw(scale=2.0)


def test_an_adapter_cannot_be_changed():
  with pytest.raises(AttributeError):
    Draw().scale = 4.0


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ({'scale': '2'}, 2.0),
    ({'mode': 'b'}, 'b'),
    ({'sizes': '[1, 2]'}, (1, 2)),
  ],
)
def test_options_are_read_from_text_by_their_types(text, value):
  [(key, _)] = text.items()
  assert value == getattr(Draw(**config.parse(Draw, text)), key)


@pytest.mark.parametrize(
  ('text', 'alpha'), [('none', None), ('4', 4.0), ('1e1', 10.0)]
)
def test_none_is_an_option_where_it_is_allowed(text, alpha):
  given = config.parse(surgery.LoRA, {'alpha': text, 'rslora': 'true'})
  adapter = surgery.LoRA(**given)
  assert (alpha, True) == (adapter.alpha, adapter.rslora)


def test_the_first_pattern_that_matches_decides():
  adapter = surgery.LoRA(
    rank=1, patterns={'**/layer1': {'rank': 2}, '**': {'alpha': 5.0}}
  )
  params = surgery.attach(params_of(2), adapter, to='**')
  ranks = [
    params[('net', f'layer{i}', 'lora_a')].value.shape[-1] for i in range(2)
  ]
  assert [1, 2] == ranks


def test_a_pattern_that_matches_nothing_is_an_error():
  adapter = surgery.LoRA(rank=1, patterns={'**/layr1': {'rank': 2}})
  with pytest.raises(
    surgery.SelectorError, match=r"patterns: selector '\*\*/layr1'.*net/layer1"
  ):
    surgery.attach(params_of(2), adapter, to='**')


def test_what_is_declared_says_type_range_default_and_meaning():
  scale, mode, _ = config.declared(Draw)
  assert {
    'name': 'scale',
    'type': 'float',
    'required': False,
    'default': 3.0,
    'range': '> 0, <= 10',
    'doc': 'Divisor.',
  } == scale
  assert "Literal['a', 'b']" == mode['type']


def test_a_weight_gives_way_to_a_parameter_of_its_name():
  params = bx.Params()
  for name, shape in (('kernel', (3, 2)), ('lora_a', (3,))):
    params[('net', 'layer', name)] = bx.Param(jnp.ones(shape))
  params = surgery.attach(params.locked(), surgery.LoRA(rank=1), to='**')
  assert ('net', 'layer', 'lora_a.default.kernel') in params
  assert ('net', 'layer', 'lora_b') in params


def test_names_of_weights_are_those_of_the_design():
  params = bx.Params()
  for name in ('kernel', 'recurrent'):
    params[('net', 'layer', name)] = bx.Param(jnp.ones((3, 2)))
  params = surgery.attach(params.locked(), surgery.LoRA(rank=1), to='all')
  params = surgery.attach(params, surgery.LoRA(rank=1), to='**', name='b')
  names = {p[-1] for p in params.keys() if p[-1].startswith('lora_a')}
  assert {'lora_a', 'lora_a.default.recurrent', 'lora_a.b'} == names


KEY = 'returned a PRNG key for .w., expected an array. Return jax.random.key_'


@pytest.mark.parametrize(
  ('methods', 'message'),
  [
    (
      {'apply': lambda self, site, name, base, w: base > 0},
      "layer0/kernel: apply of 'broken' for parameter 'kernel' returned bool, "
      'expected a floating dtype',
    ),
    (
      {'apply': lambda self, site, name, base, w: jnp.fft.fft(base)},
      'returned complex64, expected a floating dtype',
    ),
    (
      {'apply': lambda self, site, name, base, w: base + w['delta']},
      "layer0/kernel: apply of 'broken' failed: KeyError: 'delta'. The weights "
      'are w.',
    ),
    (
      {'init': lambda self, site, key: {'w': key}},
      'layer0/kernel: init of .broken. ' + KEY,
    ),
    (
      {'init': lambda self, site, key: {'w': {'a': jnp.ones(2)}}},
      "init of 'broken' returned dict for 'w', expected an array.",
    ),
    (
      {'serves': lambda self, site: True},
      "layer0/kernel: .* 'broken': serves returned True, expected None, or",
    ),
    (
      {'serves': lambda self, site: ' '},
      "serves returned ' ', expected None",
    ),
    (
      {'serves': lambda self, site: site.lost},
      "layer0/kernel: .* 'broken': serves failed: AttributeError: 'Site' object",
    ),
    (
      {'serves': lambda self, site: int('x')},
      "layer0/kernel: .* 'broken': serves failed: ValueError: invalid",
    ),
    (
      {'rank_axes': {'lora_a': 0}},
      "'broken': 'lora_a' is declared in `rank_axes`, and init returned no",
    ),
    ({'rank_axes': {'w': 7}}, r"rank_axes: 'w' has no axis 7, its shape is "),
    ({'rewrites': 'kernel'}, r"rewrites: expected .* comma: \('kernel',\)"),
    (
      {'frozen': ('scale')},
      r"frozen: expected a tuple of names, found 'scale'",
    ),
    ({'rewrites': ()}, 'rewrites: expected the names of one parameter or more'),
  ],
)
def test_what_a_type_does_wrong_is_said(methods, message):
  cls, host = broken(**methods)
  with pytest.raises(surgery.PluginError, match=message):
    surgery.attach(params_of(2), cls(), to='**', host=host)


@pytest.mark.parametrize(
  ('name', 'default'),
  [('dict', {}), ('list', []), ('set', surgery.field(default=set()))],
)
@pytest.mark.parametrize('kind', [surgery.Adapter, surgery.Method])
def test_a_default_that_can_be_changed_is_refused(name, default, kind):
  with pytest.raises(
    surgery.PluginError,
    match=rf"Odd: mutable default <class '{name}'> for field options is not "
    r'allowed\. Options are bool, .*: write a tuple, or an option for each',
  ):
    type(
      'Odd', (kind,), {'__annotations__': {'options': dict}, 'options': default}
    )


def test_ranks_of_the_weights_of_a_site_are_the_same():
  class Uneven(surgery.LoRA):
    name = 'uneven'
    rank_axes: typing.ClassVar[Mapping[str, int]] = {'lora_a': 0, 'lora_b': 0}

  host = surgery.Host(plugins=[Uneven], entry_points=False)
  with pytest.raises(
    surgery.PluginError,
    match=r"'uneven': rank_axes: net/layer0/kernel: the ranks .* differ: lora_a",
  ):
    surgery.attach(params_of(1), Uneven(rank=1), to='**', host=host)


def test_each_number_of_a_tuple_lies_in_the_range():
  class Betas(surgery.Adapter):
    name = 'betas'
    betas: tuple[float, ...] = surgery.field(default=(0.9, 0.99), gt=0, lt=1)

  message = "option 'betas': expected a value < 1, found 5.0"
  with pytest.raises(surgery.ConfigError, match=message):
    config.check(Betas, 'betas', (0.5, 5.0))
  assert (0.5, 0.6) == config.check(Betas, 'betas', (0.5, 0.6))


def test_a_range_of_what_is_no_number_is_refused():
  class Named(surgery.Adapter):
    name = 'named'
    word: str = surgery.field(default='a', ge=1)

  with pytest.raises(surgery.PluginError, match=r'ge= needs a number.* str'):
    config.check_declaration(Named)


def test_a_misspelt_hook_of_a_type_is_found():
  hook = surgery.hookimpl(lambda self, site, policy: False)
  message = "'broken': no hook is called 'surgery_freeze_params'. Did you mean"
  with pytest.raises(surgery.PluginError, match=message):
    broken(surgery_freeze_params=hook)


def test_a_hook_of_a_type_with_a_wrong_argument_is_found():
  hook = surgery.hookimpl(lambda self, sites: None)
  with pytest.raises(
    surgery.PluginError,
    match="hook 'surgery_match_layer' has no argument 'sites'; it has site, term",
  ):
    broken(surgery_match_layer=hook)


def test_an_adapter_type_is_no_plugin_and_neither_is_a_number():
  class Loose:
    @surgery.hookimpl
    def surgery_freeze_params(self, site):
      return False

  host = surgery.Host(only=())
  for wrong, message in (
    (3, "plugin 'int' implements no hook"),
    (Loose(), "plugin 'Loose'.*surgery_freeze_params"),
    (ByPath(), "plugin 'ByPath' is an adapter type. Its entry point goes"),
  ):
    with pytest.raises(surgery.PluginError, match=message):
      host.register(wrong)
  host.register(ByPath)
