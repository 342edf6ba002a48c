"""LoHa and LoKr in folders that PEFT wrote."""

import json

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_products import LoHa, LoKr

import surgery


@pytest.mark.parametrize(
  'name',
  [
    'loha',
    'lokr',
    'net/large_rank_loha',
    'variants/loha_conv',
    'variants/lokr',
    'variants/lokr_conv',
    'conv/loha_groups',
    'conv/lokr_both',
    'conv/lokr_conv',
    'conv/lokr_conv_whole',
  ],
)
def test_a_folder_is_merged_and_written_as_peft_does(folder, name):
  folder(name).check()


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('variants/loha_effective', 'products of four matrices'),
  ],
)
def test_what_the_types_cannot_do_is_refused(folder, name, message):
  with pytest.raises(surgery.SurgeryError, match=message):
    folder(name).merged_file()


@pytest.mark.peft('loha')
@pytest.mark.parametrize(
  'adapter',
  [
    LoHa(rank=2, alpha=3, patterns={'**/hidden1': {'rank': 3}}),
    LoKr(rank=2, alpha=3),
  ],
)
def test_an_adapter_of_ours_is_written_and_read_again(net, adapter, tmp_path):
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  weights = surgery.weights(params)
  weights = {
    s: {n: w + 0.1 for n, w in some.items()} for s, some in weights.items()
  }
  params = surgery.with_weights(params, 'default', weights)
  surgery.save_adapter(tmp_path / 'out', params, format='peft')
  config = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert adapter.name.upper() == config['peft_type']
  again = surgery.load_adapter(tmp_path / 'out', net.params)
  np.testing.assert_array_equal(net.output(again), net.output(params))


@pytest.mark.peft('loha')
@pytest.mark.parametrize(
  ('adapter', 'message'),
  [
    (LoKr(rank=2, factor=16), 'Attach it with factor_first=True'),
    (
      LoKr(rank=2, patterns={'**/hidden1': {'both': True}}),
      'of decompose_both',
    ),
  ],
)
def test_products_that_peft_cuts_otherwise_have_no_folder(
  net, adapter, message, tmp_path
):
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  with pytest.raises(surgery.SurgeryError, match=message):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')


@pytest.mark.parametrize('layout', ['oiii', 'iiio'])
def test_a_convolution_of_ours_is_cut_as_peft_cuts_it(layout, tmp_path):
  params = bx.Params()
  shape = (8, 4, 3, 3) if layout == 'oiii' else (3, 3, 4, 8)
  params['conv', 'kernel'] = bx.Param(jnp.zeros(shape))
  adapter = LoKr(
    rank=1, alpha=3, factor=4, both=True, taps=True, factor_first=True
  )
  params = surgery.attach(params.locked(), adapter, to='conv', layout=layout)
  rng = np.random.default_rng(0)
  weights = {
    s: {n: jnp.asarray(rng.standard_normal(w.shape)) for n, w in some.items()}
    for s, some in surgery.weights(params).items()
  }
  params = surgery.with_weights(params, 'default', weights)
  [one] = weights.values()
  assert set(one) == {'w1_a', 'w1_b', 'w2'}
  small = np.asarray(one['w1_a'] @ one['w1_b'])  # (4, 4)
  large = np.asarray(one['w2']).reshape(1, 3, 3, 2)
  expected = 3 * np.einsum('io,jhwp->ijhwop', small, large)
  expected = expected.reshape(4, 3, 3, 8)
  order = (3, 0, 1, 2) if layout == 'oiii' else (1, 2, 0, 3)
  np.testing.assert_allclose(
    surgery.merge(params)['conv', 'kernel'].value,
    expected.transpose(order),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.peft('loha')
def test_factors_that_differ_have_no_folder(net, tmp_path):
  adapter = LoKr(rank=2, patterns={'**/hidden1': {'factor': 2}})
  params = surgery.attach(net.params, adapter, to='**/hidden*')
  with pytest.raises(surgery.ConfigError, match='decompose_factor for all'):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')


@pytest.mark.parametrize(
  ('name', 'names', 'alphas'),
  [
    (
      'variants/loha_conv',
      ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'),
      {'conv': 5, 'point': 5, 'fc0': 5},
    ),
    (
      'variants/lokr',
      ('lokr_w1', 'lokr_w2_a', 'lokr_w2_b'),
      {'fc0': 3, 'fc1': 3},
    ),
    ('loha', ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'), None),
  ],
)
def test_a_single_file_is_merged_as_peft_does(folder, name, names, alphas):
  layers = ('mlp.hidden0', 'mlp.hidden1', 'mlp.output')
  roles = {one: one for one in names}
  folder(name).as_single_file(roles, alphas or dict.fromkeys(layers, 8))


def test_matrices_of_conv1d_have_no_folder(tmp_path):
  params = bx.Params()
  params['h', 'c_fc', 'weight'] = bx.Param(jnp.ones((8, 6)))
  params = surgery.attach(
    params.locked(), LoHa(rank=2), to='**/c_fc', layout='io'
  )
  with pytest.raises(surgery.FormatError, match='no LOHA for matrices'):
    surgery.save_adapter(tmp_path / 'out', params, format='peft')
