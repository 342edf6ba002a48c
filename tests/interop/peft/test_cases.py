"""Folders that `tests/data/peft_cases/make.py` made, merged and written again."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import surgery

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'peft_cases'
CASES = ('net/large_rank',)


def run(steps, folder, out, base=None, **more):
  surgery.Recipe(
    steps,
    inputs={
      'model': base or folder.parent / 'base.safetensors',
      'adapter': folder,
    },
    outputs={'out': {'path': out, **more}},
  ).plan().write()
  return out


@pytest.mark.parametrize('name', CASES)
def test_a_merge_is_that_of_peft(name, tmp_path):
  folder = DATA / name
  expected = load_file(folder.parent / 'base.safetensors')
  expected |= load_file(folder / 'merged_changed.safetensors')
  steps = [{'merge': {'with': 'adapter'}}]
  found = load_file(run(steps, folder, tmp_path / 'out.safetensors'))
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, atol=2e-5, err_msg=key)


@pytest.mark.parametrize('name', CASES)
def test_what_was_read_is_written_as_it_was(name, tmp_path):
  folder = DATA / name
  adapted = tmp_path / 'adapted.msgpack'
  run([{'attach': {'from': 'adapter'}}], folder, adapted)
  surgery.Recipe(
    [{'extract': None, 'as': 'alone'}],
    inputs={'model': adapted},
    outputs={
      'out': {'path': tmp_path / 'out', 'of': 'alone', 'format': 'peft'}
    },
  ).plan().write()
  expected = load_file(folder / 'adapter_model.safetensors')
  found = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  assert set(expected) == set(found)
  for key, value in expected.items():
    np.testing.assert_array_equal(found[key], value, err_msg=key)
  said = json.loads((folder / 'adapter_config.json').read_text())
  assert said == json.loads((tmp_path / 'out/adapter_config.json').read_text())
