"""A writer of a model folder that is killed leaves nothing that looks whole."""

import os
import signal
import subprocess
import sys

import surgery
from tests.interop.test_folders import ALONG, names

# Counts calls of what puts files on the disk, and dies at one of them. The
# process forks, so that the library is imported once.
PROGRAM = """
import os, pathlib, shutil, signal, sys
from surgery.cli import main
from surgery.files import atomic, atomic_folders, payload, sharding, system

source, folder = sys.argv[1:]
count, at = 0, 0
def counted(run):
  def call(*given, **options):
    global count
    count += 1
    if count == at:
      os.kill(os.getpid(), signal.SIGKILL)
    return run(*given, **options)
  return call
for where, name in (
  (os, 'fsync'), (os, 'link'), (os, 'mkdir'), (os, 'rename'), (os, 'replace'),
  (os, 'rmdir'), (os, 'unlink'), (os, 'write'), (os, 'writev'),
  (shutil, 'copyfileobj'), (shutil, 'rmtree'),
):
  setattr(where, name, counted(getattr(where, name)))

def write(name):
  pid = os.fork()
  if pid:
    return os.waitpid(pid, 0)[1]
  steps = ('cast', source, '--to', 'bf16', '-q', '-o', f'{folder}/{name}/')
  sys.argv = ['surgery', *steps]
  try:
    main.main()
  except SystemExit as done:
    os._exit(done.code or 0)
  os._exit(0)

for at in range(1, 1000):
  status = write('out')
  there = os.path.exists(f'{folder}/out')
  killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
  print(at, int(killed), int(there), os.waitstatus_to_exitcode(status), flush=True)
  if there:
    break
"""


def test_a_killed_writer_leaves_a_whole_folder_or_none(hf, tmp_path):
  source = hf('llama')
  out = tmp_path / 'there'
  out.mkdir()
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(source), str(out)],
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  assert 0 == done.returncode, done.stderr
  runs = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
  # Each of its steps was one at which it was killed, up to its last ones.
  assert len(runs) > 10
  assert all(killed for _, killed, _, _ in runs[:-1]), runs
  _, killed, there, code = runs[-1]
  assert there and code in (0, -signal.SIGKILL)
  expected = sorted([*ALONG, 'config.json', 'model.safetensors'])
  assert expected == names(out / 'out')
  assert surgery.open(out / 'out')
  # The next writer removes what those before it had left.
  again = subprocess.run(
    [sys.executable, '-m', 'surgery', 'cast', source, '--to', 'f16']
    + ['-o', f'{out / "out2"}/'],
    capture_output=True,
    text=True,
  )
  assert 0 == again.returncode, again.stderr
  assert expected == names(out / 'out2')
  assert not list(out.glob('.out2*'))
