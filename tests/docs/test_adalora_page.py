"""docs/plugins/adalora.md is true: its code is run from top to bottom."""

import pathlib
import re

import jax
import numpy as np
import pytest

import surgery

PAGE = pathlib.Path(__file__).parents[2] / 'docs/plugins/adalora.md'
BLOCKS = re.findall(r'^```python\n(.*?)^```$', PAGE.read_text(), re.M | re.S)


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """All that the page defines, after it was run."""
  names = {'__name__': 'page'}
  with pytest.MonkeyPatch.context() as patched:
    folder = tmp_path_factory.mktemp('page')
    patched.chdir(folder)
    for block in BLOCKS:
      exec(compile(block, str(PAGE), 'exec', dont_inherit=True), names)
  return {**names, 'folder': folder}


def test_ranks_are_those_that_the_page_shows(page):
  [said] = re.findall(r"^# (\{'one'.*\})$", PAGE.read_text(), re.M)
  assert said == str(page['ranks'])


def test_the_change_is_learnt_with_two_ranks(page):
  learnt = surgery.merge(page['params'], host=host(page))
  kernel = 'net', 'layers', 'one', 'kernel'
  found = np.asarray(learnt[kernel].value - page['base'][kernel].value)
  np.testing.assert_allclose(found, page['change'], atol=0.05)
  assert page['history'][-1][2] < 0.1 * page['history'][0][2]


def test_the_budget_falls_and_is_kept_to(page):
  budgets = [count for _, count, _ in page['history']]
  assert budgets == sorted(budgets, reverse=True)
  assert (8, 2) == (budgets[0], budgets[-1])
  assert len(set(budgets)) > 2
  assert 2 == sum(page['ranks'].values())


def test_the_file_is_the_model(page):
  found = surgery.load_adapter(
    page['folder'] / 'adalora.safetensors', page['base'], host=host(page)
  )
  ours, theirs = (surgery.weights(p) for p in (found, page['params']))
  assert all(
    jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), ours, theirs))
  )


def host(page):
  return surgery.Host(plugins=[page['AdaLoRA']])
