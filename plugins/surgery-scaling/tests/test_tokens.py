"""Trainable tokens: rows of embeddings, and of nothing else."""

import json

import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_scaling import TrainableTokens

import surgery


@pytest.fixture
def params():
  params = bx.Params()
  table = jnp.arange(24.0).reshape(6, 4)
  params['net', 'emb', 'embedding'] = bx.Param(table)
  params['net', 'conv', 'kernel'] = bx.Param(jnp.ones((3, 2, 4)))
  return params.locked()


def test_named_rows_are_replaced_and_others_stay(params):
  params = surgery.attach(params, TrainableTokens(tokens=(4, 1)), to='**/emb')
  rows = jnp.asarray([[9.0] * 4, [8.0] * 4])
  site = ('net', 'emb', 'embedding')
  params = surgery.with_weights(params, 'default', {site: {'token_rows': rows}})
  expected = np.arange(24.0).reshape(6, 4)
  expected[4], expected[1] = 9, 8
  np.testing.assert_array_equal(surgery.merge(params)[site].value, expected)


@pytest.mark.parametrize('tokens', [(), (6,), (-1,), (2, 2)])
def test_rows_that_are_not_there_are_refused(params, tokens):
  with pytest.raises(
    surgery.SiteError, match=r'net/emb/embedding: .* below 6, found tokens='
  ):
    surgery.attach(params, TrainableTokens(tokens=tokens), to='**/emb')


def test_a_layer_that_looks_nothing_up_is_refused(params):
  with pytest.raises(surgery.SiteError, match='expected one, of rows'):
    surgery.attach(params, TrainableTokens(tokens=(1,)), to='net/conv')


def test_one_of_ours_is_written_and_read_again(params, tmp_path):
  adapted = surgery.attach(params, TrainableTokens(tokens=(4, 1)), to='**/emb')
  site = ('net', 'emb', 'embedding')
  adapted = surgery.with_weights(
    adapted, 'default', {site: {'token_rows': jnp.ones((2, 4))}}
  )
  surgery.save_adapter(tmp_path / 'out', adapted, format='peft')
  said = json.loads((tmp_path / 'out/adapter_config.json').read_text())
  assert said['peft_type'] == 'TRAINABLE_TOKENS'
  assert said['token_indices'] == [4, 1]
  assert said['target_modules'] == ['net.emb']
  again = surgery.load_adapter(tmp_path / 'out', params)
  np.testing.assert_array_equal(
    surgery.merge(again)[site].value, surgery.merge(adapted)[site].value
  )


def test_rows_of_a_matrix_have_no_folder(params, tmp_path):
  params = params.unlocked()
  params['net', 'fc', 'kernel'] = bx.Param(jnp.ones((6, 4)))
  adapted = surgery.attach(
    params.locked(), TrainableTokens(tokens=(1,)), to='**/fc'
  )
  with pytest.raises(surgery.SiteError, match='PEFT trains rows of embeddings'):
    surgery.save_adapter(tmp_path / 'out', adapted, format='peft')


def test_what_was_trained_along_has_no_folder(params, tmp_path):
  adapted = surgery.attach(params, TrainableTokens(tokens=(1,)), to='**/emb')
  with pytest.raises(
    surgery.FormatError, match=r'conv: .*no modules with TRAIN'
  ):
    surgery.save_adapter(
      tmp_path / 'out', adapted, format='peft', modules_to_save='**/conv'
    )
