"""The kit looks at a type on layers of other frameworks, where asked to."""

import subprocess
import sys
import textwrap

import pytest
import surgery_lora_family
import surgery_scaling

import surgery
from surgery.testing import frameworks

TYPES = [
  surgery.LoRA(rank=2, dropout=0.1),
  surgery_lora_family.DoRA(rank=2),
  surgery_scaling.LNTuning(),
]


@pytest.mark.parametrize('framework', ['linen', 'nnx', 'equinox'])
@pytest.mark.parametrize('adapter', TYPES, ids=lambda a: a.name)
def test_a_type_that_is_right_holds(framework, adapter):
  if framework not in frameworks.installed():
    pytest.skip(f'{framework} is not installed')
  frameworks.look(framework, adapter)


def test_the_frameworks_are_looked_at_by_a_marker(tmp_path):
  (tmp_path / 'test_mine.py').write_text(
    textwrap.dedent("""
      import surgery
      from surgery.testing import AdapterConformance

      class TestMine(AdapterConformance):
        adapter = surgery.LoRA(rank=2)
        kinds = ('linear',)
    """)
  )

  def run(*options):
    done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '--strict-markers',
       '--collect-only', *options, tmp_path],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout

  assert 'test_framework' not in run()
  expected = len(frameworks.installed())
  assert expected == run('-m', 'frameworks').count('test_framework[')
