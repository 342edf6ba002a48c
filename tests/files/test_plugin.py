import subprocess
import sys

from surgery.files import plugin
from surgery.host.manager import Host


def modules(code):
  """The modules that are loaded after some code, in a new interpreter."""
  code += '\nimport sys; print(*sys.modules)'
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return set(run.stdout.split())


def test_a_host_finds_the_format_by_suffix():
  host = Host([plugin], entry_points=False)
  assert isinstance(host.format_of('m.msgpack'), plugin.Msgpack)


def test_asking_for_formats_imports_no_arrays():
  loaded = modules('from surgery.files import plugin; plugin.surgery_formats()')
  assert set() == loaded & {'numpy', 'msgpack', 'xxhash', 'jax', 'flax'}


def test_reading_and_writing_import_no_jax():
  loaded = modules('import surgery.files.msgpack')
  assert 'numpy' in loaded
  assert set() == loaded & {'jax', 'jaxlib', 'flax', 'blox'}
