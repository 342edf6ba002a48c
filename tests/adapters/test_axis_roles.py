"""One formula serves every layer: roles of axes, stacks, layouts.

The oracle is plain numpy: `W + s·A·B` with the axes in the order that the layer
stores them, and a scale on the outputs, which shows whether they are outputs.
"""

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import surgery


class Scale(surgery.Adapter):
  """Multiplies outputs, of kernel and bias."""

  name = 'scale'
  rewrites = ('kernel', 'bias')

  def init(self, site, key):
    return {'scale': jnp.arange(1.0, 1 + site.out_size).reshape(site.out_shape)}

  def apply(self, site, name, base, weights):
    assert base.shape[len(site.in_shape) :] == site.out_shape or name == 'bias'
    return base * weights['scale']


HOST = surgery.Host(plugins=[Scale])


def randomised(params, seed=0):
  """Returns params with every adapter weight random."""
  draw = np.random.default_rng(seed)
  params = params.unlocked()
  for path, param in list(params.items()):
    if 'adapter' in param.metadata:
      value = draw.normal(size=param.value.shape).astype(np.float32)
      params[path] = param.replace(value=jnp.asarray(value))
  return params.locked()


def single(value, name='kernel', **others):
  """Returns params of one layer."""
  params = bx.Params()
  for key, one in {name: value, **others}.items():
    params[('net', 'layer', key)] = bx.Param(jnp.asarray(one))
  return params.locked()


def numbers(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def weight(params, name):
  return np.asarray(params[('net', 'layer', name)].value)


def merged_kernel(params, name='kernel'):
  return np.asarray(
    surgery.merge(params, host=HOST)[('net', 'layer', name)].value
  )


def test_the_last_axis_is_the_output_by_default():
  kernel = numbers(3, 4, 5)  # E.g. a convolution over one axis.
  params = surgery.attach(single(kernel), surgery.LoRA(rank=2), to='**')
  assert (3, 4, 2) == weight(params, 'lora_a').shape
  assert (2, 5) == weight(params, 'lora_b').shape
  params = randomised(params)
  a, b = weight(params, 'lora_a'), weight(params, 'lora_b')
  np.testing.assert_allclose(
    merged_kernel(params),
    kernel + 2 * np.einsum('hir,ro->hio', a, b),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('shape', 'layout', 'a_shape', 'b_shape', 'formula'),
  [
    ((6, 2, 4), 'ioo', (6, 2), (2, 2, 4), 'ir,rhd->ihd'),
    ((2, 4, 6), 'iio', (2, 4, 2), (2, 6), 'hdr,ro->hdo'),
    ((5, 6), 'oi', (6, 2), (2, 5), 'ir,ro->oi'),
    ((2, 3, 4, 5), 'iioo', (2, 3, 2), (2, 4, 5), 'abr,rcd->abcd'),
    ((2, 3, 4, 5), 'iioi', (2, 3, 5, 2), (2, 4), 'abdr,rc->abcd'),
    ((4, 2, 3), 'oii', (2, 3, 2), (2, 4), 'ijr,ro->oij'),
  ],
)
def test_a_layout_says_which_axes_are_outputs(
  shape, layout, a_shape, b_shape, formula
):
  kernel = numbers(*shape)
  params = surgery.attach(
    single(kernel), surgery.LoRA(rank=2), to='**', layout=layout
  )
  assert (a_shape, b_shape) == (
    weight(params, 'lora_a').shape,
    weight(params, 'lora_b').shape,
  )
  params = randomised(params)
  update = np.einsum(
    formula, weight(params, 'lora_a'), weight(params, 'lora_b')
  )
  np.testing.assert_allclose(
    merged_kernel(params), kernel + 2 * update, rtol=1e-5, atol=1e-5
  )


def test_layouts_are_given_by_selector():
  params = bx.Params()
  params[('net', 'q', 'kernel')] = bx.Param(jnp.ones((6, 2, 4)))
  params[('net', 'o', 'kernel')] = bx.Param(jnp.ones((2, 4, 6)))
  params = surgery.attach(
    params.locked(), surgery.LoRA(rank=1), to='**', layout={'**/q': 'ioo'}
  )
  assert (6, 1) == params[('net', 'q', 'lora_a')].value.shape
  assert (2, 4, 1) == params[('net', 'o', 'lora_a')].value.shape


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'layout': 'io'}, r'net/layer/kernel: shape \(3, 4, 5\) does not fit'),
    ({'layout': {'**/kernel': 'ssio'}}, 'does not fit the layout'),
    ({'layout': 'ssio'}, r'can serve nothing .*its shape \(5,\) has no input'),
    ({'layout': 'ixo'}, 'expected a letter an axis'),
    ({'stacked': -1}, 'expected a number of axes >= 0, found -1'),
    ({'layout': 'sio', 'stacked': 2}, 'does not fit the layout'),
    (
      {'layout': {'**/layr': 'iio'}},
      r"layout: selector '\*\*/layr' matches no",
    ),
    ({'stacked': {'**/layr': 1}}, r"stacked: selector '\*\*/layr' matches no"),
  ],
)
def test_a_layout_that_does_not_fit_is_refused(options, message):
  with pytest.raises(surgery.SurgeryError, match=message):
    surgery.attach(
      single(numbers(3, 4, 5)), surgery.LoRA(rank=1), to='**', **options
    )


def layer_case(make, x):
  """Returns a layer, its graph, params and output."""
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = make(graph.child('layer'), rng)
  # Its shapes are asked for, its values are not drawn: that compiles slowly.
  start = lambda: rng.seed(bx.Params(), seed=0)
  shapes = jax.eval_shape(lambda: layer(start(), x)[1])
  params = bx.Params()
  for path, param in shapes.items():
    if path[1] == 'layer':
      params[path] = bx.Param(jnp.asarray(numbers(*param.value.shape)))
  params = params.locked()
  return graph, layer, params, layer(params, x)[0]


LAYERS = {
  'Linear': (lambda g, r: bx.Linear(g, 5, rng=r), (2, 4)),
  'Conv1': (lambda g, r: bx.Conv(g, 3, 5, rng=r), (2, 6, 4)),
  'Conv2': (lambda g, r: bx.Conv(g, (3, 2), 5, rng=r), (2, 6, 6, 4)),
  'grouped': (
    lambda g, r: bx.Conv(g, 3, 6, rng=r, feature_group_count=2),
    (2, 6, 4),
  ),
  'ConvTranspose': (
    lambda g, r: bx.ConvTranspose(g, (3, 3), 5, rng=r),
    (1, 4, 4, 2),
  ),
}


@pytest.mark.parametrize('name', LAYERS)
def test_scaling_outputs_scales_what_the_layer_returns(name):
  # Only true if the output axis is the right one.
  make, shape = LAYERS[name]
  x = jnp.asarray(numbers(*shape))
  graph, layer, params, y = layer_case(make, x)
  params = surgery.attach(params, Scale(), to='**', graph=graph, host=HOST)
  scale = jnp.arange(1.0, 1 + y.shape[-1])
  np.testing.assert_allclose(
    layer(params, x)[0], y * scale, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('name', LAYERS)
def test_what_is_merged_is_what_the_layer_gets(name):
  make, shape = LAYERS[name]
  x = jnp.asarray(numbers(*shape))
  graph, layer, params, _ = layer_case(make, x)
  params = randomised(
    surgery.attach(params, surgery.LoRA(rank=2), to='**', graph=graph)
  )
  merged = surgery.merge(params)
  assert jnp.array_equal(layer(params, x)[0], layer(merged, x)[0])
  assert not jnp.array_equal(
    layer(params, x)[0], layer(surgery.disable(params), x)[0]
  )


@pytest.mark.parametrize(
  ('name', 'formula'),
  [
    ('Linear', 'ir,ro->io'),
    ('Conv1', 'hir,ro->hio'),
    ('Conv2', 'hwir,ro->hwio'),
    ('grouped', 'hir,ro->hio'),
    ('ConvTranspose', 'hwir,ro->hwoi'),
  ],
)
def test_a_layers_kernel_is_updated_as_it_is_stored(name, formula):
  make, shape = LAYERS[name]
  graph, _, params, _ = layer_case(make, jnp.asarray(numbers(*shape)))
  kernel = weight(params, 'kernel')
  params = randomised(
    surgery.attach(
      params, surgery.LoRA(rank=2, alpha=6.0), to='**', graph=graph
    )
  )
  a, b = weight(params, 'lora_a'), weight(params, 'lora_b')
  np.testing.assert_allclose(
    merged_kernel(params),
    kernel + 3 * np.einsum(formula, a, b),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize('layout', ['ioo', {'**/kernel': 'ioo'}])
def test_a_bias_of_two_axes_has_the_roles_of_the_outputs(layout):
  kernel, bias = numbers(6, 2, 4), numbers(2, 4)
  params = surgery.attach(
    single(kernel, bias=bias), Scale(), to='**', layout=layout, host=HOST
  )
  merged = surgery.merge(params, host=HOST)
  scale = np.arange(1.0, 9).reshape(2, 4)
  for name, value in (('kernel', kernel), ('bias', bias)):
    np.testing.assert_allclose(
      merged[('net', 'layer', name)].value, value * scale, rtol=1e-6
    )


def test_an_embedding_is_adapted_where_it_is_looked_up_and_attended():
  ids = jnp.array([[1, 3], [0, 2]])
  _, layer, params, _ = layer_case(lambda g, r: bx.Embed(g, 7, 4, rng=r), ids)
  table = weight(params, 'embedding')
  params = randomised(surgery.attach(params, surgery.LoRA(rank=2), to='**'))
  a = weight(params, 'lora_a.default.embedding')
  b = weight(params, 'lora_b.default.embedding')
  adapted = table + 2 * a @ b
  np.testing.assert_allclose(layer(params, ids)[0], adapted[ids], rtol=1e-5)
  x = jnp.asarray(numbers(3, 4))
  np.testing.assert_allclose(
    layer.attend(params, x)[0], x @ adapted.T, rtol=1e-4, atol=1e-5
  )


# Stacked parameters.


def stacked_params(*stack):
  kernel = numbers(*stack, 4, 4)
  return single(kernel, bias=numbers(*stack, 4)), kernel


@pytest.mark.parametrize('stack', [(3,), (3, 2)])
def test_each_of_a_stack_has_its_own_weights(stack):
  params, kernel = stacked_params(*stack)
  params = surgery.attach(
    params, surgery.LoRA(rank=2), to='**', stacked=len(stack)
  )
  a = weight(params, 'lora_a')
  assert (*stack, 4, 2) == a.shape
  flat = a.reshape(-1, 4, 2)
  assert len({one.tobytes() for one in flat}) == len(flat)
  params = randomised(params)
  a, b = weight(params, 'lora_a'), weight(params, 'lora_b')
  np.testing.assert_allclose(
    merged_kernel(params), kernel + 2 * a @ b, rtol=1e-5, atol=1e-5
  )


def test_an_adapter_of_kernel_and_bias_is_stacked_too():
  params, kernel = stacked_params(3)
  bias = weight(params, 'bias')
  params = surgery.attach(params, Scale(), to='**', stacked=1, host=HOST)
  merged = surgery.merge(params, host=HOST)
  scale = np.arange(1.0, 5)
  np.testing.assert_allclose(
    merged[('net', 'layer', 'kernel')].value, kernel * scale, rtol=1e-6
  )
  np.testing.assert_allclose(
    merged[('net', 'layer', 'bias')].value, bias * scale, rtol=1e-6
  )


@pytest.mark.parametrize(
  'how',
  [{'stacked': 1}, {'layout': 'sio'}, {'layout': {'**/kernel': 'sio'}}],
)
def test_a_bias_is_stacked_as_its_kernel_is(how):
  params, kernel = stacked_params(3)
  params = surgery.attach(params, Scale(), to='**', host=HOST, **how)
  assert (3, 4) == weight(params, 'scale').shape
  bias = surgery.merge(params, host=HOST)[('net', 'layer', 'bias')].value
  np.testing.assert_allclose(
    bias, weight(params, 'bias') * np.arange(1.0, 5), rtol=1e-6
  )


def test_a_bias_that_is_not_stacked_as_its_kernel_is_refused():
  params = single(numbers(3, 4, 5), bias=numbers(5))
  with pytest.raises(
    surgery.SiteError, match=r'bias: its stacked axes are \(5,\), .* \(3,\)'
  ):
    surgery.attach(params, Scale(), to='**', stacked=1, host=HOST)


def test_a_vmap_of_a_scan_gets_what_the_verb_outside_merges():
  layer = bx.Linear(bx.Graph('net').child('layer'), 4, rng=None)
  params, _ = stacked_params(2, 3)
  params = surgery.attach(params, surgery.LoRA(rank=2), to='**', stacked=2)
  params = surgery.attach(
    params, Scale(), to='**', stacked=2, name='scale', host=HOST
  )
  params = randomised(params)

  def call(params):
    body = lambda x, p: (jnp.tanh(layer(p, x)[0]), None)
    return jax.lax.scan(body, jnp.asarray(numbers(2, 4)), params)[0]

  adapted = jax.vmap(call)(params)
  merged = jax.vmap(call)(surgery.merge(params, host=HOST))
  np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-5)
  assert not jnp.allclose(adapted[0], adapted[1])


@pytest.mark.parametrize('by', ['graph', 'stacked', 'layout'])
def test_layers_under_a_scan_get_what_the_verb_outside_merges(by):
  graph = bx.Graph('net')
  layer = bx.Linear(graph.child('layer'), 4, rng=None)
  params, _ = stacked_params(3)
  how = {
    'graph': {'graph': graph},
    'stacked': {'stacked': 1},
    'layout': {'layout': {'**/kernel': 'sio', '**/bias': 'so'}},
  }[by]
  params = randomised(
    surgery.attach(params, surgery.LoRA(rank=2), to='**', **how)
  )

  def body(x, params):
    y, _ = layer(params, x)
    return jax.nn.relu(y), None

  x = jnp.asarray(numbers(2, 4))
  adapted, _ = jax.lax.scan(body, x, params)
  merged, _ = jax.lax.scan(body, x, surgery.merge(params))
  np.testing.assert_allclose(adapted, merged, rtol=1e-5, atol=1e-6)


def test_members_of_an_ensemble_get_what_the_verb_outside_merges():
  graph = bx.Graph('net')
  rng = bx.Rng(graph.child('rng'))
  layer = bx.Linear(graph.child('layer'), 4, rng=rng)
  x = jnp.asarray(numbers(2, 4))

  def made(seed):
    _, params = layer(rng.seed(bx.Params(), seed=seed), x)
    return params.locked()

  params = jax.vmap(made)(jax.random.split(jax.random.key(0), 3))
  params = randomised(
    surgery.attach(params, surgery.LoRA(rank=2), to='**', graph=graph)
  )
  assert (3, 4, 2) == params[('net', 'layer', 'lora_a')].value.shape
  call = jax.vmap(lambda p: layer(p, x)[0])
  np.testing.assert_allclose(
    call(params), call(surgery.merge(params)), rtol=1e-5, atol=1e-6
  )


def test_weights_that_are_not_stacked_along_are_refused():
  params, _ = stacked_params(3)
  params = surgery.attach(
    params, surgery.LoRA(rank=2), to='**', stacked=1
  ).unlocked()
  path = ('net', 'layer', 'lora_a')
  params[path] = params[path].replace(value=params[path].value[0])
  layer = bx.Linear(bx.Graph('net').child('layer'), 4, rng=None)
  with pytest.raises(
    surgery.SiteError, match=r'lora_a has 0 stacked axes, .* has 1'
  ):
    layer(params.locked(), jnp.ones((2, 4)))
