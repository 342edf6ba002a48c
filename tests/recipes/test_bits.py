"""The same recipe gives the same bytes, whatever runs it."""

import os
import subprocess
import sys

import numpy as np

from tests.recipes.models import saved

RECIPE = """
- matmul: {rules: '{a,b} -> ab', keep: true}
- factorise: {rules: 'a -> {u,v}', rank: 20}
- random: {rules: '-> noise', shape: [700, 300], dtype: f32, seed: 3}
- resize-vocab: {select: b, size: 910, new: random}
- add: {'noise -> ab': 0.5}
- assert: {finite: '**'}
"""


def test_neither_hashes_nor_threads_matter(tmp_path):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype('float32')
  file = saved({'a': draw(700, 900), 'b': draw(900, 300)}, tmp_path)
  recipe = tmp_path / 'r.yaml'
  recipe.write_text(RECIPE)
  written = []
  for seed, threads in (('0', '1'), ('1', '2'), ('random', '2')):
    out = tmp_path / threads / seed / 'out.msgpack'
    out.parent.mkdir(parents=True)
    environment = {
      **os.environ,
      'PYTHONHASHSEED': seed,
      'OMP_NUM_THREADS': threads,
      'OPENBLAS_NUM_THREADS': threads,
    }
    code = 'from surgery.cli.main import main; main()'
    done = subprocess.run(
      [
        sys.executable,
        '-c',
        code,
        'run',
        recipe,
        f'model={file}',
        f'out={out}',
      ],
      env=environment,
      capture_output=True,
      text=True,
    )
    assert 0 == done.returncode, done.stderr
    written.append(out.read_bytes())
  assert written[0] == written[1] == written[2]
