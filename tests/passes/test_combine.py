"""Whole models that become one: what is given, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import surgery


def leaf(value):
  return surgery.Leaf(lambda: value, value.shape, str(value.dtype))


def model(**tensors):
  return surgery.Checkpoint(
    {tuple(k.split('__')): leaf(np.asarray(v)) for k, v in tensors.items()}
  )


def value(checkpoint, path):
  return np.asarray(checkpoint[tuple(path.split('/'))].load())


def filled(number, layers=3):
  return model(
    **{f'net__h{k}__w': np.full(2, number, np.float32) for k in range(layers)},
    head__w=np.full(2, number, np.float32),
  )


ZERO, ONE, TWO = filled(0.0), filled(1.0), filled(2.0)


def test_a_value_holds_for_all_models_and_one_for_each():
  found = surgery.combine([ONE, TWO], normalize=False, weight=2)
  assert [6, 6] == list(value(found, 'head/w'))
  found = surgery.combine([ONE, TWO], normalize=False, weight=[1, 3])
  assert [7, 7] == list(value(found, 'head/w'))


def test_a_list_is_interpolated_over_the_depth():
  found = surgery.combine(
    [ZERO, ONE], method='slerp', t={'head': 0.5, '**': [0, 0.2, 1]}
  )
  values = [value(found, f'net/h{k}/w')[0] for k in range(3)]
  np.testing.assert_allclose([0, 0.2, 1], values, rtol=1e-6)
  assert 0.5 == value(found, 'head/w')[0]


def test_each_model_may_have_a_list_over_the_depth():
  found = surgery.combine(
    [ONE, TWO],
    normalize=False,
    weight=[{'head': 3, '**': [1, 0]}, {'head': 0, '**': {'depth': [0, 1]}}],
  )
  values = [value(found, f'net/h{k}/w')[0] for k in range(3)]
  np.testing.assert_allclose([1, 1.5, 2], values)
  assert 3 == value(found, 'head/w')[0]


def test_the_first_selector_that_matches_decides():
  found = surgery.combine(
    [ZERO, ONE], method='slerp', t={'**/h1': 0.25, 'net': 0.5, '**': 1}
  )
  values = [value(found, f'net/h{k}/w')[0] for k in range(3)]
  assert [0.5, 0.25, 0.5] == values
  assert 1 == value(found, 'head/w')[0]


def test_numbers_of_layers_go_by_their_order_not_by_their_text():
  tensors = {f'h__{k}__w': np.ones(1, np.float32) for k in range(11)}
  zeros = {k: v * 0 for k, v in tensors.items()}
  found = surgery.combine(
    [model(**zeros), model(**tensors)], method='slerp', t=[0, 1]
  )
  values = [value(found, f'h/{k}/w')[0] for k in range(11)]
  np.testing.assert_allclose(np.linspace(0, 1, 11), values, rtol=1e-6)


@pytest.mark.parametrize(
  ('options', 'error', 'message'),
  [
    (
      {'method': 'tise'},
      surgery.ConfigError,
      "no method is called 'tise'.*ties",
    ),
    ({'wieght': 1}, surgery.ConfigError, "'linear' has no option 'wieght'"),
    ({'weight': 'x'}, surgery.ConfigError, "option 'weight': expected"),
    ({'weight': [1]}, surgery.ConfigError, 'for each of 2 models.*found 1'),
    ({'weight': [1, -1]}, surgery.ConfigError, 'add up to 0'),
    (
      {'method': 'slerp'},
      surgery.ConfigError,
      "option 't': a value is required",
    ),
    ({'method': 'slerp', 't': 2}, surgery.ConfigError, 'a value <= 1'),
    (
      {'method': 'slerp', 't': [0, 1]},
      surgery.ConfigError,
      r'head/w lies in no numbered layer.*by selector',
    ),
    (
      {'method': 'slerp', 't': {'**/none': 1}},
      surgery.SelectorError,
      'matches nothing',
    ),
    (
      {'method': 'slerp', 't': {'**': 1, 'head': 0}},
      surgery.SelectorError,
      "'head' has no effect",
    ),
    (
      {'method': 'slerp', 't': {'net': 1}},
      surgery.ConfigError,
      'nothing gives it for head/w',
    ),
    ({'normalize': [True, False]}, surgery.ConfigError, 'expected a value'),
    ({'method': 'ties'}, surgery.ConfigError, 'none is given. Give base'),
    ({'base': ZERO}, surgery.ConfigError, "'linear' takes no base"),
    (
      {'method': 'passthrough'},
      surgery.ConfigError,
      'expected one model, found 2',
    ),
    (
      {'method': 'della', 'base': ZERO, 'density': 0.9},
      surgery.ConfigError,
      'probabilities from 0.75 to 1.05',
    ),
  ],
)
def test_options_that_cannot_be_are_refused(options, error, message):
  with pytest.raises(error, match=message):
    surgery.combine([ONE, TWO], **options)


def test_models_are_a_list():
  with pytest.raises(surgery.SurgeryError, match='a list of models'):
    surgery.combine(ONE)


def named(checkpoint, name):
  return surgery.Checkpoint(dict(checkpoint), origin=name)


def test_a_tensor_that_one_lacks_is_an_error_that_names_both():
  less = model(head__w=np.ones(2, np.float32))
  with pytest.raises(
    surgery.SurgeryError,
    match='net/h0/w: one.st has it, less.st lacks it; .*only: common',
  ):
    surgery.combine([named(ONE, 'one.st'), named(less, 'less.st')])
  with pytest.raises(surgery.SurgeryError, match='less.st has it|lacks it'):
    surgery.combine([named(less, 'less.st'), named(ONE, 'one.st')])


def test_common_tensors_alone_on_request():
  more = model(head__w=np.ones(2, np.float32), x__w=np.ones(2, np.float32))
  found = surgery.combine([ONE, more], only='common')
  assert [('head', 'w')] == list(found)


@pytest.mark.parametrize('only', ['all', 'common'])
@pytest.mark.parametrize('turned', [False, True])
def test_a_lone_head_is_not_combined_with_a_tied_one(only, turned):
  embed = np.ones((4, 3), np.float32)
  tied = model(embed__w=embed)
  head = embed.T if turned else embed
  lone = model(embed__w=embed, lm_head__w=head)
  for models in ([tied, lone], [lone, tied]):
    with pytest.raises(surgery.SurgeryError, match='head of its own and the'):
      surgery.combine(models, only=only)
  assert [('embed', 'w')] == list(surgery.combine([tied, tied]))


@pytest.mark.parametrize(
  ('other', 'message'),
  [
    (
      np.ones(3, np.float32),
      r'w is float32\[2\] in one and float32\[3\] in two',
    ),
    (np.ones(2, np.float16), r'float32\[2\] in one and float16\[2\] in two'),
  ],
)
def test_shapes_and_dtypes_have_to_be_alike(other, message):
  one = named(model(w=np.ones(2, np.float32)), 'one')
  with pytest.raises(surgery.SurgeryError, match=message):
    surgery.combine([one, named(model(w=other), 'two')])


def test_the_base_has_to_be_alike_too():
  one = model(w=np.ones(2, np.float32))
  base = named(model(w=np.ones(3, np.float32)), 'base.st')
  with pytest.raises(surgery.SurgeryError, match='in base.st'):
    surgery.combine([one], base=base, method='task_arithmetic')


def test_integers_have_to_be_equal():
  one = model(w=np.ones(2, np.float32), n=np.array([1, 2]))
  two = model(w=np.ones(2, np.float32), n=np.array([1, 3]))
  found = surgery.combine([one, one])
  found.check()
  assert [1, 2] == list(value(found, 'n'))
  with pytest.raises(surgery.CheckError, match='n .int64.2.. differs between'):
    surgery.combine([one, two]).check()


def test_complex_numbers_are_refused():
  one = model(w=np.ones(2, np.complex64))
  with pytest.raises(surgery.SurgeryError, match='real numbers'):
    surgery.combine([one, one])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_is_refused_unless_asked_for(bad):
  one = model(w=np.array([[0, 1], [2, bad]], np.float32))
  two = named(model(w=np.ones((2, 2), np.float32)), 'two')
  found = surgery.combine([two, named(one, 'one')])
  with pytest.raises(
    surgery.CastError, match=rf'w: one has {bad} at index \[1, 1\]'
  ):
    value(found, 'w')
  asked = surgery.combine([two, one], nonfinite='allow')
  assert 1 == np.sum(~np.isfinite(value(asked, 'w')))


def test_what_becomes_too_large_is_refused():
  one = model(w=np.full(2, 60000, np.float16))
  found = surgery.combine([one, one], weight=1, normalize=False)
  with pytest.raises(surgery.CastError, match='too large for float16'):
    value(found, 'w')


def test_a_model_with_an_adapter_is_refused():
  import blox as bx

  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.ones((4, 3)))
  params = params.locked()
  adapted = surgery.attach(params, surgery.LoRA(rank=1), to='**', name='x')
  for models in ([params, adapted], [adapted, params]):
    with pytest.raises(surgery.AdapterError, match="adapter 'x'.*Merge it"):
      surgery.combine(models)


def test_params_give_params_with_the_flags_of_the_first():
  import blox as bx
  import jax

  def made(number, trainable):
    params = bx.Params()
    params['net', 'kernel'] = bx.Param(jnp.full((4, 3), number), trainable)
    params['net', 'steps'] = bx.Param(jnp.asarray(3))
    return params.locked()

  found = surgery.combine([made(1.0, False), made(2.0, True)], method='mean')
  assert isinstance(found['net', 'kernel'].value, jax.Array)
  assert 1.5 == found['net', 'kernel'].value[0, 0]
  assert not found['net', 'kernel'].trainable
  assert found.is_locked


def test_a_step_of_a_recipe_and_the_verb_come_to_the_same(tmp_path):
  rng = np.random.default_rng(0)
  files = {}
  for name in ('a', 'b', 'c', 'base'):
    one = model(
      h__0__w=rng.normal(size=(30, 40)).astype(np.float32),
      h__1__w=rng.normal(size=(30, 40)).astype(np.float32),
    )
    files[name] = tmp_path / f'{name}.safetensors'
    one.write(files[name])
  step = {
    'with': ['b', 'c'], 'base': 'base', 'method': 'dare_ties', 'seed': 3,
    'set': {'weight': [0.5, {'h/0': 0, 'h/1': 1}, 0.2], 'density': 0.5},
  }  # fmt: skip
  recipe = surgery.Recipe([{'combine': step}], inputs=files)
  recipe.run(out=tmp_path / 'out.safetensors')
  live = surgery.combine(
    [surgery.open(files[n]) for n in 'abc'],
    base=surgery.open(files['base']),
    method='dare_ties',
    seed=3,
    weight=[0.5, {'h/0': 0, 'h/1': 1}, 0.2],
    density=0.5,
  )
  found = surgery.open(tmp_path / 'out.safetensors')
  assert live.keys() == found.keys()
  for path, one in live.items():
    assert np.array_equal(one.load(), found[path].load())


class Median(surgery.Method):
  """The median of all models."""

  name = 'median'
  scale: float = surgery.field(default=1.0, gt=0)

  def combine(self, block, prepared):
    if self.scale > 10:
      raise KeyError('oops')
    if self.scale > 5:
      return np.zeros(3)
    return jnp.median(jnp.stack(block.tensors), axis=0) * self.scale


class Plugin:
  @surgery.hookimpl
  def surgery_methods(self):
    return {'median': Median}


def test_a_method_of_a_plugin_is_used_like_any():
  host = surgery.Host(plugins=[Plugin])
  found = surgery.combine(
    [ZERO, ONE, TWO], method='median', host=host, scale={'head': 2, '**': 1}
  )
  assert 2 == value(found, 'head/w')[0]
  assert 1 == value(found, 'net/h1/w')[0]


def test_a_method_that_fails_says_whose_it_is():
  host = surgery.Host(plugins=[Plugin])
  call = lambda scale: value(
    surgery.combine([ZERO, ONE], method='median', host=host, scale=scale),
    'head/w',
  )
  with pytest.raises(surgery.PluginError, match="'median' of .*Plugin.*oops"):
    call(11)
  with pytest.raises(surgery.PluginError, match=r'returned float64\[3\] for a'):
    call(6)


def test_a_class_that_is_no_method_is_named():
  class Nothing(surgery.Method):
    name = 'nothing'

  with pytest.raises(surgery.PluginError, match='has no combine'):
    Nothing()

  class Taken(surgery.Method):
    name = 'taken'
    seed: int = surgery.field(default=0)

    def combine(self, block, prepared):
      return block.tensors[0]

  with pytest.raises(surgery.PluginError, match="cannot be called 'seed'"):
    Taken()


def test_layers_of_several_models():
  tall = lambda number, layers: model(
    **{f'h__{k}__w': np.full(2, number + k, np.float32) for k in layers}
  )
  steps = [
    {'keep': 'h/{0..2}'},
    {'copy': 'other::h/{2..4}/** -> h/{3..5}/**'},
  ]
  recipe = surgery.Recipe(steps, inputs={'model': None, 'other': None})
  after = recipe.apply(tall(0, range(6)), other=tall(100, range(6)))
  values = [value(after, f'h/{k}/w')[0] for k in range(len(after))]
  assert [0, 1, 2, 102, 103, 104] == values


def test_a_plan_says_where_options_take_a_copy_apart():
  rows = np.ones((4, 2), np.float32)
  both = [model(embed__w=k * rows, lm_head__w=k * rows) for k in range(2)]
  apart = surgery.combine(
    both, method='slerp', t={'lm_head': 0.5, '**': 0.25}
  ).remarks
  assert 1 == len(apart) and 'if it is a copy of it' in apart[0]
  assert () == surgery.combine(both, method='slerp', t=0.5).remarks


@pytest.mark.parametrize('method', ['dare_ties', 'dare_linear', 'della'])
def test_a_head_that_is_a_copy_of_the_embedding_stays_one(method):
  rng = np.random.default_rng(0)
  base, a, b = (rng.normal(size=(40, 8)).astype('float32') for _ in range(3))
  of = lambda rows: surgery.Checkpoint(
    {
      ('model', 'embed_tokens', 'weight'): leaf(rows),
      ('lm_head', 'weight'): leaf(rows.copy()),
    }
  )
  after = surgery.combine(
    [of(a), of(b)], base=of(base), method=method, density=0.5
  )
  head = np.asarray(after['lm_head', 'weight'].load())
  embedding = np.asarray(after['model', 'embed_tokens', 'weight'].load())
  np.testing.assert_array_equal(head, embedding)
  assert (head != base).any() and (head == base).any()
