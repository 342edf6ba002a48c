"""Who imports what: start-up stays fast, and rooms stay rooms."""

import ast
import pathlib
import subprocess
import sys
import tomllib

import pytest

import surgery

ROOT = pathlib.Path(__file__).parents[1]


def loaded_after(code, *modules):
  """Returns which of some modules a fresh interpreter has imported."""
  program = (
    f'{code}\nimport sys\nprint([m for m in {modules!r} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  return ast.literal_eval(done.stdout.splitlines()[-1])


def test_import_surgery_imports_neither_jax_nor_numpy():
  assert [] == loaded_after('import surgery', 'jax', 'numpy', 'blox', 'flax')


def test_the_lower_rooms_import_neither_jax_nor_numpy():
  modules = [
    f'import surgery.{room}.{path.stem}'
    for room in ('naming', 'contract', 'host', 'model')
    for path in (ROOT / 'surgery' / room).glob('*.py')
  ]
  assert len(modules) > 10
  assert [] == loaded_after('\n'.join(modules), 'jax', 'numpy', 'blox')


def test_opening_a_file_imports_no_jax(tmp_path):
  msgpack = pytest.importorskip('flax.serialization')
  file = tmp_path / 'm.msgpack'
  file.write_bytes(msgpack.to_bytes({'net': {'a': 3}}))
  code = f'import surgery\nassert 1 == len(surgery.open({str(file)!r}))'
  assert [] == loaded_after(code, 'jax', 'blox', 'flax')


def test_selecting_in_a_file_imports_no_jax(tmp_path):
  msgpack = pytest.importorskip('flax.serialization')
  file = tmp_path / 'm.msgpack'
  file.write_bytes(msgpack.to_bytes({'net': {'a': 3}}))
  code = (
    'import surgery\n'
    f'assert 1 == len(surgery.select(surgery.open({str(file)!r}), "net"))'
  )
  assert [] == loaded_after(code, 'jax', 'blox', 'flax')


@pytest.mark.parametrize('name', surgery.__all__)
def test_every_public_name_is_there_and_documented(name):
  assert (getattr(surgery, name).__doc__ or '').strip()


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'atach'"):
    surgery.atach


@pytest.mark.parametrize(
  'path',
  sorted((ROOT / 'plugins').rglob('*.py')),
  ids=lambda path: str(path.relative_to(ROOT)),
)
def test_plugins_use_only_public_names(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for name in node.names:
        assert not name.name.startswith('surgery.'), name.name
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == 'surgery':
        names = {a.name for a in node.names}
        assert names <= {*surgery.__all__, 'formats', 'testing'}
      public = node.module in ('surgery.formats', 'surgery.testing')
      assert public or not node.module.startswith('surgery.'), node.module
    if (
      isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id == 'surgery'
    ):
      assert node.attr in surgery.__all__, node.attr


def test_types_are_checked_where_no_plugin_is_installed():
  """`make lint` comes first on a clean clone: mypy has to skip the plugins."""
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))
  skipped = {
    module
    for override in settings['tool']['mypy']['overrides']
    if override.get('follow_imports') == 'skip'
    for module in override['module']
  }
  plugins = {
    f'{path.parent.name}.*'
    for path in (ROOT / 'plugins').glob('surgery-*/surgery_*/__init__.py')
  }
  assert len(plugins) >= 5
  assert plugins <= skipped
