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

import surgery


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder of a new plugin, and where it has been installed."""
  folder = tmp_path_factory.mktemp('new')
  run(folder, '-m', 'surgery', 'new-plugin', 'my_scale')
  target = folder / 'site'
  run(
    folder, '-m', 'pip', 'install', '--quiet', '--no-deps',
    '--no-build-isolation', '--target', str(target), './surgery-my-scale',
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
  folder = written[0] / 'surgery-my-scale'
  found = {
    str(p.relative_to(folder))
    for p in folder.rglob('*')
    if p.is_file() and 'egg-info' not in str(p) and 'build' not in p.parts
  }
  assert {
    'pyproject.toml',
    'README.md',
    'surgery_my_scale/__init__.py',
    'tests/test_my_scale.py',
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
    'surgery-my-scale/tests', '-k', 'values or (linear and float32)', path=target,
  )  # fmt: skip
  assert ' passed' in out and 'failed' not in out


def test_it_is_used_live_in_the_shell_in_recipes_and_in_files(written):
  folder, target = written
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.ones((2, 3)))
  surgery.save(folder / 'base.msgpack', params.locked())
  shell = ('-m', 'surgery')
  shown = json.loads(
    run(folder, *shell, 'plugins', 'show', 'my_scale', '--json', path=target)
  )
  assert ('surgery-my-scale', '0.1.0') == (
    shown['distribution'].replace('_', '-'),
    shown['version'],
  )
  run(
    folder, *shell, 'attach', 'base.msgpack', '--adapter', 'my_scale', '--to',
    '**', '--set', 'strength=2', '-o', 'adapted.msgpack', path=target,
  )  # fmt: skip
  pathlib.Path(folder, 'r.yaml').write_text(
    "- attach: {adapter: my_scale, to: '**', set: {strength: 2.0}}\n- merge\n"
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
    surgery.UnknownAdapterType, match=r'surgery[-_]my[-_]scale 0\.1\.0'
  ):
    surgery.load(folder / 'adapted.msgpack')


@pytest.mark.parametrize(
  ('arguments', 'code', 'message'),
  [
    (('My-Scale',), 2, 'between them. Write my_scale.'),
    (('class',), 2, 'expected lower-case letters'),
    (('mine_',), 2, 'Write mine.'),
    (('9',), 2, 'underscores between them.\n'),
    (('lora',), 3, "adapter type 'lora' is there already, of blox-surgery"),
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
