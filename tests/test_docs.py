"""Examples in docs/ run."""

import pathlib
import re
import shlex

import blox as bx
import jax.numpy as jnp
import pytest

import surgery
from surgery.cli import main

DOCS = pathlib.Path(__file__).parents[1] / 'docs'


def lines(page, language):
  text = (DOCS / page).read_text()
  blocks = re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)
  return [line for block in blocks for line in block.strip().splitlines()]


@pytest.fixture
def files(tmp_path, monkeypatch):
  """A folder with a base model and an adapter of it."""
  monkeypatch.chdir(tmp_path)
  params = bx.Params()
  for name in ('query', 'value'):
    params[('net', 'attention', name, 'kernel')] = bx.Param(jnp.ones((4, 3)))
  params = params.locked()
  surgery.save('base.msgpack', params)
  adapted = surgery.attach(params, surgery.LoRA(rank=1), to='**')
  surgery.save_adapter('adapter.msgpack', adapted)
  return tmp_path


def test_the_shell_examples_run(files, capfd):
  for line in lines('cli.md', 'sh'):
    arguments = shlex.split(line)
    assert 'surgery' == arguments[0]
    assert 0 == main.run(arguments[1:]), (line, capfd.readouterr().err)
  written = {path.stem for path in files.glob('*.msgpack')}
  assert {'adapted', 'merged', 'again', 'direct'} <= written
  assert 'other' not in written


def test_every_verb_is_documented():
  text = (DOCS / 'cli.md').read_text()
  for verb in main.VERBS:
    assert f'`{verb}' in text


def test_every_hook_is_documented():
  from surgery.core import hookspecs

  text = (DOCS / 'plugins.md').read_text()
  for name in vars(hookspecs):
    if name.startswith('surgery_'):
      assert name in text


def test_links_between_pages_lead_somewhere():
  root = DOCS.parent
  for page in [root / 'README.md', *DOCS.glob('*.md')]:
    for link in re.findall(r'\]\(([^)#]+)', page.read_text()):
      if not link.startswith('http'):
        assert (page.parent / link).exists(), (page.name, link)


def test_the_examples_of_passes_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec('\n'.join(lines('passes.md', 'python')), {})
  assert {'base', 'small'} == {path.stem for path in tmp_path.iterdir()}


def test_every_pass_is_documented():
  text = (DOCS / 'passes.md').read_text()
  for name in surgery.default_host().passes:
    assert re.search(rf'^## .*\b{name}\b', text, re.MULTILINE), name


def test_the_adapter_of_the_plugin_page_works():
  text = (DOCS / 'plugins.md').read_text()
  [code] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  namespace: dict[str, object] = {}
  exec(code, namespace)
  scale = namespace['Scale']
  host = surgery.Host(plugins=[scale], entry_points=False)
  params = bx.Params()
  params[('net', 'a', 'kernel')] = bx.Param(jnp.ones((2, 3)))
  params = surgery.attach(
    params.locked(),
    scale(start=2.0),
    to='**',
    host=host,  # type: ignore
  )
  merged = surgery.merge(params, host=host)
  assert jnp.all(merged[('net', 'a', 'kernel')].value == 2)
