"""The shell computes on the CPU and starts nothing else, unless asked."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import surgery
from surgery.cli import main, platform
from surgery.platform import VARIABLE

ROOT = pathlib.Path(surgery.__file__).parents[1]

# An accelerator as JAX finds them: a package `jax_plugins.*` that registers a
# platform. Its devices are the host's, and it says when it is started.
PLUGIN = """
import os, pathlib
from jax._src import xla_bridge

def initialize():
  xla_bridge.register_backend_factory('fake', start, priority=1000)

def start():
  with pathlib.Path(os.environ['FAKE_STARTED']).open('a') as file:
    file.write('started\\n')
  return xla_bridge.make_cpu_client()
"""

# Runs many commands as the shell does, each from the top.
RUN = """
import json, sys, warnings
from surgery.cli import main

codes = []
for arguments in json.loads(sys.argv[1]):
  sys.argv = ['surgery', *arguments]
  try:
    main.main()
  except SystemExit as done:
    codes.append(done.code)
xla_bridge = sys.modules.get('jax._src.xla_bridge')
started = sorted(xla_bridge._backends) if xla_bridge else []
print(json.dumps([codes, started]))
"""


@pytest.fixture
def shell(tmp_path):
  """Runs commands in a process of their own, on a machine with a platform."""
  folder = tmp_path / 'site' / 'jax_plugins' / 'fake'
  folder.mkdir(parents=True)
  (folder / '__init__.py').write_text(PLUGIN)
  record = tmp_path / 'started'

  def run(commands, **environment):
    kept = {
      k: v
      for k, v in os.environ.items()
      if k not in ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME', VARIABLE)
    }
    record.unlink(missing_ok=True)
    done = subprocess.run(
      [sys.executable, '-c', RUN, json.dumps(commands)],
      capture_output=True,
      text=True,
      check=False,
      cwd=tmp_path,
      env={
        **kept,
        'PYTHONPATH': os.pathsep.join([str(folder.parents[1]), str(ROOT)]),
        'FAKE_STARTED': str(record),
        **environment,
      },
    )
    assert 0 == done.returncode, done.stderr
    codes, started = json.loads(done.stdout.splitlines()[-1])
    assert ('fake' in started) == record.exists()
    return codes, started, done.stderr

  return run


MODULE = """
import blox as bx
import jax
import jax.numpy as jnp

class Net(bx.Module):
  def __init__(self, graph, rng):
    super().__init__(graph)
    self.query = bx.Linear(graph.child('query'), 8, rng)
    self.value = bx.Linear(graph.child('value'), 8, rng)

  def __call__(self, params, x):
    q, params = self.query(params, x)
    return self.value(params, jax.nn.relu(q))

def make():
  graph = bx.Graph('model')
  rng = bx.Rng(graph.child('rng'))
  return Net(graph.child('net'), rng), jnp.ones((2, 6))
"""

RECIPE = """
steps:
  - attach: {adapter: lora, to: '**/query', set: {rank: 2}}
  - merge: default
  - scale: {select: '**/value/kernel', by: 2.0}
  - factorise: {rules: '**/value/kernel -> **/value/kernel_{a,b}', rank: 2}
"""


def test_no_verb_starts_another_platform(shell, model, adapted, tmp_path):
  (tmp_path / 'made.py').write_text(MODULE)
  (tmp_path / 'recipe.yaml').write_text(RECIPE)
  base, tuned = str(model.file), str(adapted)
  lora = ['--adapter', 'lora', '--to', '**/query', '--set', 'rank=2']
  commands = [
    ['attach', base, *lora, '-o', 'a.msgpack'],
    ['attach', tuned, *lora, '--name', 'b', '-o', 'ab.msgpack'],
    ['combine', 'ab.msgpack', '--weight', 'default=1', '--weight', 'b=1']
    + ['--method', 'svd', '-o', 'c.msgpack'],
    ['extract', tuned, '-o', 'alone.msgpack'],
    ['attach', base, '--from', 'alone.msgpack', '-o', 'again.msgpack'],
    ['merge', tuned, '-o', 'm.msgpack'],
    ['merge', base, '--with', 'alone.msgpack', '-o', 'm2.msgpack'],
    ['detach', tuned, '-o', 'd.msgpack'],
    ['disable', tuned, '-o', 'off.msgpack'],
    ['enable', 'off.msgpack', '-o', 'on.msgpack'],
    ['freeze', tuned, '-o', 'f.msgpack'],
    ['unfreeze', 'f.msgpack', '-o', 'u.msgpack'],
    ['cast', tuned, '--to', 'bf16', '-o', 'bf16.safetensors'],
    ['rename', tuned, '**/query -> **/q', '-o', 'r.msgpack'],
    ['drop', base, '**/bias', '-o', 'drop.msgpack'],
    ['keep', base, '**/query/**', '-o', 'keep.msgpack'],
    ['convert', tuned, 'x.safetensors'],
    ['run', 'recipe.yaml', f'model={base}', 'out=run.msgpack'],
    ['diff', 'm.msgpack', 'm2.msgpack'],
    ['verify', tuned],
    ['inspect', tuned, '--history'],
    ['select', base, '**/query/**'],
    ['explain', tuned, 'made:make'],
    ['extract-lora', base, 'm.msgpack', '--rank', '1', '-o', 'el.msgpack'],
    ['diff', base, tuned, '--save', 'p.safetensors'],
    ['patch', base, 'p.safetensors', '-o', 'patched.msgpack'],
    ['stats', tuned],
    ['maps'],
    ['plugins'],
    ['plugins', 'show', 'lora'],
    ['recipe-schema'],
    ['new-plugin', 'mine'],
  ]
  # The demo trains; it is a program of its own.
  assert set(main.VERBS) - {'demo'} == {one[0] for one in commands}
  codes, started, stderr = shell(commands)
  assert dict.fromkeys(map(' '.join, commands), 0) == dict(
    zip(map(' '.join, commands), codes, strict=True)
  ), stderr
  assert ['cpu'] == started


def test_what_the_user_says_is_heard(shell, adapted):
  merge = lambda out: ['merge', str(adapted), '-o', out]
  for number, (first, environment, expected) in enumerate(
    [
      ([], {'JAX_PLATFORMS': 'fake,cpu'}, ['cpu', 'fake']),
      ([], {'JAX_PLATFORM_NAME': 'fake'}, ['cpu', 'fake']),
      ([], {'JAX_PLATFORM_NAME': 'cpu'}, ['cpu']),
      ([], {VARIABLE: 'fake'}, ['cpu', 'fake']),
      (['--platform', 'default'], {}, ['cpu', 'fake']),
      (['--platform', 'cpu'], {'JAX_PLATFORMS': 'fake,cpu'}, ['cpu']),
      (['--platform', 'fake'], {'JAX_PLATFORMS': 'cpu'}, ['cpu', 'fake']),
    ]
  ):
    codes, started, stderr = shell(
      [[*first, *merge(f'{number}.msgpack')]], **environment
    )
    assert ([0], expected) == (codes, [n for n in started if n != 'tpu']), (
      first,
      environment,
      stderr,
    )


def test_a_platform_that_is_not_there_is_an_error(shell, adapted):
  codes, _, stderr = shell(
    [['--platform', 'cuda', 'merge', str(adapted), '-o', 'm.msgpack']]
  )
  assert [3] == codes
  assert 'SURGERY_PLATFORM=cuda: JAX finds no such platform here' in stderr


def test_help_imports_neither_jax_nor_numpy_and_lists_the_option(shell):
  codes, started, _ = shell([['--help']])
  assert ([0], []) == (codes, started)


@pytest.mark.parametrize(
  ('environment', 'name', 'platforms', 'chosen'),
  [
    ({}, None, 'cpu', 'cpu'),
    ({'JAX_PLATFORMS': ''}, None, 'cpu', 'cpu'),
    ({'JAX_PLATFORMS': 'cuda'}, None, 'cuda', 'default'),
    ({'JAX_PLATFORM_NAME': 'GPU'}, None, None, 'default'),
    ({'JAX_PLATFORM_NAME': 'cpu'}, None, 'cpu', 'cpu'),
    ({VARIABLE: 'tpu', 'JAX_PLATFORMS': 'cpu'}, None, 'tpu,cpu', 'tpu'),
    ({VARIABLE: 'tpu'}, 'cpu', 'cpu', 'cpu'),
    ({}, 'gpu', None, 'gpu'),
    ({'JAX_PLATFORMS': 'cuda,cpu'}, 'default', 'cuda,cpu', 'default'),
  ],
)
def test_who_says_which_platform(
  monkeypatch, environment, name, platforms, chosen
):
  for variable in ('JAX_PLATFORMS', 'JAX_PLATFORM_NAME', VARIABLE):
    monkeypatch.delenv(variable, raising=False)
  # Here JAX has been imported, and its configuration stays as it is.
  monkeypatch.setattr(platform.sys, 'modules', {})
  for variable, value in environment.items():
    monkeypatch.setenv(variable, value)
  # Set once, so that all of it is undone.
  for variable in ('JAX_PLATFORMS', VARIABLE):
    monkeypatch.setenv(variable, os.environ.get(variable, ''))
  platform.claim(name)
  assert platforms == (os.environ['JAX_PLATFORMS'] or None)
  assert chosen == os.environ[VARIABLE]


def test_calling_the_shell_from_python_changes_no_platform(
  surgery_cli, adapted, tmp_path
):
  before = {k: v for k, v in os.environ.items() if 'PLATFORM' in k}
  done = surgery_cli('merge', adapted, '-o', tmp_path / 'm.msgpack')
  assert 0 == done.code
  assert before == {k: v for k, v in os.environ.items() if 'PLATFORM' in k}
