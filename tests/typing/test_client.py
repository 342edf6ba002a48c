"""Type checkers see the mistakes of a client, and nothing else."""

import json
import pathlib
import re
import subprocess
import sys

CLIENT = pathlib.Path(__file__).with_name('client.py')
EXPECTED = [
  number
  for number, line in enumerate(CLIENT.read_text().splitlines(), 1)
  if line.endswith('# error')
]


def run(tmp_path, *command):
  return subprocess.run(
    [sys.executable, '-m', *command],
    cwd=tmp_path,
    text=True,
    capture_output=True,
  ).stdout


def test_mypy_sees_the_mistakes_and_nothing_else(tmp_path):
  out = run(
    tmp_path,
    'mypy',
    '--config-file=',
    '--strict',
    '--disable-error-code=import-untyped',
    '--allow-untyped-calls',
    '--allow-subclassing-any',
    '--follow-imports=silent',
    f'--cache-dir={tmp_path}',
    str(CLIENT),
  )
  assert EXPECTED == sorted(
    {int(n) for n in re.findall(r'client\.py:(\d+): error', out)}
  ), out


def test_pyright_sees_the_mistakes_and_nothing_else(tmp_path):
  config = tmp_path / 'pyrightconfig.json'
  config.write_text(
    json.dumps(
      {
        'include': [str(CLIENT)],
        # What is linked and not copied is not found otherwise.
        'extraPaths': [str(CLIENT.parents[2])],
        'typeCheckingMode': 'standard',
        'reportMissingTypeStubs': False,
        'pythonVersion': '3.11',
      }
    )
  )
  out = run(
    tmp_path, 'basedpyright', '--outputjson', '--pythonpath', sys.executable
  )
  found = json.loads(out)['generalDiagnostics']
  lines = {d['range']['start']['line'] + 1 for d in found}
  assert EXPECTED == sorted(lines), out
