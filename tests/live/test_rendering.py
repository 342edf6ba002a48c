"""What notebooks show."""

import re

import blox as bx
import jax.numpy as jnp
import pytest

import surgery

# treescope asks numpy for a class that newer releases are rid of.
pytestmark = pytest.mark.filterwarnings(
  'ignore:The chararray class is deprecated:DeprecationWarning'
)


@pytest.fixture
def params():
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.ones((4, 3)))
  params['net', 'layer', 'bias'] = bx.Param(jnp.zeros(3), trainable=False)
  return surgery.attach(params.locked(), surgery.LoRA(rank=1), to='net/layer')


def text(html):
  return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', html))


def test_params_show_flags_and_adapters_beside_arrays(params):
  shown = params._repr_html_()
  assert 'AdaptedParams: 4 parameters, default' in shown
  assert 'treescope' in shown
  plain = str(text(shown))
  assert 'AdaptedParams' in plain


def test_params_of_which_one_lies_beneath_another_show_too(params):
  data = dict(params.items())
  nested = bx.Params()
  for path, param in data.items():
    nested[path] = param
  nested['net', 'layer', 'bias', 'scale'] = bx.Param(jnp.ones(3))
  adapted = surgery.attach(
    surgery.detach(params).unlocked(),
    surgery.LoRA(rank=1),
    to='net/layer/kernel',
  )
  adapted['net', 'layer', 'bias', 'scale'] = bx.Param(jnp.ones(3))
  assert 'AdaptedParams: 5 parameters' in adapted._repr_html_()


def test_a_selection_is_a_table_of_escaped_paths(params):
  params = surgery.rename(params, 'net/layer -> a&b')
  shown = surgery.select(params, '**/bias')._repr_html_()
  assert 'Selection: 1 of 4' in shown
  assert '<td>a&amp;b/bias</td><td>float32[3]</td>' in shown


def test_an_explanation_says_why_a_parameter_is_dense(params):
  class Exponential(bx.Module):
    def __call__(self, params, x):
      kernel, params = self.get_param(params, 'kernel')
      return x @ jnp.exp(kernel), params

  model = Exponential(bx.Graph('net').child('layer'))
  shown = surgery.explain(model, params, jnp.ones((2, 4)))._repr_html_()
  assert (
    '<td>net/layer/kernel</td><td>dense</td><td>0</td><td>exp (1)</td>' in shown
  )


def test_a_plan_shows_each_tensor_of_each_output(params, tmp_path):
  surgery.save(tmp_path / 'm.msgpack', params)
  recipe = surgery.Recipe([{'merge': {}}])
  plan = recipe.plan(model=tmp_path / 'm.msgpack', out=tmp_path / 'out.msgpack')
  shown = plan._repr_html_()
  assert 'out.msgpack: about' in shown
  assert '<td>net/layer/kernel</td>' in shown
  assert '<td>lora_a</td>' not in shown
