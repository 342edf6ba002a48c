"""The public names: typed, lazy, and complete."""

import ast
import inspect
import pathlib
import typing

import pytest

import surgery

SOURCE = ast.parse(pathlib.Path(surgery.__file__).read_text())


def test_a_type_checker_sees_each_public_name_and_no_other():
  (typed,) = (
    node
    for node in SOURCE.body
    if isinstance(node, ast.If) and isinstance(node.body[0], ast.ImportFrom)
  )
  seen = {
    alias.asname or alias.name for node in typed.body for alias in node.names
  }
  assert sorted(surgery.__all__) == sorted(seen)


def test_a_type_checker_does_not_see_a_module_with_any_name():
  defined = [n.name for n in SOURCE.body if isinstance(n, ast.FunctionDef)]
  assert '__getattr__' not in defined


# `Plan` is defined in a module that imports this one's.
CIRCULAR = ('Recipe.plan', 'Recipe.run')


def annotated():
  for name in surgery.__all__:
    value = getattr(surgery, name)
    if inspect.isclass(value):
      for part, method in vars(value).items():
        test = f'{name}.{part}'
        public = inspect.isfunction(method) and not part.startswith('_')
        if public and test not in CIRCULAR:
          yield pytest.param(method, id=test)
    elif inspect.isfunction(value):
      yield pytest.param(value, id=name)


@pytest.mark.parametrize('function', [*annotated()])
def test_annotations_are_there_at_run_time(function):
  hints = typing.get_type_hints(function)
  parameters = list(inspect.signature(function).parameters)
  given = [n for n in parameters if n not in ('self', 'cls')]
  assert {*given, 'return'} == hints.keys()


def test_dir_has_the_public_names_once_and_nothing_private():
  names = dir(surgery)
  assert len(set(names)) == len(names)
  assert [] == [n for n in names if n.startswith('_') and not n.endswith('__')]
  assert set(surgery.__all__) == {n for n in names if not n.startswith('__')}
