"""Each hook is documented and tested."""

import inspect
import pathlib
import re

import pytest

from surgery.contract import hookspecs

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith('surgery_'))
TESTS = pathlib.Path(__file__).parents[1]


def test_the_hooks_are_those_of_the_design():
  assert [
    'surgery_adapter_files',
    'surgery_finished',
    'surgery_formats',
    'surgery_freeze_param',
    'surgery_intercept_param',
    'surgery_maps',
    'surgery_match_layer',
    'surgery_merge_param',
    'surgery_methods',
    'surgery_passes',
    'surgery_started',
    'surgery_trees',
  ] == HOOKS


@pytest.mark.parametrize('name', HOOKS)
@pytest.mark.parametrize(
  'part', ['Called:', 'Order:', 'Return:', 'May raise:', 'Since:']
)
def test_a_hook_says_when_and_how(name, part):
  assert part in inspect.getdoc(getattr(hookspecs, name))


@pytest.mark.parametrize('name', HOOKS)
def test_a_hook_is_implemented_in_some_test(name):
  found = [
    path
    for path in TESTS.rglob('test_*.py')
    if re.search(rf'def {name}\(', path.read_text())
  ]
  assert found, f'no test implements {name}'
