"""Distributions that are installed for a test."""

import importlib
import sys
import textwrap

import pytest


@pytest.fixture
def installed(tmp_path_factory, monkeypatch):
  """Returns a function that puts a distribution on the path.

  A module that is imported writes a file beside it, `NAME.imported`.
  """
  folder = tmp_path_factory.mktemp('site')
  monkeypatch.syspath_prepend(folder)

  def install(
    name, module, source, *, adapters='', plugins='', version='1.0', needs=''
  ):
    file = folder / f'{module}.py'
    marked = file.with_suffix('.imported')
    # On the first line, so that lines have their numbers.
    mark = f'open({str(marked)!r}, "w").close(); '
    file.write_text(mark + textwrap.dedent(source).lstrip())
    info = folder / f'{name}-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(
      f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
      + (f'Requires-Dist: {needs}\n' if needs else '')
    )
    points = ''
    if adapters:
      points += f'[surgery.adapters]\n{adapters}\n'
    if plugins:
      points += f'[surgery.plugins]\n{plugins}\n'
    (info / 'entry_points.txt').write_text(points)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, module, raising=False)
    return marked

  return install
