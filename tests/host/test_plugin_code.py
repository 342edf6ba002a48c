"""What plugins raise, return and print, wherever their code runs."""

import functools
import json
import re
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Check, Checkpoint, Leaf
from surgery.recipes import performing
from surgery.recipes.recipe import Recipe


def model(**options):
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(graph.child('layer'), 3, rng)
  x = jnp.linspace(-1, 1, 8).reshape(2, 4)
  params = layer(rng.seed(bx.Params(), seed=0), x)[1].locked()
  return surgery.attach(params, surgery.LoRA(rank=2), to='**', **options)


PARAMS = model()
NAMES = ('kernel', 'bias', 'lora_a', 'lora_b')
KERNEL, BIAS, A, B = (('net', 'layer', name) for name in NAMES)


def offering(function, name='mine'):
  """Returns a host with a plugin that has a pass."""

  class Mine:
    @surgery.hookimpl
    def surgery_passes(self):
      return {name: function}

  return surgery.Host(plugins=[Mine()])


def saved(tmp_path):
  file = tmp_path / 'm.msgpack'
  surgery.save(file, PARAMS)
  return file


def both(function, tmp_path):
  """Yields a plugin's pass on params, on a file, and in a recipe."""
  host = offering(function)
  out = tmp_path / 'out.msgpack'
  file = saved(tmp_path)
  yield lambda: surgery.apply(PARAMS, 'mine', host=host)
  yield lambda: Recipe(['mine']).run(model=file, out=out, host=host)
  assert not out.exists()


# What passes raise.


@pytest.mark.parametrize(
  'error',
  [RuntimeError('gone'), KeyError('net/x'), SystemExit(0), OSError('o')],
)
def test_a_pass_that_raises_is_named_with_its_step(error, tmp_path):
  def mine(checkpoint):
    raise error

  for run in both(mine, tmp_path):
    with pytest.raises(surgery.PluginError) as caught:
      run()
    kind = type(error).__name__
    assert f"pass 'mine' of plugin 'Mine' failed: {kind}: " in str(caught.value)
    causes: list[BaseException | None] = [caught.value.__cause__]
    if causes[0] is not None:
      causes.append(causes[0].__cause__)
    assert error in causes


def test_a_step_of_a_recipe_file_is_named_by_its_line(tmp_path):
  def mine(checkpoint):
    raise RuntimeError('gone')

  recipe = tmp_path / 'r.yaml'
  recipe.write_text('steps:\n  - drop: "**/bias"\n  - mine\n')
  with pytest.raises(
    surgery.PluginError,
    match=r"r\.yaml:3: step 2 \(mine\): pass 'mine' of plugin 'Mine' failed",
  ):
    Recipe.load(recipe).apply(
      surgery.open(saved(tmp_path)), host=offering(mine)
    )


def test_a_pass_may_refuse_by_an_error_of_its_own(tmp_path):
  class Odd(surgery.PluginError):
    def __init__(self, number, unit):
      super().__init__(f'{number} {unit}')
      self.number = number

  def mine(checkpoint):
    raise Odd(3, 'ranks')

  for run in both(mine, tmp_path):
    with pytest.raises(Odd, match='3 ranks') as caught:
      run()
    assert 3 == caught.value.number


# What passes return.


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda c: None, "pass 'mine' .* returned NoneType, expected a surgery.Ch"),
    (lambda c: dict(c), 'returned dict, expected a surgery.Checkpoint'),
    (
      lambda c: c.replace(leaves={**c, ('net', 'x'): np.ones(3)}),
      'net/x: .* returned ndarray in place of a surgery.Leaf',
    ),
    (
      lambda c: c.replace(leaves={**c, 'net/x': c[KERNEL]}),
      "a tensor under 'net/x', expected a path: a tuple of strings",
    ),
  ],
)
def test_a_pass_that_returns_something_else_is_named(change, message, tmp_path):
  for run in both(change, tmp_path):
    with pytest.raises(surgery.PluginError, match=message):
      run()


def computing(load, part=None, **said):
  def mine(checkpoint):
    leaf = checkpoint[BIAS].replace(load=load, part=part, **said)
    return checkpoint.replace(leaves={**checkpoint, BIAS: leaf})

  return mine


@pytest.mark.parametrize(
  ('load', 'message'),
  [
    (
      lambda: np.ones(4, np.float32),
      r'float32\[3\], found float32\[4',
    ),
    (lambda: np.ones(3), r'expected float32\[3\], found float64\[3\]'),
    (lambda: 3, r'expected float32\[3\], found a value of type int'),
    (lambda: 1 / 0, 'failed: ZeroDivisionError'),
  ],
)
def test_what_a_pass_computes_is_what_it_says_on_params_and_files(
  load, message, tmp_path
):
  for run in both(computing(load), tmp_path):
    with pytest.raises(
      surgery.PluginError, match=f"net/layer/bias: pass 'mine' .*{message}"
    ):
      run()


def test_a_block_is_what_the_leaf_says(tmp_path):
  big = np.zeros((2048, 1024), np.float32)
  leaf = Leaf(lambda: big, big.shape, 'float32', part=lambda index: big[:3])
  with pytest.raises(
    surgery.PluginError,
    match=r'expected float32\[1024,1024\], found float32\[3',
  ):
    Recipe(['mine']).apply(
      Checkpoint({}),
      host=offering(lambda c: c.replace(leaves={('a', 'b'): leaf})),
    ).write(tmp_path / 'x.msgpack')


def test_a_check_that_cannot_run_is_the_plugins(tmp_path):
  def mine(checkpoint):
    check = Check('all is well', lambda: checkpoint.well)
    return checkpoint.replace(checks=(*checkpoint.checks, check))

  for run in both(mine, tmp_path):
    with pytest.raises(
      surgery.PluginError,
      match="all is well: a check of pass 'mine' of plugin 'Mine' failed: Attr",
    ):
      run()


def test_what_a_pass_leaves_alone_is_copied_unread(tmp_path):
  def mine(checkpoint):
    leaf = checkpoint[BIAS]
    new = leaf.replace(load=lambda: 2 + leaf.load())
    return checkpoint.replace(leaves={**checkpoint, BIAS: new})

  plan = Recipe(['mine']).plan(
    model=saved(tmp_path), out=tmp_path / 'o.msgpack', host=offering(mine)
  )
  rows = {row['path']: row['what'] for row in plan.report()['tensors']}
  assert 'computed' == rows.pop('net/layer/bias')
  assert {'copied'} == set(rows.values())
  plan.write()
  moved = surgery.load(tmp_path / 'o.msgpack')
  np.testing.assert_array_equal(
    2 + np.asarray(PARAMS[BIAS].value), moved[BIAS].value
  )


# Half an adapter.


def without(*paths):
  return lambda c: c.replace(
    leaves={p: leaf for p, leaf in c.items() if p not in paths}
  )


def moved(old, new):
  return lambda c: c.replace(
    leaves={new if p == old else p: leaf for p, leaf in c.items()}
  )


def turned(path):
  def mine(c):
    leaf = c[path]
    new = leaf.replace(load=lambda: leaf.load().T, shape=leaf.shape[::-1])
    return c.replace(leaves={**c, path: new})

  return mine


def forgotten(c):
  return Checkpoint({p: Leaf(m.load, m.shape, m.dtype) for p, m in c.items()})


HALVES = {
  'a weight is dropped': (
    without(B),
    'net/layer/lora_b: .* this tensor is gon',
  ),
  'the base is dropped': (without(KERNEL), 'net/layer/kernel: .* is gone'),
  'a weight is renamed': (
    moved(A, ('net', 'layer', 'x')),
    'lora_a: .* is gone',
  ),
  'the layer is renamed': (moved(KERNEL, ('net', 'new', 'kernel')), 'is gone'),
  'the base is turned': (
    turned(KERNEL),
    r'has shape \(3, 4\), its record says',
  ),
  'a weight is turned': (turned(A), r'lora_a: .* has shape \(2, 4\)'),
  'records are lost': (
    lambda c: c.replace(
      records=type(c.known_records or PARAMS.records)(),
      manifest=c.manifest.replace(adapters=()),
    ),
    'lora_a: .* is left, but its record is gone',
  ),
  'all is made anew': (forgotten, 'lora_a: .* is left, but its record'),
}


@pytest.mark.parametrize('change', HALVES)
def test_a_pass_of_anybody_that_leaves_half_an_adapter_is_refused(
  change, tmp_path
):
  function, message = HALVES[change]
  # One that says nothing of adapters may not even change what they rewrite.
  for run in both(function, tmp_path):
    with pytest.raises(surgery.SurgeryError, match='half of adapter|rewritten'):
      run()
  for run in both(surgery.handles_adapters(function), tmp_path):
    with pytest.raises(surgery.SurgeryError, match=message) as caught:
      run()
    said = str(caught.value)
    assert "pass 'mine' of plugin 'Mine' left half of adapter 'default'" in said
    assert isinstance(caught.value, surgery.PluginError)


def test_an_adapter_may_go_as_a_whole_or_move_as_a_whole(tmp_path):
  host = surgery.default_host()

  def off(checkpoint):
    return host.passes['detach'](checkpoint, host=host)

  def renamed(checkpoint):
    return host.passes['rename'](checkpoint, 'net/layer -> net/new', host=host)

  off_host, renamed_host = offering(off), offering(renamed)
  assert not surgery.adapters(surgery.apply(PARAMS, 'mine', host=off_host))
  [info] = surgery.adapters(surgery.apply(PARAMS, 'mine', host=renamed_host))
  assert (('net', 'new', 'kernel'),) == info.sites


def test_a_half_that_was_split_may_be_worked_on():
  trainable, _ = surgery.freeze(PARAMS).split()
  assert B in trainable and KERNEL not in trainable
  same = surgery.apply(trainable, 'mine', host=offering(lambda c: c.replace()))
  assert B in same


def test_an_adapter_whose_type_is_not_installed_is_seen_to_as_well():
  one = {
    'name': 'x',
    'shared': {},
    'sites': [
      {
        'layer': 'net/l',
        'params': [{'name': 'kernel', 'shape': [4, 3]}],
        'weights': {'w': {'path': 'net/l/w', 'shape': [2]}},
      }
    ],
  }
  shapes = {('net', 'l', 'kernel'): (7, 4, 3), ('net', 'l', 'w'): (7, 2)}
  leaves: dict[tuple[str, ...], Leaf] = {
    p: Leaf(lambda: None, s, 'float32') for p, s in shapes.items()
  }
  before = Checkpoint(leaves)
  before = before.replace(manifest=before.manifest.replace(adapters=(one,)))
  host = surgery.default_host()
  same = performing.performed('mine', lambda c: c.replace(), before, host, {})
  assert before.keys() == same.keys()
  with pytest.raises(surgery.AdapterError, match="half of adapter 'x'"):
    performing.performed('mine', without(('net', 'l', 'w')), before, host, {})


# Hooks.


class Wrong:
  """Answers of a kind that nobody asked for."""

  def __init__(self, hook, value):
    self.value = value
    function = surgery.hookimpl(lambda: value)
    setattr(self, hook, function)


WRONG = {
  'surgery_match_layer': ['no', 1, [], np.ones(2)],
  'surgery_freeze_param': ['yes', 0],
  'surgery_intercept_param': ['x', surgery.LoRA, Ellipsis],
  'surgery_merge_param': ['no', False, 3],
}
CALLS = {
  'surgery_match_layer': lambda host: surgery.select(
    PARAMS, 'mine:x', host=host
  ),
  'surgery_freeze_param': lambda host: surgery.freeze(
    PARAMS, policy='mine', host=host
  ),
}


@pytest.mark.parametrize(
  ('hook', 'value'),
  [(h, v) for h, some in WRONG.items() for v in some],
  ids=str,
)
def test_a_hook_that_answers_something_else_is_named(hook, value):
  class Other:
    """Is asked first, and has nothing to say."""

  setattr(Other, hook, surgery.hookimpl(lambda self: None))
  host = surgery.Host(plugins=[Wrong(hook, value), Other()])
  some: dict[str, dict[str, Any]] = {
    'surgery_match_layer': {'site': None, 'term': 'a:'},
    'surgery_freeze_param': {'site': None, 'policy': 'a'},
    'surgery_intercept_param': {'site': None},
    'surgery_merge_param': {'site': None, 'adapter': None},
  }
  with pytest.raises(
    surgery.PluginError,
    match=rf"plugin 'Wrong' returned .* in {hook}, expected ",
  ):
    host.ask(hook, **some[hook])
  if hook in CALLS:
    with pytest.raises(surgery.PluginError, match="plugin 'Wrong' returned"):
      CALLS[hook](host)


def test_a_hook_may_answer_with_numpys_truth():
  class Mine:
    @surgery.hookimpl
    def surgery_match_layer(self, site, term):
      return np.int64(len(site.params)) > 1

  chosen = surgery.select(PARAMS, 'mine:', host=surgery.Host(plugins=[Mine()]))
  assert KERNEL in chosen


def test_a_hook_of_a_type_that_answers_something_else_is_named():
  class Mine(surgery.LoRA):
    name = 'mine'

    @surgery.hookimpl
    def surgery_merge_param(self, site, adapter):
      return 'it is locked'

  host = surgery.Host(plugins=[Mine])
  params = surgery.detach(PARAMS)
  params = surgery.attach(params, Mine(rank=1), to='**', host=host)
  with pytest.raises(
    surgery.PluginError,
    match="adapter type 'mine' returned 'it is locked' in surgery_merge_param",
  ):
    surgery.merge(params, host=host)


@pytest.mark.parametrize(
  ('encode', 'message'),
  [
    (lambda value: value.astype('float16'), 'expected float32.*found float16'),
    (lambda value: 3, 'found a value of type int'),
    (lambda value: value.x, 'failed: AttributeError'),
  ],
)
def test_a_function_that_encodes_wrongly_is_named(encode, message):
  class Mine:
    @surgery.hookimpl
    def surgery_merge_param(self, site):
      return encode

  class Type(surgery.LoRA):
    name = 'silent'

    @surgery.hookimpl
    def surgery_merge_param(self, site, adapter):
      return None

  host = surgery.Host(plugins=[Mine(), Type])
  params = surgery.attach(
    surgery.detach(PARAMS), Type(rank=1), to='**', host=host
  )
  with pytest.raises(
    surgery.PluginError,
    match=f'net/layer/kernel: what surgery_merge.*{message}',
  ):
    surgery.merge(params, host=host)


@pytest.mark.parametrize(
  ('hook', 'value', 'message'),
  [
    ('surgery_passes', 3, 'returned 3 in surgery_passes, expected a mapping'),
    ('surgery_passes', {'a': 3}, "offers 3 as 'a' in surgery_passes"),
    ('surgery_passes', {3: len}, 'as 3 in surgery_passes'),
    ('surgery_formats', {'a': len}, 'expected an object with suffixes'),
    ('surgery_methods', {'a': 'b'}, 'expected a subclass of surgery.Method'),
  ],
)
def test_what_a_plugin_offers_is_of_the_kind(hook, value, message):
  host = surgery.Host(plugins=[Wrong(hook, value)])
  with pytest.raises(surgery.PluginError, match=f"plugin 'Wrong' .*{message}"):
    getattr(host, hook.removeprefix('surgery_'))


def test_a_hook_that_ends_the_process_is_a_failure():
  class Mine:
    @surgery.hookimpl
    def surgery_started(self, event):
      raise SystemExit(0)

  with pytest.raises(
    surgery.PluginError, match="plugin 'Mine' failed in surgery_started: Sys"
  ):
    surgery.detach(PARAMS, host=surgery.Host(plugins=[Mine()]))


def test_a_pass_without_a_signature_is_named():
  with pytest.raises(
    surgery.PluginError, match="pass 'mine' of plugin 'Mine' cannot be a step"
  ):
    surgery.apply(PARAMS, 'mine', host=offering(dict.fromkeys.__self__))


# Formats.


class Bytes:
  """A format that does what it is told to."""

  suffixes = ('.bytes',)

  def __init__(self, result):
    self.result = result

  @surgery.hookimpl
  def surgery_formats(self):
    return {'bytes': self}

  def open(self, path):
    return self.result()

  def write(self, checkpoint, path, *, overwrite=False):
    self.result()


def test_a_format_that_fails_is_named(tmp_path):
  host = surgery.Host(plugins=[Bytes(functools.partial(dict.pop, {}, 'x'))])
  file = tmp_path / 'm.bytes'
  file.write_bytes(b'data')
  with pytest.raises(
    surgery.PluginError,
    match="open of format 'bytes' of plugin 'Bytes' failed: KeyError: 'x'",
  ):
    surgery.open(file, host=host)
  with pytest.raises(surgery.PluginError, match="write of format 'bytes' of"):
    Checkpoint({}).write(file, host=host)
  other = surgery.Host(plugins=[Bytes(dict)])
  with pytest.raises(
    surgery.PluginError, match='returned dict, expected a surgery.Checkpoint'
  ):
    surgery.open(file, host=other)


def test_what_the_system_says_of_a_file_stays_what_it_is(tmp_path):
  file = tmp_path / 'm.bytes'
  host = surgery.Host(plugins=[Bytes(file.read_bytes)])
  with pytest.raises(FileNotFoundError):
    surgery.open(file, host=host)


# A name twice.


def rival(name='lora'):
  return type('Rival', (surgery.LoRA,), {'name': name, '__doc__': 'Another.'})


def test_a_type_that_is_given_replaces_no_other_silently():
  cls = rival()
  with pytest.raises(
    surgery.PluginError,
    match=re.escape("adapter type 'lora' is offered by blox-surgery ")
    + '.*Rival, which the host was given, has the same name.*'
    + re.escape("Host(prefer={'lora': 'Rival'})"),
  ):
    surgery.Host(plugins=[cls])
  assert cls is surgery.Host(
    plugins=[cls], prefer={'lora': 'Rival'}
  ).adapter_type('lora')
  assert surgery.LoRA is surgery.Host(
    plugins=[cls], prefer={'lora': 'blox-surgery'}
  ).adapter_type('lora')
  # The very type that is offered is no rival.
  assert surgery.LoRA is surgery.Host(plugins=[surgery.LoRA]).adapter_type(
    'lora'
  )


def test_a_type_that_is_given_replaces_no_installed_one_silently(installed):
  source = """
    import surgery

    class Mine(surgery.LoRA):
      name = 'mine'
  """
  mark = installed('theirs', 'theirs', source, adapters='mine = theirs:Mine')
  with pytest.raises(surgery.PluginError, match='offered by theirs 1.0, and'):
    surgery.Host(plugins=[rival('mine')])
  assert not mark.exists()  # It is not imported for that.
  cls = rival('mine')
  assert cls is surgery.Host(plugins=[cls], only=()).adapter_type('mine')
  theirs = surgery.Host().adapter_type('mine')
  assert theirs is surgery.Host(plugins=[theirs]).adapter_type('mine')


# What plugins print.

LOUD = """
  import surgery

  print('imported')

  class Loud:
    def __init__(self):
      print('made')

    @surgery.hookimpl
    def surgery_started(self, event):
      print('started')

    @surgery.hookimpl
    def surgery_match_layer(self, site, term):
      print('asked')
      return True if term == 'loud:' else None

    @surgery.hookimpl
    def surgery_passes(self):
      return {'loud': self.loud}

    def loud(self, checkpoint):
      '''Prints.'''
      print('running')
      leaves = {}
      for path, leaf in checkpoint.items():
        def load(leaf=leaf):
          print('loading')
          return leaf.load()
        if path[-1] == 'bias':
          leaf = leaf.replace(load=load)
        leaves[path] = leaf
      return checkpoint.replace(leaves=leaves)

  class Fails:
    @surgery.hookimpl
    def surgery_passes(self):
      return {'fail': self.fail}

    def fail(self, checkpoint):
      '''Fails.'''
      raise RuntimeError('gone')
"""


@pytest.fixture
def loud(installed, monkeypatch):
  """Installs a plugin that prints wherever its code runs."""
  installed(
    'loud-dist',
    'loud_mod',
    LOUD,
    plugins='loud = loud_mod:Loud\nfails = loud_mod:Fails',
  )
  # The default host of this process knows no plugin of a test's.
  monkeypatch.setenv('SURGERY_PLUGINS', 'loud,fails')


def test_what_plugins_print_is_no_result(loud, surgery_cli, tmp_path):
  file = saved(tmp_path)
  recipe = tmp_path / 'r.yaml'
  recipe.write_text('steps:\n  - loud\n')
  done = surgery_cli(
    'run', recipe, f'model={file}', f'out={tmp_path / "o.msgpack"}', '--json'
  )
  assert 0 == done.code, done.err
  assert str(tmp_path / 'o.msgpack') == json.loads(done.out)['output']
  for word in ('imported', 'made', 'started', 'running', 'loading'):
    assert word in done.err.split()
  done = surgery_cli('select', file, 'loud:')
  assert 'asked' in done.err.split()
  assert 'net/layer/kernel' in done.out
  assert not {'asked', 'imported', 'made'} & set(done.out.split())


def test_a_plugin_prints_where_it_likes_in_python(capsys):
  def mine(checkpoint):
    print('running')
    return checkpoint

  surgery.apply(PARAMS, 'mine', host=offering(mine))
  assert 'running\n' == capsys.readouterr().out


def test_the_shell_blames_the_plugin(loud, surgery_cli, tmp_path):
  recipe = tmp_path / 'r.yaml'
  recipe.write_text('steps:\n  - fail\n')
  out = tmp_path / 'o.msgpack'
  done = surgery_cli('run', recipe, f'model={saved(tmp_path)}', f'out={out}')
  assert (4, '') == (done.code, done.out)
  assert re.search(
    r"error: .*r\.yaml:2: step 1 \(fail\): pass 'fail' of plugin 'fails' of "
    r'loud-dist 1\.0 failed: RuntimeError: gone',
    done.err,
  )
  assert not out.exists()


def test_hooks_of_a_plugin_that_is_a_class_are_listed(loud, surgery_cli):
  listed = json.loads(surgery_cli('plugins', '--json').out)
  [one] = [info for info in listed if info['name'] == 'loud']
  assert ['surgery_match_layer', 'surgery_passes', 'surgery_started'] == (
    one['hooks']
  )


def test_a_class_that_cannot_be_made_is_broken_and_nothing_else(installed):
  source = """
    import surgery

    class Bad:
      def __init__(self):
        raise KeyError('x')

      @surgery.hookimpl
      def surgery_started(self, event):
        pass
  """
  installed('bad', 'bad_mod', source, plugins='bad = bad_mod:Bad')
  host = surgery.Host()
  with pytest.warns(surgery.PluginWarning, match="'bad': KeyError: 'x'"):
    states = {i.name: i.state for i in host.plugins()}
  assert ('broken', 'loaded') == (states['bad'], states['passes'])


def spoilt(checkpoint, *, by):
  """Writes a number at one place of each kernel, in blocks or whole."""

  def changed(leaf):
    def load():
      value = np.array(leaf.load())
      value[1, 2] = by
      return value

    return leaf.replace(load=load, dtype=leaf.dtype)

  leaves = {
    path: changed(leaf) if path[-1] == 'kernel' else leaf
    for path, leaf in checkpoint.items()
  }
  return checkpoint.replace(leaves=leaves)


@pytest.mark.parametrize('by', [np.nan, np.inf, -np.inf])
def test_what_was_finite_does_not_become_nan_or_infinite(by, tmp_path):
  plain = surgery.merge(PARAMS)
  host = offering(lambda checkpoint: spoilt(checkpoint, by=by))
  file, out = tmp_path / 'm.msgpack', tmp_path / 'o.msgpack'
  surgery.save(file, plain)
  message = (
    rf"net/layer/kernel: pass 'mine' of plugin 'Mine': the result at index "
    rf'\[1, 2\] is {by}, and was -?[0-9.]+\. A pass that may'
  )
  with pytest.raises(surgery.CastError, match=message):
    surgery.apply(plain, 'mine', host=host)
  with pytest.raises(surgery.CastError, match=message):
    Recipe(['mine']).run(model=file, out=out, host=host)
  assert not out.exists()


def test_a_pass_that_may_make_such_numbers_says_so():
  plain = surgery.merge(PARAMS)

  def mine(checkpoint, *, nonfinite='refuse'):
    return spoilt(checkpoint, by=-np.inf)

  changed = surgery.apply(plain, 'mine', host=offering(mine))
  assert np.isneginf(changed[KERNEL].value[1, 2])
  # What was so before may stay so, and is not the pass's.
  again = surgery.apply(
    changed, 'mine', host=offering(lambda c: spoilt(c, by=np.inf))
  )
  assert np.isposinf(again[KERNEL].value[1, 2])


def test_a_traced_value_of_a_pass_is_not_looked_at():
  plain = surgery.merge(PARAMS)

  def mine(checkpoint):
    leaf = checkpoint[KERNEL]
    new = leaf.replace(load=lambda: leaf.load() * jnp.inf)
    return checkpoint.replace(leaves={**checkpoint, KERNEL: new})

  host = offering(mine)
  done = jax.jit(lambda p: surgery.apply(p, 'mine', host=host))(plain)
  assert not np.isfinite(done[KERNEL].value).any()
