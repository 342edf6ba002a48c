"""`surgery new-plugin`: a distribution that works at once."""

import json
import os
import pathlib
import subprocess
import sys
import tomllib
from typing import Any

import blox as bx
import jax.numpy as jnp
import pytest
import yaml
from click.testing import CliRunner

import surgery
from surgery import testing
from surgery.cli.new_plugin import command
from surgery.host import manager


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder of a new plugin, and where it has been installed."""
  folder = tmp_path_factory.mktemp('new')
  run(folder, '-m', 'surgery', 'new-plugin', 'dora-lite')
  target = folder / 'site'
  run(
    folder, '-m', 'pip', 'install', '--quiet', '--no-deps',
    '--no-build-isolation', '--target', str(target), './surgery-dora-lite',
  )  # fmt: skip
  return folder, target


def run(folder, *arguments, path=None):
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  if path is not None:
    environment['PYTHONPATH'] = str(path)
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert 0 == done.returncode, done.stdout + done.stderr
  return done.stdout


def test_all_that_a_distribution_needs_is_there(written):
  folder = written[0] / 'surgery-dora-lite'
  found = {
    str(p.relative_to(folder))
    for p in folder.rglob('*')
    if p.is_file() and 'egg-info' not in str(p) and 'build' not in p.parts
  }
  assert {
    'pyproject.toml',
    'README.md',
    'surgery_dora_lite/__init__.py',
    'tests/test_dora_lite.py',
    '.github/workflows/tests.yml',
    '.gitignore',
  } == found
  for name in found - {'.github/workflows/tests.yml'}:
    assert '$' not in (folder / name).read_text(), name
  # What is run there is what is told to people, and is said to exist.
  jobs = yaml.safe_load((folder / '.github/workflows/tests.yml').read_text())
  ran = [
    step['run']
    for job in jobs['jobs'].values()
    for step in job['steps']
    if 'run' in step
  ]
  assert "pip install --editable '.[test]'" in ran
  readme = (folder / 'README.md').read_text()
  assert all(line in readme for line in ran if 'twine check' not in line)
  project = tomllib.loads((folder / 'pyproject.toml').read_text())['project']
  assert ['pytest>=8.4'] == project['optional-dependencies']['test']


def test_its_own_tests_pass(written):
  folder, target = written
  out = run(
    folder, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
    'surgery-dora-lite/tests', '-k', 'values or (linear and float32)', path=target,
  )  # fmt: skip
  assert ' passed' in out and 'failed' not in out


def test_it_is_used_live_in_the_shell_in_recipes_and_in_files(written):
  folder, target = written
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.ones((2, 3)))
  surgery.save(folder / 'base.msgpack', params.locked())
  shell = ('-m', 'surgery')
  shown = json.loads(
    run(folder, *shell, 'plugins', 'show', 'dora-lite', '--json', path=target)
  )
  assert ('surgery-dora-lite', '0.1.0') == (
    shown['distribution'].replace('_', '-'),
    shown['version'],
  )
  run(
    folder, *shell, 'attach', 'base.msgpack', '--adapter', 'dora-lite', '--to',
    '**', '--set', 'strength=2', '-o', 'adapted.msgpack', path=target,
  )  # fmt: skip
  pathlib.Path(folder, 'r.yaml').write_text(
    "- attach: {adapter: dora-lite, to: '**', set: {strength: 2.0}}\n- merge\n"
  )
  run(
    folder, *shell, 'run', 'r.yaml', 'model=base.msgpack', 'out=merged.msgpack',
    path=target,
  )  # fmt: skip
  run(folder, *shell, 'diff', 'base.msgpack', 'merged.msgpack', path=target)
  code = (
    'import surgery; p = surgery.load("adapted.msgpack"); '
    'print(surgery.adapters(p)[0].config)'
  )
  assert "{'strength': 2.0}\n" == run(folder, '-c', code, path=target)
  # Without the distribution the file says which one had the type.
  with pytest.raises(
    surgery.UnknownAdapterType, match=r'surgery[-_]dora[-_]lite 0\.1\.0'
  ):
    surgery.load(folder / 'adapted.msgpack')


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (('My-Scale',), 2, 'between them. Write my-scale.'),
    (('my__-scale 2',), 2, 'between them. Write my-scale_2.'),
    (('class',), 2, 'expected lower-case letters'),
    (('mine_',), 2, 'Write mine.'),
    (('9',), 2, 'underscores between them.\n'),
    (('lora',), 3, "adapter type 'lora' exists already, of blox-surgery"),
    (('ties', '--kind', 'method'), 3, 'exists already, of blox-surgery'),
    (('mine', '--kind', 'x'), 2, "'term'"),
    (
      ('cast', '--kind', 'pass'),
      3,
      "pass 'cast' exists already, of blox-surgery",
    ),
    (('passes', '--kind', 'term'), 3, 'exists already, of blox-surgery'),
    (('msgpack', '--kind', 'format'), 3, 'exists already'),
    (('adapters', '--kind', 'policy'), 3, 'exists already'),
    (('type', '--kind', 'term'), 3, 'exists already'),
    (('mine', '-o', '.'), 3, '.: exists already'),
    (('mine', '-o', 'no/mine'), 3, 'no: there is no such folder'),
  ],
)
def test_bad_input_is_refused(
  tmp_path, monkeypatch, surgery_cli, arguments, code, message
):
  monkeypatch.chdir(tmp_path)
  result = surgery_cli('new-plugin', *arguments)
  assert code == result.code
  assert message in result.err
  assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['none', 'any', 'adapter_conformance'])
def test_the_class_is_called_by_no_name_that_is_taken(
  tmp_path, monkeypatch, surgery_cli, name
):
  monkeypatch.chdir(tmp_path)
  result = surgery_cli('new-plugin', name, '-o', 'a b')
  assert 0 == result.code, result.err
  assert "pip install --editable './a b[test]' && pytest 'a b'" in result.err
  made: dict[str, Any] = {}
  exec((tmp_path / 'a b' / f'surgery_{name}' / '__init__.py').read_text(), made)
  [cls] = made['__all__']
  assert (True, name) == (cls.endswith('Adapter'), made[cls].name)


# By kind, with the words of a name joined in either way.
NAMES = {
  'pass': 'my-pass',
  'format': 'my-format',
  'method': 'my-method',
  'policy': 'my_policy',
  'term': 'my_term',
}
KINDS = tuple(NAMES)


@pytest.fixture(scope='module')
def hooks(tmp_path_factory):
  """A folder with a new plugin of each other kind, and where they are."""
  folder = tmp_path_factory.mktemp('hooks')
  new = CliRunner()
  for kind in KINDS:
    where = str(folder / kind)
    done = new.invoke(command, [NAMES[kind], '--kind', kind, '-o', where])
    assert 0 == done.exit_code, done.output
  target = folder / 'site'
  run(
    folder, '-m', 'pip', 'install', '--quiet', '--no-deps',
    '--no-build-isolation', '--target', str(target),
    *(f'./{kind}' for kind in KINDS),
  )  # fmt: skip
  return folder, target


def test_hook_plugins_have_all_that_a_distribution_needs(hooks):
  for kind in KINDS:
    folder = hooks[0] / kind
    name, module = NAMES[kind], f'my_{kind}'
    points = tomllib.loads((folder / 'pyproject.toml').read_text())['project'][
      'entry-points'
    ]
    assert {'surgery.plugins': {name: f'surgery_{module}'}} == points
    for path in (
      'README.md',
      f'surgery_{module}/__init__.py',
      f'tests/test_{module}.py',
    ):
      assert '$' not in (folder / path).read_text(), path
    jobs = yaml.safe_load((folder / '.github/workflows/tests.yml').read_text())
    assert {'tests', 'build'} == jobs['jobs'].keys()


def test_the_tests_of_hook_plugins_pass(hooks):
  folder, target = hooks
  out = run(
    folder, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
    *(f'{kind}/tests' for kind in KINDS), path=target,
  )  # fmt: skip
  # Those of all suites, and one of values each.
  suites = (
    testing.PassConformance,
    testing.FormatConformance,
    testing.MethodConformance,
    testing.PolicyConformance,
    testing.TermConformance,
  )
  count = sum(len(suite.laws()) + 1 for suite in suites)
  assert f'{count} passed' in out and 'failed' not in out


def test_hook_plugins_are_found_when_they_are_installed(hooks):
  folder, target = hooks
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.ones((2, 3)))
  surgery.save(folder / 'base.msgpack', params.locked())
  code = """
import surgery
model = surgery.open('base.msgpack')
model = surgery.apply(model, {'my-pass': {'select': 'my_term:5', 'at': 0.5}})
frozen = surgery.freeze(model, policy='my_policy')
print([leaf.trainable for leaf in frozen.values()])
model.write('out.my-format')
print(surgery.open('out.my-format')['net', 'layer', 'kernel'].load().max())
"""
  assert '[False]\n0.5\n' == run(folder, '-c', code, path=target)


@pytest.mark.parametrize(
  ('kind', 'name', 'called'),
  [
    ('pass', 'dict', 'dict_pass'),
    ('pass', 'np', 'np_pass'),
    ('format', 'exception', 'ExceptionFormat'),
  ],
)
def test_nothing_that_a_module_uses_is_hidden(tmp_path, kind, name, called):
  where = tmp_path / 'new'
  done = CliRunner().invoke(command, [name, '--kind', kind, '-o', str(where)])
  assert 0 == done.exit_code, done.output
  made: dict[str, Any] = {}
  exec((where / f'surgery_{name}' / '__init__.py').read_text(), made)
  assert [called] == made['__all__'] and callable(made[called])


class Taken:
  suffixes = ('.taken_suffix',)

  @surgery.hookimpl
  def surgery_formats(self):
    return {'other': self}

  @surgery.hookimpl
  def surgery_freeze_param(self, policy):
    return True if policy == 'taken_policy' else None

  @surgery.hookimpl
  def surgery_match_layer(self, term):
    if term.startswith('taken_term:'):
      raise surgery.SelectorError('taken_term: expected a letter.')


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('format', 'other'),
    ('format', 'taken_suffix'),
    ('policy', 'taken_policy'),
    ('term', 'taken_term'),
  ],
)
def test_what_another_plugin_offers_is_taken(tmp_path, kind, name):
  where = tmp_path / 'new'
  with manager.used(surgery.Host(plugins=[Taken], only=())):
    done = CliRunner().invoke(command, [name, '--kind', kind, '-o', str(where)])
  assert 'plugin' in str(done.exception) and 'exists already' in str(
    done.exception
  )
  assert not where.exists()
