"""What surgery writes, loaded by torch and transformers themselves.

`nox -s torch` installs both and runs these tests; elsewhere they are skipped.
"""

import pathlib
import shutil

import pytest

DATA = pathlib.Path(__file__).parents[2] / 'data' / 'hf'


@pytest.fixture
def hf(tmp_path):
  """Copies the folder of a tiny model of transformers."""

  def copied(name):
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    return folder

  return copied
