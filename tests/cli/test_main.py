"""The entry point: help, exit codes, start-up."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

from surgery import errors
from surgery.cli import main
from tests import signals

BIN = pathlib.Path(sys.executable).parent / 'surgery'


def command(*arguments, **options):
  return subprocess.run(
    [BIN, *map(str, arguments)], capture_output=True, text=True, **options
  )


def test_help_lists_every_verb_with_its_summary():
  done = command('--help')
  assert 0 == done.returncode
  for name, summary in main.VERBS.items():
    assert name in done.stdout
    assert summary in done.stdout


@pytest.mark.parametrize('arguments', [['--help'], ['attach', '--help']])
def test_help_imports_neither_jax_nor_numpy(arguments):
  program = (
    f'import sys; sys.argv = ["surgery", *{arguments!r}]\n'
    'from surgery.cli.main import run\n'
    'run()\n'
    'heavy = {"jax", "numpy", "blox", "flax", "rich", "msgpack"}\n'
    'sys.exit(f"imported {heavy & set(sys.modules)}" '
    'if heavy & set(sys.modules) else 0)'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert (0, '') == (done.returncode, done.stderr)


@pytest.mark.parametrize('name', main.VERBS)
def test_every_verb_has_help(surgery_cli, name):
  result = surgery_cli(name, '--help')
  assert 0 == result.code
  assert 'Usage: surgery' in result.out


@pytest.mark.parametrize(
  'name', sorted(main.VERBS.keys() - {'demo', 'plugins'})
)
def test_help_has_an_example_on_a_line_of_its_own(surgery_cli, name):
  lines = surgery_cli(name, '--help').out.splitlines()
  assert [line for line in lines if line.startswith(f'  surgery {name} ')]
  assert '\\b' not in '\n'.join(lines)


def test_an_unknown_verb_is_a_usage_error_with_a_suggestion(surgery_cli):
  result = surgery_cli('atach')
  assert 2 == result.code
  assert "no verb 'atach'. Did you mean 'attach' or" in result.err


def test_version(surgery_cli):
  assert 'surgery 0.1.0\n' == surgery_cli('--version').out


@pytest.mark.parametrize(
  ('error', 'code'),
  [
    (errors.SelectorError('x'), 3),
    (errors.UnknownAdapterType('x'), 3),
    (errors.PluginError('x'), 4),
    (FileNotFoundError(2, 'No such file', 'x'), 3),
    (KeyboardInterrupt(), 130),
    (ZeroDivisionError('x'), 70),
  ],
)
def test_an_error_has_its_exit_code_and_no_traceback(
  surgery_cli, monkeypatch, error, code
):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(main.cli, 'main', fail)
  monkeypatch.delenv('SURGERY_DEBUG', raising=False)
  result = surgery_cli()
  assert code == result.code
  assert 'Traceback' not in result.err
  assert '' == result.out


def test_a_bug_says_so_and_shows_more_on_request(surgery_cli, monkeypatch):
  def fail(*args, **kwargs):
    raise ZeroDivisionError('oh')

  monkeypatch.setattr(main.cli, 'main', fail)
  monkeypatch.setenv('SURGERY_DEBUG', '1')
  result = surgery_cli()
  assert 70 == result.code
  assert 'bug: ZeroDivisionError: oh' in result.err
  assert 'Traceback' in result.err


def test_a_reader_that_has_seen_enough_is_no_error(model):
  # `true` ends without reading; the pipe breaks when we write.
  done = subprocess.run(
    ['bash', '-c', f'set -o pipefail; {BIN} inspect {model.file} | true'],
    capture_output=True,
    text=True,
  )
  assert (0, '') == (done.returncode, done.stderr)


def test_ctrl_c_is_quiet(tmp_path):
  program = (
    'import os, signal\n'
    'from surgery.cli import main\n'
    'def stop(*a, **k): os.kill(os.getpid(), signal.SIGINT)\n'
    'main.cli.main = stop\n'
    'main.main()\n'
  )
  done = subprocess.run(
    signals.hearing(sys.executable, '-c', program),
    capture_output=True,
    text=True,
  )
  assert (signals.ended_by('SIGINT'), '', '') == (
    done.returncode,
    done.stdout,
    done.stderr,
  )


@pytest.mark.parametrize('module', ['click', 'surgery.cli.main', 'numpy'])
def test_ctrl_c_is_quiet_while_modules_are_imported(model, module):
  program = (
    'import os, signal, sys\n'
    'class Stop:\n'
    '  def find_spec(self, name, path, target=None):\n'
    f'    if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n'
    'sys.meta_path.insert(0, Stop())\n'
    f'sys.argv = ["surgery", "cast", {str(model.file)!r}, "--to", "bf16",'
    ' "-o", "out.msgpack"]\n'
    'from surgery.cli.entry import main\n'
    'main()\n'
  )
  done = subprocess.run(
    signals.hearing(sys.executable, '-c', program),
    cwd=model.file.parent,
    capture_output=True,
    text=True,
  )
  assert (signals.ended_by('SIGINT'), '', '') == (
    done.returncode,
    done.stdout,
    done.stderr,
  )


def test_the_command_begins_in_the_module_that_is_quiet():
  project = pathlib.Path(__file__).parents[2] / 'pyproject.toml'
  scripts = tomllib.loads(project.read_text())['project']['scripts']
  assert {'surgery': 'surgery.cli.entry:main'} == scripts
