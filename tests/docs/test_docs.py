"""Examples in docs/ run."""

import pathlib
import re
import shlex
import sys
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import surgery
from surgery import testing
from surgery.cli import main

# A model of the user's, for `surgery explain`.
MODEL = """
import blox as bx, jax.numpy as jnp

def example():
  graph = bx.Graph('net').child('h0').child('query')
  return bx.Linear(graph, 3, None), jnp.ones((2, 4))
"""
DOCS = pathlib.Path(__file__).parents[2] / 'docs'


def lines(page, language):
  text = (DOCS / page).read_text()
  blocks = re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)
  return [line for block in blocks for line in block.strip().splitlines()]


@pytest.fixture
def files(tmp_path, monkeypatch):
  """A folder with a base model, an adapter of it, and a file from flax."""
  monkeypatch.chdir(tmp_path)
  params = bx.Params()
  for block in ('h0', 'h1'):
    for name in ('query', 'value'):
      params['net', block, name, 'kernel'] = bx.Param(jnp.ones((4, 3)) / 3)
      params['net', block, name, 'bias'] = bx.Param(jnp.zeros(3))
    params['net', block, 'norm', 'scale'] = bx.Param(jnp.ones(4))
  params['net', 'head', 'kernel'] = bx.Param(jnp.ones((4, 2)))
  params = params.locked()
  surgery.save('base.msgpack', params)
  surgery.save('tuned.msgpack', jax.tree.map(lambda x: 2 * x, params))
  adapted = surgery.attach(params, surgery.LoRA(rank=1), to='**/query')
  surgery.save_adapter('adapter.msgpack', adapted)
  pathlib.Path('flax.msgpack').write_bytes(
    serialization.to_bytes({'layer': {'kernel': np.ones((2, 2))}})
  )
  pathlib.Path('recipe.yaml').write_text("- drop: '**/norm'")
  pathlib.Path('my_model.py').write_text(MODEL)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  return tmp_path


def test_the_shell_examples_run(files, capfd):
  for line in lines('cli.md', 'sh'):
    # LoRA's B is zero at first, so nothing would differ.
    command, _, comment = line.partition('    #')
    arguments = shlex.split(command)
    assert 'surgery' == arguments[0]
    code = 1 if 'exits with 1' in comment else 0
    assert code == main.run(arguments[1:]), (line, capfd.readouterr().err)
    if arguments[1] == 'attach' and 'adapted.msgpack' in arguments:
      trained(files / 'adapted.msgpack')
  written = {path.stem for path in files.glob('*.msgpack')}
  assert {'adapted', 'merged', 'again', 'direct'} <= written
  assert 'other' not in written


def trained(path):
  """Gives B of an adapter another value than zero."""
  opened = surgery.open(path)
  leaves = {
    name: leaf.replace(load=lambda leaf=leaf: np.ones(leaf.shape, leaf.dtype))
    if name[-1] == 'lora_b'
    else leaf
    for name, leaf in opened.items()
  }
  opened.replace(leaves=leaves).write(path, overwrite=True)


def test_every_verb_is_documented_by_an_example():
  text = (DOCS / 'cli.md').read_text()
  verbs = {shlex.split(line)[1] for line in lines('cli.md', 'sh')}
  for verb in main.VERBS:
    assert f'`{verb}' in text
  assert main.VERBS.keys() - {'demo'} == verbs


def test_every_hook_is_documented():
  from surgery.contract import hookspecs

  text = (DOCS / 'plugins/README.md').read_text()
  for name in vars(hookspecs):
    if name.startswith('surgery_'):
      assert name in text


def test_the_reference_of_hooks_is_what_they_say():
  from docs.tools import hooks

  page = (DOCS / 'plugins/hooks.md').read_text()
  assert hooks.markdown() == page, 'make docs'


def test_links_between_pages_lead_somewhere():
  root = DOCS.parent
  for page in [root / 'README.md', *DOCS.rglob('*.md')]:
    for link in re.findall(r'\]\(([^)#]+)', page.read_text()):
      if not link.startswith('http'):
        assert (page.parent / link).exists(), (page.name, link)


def test_the_examples_of_passes_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec('\n'.join(lines('passes.md', 'python')), {})
  assert {'base', 'small'} == {path.stem for path in tmp_path.iterdir()}


def test_the_examples_of_formats_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec('\n'.join(lines('formats.md', 'python')), {})
  assert (tmp_path / 'large.msgpack.index.json').exists()


def test_every_format_is_documented():
  text = (DOCS / 'formats.md').read_text()
  for name, form in surgery.default_host().formats.items():
    assert re.search(rf'^## .*{name}', text, re.MULTILINE), name
    assert all(f'`{suffix}`' in text for suffix in form.suffixes)


def test_every_pass_is_documented():
  from docs.tools import steps

  # Without plugins that happen to be installed.
  page = (DOCS / 'steps.md').read_text()
  assert steps.markdown(surgery.default_host()) == page, 'make docs'
  for name in surgery.default_host().passes:
    assert re.search(rf'^## {name}$', page, re.MULTILINE), name


def test_the_tutorial_of_recipes_runs(tmp_path, monkeypatch, capfd):
  monkeypatch.chdir(tmp_path)
  recipe = next(
    b
    for b in re.findall(
      r'```yaml\n(.*?)```', (DOCS / 'recipes.md').read_text(), re.DOTALL
    )
    if 'export.yaml' in b
  )
  pathlib.Path('export.yaml').write_text(recipe)
  for line in lines('recipes.md', 'sh'):
    arguments = shlex.split(line)
    assert 0 == main.run(arguments[1:]), (line, capfd.readouterr().err)
  small = surgery.open('export.safetensors')
  assert 'bfloat16' == small['layers', '0', 'kernel'].dtype
  assert 6 == len(small)
  exec('\n'.join(lines('recipes.md', 'python')), {})


def test_the_recipes_of_the_page_can_be_read():
  text = (DOCS / 'recipes.md').read_text()
  for written in re.findall(r'```yaml\n(.*?)```', text, re.DOTALL):
    recipe = surgery.Recipe.loads(written)
    host = surgery.default_host()
    from surgery.recipes import definitions

    for step in recipe.steps:
      definitions.find(step.name, host).read(step.value)


def test_the_adapter_of_the_plugin_page_works():
  text = (DOCS / 'plugins/README.md').read_text()
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


def test_the_type_with_dropout_of_the_plugin_page_drops_anew_at_each_call():
  from tests.live.models import mlp, stirred

  text = (DOCS / 'plugins/README.md').read_text()
  [code] = re.findall(r'```py\n(class Dropped.*?)```', text, re.DOTALL)
  namespace = {'surgery': surgery, 'jax': jax, 'jnp': jnp}
  exec(code, namespace)
  dropped: Any = namespace['Dropped']
  testing.check(
    dropped(rate=0.5),
    kinds=['linear'],
    dtypes=['float32'],
    too_large={},
  )
  model, base, x = mlp()
  host = surgery.Host(plugins=[dropped], entry_points=False)
  adapter = dropped(rate=0.5)
  params = surgery.attach(base, adapter, to='**/hidden*', host=host)
  fast = surgery.factored(model)
  one, after = fast(stirred(params), x)
  two, _ = fast(after, x)
  assert not jnp.array_equal(one, two)
  assert jnp.array_equal(
    fast(after, x, is_training=False)[0], model(after, x)[0]
  )


def test_the_page_on_factored_names_every_rule_and_its_examples_run():
  from surgery.factoring import rules
  from tests.live.models import mlp, stirred

  text = (DOCS / 'factored.md').read_text()
  table = text[text.index('| primitive |') : text.index('Whatever is not')]
  named = {
    name
    for line in table.splitlines()
    for name in re.findall(r'`(\w+)`', line.removeprefix('|').split('|')[0])
  }
  assert rules.RULES.keys() == named
  model, base, x = mlp()
  attach = lambda seed: stirred(
    surgery.attach(base, surgery.LoRA(rank=2), to='**/hidden*'), seed=seed
  )
  names = {
    **{'surgery': surgery, 'jax': jax, 'jnp': jnp, 'model': model},
    **{'base': base, 'x': x, 'params': attach(0)},
    **{n: attach(i) for i, n in enumerate(('alice', 'bob', 'carol'))},
  }
  code = '\n'.join(lines('factored.md', 'python'))
  exec(code, names)  # The page's own code.
  assert (7, 3) == names['y'].shape
  counts = names['rest']['net', 'mlp', 'hidden0', 'lora_dropout'].value
  assert 2 == int(counts[2])  # A call each, from which keys derive.


def test_each_guarantee_names_a_test_that_exists():
  root = DOCS.parent
  rows = [
    line
    for line in (DOCS / 'guarantees.md').read_text().splitlines()
    if line.startswith('| ') and not line.startswith(('| promise', '| ---'))
  ]
  assert rows
  for row in rows:
    cell = row.split('|')[-2]
    named = re.findall(r'`([\w./-]+\.py)((?:::\w+)*)`', cell)
    assert named, row
    for file, names in named:
      source = (root / file).read_text()
      for name in filter(None, names.split('::')):
        assert re.search(rf'^ *(?:def|class) {name}\b', source, re.M), row


def test_the_page_on_adapters_sets_weights_by_site():
  from tests.live.models import mlp, stirred

  text = (DOCS / 'adapters.md').read_text()
  section = text[text.index('## Weights by site') : text.index('## LoRA by')]
  [code] = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
  params = surgery.attach(mlp()[1], surgery.LoRA(rank=2), to='**/hidden*')
  params = jax.tree.map(lambda w: w, stirred(params))
  names: dict[str, Any] = {
    'surgery': surgery, 'jax': jax, 'jnp': jnp, 'params': params
  }  # fmt: skip
  exec(code, names)
  for path, site in surgery.weights(params).items():
    for name, weight in site.items():
      found = surgery.weights(names['params'])[path][name]
      np.testing.assert_array_equal(np.clip(weight, -1, 1), found)


def test_the_page_on_adapters_trains_what_trains_alone():
  import optax

  from tests.live.models import bits, mlp, stirred

  text = (DOCS / 'adapters.md').read_text()
  section = text[text.index('## Training') : text.index('## What is refused')]
  first, second = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
  model, base, x = mlp()
  adapted = stirred(surgery.attach(base, surgery.LoRA(rank=2), to='**/hidden*'))
  names: dict[str, Any] = {
    **{'surgery': surgery, 'jax': jax, 'optax': optax},
    'loss': lambda params: (model(params, x)[0] ** 2).sum(),
  }
  # Where there is an Rng, params are differentiated by halves.
  names['params'] = adapted.split(lambda path, _: 'rng' not in path)[0]
  exec(first, names)
  once = names['params']
  names['params'] = once.merge(adapted.split(lambda path, _: 'rng' in path)[0])
  exec(second, names)
  for path, param in once.items():
    before, after = adapted[path].value, names['params'][path].value
    moved = {bits(v) for v in (before, param.value, after)}
    assert (3 if param.trainable else 1) == len(moved), path


def test_the_mapping_of_the_page_on_peft_reads_and_writes(tmp_path):
  [code] = [
    one
    for one in re.findall(
      r'```python\n(.*?)```', (DOCS / 'peft.md').read_text(), re.DOTALL
    )
    if 'class' in one
  ]
  scope: dict[str, Any] = {}
  exec(code, scope)
  host = surgery.Host(plugins=[scope['Scale']])
  params = bx.Params()
  params['net', 'kernel'] = bx.Param(jnp.ones((4, 3)))
  params = params.locked()
  adapted = surgery.attach(params, scope['Scale'](), to='net', host=host)
  adapted = surgery.with_weights(
    adapted, 'default', {('net', 'kernel'): {'scale': jnp.arange(3.0)}}
  )
  folder = tmp_path / 'folder'
  surgery.save_adapter(folder, adapted, format='peft', host=host)
  again = surgery.load_adapter(folder, params, host=host)
  found = surgery.merge(again)['net', 'kernel'].value
  np.testing.assert_array_equal(found, jnp.ones((4, 3)) * jnp.arange(3.0))
