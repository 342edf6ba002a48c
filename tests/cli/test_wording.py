"""Messages of the library, as the shell says them."""

import ast
import pathlib
import re

import pytest

import surgery
from surgery import errors
from surgery.cli import wording

ROOMS = (
  'adapting', 'builtin', 'contract', 'editing', 'files', 'host', 'interop',
  'looking', 'methods', 'model', 'naming', 'passes', 'recipes',
)  # fmt: skip
# What only Python reaches: before initialisation, with a graph.
PYTHON = (
  'model= out=',  # Inputs of a recipe.
  'path_initial_model_for_weight_conversion=',  # Of PEFT itself.
  'Give graph=',
  'attach without graph=',
  'give original=',
)
ARGUMENT = re.compile(r'\b[a-z]+(_[a-z]+)*=(?=[A-Z…\s).,;]|$)')


def texts():
  """Yields the text of each error that the rooms of the shell raise."""
  root = pathlib.Path(surgery.__file__).parent
  for room in ROOMS:
    for file in sorted((root / room).rglob('*.py')):
      for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and re.search(
          r'Error$|^wrong$', getattr(node.func, 'attr', '')
        ):
          for given in node.args:
            parts = [
              part.value
              for part in ast.walk(given)
              if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            yield f'{file.name}:{node.lineno}', ''.join(parts)


@pytest.mark.parametrize(
  ('where', 'text'), [t for t in texts() if ARGUMENT.search(t[1])]
)
def test_no_message_of_the_shell_speaks_python(where, text):
  said = wording.as_options(text)
  for known in PYTHON:
    said = said.replace(known, '')
  assert not ARGUMENT.search(said), f'{where}: {said}'


def test_there_are_messages_to_look_at():
  assert len([*texts()]) > 200
  assert any(ARGUMENT.search(text) for _, text in texts())


def test_errors_of_the_system_are_a_line():
  error = FileExistsError(17, 'file exists', 'a.msgpack')
  assert 'a.msgpack: file exists.' == wording.line(error)
  other = errors.BaseMismatchError('another base. Say check_base=False.')
  assert 'another base. Say --no-check-base.' == wording.line(other)


def test_examples_of_python_are_options():
  say = wording.as_options
  assert "by --set 'a/b:rank=32'." == say("by patterns={'a/b': {'rank': 32}}.")
  assert "e.g. --layout '**/w=oi'." == say("e.g. layout={'**/w': 'oi'}.")
  assert 'Write one with surgery extract.' == say(
    'Write one with surgery.save_adapter.'
  )


def test_options_of_steps_are_said_as_the_shell_has_them():
  said = wording.as_options('To write it all the same, give nonfinite: allow.')
  assert (
    'To write it all the same, give --nonfinite allow (in a recipe nonfinite: '
    'allow).'
  ) == said
  assert '--only common (in a recipe' in wording.as_options('give only: common')
