"""Rules of the host, on distributions that are installed."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.cli import main
from surgery.host.manager import Host

TYPE = """
  import surgery

  class Slow(surgery.Adapter):
    \"\"\"Doubles what a layer gets.\"\"\"

    name = 'slow'
    frozen = ('two',)
    times: float = surgery.field(default=2.0, gt=0, le=9, doc='By how much.')
    mode: str | None = surgery.field(default=None)
    size: int = surgery.field(ge=1, doc='Not used.')

    def init(self, site, key):
      import jax.numpy as jnp
      return {'two': jnp.full((), self.times)}

    def apply(self, site, name, base, weights):
      return base * weights['two']
"""
HOOKS = """
  import surgery

  @surgery.hookimpl
  def surgery_match_layer(site, term):
    if term == 'who:':
      raise surgery.SelectorError(__name__)
"""


def saved(path):
  # By a host of its own: the default one would remember what is installed.
  surgery.save(path, model(), host=Host(only=()))
  return path


def model():
  params = bx.Params()
  params['net', 'a', 'kernel'] = bx.Param(jnp.ones((3, 2)))
  return params.locked()


def slow(host: Any) -> Any:
  return host.adapter_type('slow')(size=1)


@pytest.fixture
def fresh(surgery_cli):
  """Runs the command with a host that has not looked at what is installed."""
  return lambda *arguments: surgery_cli('--no-plugin', 'no-such', *arguments)


def test_a_type_is_imported_by_whoever_asks_for_it_alone(
  installed, fresh, tmp_path, monkeypatch
):
  marked = installed('slow', 'slow_mod', TYPE, adapters='slow = slow_mod:Slow')
  monkeypatch.chdir(tmp_path)
  saved('base.msgpack')
  attach = ('attach', 'base.msgpack', '--to', '**', '--adapter')
  pathlib.Path('lora.yaml').write_text(
    "- attach: {adapter: lora, to: '**', set: {rank: 1}}"
  )
  for line in (
    ('--help',),
    ('inspect', 'base.msgpack'),
    (*attach, 'lora', '--set', 'rank=1', '-o', 'lora.msgpack'),
    ('merge', 'lora.msgpack', '-o', 'merged.msgpack'),
    ('run', 'lora.yaml', 'model=base.msgpack', 'out=run.msgpack'),
    ('plugins',),
    ('plugins', '--json'),
    ('plugins', 'show', 'lora'),
    ('recipe-schema',),
  ):
    result = fresh(*line)
    assert 0 == result.code, (line, result.err)
    assert not marked.exists(), line
  # A name that is not known is looked up among names.
  assert "Did you mean 'slow'" in fresh(*attach, 'slov', '-o', 'x.msgpack').err
  assert not marked.exists()
  line = (*attach, 'slow', '--set', 'size=1', '-o', 'slow.msgpack')
  assert 0 == fresh(*line).code
  assert marked.exists()
  # A file says what it has, without what it needs to be used.
  marked.unlink()
  monkeypatch.delitem(sys.modules, 'slow_mod')
  assert 'default: slow(' in fresh('inspect', 'slow.msgpack').out
  assert not marked.exists()


def test_help_imports_nothing_of_what_is_installed(installed):
  marks = [
    installed('slow', 'slow_mod', TYPE, adapters='slow = slow_mod:Slow'),
    installed('told', 'told_mod', HOOKS, plugins='told = told_mod'),
  ]
  groups = ('surgery.adapters', 'surgery.plugins')
  modules = {
    point.module.partition('.')[0]
    for group in groups
    for point in importlib.metadata.entry_points(group=group)
  } - {'surgery'}
  assert {'slow_mod', 'told_mod'} <= modules
  code = (
    'import sys; from surgery.cli.main import run\n'
    'run(["--help"]); run(["attach", "--help"])\n'
    f'sys.exit(str({modules!r} & sys.modules.keys() or ""))'
  )
  environment = {**os.environ, 'PYTHONPATH': str(marks[0].parent)}
  done = subprocess.run(
    [sys.executable, '-c', code],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert '' == done.stderr.strip()
  assert 'Usage: surgery' in done.stdout
  assert not any(mark.exists() for mark in marks)


def test_a_type_is_shown_whole(installed, fresh):
  installed('slow', 'slow_mod', TYPE, adapters='slow = slow_mod:Slow')
  data = json.loads(fresh('plugins', 'show', 'slow', '--json').out)
  times, mode, size = data['options']
  assert {
    'name': 'times',
    'type': 'float',
    'required': False,
    'default': 2.0,
    'range': '> 0, <= 9',
    'doc': 'By how much.',
  } == times
  assert ('str | None', None) == (mode['type'], mode['default'])
  assert (True, None, '>= 1') == (
    size['required'],
    size['default'],
    size['range'],
  )
  assert ('adapter', 'slow', '1.0', 'loaded', '', []) == tuple(
    data[k]
    for k in ('kind', 'distribution', 'version', 'state', 'reason', 'others')
  )
  assert 'surgery_merge_param' in data['hooks']
  assert (['kernel'], ['two'], False, True) == tuple(
    data[k] for k in ('rewrites', 'frozen', 'adds', 'mergeable')
  )
  lines = fresh('plugins', 'show', 'slow').out.splitlines()
  for line in (
    'distribution: slow',
    'version: 1.0',
    'state: loaded',
    'frozen: two',
    'Doubles what a layer gets.',
    '--set times=…  float (> 0, <= 9), = 2.0',
    '    By how much.',
    '--set mode=…  str | None, = None',
    '--set size=…  int (>= 1), required',
  ):
    assert line in lines
  assert any(x.startswith('hooks: surgery_freeze_param, ') for x in lines)


def test_what_is_broken_and_what_is_blocked_is_shown_as_such(
  installed, surgery_cli
):
  installed('bad', 'bad_mod', 'import nowhere', plugins='bad = bad_mod')
  installed(
    'gone', 'gone_mod', 'raise SystemExit(3)', plugins='gone = gone_mod'
  )
  mark = installed('told', 'told_mod', HOOKS, plugins='told = told_mod')
  show = ('--no-plugin', 'told', 'plugins', 'show')
  with pytest.warns(surgery.PluginWarning):
    data = json.loads(surgery_cli(*show, 'bad', '--json').out)
  assert 'broken' == data['state']
  reason = "ModuleNotFoundError: No module named 'nowhere' (bad_mod.py:1)"
  assert reason == data['reason']
  assert 'Traceback (most recent call last)' in data['traceback']
  with pytest.warns(surgery.PluginWarning) as told:
    text = surgery_cli(*show, 'told').out
  assert any('SystemExit: 3 (gone_mod.py:1)' in str(w.message) for w in told)
  assert 'state: blocked' in text
  assert not mark.exists()


def test_the_shell_prints_calls_of_hooks_on_request(
  installed, fresh, tmp_path, monkeypatch
):
  installed('told', 'told_mod', HOOKS, plugins='told = told_mod')
  file = saved(tmp_path / 'm.msgpack')
  monkeypatch.setenv('SURGERY_TRACE', '1')
  result = fresh('select', file, 'who:')
  lines = result.err.splitlines()
  assert (
    "surgery_formats() asked of files → ['msgpack', 'safetensors']" in lines
  )
  assert (
    "surgery_match_layer(site=net/a/kernel, term='who:') asked of told → "
    "raised SelectorError('told_mod')" in lines
  )
  assert '' == result.out
  monkeypatch.setenv('SURGERY_TRACE', '0')
  assert 'asked of' not in fresh('select', file, 'who:').err


def test_a_broken_plugin_is_one_line_of_the_shell(installed, tmp_path):
  mark = installed('bad', 'bad_mod', 'import nowhere', plugins='bad = bad_mod')
  saved(tmp_path / 'm.msgpack')
  done = subprocess.run(
    [sys.executable, '-m', 'surgery', 'inspect', tmp_path / 'm.msgpack'],
    env={**os.environ, 'PYTHONPATH': str(mark.parent)},
    capture_output=True,
    text=True,
  )
  assert (0, 1) == (done.returncode, len(done.stderr.splitlines()))
  assert done.stderr.startswith(
    "warning: plugin 'bad' of bad 1.0 is broken and left out: ModuleNotFound"
  )
  assert 'model: 1 tensor' in done.stdout


def test_a_name_may_be_that_of_a_type_and_of_a_plugin(installed, fresh):
  installed(
    'both', 'both_mod', TYPE + HOOKS.replace('import surgery', ''),
    adapters='slow = both_mod:Slow', plugins='slow = both_mod',
  )  # fmt: skip
  data = json.loads(fresh('plugins', 'show', 'slow', '--json').out)
  assert 'adapter' == data['kind'] and 3 == len(data['options'])
  [other] = data['others']
  assert ('plugin', ['surgery_match_layer']) == (other['kind'], other['hooks'])
  assert 'kind: plugin' in fresh('plugins', 'show', 'slow').out


def test_two_types_of_one_name_are_listed_as_broken(installed, fresh):
  for name in ('one', 'two'):
    installed(name, f'{name}_mod', TYPE, adapters=f'slow = {name}_mod:Slow')
  infos = [i for i in Host().plugins() if i.name == 'slow']
  assert ['broken', 'broken'] == [i.state for i in infos]
  assert all('offered by one 1.0 and two 1.0' in i.reason for i in infos)
  shown = fresh('plugins', 'show', 'slow')
  assert main.PLUGIN == shown.code
  assert 'offered by one 1.0 and two 1.0' in shown.err
  infos = [
    i for i in Host(prefer={'slow': 'two'}).plugins() if i.name == 'slow'
  ]
  assert [('one', 'blocked'), ('two', 'available')] == [
    (i.distribution, i.state) for i in infos
  ]


def test_what_raises_in_a_hook_is_named_with_its_distribution(
  installed, fresh, tmp_path
):
  source = HOOKS.replace('surgery.SelectorError(__name__)', 'KeyError(3)')
  installed('told', 'told_mod', source, plugins='told = told_mod')
  message = (
    "plugin 'told' of told 1.0 failed in surgery_match_layer: KeyError: 3"
  )
  with pytest.raises(surgery.PluginError) as raised:
    surgery.select(model(), 'who:', host=Host())
  assert message == str(raised.value)
  # The rest goes on, and from the shell it is a plugin's failure.
  assert surgery.select(model(), '**/kernel', host=Host())
  saved(tmp_path / 'm.msgpack')
  result = fresh('select', tmp_path / 'm.msgpack', 'who:')
  assert (main.PLUGIN, True) == (result.code, message in result.err)


def test_a_type_for_a_newer_release_says_so(installed):
  installed(
    'new', 'new_mod', 'from surgery import Quantum', needs='blox_surgery>=9.1',
    adapters='new = new_mod:New',
  )  # fmt: skip
  with pytest.raises(
    surgery.PluginError,
    match=r"'new' of new 1\.0 is broken: ImportError: .*Quantum.*"
    r'it requires blox_surgery>=9\.1; this is',
  ):
    Host().adapter_type('new')


def test_the_order_of_installation_decides_nothing(installed, monkeypatch):
  mark = installed('zed', 'aaa_mod', HOOKS, plugins='a = aaa_mod')
  site = mark.parent
  other = site / 'other'
  other.mkdir()
  installed('art', 'zzz_mod', HOOKS, plugins='z = zzz_mod')
  for name in ('zzz_mod.py', 'art-1.0.dist-info'):
    (site / name).rename(other / name)
  for paths in ([site, other], [other, site]):
    with monkeypatch.context() as patched:
      patched.setattr(sys, 'path', [*map(str, paths), *sys.path])
      importlib.invalidate_caches()
      with pytest.raises(surgery.SelectorError, match='^aaa_mod'):
        surgery.select(model(), 'who:', host=Host())


def test_hooks_are_never_asked_while_a_model_is_traced(installed):
  installed('slow', 'slow_mod', TYPE, adapters='slow = slow_mod:Slow')
  installed('told', 'told_mod', HOOKS, plugins='told = told_mod')
  asked = []
  host = Host(trace=asked.append)
  params = surgery.attach(model(), slow(host), to='**', host=host)
  assert any(line.startswith('surgery_intercept_param') for line in asked)
  del asked[:]
  layer = bx.Linear(bx.Graph('net').child('a'), 2, None, use_bias=False)
  call = lambda params: layer(params, jnp.ones((1, 3)))[0].sum()
  assert 12 == jax.jit(call)(params)
  assert 12 == jax.vmap(call, axis_size=1)(
    jax.tree.map(lambda v: v[None], params)
  )
  gradient = jax.grad(lambda p, r: call(p.merge(r)))(*params.split())
  assert np.array_equal(
    np.full((3, 2), 2.0), gradient['net', 'a', 'kernel'].value
  )
  assert [] == asked


def test_a_file_that_needs_a_missing_type_says_who_had_it(
  installed, fresh, tmp_path
):
  mark = installed('slow', 'slow_mod', TYPE, adapters='slow = slow_mod:Slow')
  host = Host()
  params = surgery.attach(model(), slow(host), to='**', host=host)
  whole, alone = tmp_path / 'm.msgpack', tmp_path / 'a.msgpack'
  surgery.save(whole, params, host=host)
  surgery.save_adapter(alone, params, host=host)
  (mark.parent / 'slow-1.0.dist-info' / 'entry_points.txt').write_text('')
  importlib.invalidate_caches()
  message = (
    "adapter 'default' needs its type, which came from slow 1.0. unknown "
    "adapter type 'slow'."
  )
  for call in (
    lambda: surgery.load(whole, host=Host()),
    lambda: surgery.load_adapter(alone, model(), host=Host()),
    lambda: surgery.merge(surgery.open(whole, host=Host()), host=Host()),
  ):
    with pytest.raises(surgery.UnknownAdapterType, match=message):
      call()
  result = fresh('merge', whole, '-o', tmp_path / 'out.msgpack')
  assert (3, True) == (result.code, message in result.err)
  # What needs no type of it goes on: it is looked at, and taken apart.
  assert 'default: slow(' in fresh('inspect', whole).out
  assert surgery.open(whole, host=Host())['net', 'a', 'kernel'].shape == (3, 2)


def test_files_and_recipes_name_no_modules(installed, fresh, tmp_path):
  mark = installed('x', 'evil_mod', TYPE)
  for name in ('evil_mod', 'evil_mod:Slow', 'evil_mod.Slow'):
    step = {'attach': {'adapter': name, 'to': '**'}}
    with pytest.raises(surgery.SurgeryError, match='unknown adapter type'):
      surgery.apply(model(), step, host=Host())
  host, file = Host(only=()), tmp_path / 'm.msgpack'
  params = surgery.attach(model(), surgery.LoRA(rank=1), to='**', host=host)
  surgery.save(file, params, host=host)
  file.write_bytes(
    file.read_bytes().replace(b'"type":"lora"', b'"type":"evil"').replace(
      b'"type": "lora"', b'"type": "evil"'
    )
  )  # fmt: skip
  with pytest.raises(surgery.SurgeryError, match="unknown adapter type 'evil'"):
    surgery.load(file, host=Host())
  assert not mark.exists()
