"""Layers that a type cannot serve: an error, a warning, or a line of a plan."""

import json
import re
import warnings

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Checkpoint
from surgery.naming import selectors


class Narrow(surgery.Adapter):
  """Serves layers of four outputs at most."""

  name = 'narrow'

  def serves(self, site):
    if site.out_size > 4:
      return f'it has {site.out_size} outputs, at most 4 can be served'
    return super().serves(site)

  def init(self, site, key):
    return {'w': jnp.ones(site.out_shape)}

  def apply(self, site, name, base, weights):
    return base * weights['w']


class Strict(Narrow):
  """Refuses in `init`, by the site's path."""

  name = 'strict'

  def serves(self, site):
    return None

  def init(self, site, key):
    if site.out_size > 4:
      raise surgery.SiteError(f'{"/".join(site.path)}: more than 4 outputs.')
    return super().init(site, key)


HOST = surgery.Host(plugins=[Narrow, Strict])


def params(locked=True):
  found = bx.Params()
  for name, shape in {
    'h0/kernel': (3, 4),
    'h0/bias': (4,),
    'h1/kernel': (4, 4),
    'out/kernel': (4, 7),
    'out/bias': (7,),
    'norm/scale': (4,),
    'enc/pos': (5,),
    'enc/h2/kernel': (4, 4),
    'enc/wide/kernel': (4, 9),
    'dec/wide/kernel': (4, 9),
  }.items():
    found[('net', *name.split('/'))] = bx.Param(jnp.ones(shape))
  return found.locked() if locked else found


def saved(tmp_path):
  file = tmp_path / 'm.msgpack'
  surgery.save(file, params())
  return file


def attached(to, model=None, adapter=None):
  model = params() if model is None else model
  return surgery.attach(model, adapter or Narrow(), to=to, host=HOST)


def sites(model):
  [info] = surgery.adapters(model, host=HOST)
  return {'/'.join(path[1:-1]) for path in info.sites}


WIDE = r'kernel: it has 7 outputs, at most 4 can be served'
NAMED = {
  '**/{h0,out}': f"its alternative 'out': .* net/out/{WIDE}",
  'net/{h0,out}': "its alternative 'out'",
  '{net/h0,net/out}': "its alternative 'net/out'",
  '**/{h*,out}': "its alternative 'out'",
  'net/{h,o}*': "its alternative 'o'",
  're:net/(h0|out)': "its alternative 'out'",
  '**/{h0,norm}': "its alternative 'norm': .* default site",
  'net/{h0,dec}': "its alternative 'dec'",
}


@pytest.mark.parametrize('to', NAMED)
@pytest.mark.parametrize('kind', ['params', 'file'])
def test_a_layer_that_is_named_is_not_skipped(to, kind, tmp_path):
  model = params() if kind == 'params' else surgery.open(saved(tmp_path))
  with pytest.raises(surgery.SurgeryError, match=NAMED[to]):
    attached(to, model)


@pytest.mark.parametrize('to', ['**/x', '**/{x,h0}', ['**/x', 'net/h0']])
def test_each_layer_of_a_name_is_served(to):
  model = params(locked=False)
  for name, outputs in (('a', 4), ('b', 9)):
    value = jnp.ones((4, outputs))
    model['net', name, 'x', 'kernel'] = bx.Param(value)
  with pytest.raises(
    surgery.SiteError,
    match=r"net/b/x: selector '.*' names this layer, .* cannot serve it: "
    r'kernel: it has 9 outputs, at most 4 .*Leave it out .* .!net/b/x',
  ):
    attached(to, model.locked())
  some = [to] if isinstance(to, str) else to
  assert 'a/x' in sites(attached([*some, '!net/b/x'], model.locked()))


def test_a_list_and_braces_mean_the_same():
  for to in ('**/{h0,out}', ['**/h0', '**/out']):
    with pytest.raises(surgery.SiteError, match='net/out'):
      attached(to)
  assert {'h0', 'h1'} == sites(attached('**/{h0,h1}'))


@pytest.mark.parametrize(
  ('to', 'served', 'left'),
  [
    ('**/*h*', {'h0', 'h1', 'enc/h2'}, []),
    ('net/[ho]*', {'h0', 'h1'}, ['net/out']),
    ('net/{h,[ho]}*', {'h0', 'h1'}, ['net/out']),
    ('re:net/[ho].*', {'h0', 'h1'}, ['net/out']),
    ('**/[hn]*', {'h0', 'h1', 'enc/h2'}, ['net/norm']),
  ],
)
def test_a_layer_that_a_pattern_names_in_part_is_warned_of(to, served, left):
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    model = attached(to)
  assert served == sites(model)
  said = [str(w.message) for w in caught]
  assert bool(left) == bool(said)
  for path in left:
    assert re.search(
      rf"'narrow' cannot serve 1 of the layers .*: {path} \(.*\)\. If this is",
      said[0],
    )
    assert surgery.SiteWarning is caught[0].category


@pytest.mark.parametrize('to', ['**', 'net/*', 'net/**', 'all'])
def test_wildcards_alone_mean_what_can_be_served(to):
  assert {'h0', 'h1'} <= sites(attached(to))  # Warnings are errors here.


def test_what_lies_in_a_named_layer_need_not_be_served():
  # Its position and its wide layer are not what was named.
  assert {'enc/h2'} == sites(attached('net/enc'))
  assert {'enc/h2', 'h0'} == sites(attached('net/{enc,h0}'))


def test_a_type_of_layer_counts_as_a_part_of_a_name():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layers = [bx.Linear(graph.child(f'l{n}'), n, rng) for n in (3, 9)]
  made = rng.seed(bx.Params(), seed=0)
  for one in layers:
    _, made = one(made, jnp.ones((1, 2)))
  with pytest.warns(surgery.SiteWarning, match=r'net/l9 \(kernel: it has 9'):
    model = surgery.attach(
      made.locked(), Narrow(), to='type:Linear', graph=graph, host=HOST
    )
  assert {'l3'} == sites(model)


def test_before_initialisation_a_named_layer_is_not_skipped_either():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layers = [bx.Linear(graph.child(f'l{n}'), n, rng) for n in (3, 9)]

  def init(to):
    made = surgery.attach(
      rng.seed(bx.Params(), seed=0), Narrow(), to=to, host=HOST
    )
    for one in layers:
      _, made = one(made, jnp.ones((1, 2)))
    return made.locked()

  with pytest.raises(surgery.SurgeryError, match="its alternative 'l9'"):
    init('**/{l3,l9}')
  model = bx.Graph('net')
  rng = bx.Rng(model.child('rng'))
  layers = [
    bx.Linear(model.child(part).child('x'), n, rng)
    for part, n in (('a', 3), ('b', 9))
  ]
  with pytest.raises(surgery.SiteError, match='net/b/x: .* names this layer'):
    init('**/x')
  with pytest.warns(surgery.SiteWarning, match='net/b/x'):
    init('**/x*')
  assert {'a/x'} == sites(init('**'))


def test_a_refusal_of_init_is_an_error_whatever_was_written():
  for to in ('**', '**/{h0,out}', 'all'):
    with pytest.raises(surgery.SiteError, match='net/.*: more than 4 outputs'):
      attached(to, adapter=Strict())


def test_a_plan_says_what_is_left_out_and_why(tmp_path):
  after = attached('**', surgery.open(saved(tmp_path)))
  assert isinstance(after, Checkpoint)
  assert {
    'net/out': 'kernel: it has 7 outputs, at most 4 can be served',
    'net/norm': "it has no 'kernel', which the type rewrites, only scale",
    'net/enc/wide': 'kernel: it has 9 outputs, at most 4 can be served',
    'net/dec/wide': 'kernel: it has 9 outputs, at most 4 can be served',
  }.items() <= {'/'.join(o.path): o.reason for o in after.left_out}.items()
  assert not any(one.named for one in after.left_out)


def test_the_shell_says_it_on_stderr_and_in_the_plan(tmp_path, surgery_cli):
  file, out = saved(tmp_path), tmp_path / 'o.msgpack'
  arguments = ['attach', file, '--adapter', 'lora', '--set', 'rank=1']
  with pytest.warns(surgery.SiteWarning, match=r'net/norm \(it has no .kernel'):
    done = surgery_cli(
      *arguments, '--to', 'net/[hn]*', '-o', out, '--dry-run', '--json'
    )
  [left] = json.loads(done.out)['left_out']
  assert ('net/norm', 'default') == (left['path'], left['adapter'])
  assert left['why'].startswith("it has no 'kernel'")
  done = surgery_cli(*arguments, '--to', '**', '-o', out, '--dry-run')
  assert "left out  net/norm  it has no 'kernel', which" in done.out
  done = surgery_cli(*arguments, '--to', '**/{h0,norm}', '-o', out)
  assert 3 == done.code and not out.exists()
  assert (
    "error: attach: selector '**/{h0,norm}': its alternative 'norm'" in done.err
  )


@pytest.mark.parametrize(
  ('text', 'path', 'how'),
  [
    ('**/a', 'x/a', 'name'),
    ('**/a', 'x/a/b', ''),
    ('**/{a,b*}', 'x/b1', 'part'),
    ('**/{a,b*}', 'a', 'name'),
    ('**/{a*,ab}', 'ab', 'name'),
    ('**', 'a/b', 'any'),
    ('a/?', 'a/b', 'any'),
    ('a/[bc]', 'a/b', 'part'),
    (r'a/\*', 'a/*', 'name'),
    ('{a,b}/**', 'a/c', 'any'),
    ('re:a/.', 'a/c', 'part'),
    ('all', 'a', 'any'),
    ('type:Linear', 'a', ''),
  ],
)
def test_how_a_selector_names_a_layer(text, path, how):
  [item] = selectors.parse(text).items
  assert how == selectors.naming(item, tuple(path.split('/')))


def test_a_selection_says_what_is_left_out():
  model = params()
  chosen = surgery.select(model, '**')
  with pytest.warns(surgery.SiteWarning, match='cannot serve 3 of the layers'):
    adapted = attached(chosen)
  assert {'h0', 'h1', 'enc/h2'} == sites(adapted)
  np.testing.assert_array_equal(
    model['net', 'out', 'kernel'].value, adapted['net', 'out', 'kernel'].value
  )


def refusing(how):
  """Returns a type that serves up to four outputs and refuses in some way."""

  class Refusing(Narrow):
    name = 'refusing'

    def serves(self, site):
      return how(site) if site.out_size > 4 else None

  return Refusing, surgery.Host(plugins=[Refusing], entry_points=False)


def raised(error):
  def how(site):
    raise error(site) if callable(error) else error

  return how


def initialised(adapter, host, to):
  """Attaches before initialisation to layers of 3 and 9 outputs."""
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layers = [bx.Linear(graph.child(f'l{n}'), n, rng) for n in (3, 9)]
  made = rng.seed(bx.Params(), seed=0)
  made = surgery.attach(made, adapter, to=to, host=host)
  for one in layers:
    _, made = one(made, jnp.ones((1, 2)))
  return made.locked()


EARLY = "adapter 'default' was attached before initialisation: "


@pytest.mark.parametrize(
  'how',
  [
    lambda site: 'it is too wide.',
    raised(surgery.SiteError('it is too wide')),
    raised(
      lambda site: surgery.SiteError(f'{"/".join(site.path)}: it is too wide.')
    ),
  ],
)
def test_a_reason_is_told_however_it_is_given_and_whenever(how):
  cls, host = refusing(how)
  with pytest.raises(surgery.SiteError) as caught:
    attached('net/out', adapter=cls())
  assert 'net/out/kernel: it is too wide.' in str(caught.value)
  with pytest.warns(
    surgery.SiteWarning, match=r'net/out \(kernel: it is too w'
  ):
    assert {'h0', 'h1'} == sites(attached('net/[ho]*', adapter=cls()))
  for to in ('net/l9', '**/{l3,l9}', '**/l9/kernel', ['**/l3', '**/l9']):
    with pytest.raises(surgery.SiteError) as caught:
      initialised(cls(), host, to)
    assert EARLY in str(caught.value)
    assert 'net/l9/kernel' in str(caught.value)
    assert 1 == str(caught.value).count('it is too wide.')
  with pytest.warns(
    surgery.SiteWarning, match=r'net/l9 \(kernel: it is too wi'
  ):
    assert {'l3'} == sites(initialised(cls(), host, 'net/l*'))


@pytest.mark.parametrize(
  ('how', 'message'),
  [
    (raised(RuntimeError('oh')), 'serves failed: RuntimeError: oh'),
    (raised(ValueError('oh')), 'serves failed: ValueError: oh'),
    (raised(SystemExit(0)), 'serves failed: SystemExit: 0'),
    (lambda site: '', "serves returned '', expected None"),
    (lambda site: False, 'serves returned False, expected None'),
  ],
)
def test_what_serves_does_wrong_is_said_with_type_and_site(how, message):
  cls, host = refusing(how)
  said = f"adapter type 'refusing': {message}"
  with pytest.raises(surgery.PluginError) as caught:
    surgery.attach(params(), cls(), to='net/[ho]*', host=host)
  assert f'attach: net/out/kernel: {said}' in str(caught.value)
  with pytest.raises(surgery.PluginError) as caught:
    initialised(cls(), host, 'net/*')
  assert f'{EARLY}net/l9/kernel: {said}' in str(caught.value)


def test_another_error_of_serves_keeps_its_class_and_gets_the_path():
  cls, host = refusing(raised(lambda _: surgery.ConfigError('a rank above 4')))
  with pytest.raises(
    surgery.ConfigError, match='net/out/kernel: a rank above 4'
  ):
    surgery.attach(params(), cls(), to='**', host=host)
  with pytest.raises(surgery.ConfigError, match='net/l9/kernel: a rank above'):
    initialised(cls(), host, '**')


def test_before_initialisation_what_is_left_out_by_hand_is_no_error():
  adapter = Narrow()
  for to in (['net/*', '!net/l9'], ['net/*', '!net/rng'], '**/l3'):
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', surgery.SiteWarning)
      assert {'l3'} == sites(initialised(adapter, HOST, to))
  with pytest.raises(surgery.SelectorError, match=f"{EARLY}selector '!net/l8'"):
    initialised(adapter, HOST, ['net/*', '!net/l8'])
  with pytest.raises(
    surgery.SelectorError, match=f"{EARLY}selector '\\*\\*/b'"
  ):
    initialised(adapter, HOST, ['net/*', '**/b'])


class NoConvolutions(Narrow):
  """As the page for authors tells a convolution, with and without types."""

  name = 'no_convolutions'

  def serves(self, site):
    if 'Conv' in site.types or (not site.types and len(site.in_shape) > 1):
      return 'it is a convolution'
    return None


def test_a_convolution_is_told_by_its_type_or_its_axes(tmp_path):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  conv = bx.Conv(graph.child('conv'), (3,), 4, rng)
  line = bx.Linear(graph.child('line'), 4, rng)
  made = rng.seed(bx.Params(), seed=0)
  made = conv(made, jnp.ones((1, 5, 2)))[1]
  model = line(made, jnp.ones((1, 2)))[1].locked()
  host = surgery.Host(plugins=[NoConvolutions], entry_points=False)
  file = tmp_path / 'm.msgpack'
  surgery.save(file, model, graph=graph)
  for given, known in (
    (model, {}),
    (model, {'graph': graph}),
    (surgery.load(file), {}),
    (surgery.open(file), {}),
  ):
    options = {'to': 'net/conv', 'host': host, **known}
    with pytest.raises(surgery.SiteError, match='conv/kernel: it is a conv'):
      surgery.attach(given, NoConvolutions(), **options)
    surgery.attach(given, NoConvolutions(), **{**options, 'to': 'net/line'})
