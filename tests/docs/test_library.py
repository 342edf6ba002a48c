"""The reference, and what the pages for authors say of the kit, are true."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import surgery
from docs.tools import library
from surgery import testing
from surgery.testing import models
from tests.live import models as nets

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
AUTHORS = (DOCS / 'plugins/README.md').read_text()


def test_the_reference_is_what_docstrings_say():
  assert library.markdown() == (DOCS / 'reference.md').read_text(), 'make docs'


def test_every_error_and_law_is_on_the_page():
  page = library.markdown()
  for name in library.errors():
    assert f'### surgery.{name}' in page
  for law in testing.LAWS:
    assert re.search(rf'^\* `{law}`: \S', page, re.MULTILINE), law


def test_every_public_name_is_on_a_page():
  page = library.markdown() + (DOCS / 'plugins/hooks.md').read_text()
  missing = [
    name
    for name in surgery.__all__
    # Mappings to PEFT have a page of their own.
    if not name.startswith('Peft')
    and not re.search(rf'^### surgery\.{name}\b', page, re.MULTILINE)
  ]
  assert [] == missing


def sizes(text):
  """Returns kinds, and the shapes of their two layers, of a table's rows."""
  found = {}
  for kinds, *layers in re.findall(r'\| (`\w+`.*?) \| (.*?) \| (.*?) \|', text):
    for kind in re.findall(r'`(\w+)`', kinds):
      found[kind] = [tuple(map(int, re.findall(r'\d+', one))) for one in layers]
  return found


@pytest.mark.parametrize('kind', models.KINDS)
@pytest.mark.parametrize('times', [1, 4])
def test_layers_have_the_sizes_that_the_tables_say(kind, times):
  params = models.model(kind, multiple_of=times).params
  names = ('kernel', 'embedding', 'scale')
  shapes = [
    params['net', 'layers', layer, name].value.shape
    for layer in ('query', 'query2')
    for name in names
    if ('net', 'layers', layer, name) in params
  ]
  table = AUTHORS[AUTHORS.index('| kind | first |') :]
  for text in (testing.AdapterConformance.__doc__, table):
    said = sizes(text)[kind]
    if times == 1:
      assert said == shapes
    # The last number on each side of each ×.
    assert all(
      now[-1] == times * one[-1] for now, one in zip(shapes, said, strict=True)
    )


ROWS = [
  (code, verdict)
  for row, verdict in re.findall(
    r'^\| (`.*`) \| (factored|dense) \|$', AUTHORS, re.MULTILINE
  )
  for code in re.findall(r'`(.*?)`', row)
]


@pytest.mark.parametrize(('code', 'verdict'), ROWS)
def test_what_keeps_the_factors_does(code, verdict):
  class Tried(surgery.Adapter):
    name = 'tried'

    def init(self, site, key):
      [rows], [columns] = site.in_shape, site.out_shape
      return {
        'a': jnp.ones((rows, 1)),
        'b': jax.random.normal(key, (1, columns)),
        'row': jnp.ones(rows),
        'column': jnp.ones(columns),
        'mask': jnp.ones((rows, columns)),
      }

    def apply(self, site, name, base, weights):
      w = surgery.LowRank(base, weights['a'], weights['b']).dense()
      known = {'w': w, 'base': base, 'jax': jax, 'jnp': jnp, **weights}
      return eval(code, known)

  model, params, x = nets.mlp()
  params = surgery.attach(params, Tried(), to='**/hidden0')
  found = str(surgery.explain(model, params, x))
  assert re.search(rf'kernel +{verdict}\b', found), found


def test_rows_of_both_kinds_are_tried():
  assert {'factored', 'dense'} == {verdict for _, verdict in ROWS}
  assert len(ROWS) > 20


def test_a_mask_of_booleans_does_not_train():
  class Masked(surgery.Adapter):
    name = 'masked'

    def init(self, site, key):
      return {'mask': jnp.ones(site.out_shape, bool)}

    def apply(self, site, name, base, weights):
      assert weights['mask'].dtype == jnp.bool_
      return base * weights['mask']

  model, params, x = nets.mlp()
  params = surgery.attach(params, Masked(), to='**/hidden0')
  mask = surgery.weights(params)['net', 'mlp', 'hidden0', 'kernel']['mask']
  assert mask.dtype == jnp.bool_
  half, _ = params.split()
  assert not surgery.weights(half)
