import importlib.metadata
import pathlib
import re
import sys
import tomllib
import warnings

import blox as bx
import jax.numpy as jnp
import pytest

import surgery
from surgery import errors
from surgery.contract.site import ParamSpec, Site
from surgery.host import discovery
from surgery.host.manager import Host
from surgery.methods import plugin

ROOT = pathlib.Path(__file__).parents[2]
SITE = Site(('net', 'a'), (ParamSpec('kernel', (4, 2), 'float32', 'io'),))


# Methods that come with the library.
OWN = set(plugin.HOMES)


class Double(surgery.Adapter):
  name = 'double'

  def init(self, site, key):
    return {}

  def apply(self, site, name, base, weights):
    return 2 * base


class First(surgery.Method):
  name = 'first'

  def combine(self, block, prepared):
    return block.tensors[0]


class Hooks:
  """A plugin that implements every hook."""

  def __init__(self):
    self.events = []

  @surgery.hookimpl
  def surgery_match_layer(self, site, term):
    return site.layer[-1] == 'a' if term == 'mine:' else None

  @surgery.hookimpl
  def surgery_intercept_param(self, site):
    return None

  @surgery.hookimpl
  def surgery_freeze_param(self, site, policy):
    return site.name == 'bias' if policy == 'mine' else None

  @surgery.hookimpl
  def surgery_merge_param(self, site):  # Takes fewer arguments.
    return surgery.Refusal('it is locked in a safe')

  @surgery.hookimpl
  def surgery_passes(self):
    return {'nothing': lambda checkpoint: checkpoint}

  @surgery.hookimpl
  def surgery_formats(self):
    return {'none': self}

  suffixes = ('.none',)

  @surgery.hookimpl
  def surgery_methods(self):
    return {'first': First}

  @surgery.hookimpl
  def surgery_started(self, event):
    self.events.append(('started', event.verb))

  @surgery.hookimpl
  def surgery_finished(self, event):
    self.events.append(('finished', event.verb, type(event.failed)))


ADAPTER = """
  import surgery

  class Mine(surgery.Adapter):
    name = 'mine'
    def init(self, site, key):
      return {}
    def apply(self, site, name, base, weights):
      return base
"""


def test_lora_is_found_by_its_entry_point():
  assert 'lora' in Host().adapter_names()
  assert surgery.LoRA is Host().adapter_type('lora')


def test_without_lora_the_core_works_and_says_that_it_is_unknown():
  host = Host(plugins=[Double], block=['lora'])
  assert Double is host.adapter_type('double')
  assert 'lora' not in host.adapter_names()
  message = (
    "unknown adapter type 'lora'.{} Adapter types come from installed "
    "distributions (entry points in 'surgery.adapters'); `surgery plugins` "
    'lists them.'
  )
  with pytest.raises(errors.UnknownAdapterType) as raised:
    Host(block=['lora'], entry_points=False).adapter_type('lora')
  assert message.format('') == str(raised.value)


def test_an_unknown_type_gets_suggestions():
  with pytest.raises(errors.UnknownAdapterType, match="Did you mean 'lora'"):
    Host().adapter_type('lorra')


def test_an_installed_type_is_imported_only_when_it_is_asked_for(installed):
  installed('theirs', 'theirs_mod', ADAPTER, adapters='mine = theirs_mod:Mine')
  host = Host()
  assert 'mine' in host.adapter_names()
  assert 'theirs_mod' not in sys.modules
  assert 'mine' == host.adapter_type('mine').name
  assert 'theirs 1.0' == host.distribution('mine')


def test_a_broken_type_is_named_when_asked_for_and_hurts_nobody_else(installed):
  installed(
    'broken', 'broken_mod', 'import not_there', adapters='bad = broken_mod:Bad'
  )
  host = Host()
  assert surgery.LoRA is host.adapter_type('lora')
  with pytest.raises(
    errors.PluginError,
    match=re.escape(
      "adapter type 'bad' of broken 1.0 is broken: ModuleNotFoundError: No "
      "module named 'not_there' (broken_mod.py:1)"
    ),
  ):
    host.adapter_type('bad')
  states = {i.name: (i.state, i.distribution) for i in host.plugins()}
  assert ('broken', 'broken') == states['bad']
  assert ('loaded', 'blox-surgery') == states['lora']


def test_what_is_no_adapter_type_is_refused(installed):
  installed('odd', 'odd_mod', 'thing = 3', adapters='odd = odd_mod:thing')
  with pytest.raises(
    errors.PluginError, match='expected a subclass of surgery'
  ):
    Host().adapter_type('odd')


def test_two_distributions_with_one_name_are_both_named(installed):
  installed('one', 'one_mod', ADAPTER, adapters='mine = one_mod:Mine')
  installed('two', 'two_mod', ADAPTER, adapters='mine = two_mod:Mine')
  with pytest.raises(
    errors.PluginError, match=re.escape('offered by one 1.0 and two 1.0')
  ):
    Host().adapter_type('mine')


def test_an_entry_must_be_called_as_its_type(installed):
  installed('one', 'one_mod', ADAPTER, adapters='other = one_mod:Mine')
  with pytest.raises(errors.PluginError, match="calls itself 'mine'"):
    Host().adapter_type('other')


def test_a_broken_plugin_is_warned_of_once_and_left_out(installed):
  installed('bad', 'bad_mod', 'raise OSError("gone")', plugins='bad = bad_mod')
  host = Host()
  with pytest.warns(
    surgery.PluginWarning, match="plugin 'bad' of bad 1.0 is broken"
  ):
    assert 'msgpack' in host.formats
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert OWN == set(host.methods)
  reasons = {i.name: i.reason for i in host.plugins()}
  assert 'OSError: gone (bad_mod.py:1)' == reasons['bad']


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    (
      """
      import surgery
      @surgery.hookimpl
      def surgery_mathc_layer(site, term):
        return None
      """,
      'surgery_mathc_layer',
    ),
    (
      """
      import surgery
      @surgery.hookimpl
      def surgery_match_layer(site, term, mood):
        return None
      """,
      'mood',
    ),
    ('x = 3', 'implements no hook'),
  ],
)
def test_a_plugin_with_a_wrong_hook_is_reported(installed, source, message):
  installed('bad', 'bad_mod', source, plugins='bad = bad_mod')
  with pytest.warns(surgery.PluginWarning, match=message):
    Host().formats


def test_an_exception_in_a_hook_names_plugin_and_hook():
  class Bad:
    @surgery.hookimpl
    def surgery_match_layer(self, site, term):
      raise ZeroDivisionError('oh')

  host = Host(plugins=[Bad()], entry_points=False)
  with pytest.raises(
    errors.PluginError,
    match="plugin 'Bad' failed in surgery_match_layer: ZeroDivisionError: oh",
  ):
    host.ask('surgery_match_layer', site=SITE, term='x:')


def test_the_object_that_is_asked_about_answers_first():
  class Other:
    @surgery.hookimpl
    def surgery_match_layer(self, site, term):
      return False

  host = Host(plugins=[Other(), Double], entry_points=False)
  assert host.ask(
    'surgery_match_layer', of=Double(), site=SITE, term='serves:double'
  )


def test_every_hook_of_a_plugin_is_asked():
  plugin = Hooks()
  host = Host(plugins=[plugin], entry_points=False)
  ask = lambda hook, **given: host.ask(hook, **given)
  assert ask('surgery_match_layer', site=SITE, term='mine:') is True
  assert ask('surgery_match_layer', site=SITE, term='yours:') is None
  assert ask('surgery_intercept_param', site=SITE) is None
  assert ask('surgery_freeze_param', site=SITE, policy='mine') is False
  refused = ask('surgery_merge_param', site=SITE, adapter=Double())
  assert surgery.Refusal('it is locked in a safe') == refused
  assert 'nothing' in host.passes
  assert {*Host(entry_points=False).passes, 'nothing'} == {*host.passes}
  assert {'first'} == set(host.methods) - OWN
  assert plugin is host.format_of('model.none')
  with pytest.raises(KeyError), host.observed('merge', {}):
    raise KeyError('x')
  assert [
    ('started', 'merge'),
    ('finished', 'merge', KeyError),
  ] == plugin.events


def test_two_plugins_that_offer_one_name_are_an_error():
  host = Host(plugins=[Hooks(), Hooks()], entry_points=False)
  with pytest.raises(errors.PluginError, match="'nothing' is offered by two"):
    host.passes


def test_plugins_that_are_given_are_called_by_their_class():
  host = Host(plugins=[Hooks(), Hooks(), Double], entry_points=False)
  given = [i for i in host.plugins() if i.origin == 'given to the host']
  assert ['double', 'Hooks', 'Hooks 2'] == [i.name for i in given]


def test_an_unknown_suffix_names_those_that_are_known():
  with pytest.raises(errors.FormatError, match=r"suffix '\.pt'.*\.msgpack"):
    Host().format_of('model.pt')


def test_hosts_share_nothing():
  one = Host(plugins=[Double], entry_points=False)
  two = Host(entry_points=False)
  assert ('double', 'lora') == one.adapter_names()
  assert ('lora',) == two.adapter_names()
  assert () == Host(entry_points=False, block=['lora']).adapter_names()


def test_what_comes_with_the_library_needs_no_installed_distribution(
  monkeypatch, tmp_path
):
  def asked(**_):
    raise AssertionError('installed distributions were asked')

  table = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  installed = Host(only=()).plugins()
  monkeypatch.setattr(importlib.metadata, 'entry_points', asked)
  host = Host(plugins=[Double], entry_points=False)
  points = table['project']['entry-points']
  assert points['surgery.adapters'] == discovery._OWN['surgery.adapters']
  assert points['surgery.plugins'] == discovery._OWN['surgery.plugins']
  known = lambda infos: {
    (i.name, i.origin) for i in infos if i.distribution == 'blox-surgery'
  }
  assert known(installed) == known(host.plugins())
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((2, 3)))
  lora = surgery.LoRA(rank=1)
  params = surgery.attach(params.locked(), lora, to='**', host=host)
  surgery.save(tmp_path / 'm.msgpack', params, host=host)
  loaded = surgery.load(tmp_path / 'm.msgpack', host=host)
  assert ['default'] == [a.name for a in surgery.adapters(loaded, host=host)]


def test_a_type_is_registered_once():
  host = Host(plugins=[Double], entry_points=False)
  with pytest.raises(errors.PluginError, match='registered already'):
    host.register(Double)


PLUGIN = """
  import surgery

  class Name(surgery.Method):
    name = 'name'

    def combine(self, block, prepared):
      return block.tensors[0]

  @surgery.hookimpl
  def surgery_methods():
    return {'name': Name}
"""


def test_plugins_of_one_name_are_both_named_and_left_out(installed):
  for name in ('one', 'two'):
    installed(name, f'{name}_mod', PLUGIN, plugins=f'same = {name}_mod')
  host = Host()
  with pytest.warns(surgery.PluginWarning) as told:
    assert OWN == set(host.methods)
  assert 2 == len(told)
  message = (
    "plugin 'same' is offered by one 1.0 and two 1.0. Uninstall or block"
  )
  assert all(message in str(one.message) for one in told)
  assert 'one_mod' not in sys.modules
  # Whoever says which is meant gets it.
  host = Host(prefer={'same': 'two'})
  assert {'name'} == set(host.methods) - OWN
  assert 'one_mod' not in sys.modules
  states = [i.state for i in host.plugins() if i.name == 'same']
  assert ['blocked', 'loaded'] == states


def test_what_comes_with_the_library_is_overridden_on_request_only(installed):
  source = ADAPTER.replace("'mine'", "'lora'")
  installed('rival', 'rival_mod', source, adapters='lora = rival_mod:Mine')
  with pytest.raises(
    surgery.PluginError,
    match=r"'lora' is offered by blox-surgery .* and rival 1\.0.*prefer=",
  ):
    Host().adapter_type('lora')
  assert 'rival_mod' not in sys.modules
  mine = Host(prefer={'lora': 'rival'}).adapter_type('lora')
  assert 'rival_mod' == mine.__module__
  own = Host(prefer={'lora': 'blox-surgery'}).adapter_type('lora')
  assert surgery.LoRA is own
  with pytest.raises(
    surgery.PluginError, match=r"but not by 'other', which `prefer` names"
  ):
    Host(prefer={'lora': 'other'}).adapter_type('lora')


def test_a_pass_that_comes_with_the_library_is_overridden_on_request_only():
  class Rival:
    @surgery.hookimpl
    def surgery_passes(self):
      return {'cast': len}

  with pytest.raises(surgery.PluginError, match="'cast' is offered by two"):
    Host(plugins=[Rival()]).passes
  plugin = Rival()
  name = str(Host(plugins=[plugin]).manager.get_name(plugin))
  assert len is Host(plugins=[plugin], prefer={'cast': name}).passes['cast']
  own = Host(plugins=[plugin], prefer={'cast': 'passes'}).passes['cast']
  assert 'surgery.passes.cast' == own.__module__


def test_a_plugin_for_a_newer_release_is_reported(installed):
  source = """
    import surgery

    @surgery.hookimpl
    def surgery_from_the_future(site):
      return None
  """
  installed(
    'new', 'new_mod', source, plugins='new = new_mod',
    needs='blox-surgery>=9.1',
  )  # fmt: skip
  with pytest.warns(
    surgery.PluginWarning,
    match=r'surgery_from_the_future.*it requires blox-surgery>=9\.1; this is',
  ):
    assert 'msgpack' in Host().formats


def test_strict_hosts_take_no_broken_plugin(installed):
  installed('bad', 'bad_mod', 'raise OSError("gone")', plugins='bad = bad_mod')
  with pytest.raises(
    surgery.PluginError, match="'bad' of bad 1.0 is broken: OSError: gone"
  ):
    Host(strict=True).formats
  assert 'msgpack' in Host(strict=True, block=['bad']).formats


def test_only_some_plugins_of_others_are_loaded(installed):
  installed('a', 'a_mod', PLUGIN, plugins='a = a_mod')
  installed('b', 'b_mod', ADAPTER, adapters='mine = b_mod:Mine')
  host = Host(only=[])
  assert OWN == set(host.methods)
  assert {'msgpack', 'peft', 'safetensors'} == set(host.formats)
  assert 'lora' in host.adapter_names() and 'mine' not in host.adapter_names()
  assert 'mine' in Host(only=['mine']).adapter_names()
  states = {i.name: i.state for i in host.plugins()}
  assert ('blocked', 'blocked') == (states['a'], states['mine'])
  assert not {'a_mod', 'b_mod'} & sys.modules.keys()


def test_what_is_blocked_is_not_imported(installed):
  installed('slow', 'slow_mod', 'raise SystemExit', plugins='slow = slow_mod')
  assert 'msgpack' in Host(block=['slow']).formats
  assert 'slow_mod' not in sys.modules


def test_calls_of_hooks_are_traced():
  lines = []
  host = Host(plugins=[Hooks()], entry_points=False, trace=lines.append)
  host.ask('surgery_match_layer', site=SITE, term='mine:')
  [line] = lines
  assert "surgery_match_layer(site=net/a/kernel, term='mine:')" in line
  assert line.endswith('→ True')

  class Bad:
    @surgery.hookimpl
    def surgery_match_layer(self, site, term):
      raise ZeroDivisionError('oh')

  host = Host(plugins=[Bad()], entry_points=False, trace=lines.append)
  with pytest.raises(surgery.PluginError):
    host.ask('surgery_match_layer', site=SITE, term='x:')
  assert 'raised ZeroDivisionError' in lines[-1]


def test_the_environment_makes_a_host(installed, monkeypatch, surgery_cli):
  installed('b', 'b_mod', ADAPTER, adapters='mine = b_mod:Mine')
  installed('bad', 'bad_mod', 'raise OSError("gone")', plugins='bad = bad_mod')
  assert 'mine' in surgery_cli('--no-plugin', 'bad', 'plugins').out
  monkeypatch.setenv('SURGERY_STRICT_PLUGINS', '1')
  result = surgery_cli('plugins')
  assert (4, True) == (result.code, 'OSError: gone' in result.err)
  monkeypatch.setenv('SURGERY_PLUGINS', 'mine')
  result = surgery_cli('plugins')
  assert 0 == result.code, result.err
  assert 'blocked' in next(x for x in result.out.splitlines() if ' bad ' in x)
  monkeypatch.setenv('SURGERY_TRACE', '1')
  assert 'surgery_formats()' not in surgery_cli('plugins').err
  monkeypatch.setenv('SURGERY_PREFER', 'x')
  assert 'expected name=distribution' in surgery_cli('plugins').err


def test_what_is_broken_is_shown_with_its_traceback(installed, surgery_cli):
  installed('bad', 'bad_mod', 'raise OSError("gone")', adapters='bad = bad_mod')
  # A host of its own, which has not looked at what is installed before.
  result = surgery_cli('--no-plugin', 'x', 'plugins', 'show', 'bad')
  assert 0 == result.code, result.err
  assert 'state: broken' in result.out
  assert 'reason: OSError: gone (bad_mod.py:1)' in result.out
  assert 'Traceback (most recent call last)' in result.out


def test_two_hosts_side_by_side_in_two_threads():
  import concurrent.futures

  import blox as bx
  import jax.numpy as jnp

  class Triple(Double):
    def apply(self, site, name, base, weights):
      return 3 * base

  params = bx.Params()
  params['net', 'a', 'kernel'] = bx.Param(jnp.ones((3, 2)))
  params = params.locked()

  def run(cls):
    host = Host(plugins=[cls], entry_points=False)
    for _ in range(10):
      adapted = surgery.attach(params, cls(), to='**', host=host)
      merged = surgery.merge(adapted, host=host)
    return float(merged['net', 'a', 'kernel'].value[0, 0])

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert [2.0, 3.0] == list(pool.map(run, (Double, Triple)))
