import pathlib
import shutil

import pytest

DATA = pathlib.Path(__file__).parents[1] / 'data' / 'hf'
TOKENIZER = '{"version": "1.0", "added_tokens": []}'


@pytest.fixture
def hf(tmp_path):
  """Copies the folder of a tiny model of transformers, with a tokenizer."""

  def copied(name):
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    (folder / 'tokenizer.json').write_text(TOKENIZER)
    (folder / 'LICENSE.txt').write_text('Apache 2.0')
    return folder

  return copied
