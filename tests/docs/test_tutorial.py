"""The tutorial on plugins is true: its commands and files are run in order."""

import fnmatch
import os
import pathlib
import re
import shlex
import subprocess
import sysconfig
import tarfile
import venv
import zipfile

from packaging import metadata

PAGE = pathlib.Path(__file__).parents[2] / 'docs/plugins/tutorial.md'
BLOCK = re.compile(r'^```(\w+)( \w+)?\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# Runs what is left of a page in one process, as imports of JAX take long.
SESSION = """
import shlex, sys
from surgery.cli.main import run

names = {}
for kind, text in %r:
  print('>>>', flush=True)
  if kind == 'python':
    exec(text, names)
    continue
  code = run(shlex.split(text)[1:])
  sys.stderr.flush()
  wrong = kind == 'fails'
  if bool(code) is not wrong:
    sys.exit(f'{text}: exit code {code}')
"""


class Newcomer:
  """Somebody with an environment of their own, who reads the page."""

  def __init__(self, folder):
    self.folder = folder
    environment = folder / '.venv'
    venv.create(environment, with_pip=False)
    self.python = environment / 'bin' / 'python'
    # It has what this one has installed, editable distributions too.
    [site] = environment.glob('lib/python*/site-packages')
    ours = sysconfig.get_path('purelib')
    (site / 'ours.pth').write_text(f'import site; site.addsitedir({ours!r})\n')
    self.waiting = []

  def python_m(self, *arguments):
    """Runs a module; returns exit code and all that it printed."""
    done = subprocess.run(
      [self.python, '-m', *arguments],
      cwd=self.folder,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    return done.returncode, done.stdout

  def command(self, line):
    """Runs a command of the page; returns exit code and what it printed."""
    name, *rest = shlex.split(line)
    match name:
      case 'surgery':
        return self.python_m('surgery', *rest)
      case 'pip':
        # What it needs is here, and nothing comes from elsewhere.
        offline = ['--no-deps', '--no-build-isolation', '--quiet']
        return self.python_m('pip', *rest, *offline)
      case 'pytest':
        return self.python_m('pytest', '-p', 'no:cacheprovider', *rest)
      case 'python':
        assert ['-m', 'build'] == rest[:2], line
        return self.python_m(*rest[1:], '--no-isolation')
      case 'twine':
        assert ['check', '--strict'] == rest[:2], line
        files = list(self.folder.glob(rest[2]))
        for file in files:
          checked(file)
        return 0 if len(files) == 2 else 1, ''
    raise AssertionError(f'the test cannot run {line!r}')

  def write(self, text, is_diff=False):
    """Writes a file that the page shows, or what it changes of one."""
    first, rest = text.split('\n', 1)
    file = self.folder / first.removeprefix('# ')
    if is_diff:
      lines = rest.splitlines(keepends=True)
      old, new = (
        ''.join(line[1:] for line in lines if line[0] != mark) for mark in '+-'
      )
      assert 1 == file.read_text().count(old)
      rest = file.read_text().replace(old, new)
    file.write_text(rest)


def checked(file):
  """What twine looks at: metadata that are valid, and a description."""
  if file.suffix == '.whl':
    with zipfile.ZipFile(file) as wheel:
      names = wheel.namelist()
      [name] = [n for n in names if n.endswith('METADATA')]
      said = wheel.read(name)
      assert {'surgery_gain'} == {
        n.partition('/')[0] for n in names if '.dist-info/' not in n
      }
  else:
    with tarfile.open(file) as source:
      names = source.getnames()
      assert any(n.endswith('tests/test_gain.py') for n in names)
      [name] = [n for n in names if re.fullmatch(r'[^/]*/PKG-INFO', n)]
      read = source.extractfile(name)
      assert read is not None
      said = read.read()
  about = metadata.Metadata.from_email(said, validate=True)
  assert ('surgery-gain', '0.1.0') == (about.name, str(about.version))
  assert 'text/markdown' == about.description_content_type
  assert '# surgery-gain' in (about.description or '')


def missing(expected, output):
  """Returns the lines that the page shows and nobody printed."""
  printed = [' '.join(line.split()) for line in output.splitlines()]
  wanted = [' '.join(line.split()) for line in expected.splitlines()]
  found = lambda line: any(
    line in one or fnmatch.fnmatchcase(one, f'*{literal(line)}*')
    for one in printed
  )
  return [line for line in wanted if line and not found(line)]


def literal(line):
  """Returns a pattern of a line in which `…` stands for anything."""
  escaped = re.sub(r'([\[*?])', r'[\1]', line)
  return escaped.replace('…', '*')


def test_the_tutorial_of_plugins_is_true(tmp_path):
  reader = Newcomer(tmp_path)
  # What is run at the end, and what it is said to print: from where to where.
  session, expected = [], []
  output = start = None
  for language, flag, text in BLOCK.findall(PAGE.read_text()):
    fails = flag.strip() == 'fails'
    named = re.match(r'# [\w./-]+\.\w+\n', text)
    if language == 'diff' or named:
      reader.write(text, language == 'diff')
    elif language == 'python':
      session.append(('python', text))
    elif language == 'sh':
      output, start = '', len(session)
      for line in text.splitlines():
        if line.startswith('surgery ') and 'new-plugin' not in line:
          session.append(('fails' if fails else '', line))
          continue
        code, said = reader.command(line)
        assert bool(code) is fails, (line, said)
        output += said
    elif language == 'text' and len(session) > start:
      expected.append((start, len(session), text))
    elif language == 'text':
      assert [] == missing(text, output), output
    elif language == 'toml':
      project = tmp_path / 'surgery-gain' / 'pyproject.toml'
      assert text in project.read_text()
    else:
      assert 'console' == language, 'the test does not know what to do with it'
  (tmp_path / 'session.py').write_text(SESSION % (session,))
  code, said = reader.python_m('session')
  assert 0 == code, said
  parts = said.split('>>>\n')[1:]
  for start, end, text in expected:
    assert [] == missing(text, ''.join(parts[start:end])), parts[start:end]
  assert (tmp_path / 'small.safetensors').exists()
  assert not (tmp_path / 'never.msgpack').exists()
