"""What a type of an installed distribution does wrong is said with its name."""

import json

import blox as bx
import jax.numpy as jnp
import pytest

import surgery
from surgery.host.manager import Host

TYPE = """
  import jax.numpy as jnp
  import surgery


  class Odd(surgery.Adapter):
    name = 'odd'
    version = 2
    fault: str = ''

    def check(self):
      if self.fault == 'check':
        1 / 0

    def serves(self, site):
      return False if self.fault == 'serves' else None

    def init(self, site, key):
      if self.fault == 'init':
        1 / 0
      return {'s': jnp.ones(())}

    def apply(self, site, name, base, weights):
      return base * weights['t' if self.fault == 'apply' else 's']

    @classmethod
    def upgraded(cls, config, version):
      if config.get('fault') == 'upgraded':
        1 / 0
      return config
"""


@pytest.fixture
def odd(installed):
  """Returns the type, and a host that found it by its entry point."""
  installed('odd-types', 'odd_types', TYPE, adapters='odd = odd_types:Odd')
  host = Host()
  return host.adapter_type('odd'), host


def params():
  made = bx.Params()
  made['net', 'a', 'kernel'] = bx.Param(jnp.ones((3, 2)))
  return made.locked()


def test_where_a_failing_type_comes_from_is_said(odd):
  cls, host = odd
  who = "adapter type 'odd' of odd-types 1.0"
  for fault, message in {
    'check': f'{who}: check failed: ZeroDivisionError',
    'serves': f'attach: net/a/kernel: {who}: serves returned False, expected',
    'init': "net/a/kernel: init of 'odd' of odd-types 1.0 failed: ZeroDivision",
    'apply': "apply of 'odd' of odd-types 1.0 failed: KeyError: 't'",
  }.items():
    with pytest.raises(surgery.PluginError) as caught:
      surgery.attach(params(), cls(fault=fault), to='net/a', host=host)
    assert message in str(caught.value)
  with pytest.raises(surgery.ConfigError, match=f'{who} has no option .falt.'):
    cls(falt='x')


def older(tmp_path, host, cls, config):
  """Writes a file whose adapter has options of version 1."""
  file = tmp_path / 'old.msgpack'
  surgery.save(file, surgery.attach(params(), cls(), to='**', host=host))
  opened = surgery.open(file, host=host)
  [said] = opened.manifest.adapters
  said = json.loads(json.dumps({**said, 'version': 1, 'config': config}))
  manifest = opened.manifest.replace(adapters=(said,))
  older = tmp_path / 'older.msgpack'
  opened.replace(manifest=manifest).write(older, host=Host(only=()))
  return older


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (
      {'fault': 'upgraded'},
      "adapter type 'odd' of odd-types 1.0: upgraded failed: ZeroDivisionError",
    ),
    (
      {'falt': 'x'},
      "upgraded from version 1 to 2: adapter type 'odd' of odd-types 1.0 has no "
      "option 'falt'. Did you mean 'fault'?",
    ),
    (
      {'patterns': {'**/a': {'falt': 'x'}}},
      "patterns, '**/a': upgraded from version 1 to 2: adapter type 'odd' of "
      "odd-types 1.0 has no option 'falt'",
    ),
    (
      {'patterns': {'**/a': {'fault': 3}}},
      "patterns, '**/a': adapter type 'odd' of odd-types 1.0, option 'fault': "
      'expected str, found 3',
    ),
  ],
)
def test_an_option_of_a_file_is_named_with_file_type_and_pattern(
  odd, tmp_path, config, message
):
  cls, host = odd
  file = older(tmp_path, host, cls, config)
  with pytest.raises(surgery.SurgeryError) as caught:
    surgery.load(file, host=host)
  assert f"{file}: adapter 'default': {message}" in str(caught.value)


def test_patterns_name_the_selector_of_an_unknown_option():
  with pytest.raises(
    surgery.ConfigError,
    match=r"^patterns, '\*\*/q': adapter type 'lora' has no option 'rnk'. Did",
  ):
    surgery.LoRA(patterns={'**/q': {'rnk': 3}})
