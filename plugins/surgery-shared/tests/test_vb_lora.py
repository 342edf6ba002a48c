import blox as bx
import jax.numpy as jnp
import numpy as np
import pytest
from surgery_shared import VBLoRA

import surgery

# Made with PEFT 0.21.2 on torch 2.13.0.
pytestmark = pytest.mark.peft('vb_lora')

LAYERS = ('hidden0', 'hidden1', 'output')
BANK = ('surgery.default', 'vector_bank')


def attached(net, **options):
  adapter = VBLoRA(rank=4, num_vectors=12, vector_length=2, **options)
  return surgery.attach(net.params, adapter, to='**')


def test_it_equals_peft(net):
  assert (4, 12, 2, 3) == tuple(
    net.config[k] for k in ('r', 'num_vectors', 'vector_length', 'topk')
  )
  values = {BANK: net.weights['base_model.vblora_vector_bank']}
  for layer in LAYERS:
    theirs = net.of_layer(layer)
    values[net.path(layer, 'logits_a')] = theirs['vblora_logits_A']
    values[net.path(layer, 'logits_b')] = theirs['vblora_logits_B']
  net.assert_equals_peft(net.written(attached(net, topk=3), values))


def test_pieces_are_mixtures_of_the_largest_as_in_the_paper():
  params = bx.Params()
  params[('a', 'kernel')] = bx.Param(jnp.zeros((2, 3, 4)))
  adapter = VBLoRA(rank=2, num_vectors=7, vector_length=2, topk=3)
  params = surgery.attach(params.locked(), adapter, to='a', seed=4)
  bank, a, b = (
    np.asarray(params[p].value, np.float64)
    for p in (BANK, ('a', 'logits_a'), ('a', 'logits_b'))
  )
  assert ((7, 2), (2, 3, 7), (2, 2, 7)) == (bank.shape, a.shape, b.shape)

  def piece(logits):
    largest = sorted(range(7), key=lambda n: -logits[n])[:3]
    shares = np.exp([logits[n] for n in largest])
    return (
      sum(share * bank[n] for share, n in zip(shares, largest, strict=True))
      / shares.sum()
    )

  update = np.zeros((6, 4))
  for r in range(2):
    column = np.concatenate([piece(a[r, n]) for n in range(3)])
    row = np.concatenate([piece(b[n, r]) for n in range(2)])
    update += np.outer(column, row)
  kernel = surgery.merge(params)[('a', 'kernel')].value
  np.testing.assert_allclose(kernel.reshape(6, 4), update, rtol=1e-5, atol=1e-8)


def test_it_begins_near_the_base_and_not_as_it(net):
  params = attached(net)
  assert np.abs(params[BANK].value).max() <= 0.02
  apart = np.abs(net.output(params) - net.output(net.params)).max()
  assert 0 < apart < 0.02


def test_what_does_not_fit_is_refused(net):
  attach = lambda to, **options: surgery.attach(
    net.params, VBLoRA(num_vectors=12, **options), to=to
  )
  with pytest.raises(
    surgery.SiteError,
    match=r'output/kernel: vector_length 4 does not .* 10 outputs.*\[1, 2\]',
  ):
    attach('**', vector_length=4)
  with pytest.raises(
    surgery.SiteError, match=r'output/kernel: rank 11 exceeds .* 32×10.*most 10'
  ):
    attach('**', vector_length=2, rank=11)
  with pytest.raises(surgery.ConfigError, match='at most the 12 vectors'):
    VBLoRA(num_vectors=12, topk=13)
  with pytest.raises(surgery.ConfigError, match="sets 'vector_length', which"):
    VBLoRA(patterns={'**/output': {'vector_length': 2}})
