"""Results of mergekit 0.1.5, which was run on small models."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'mergekit'


def opened(name):
  return surgery.open(DATA / f'{name}.safetensors')


def values(model):
  return {
    '.'.join(path): np.asarray(leaf.load()) for path, leaf in model.items()
  }


@pytest.mark.parametrize(
  ('name', 'models', 'base', 'options'),
  [
    ('linear', 'ab', None, {'method': 'linear', 'weight': [0.7, 0.3]}),
    ('slerp_t0.3', 'ab', None, {'method': 'slerp', 't': 0.3}),
    (
      'task_arithmetic',
      'abc',
      'base',
      {'method': 'task_arithmetic', 'weight': [0.6, 0.3, 0.5]},
    ),
    (
      'ties_d0.5',
      'abc',
      'base',
      {'method': 'ties', 'weight': [0.6, 0.3, 0.5], 'density': 0.5},
    ),
  ],
)
def test_whole_files_equal_those_that_it_wrote(name, models, base, options):
  given = [opened(one) for one in models]
  combined = surgery.combine(given, base=base and opened(base), **options)
  expected, found = values(opened(name)), values(combined)
  assert expected.keys() == found.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=0, atol=2e-6)


CASES = json.loads((DATA / 'methods.json').read_text())
# What mergekit calls otherwise.
NAMES = {'nuslerp_flatten': 'flatten', 'nuslerp_row_wise': 'row_wise'}


def part(tensors, name):
  """Returns the tensors under a name as a checkpoint."""
  return surgery.Checkpoint(
    {
      tuple(key.partition('/')[2].split('.')): surgery.Leaf(
        lambda value=value: value, value.shape, str(value.dtype)
      )
      for key, value in tensors.items()
      if key.startswith(f'{name}/')
    }
  )


@pytest.mark.parametrize('case', CASES)
def test_each_method_gives_what_its_function_does(case):
  tensors = load_file(DATA / 'methods.safetensors')
  said = CASES[case]
  options = {NAMES.get(k, k): v for k, v in said['options'].items()}
  if said['method'] == 'passthrough':
    [options['scale']] = options['scale']
  base = part(tensors, 'base') if said['base'] == 'base' else None
  found = values(
    surgery.combine(
      [part(tensors, name) for name in said['models']],
      base=base,
      method=said['method'],
      **options,
    )
  )
  expected = values(part(tensors, case))
  assert expected.keys() == found.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(
      found[path], value, rtol=0, atol=2e-6, err_msg=path
    )
