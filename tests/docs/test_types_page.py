"""The page of adapter types has all that are here."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[2]


def test_all_types_are_on_the_page():
  page = (ROOT / 'docs' / 'plugins' / 'types.md').read_text()
  projects = [ROOT / 'pyproject.toml', *ROOT.glob('plugins/*/pyproject.toml')]
  for file in projects:
    project = tomllib.loads(file.read_text())['project']
    for name in project['entry-points'].get('surgery.adapters', ()):
      origin = project['name'].replace('blox-surgery', 'built in')
      assert re.search(rf'^\| `{name}` \| {origin} \|', page, re.MULTILINE), (
        name
      )
