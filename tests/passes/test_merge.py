"""Merging in memory and in files gives the same bits, however large."""

from __future__ import annotations

import blox as bx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import surgery
from surgery.adapting.attachment import attach
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
)
from surgery.model.grid import (
  BLOCK,
)
from surgery.passes.merge import merge
from tests.live import models

DTYPES = {
  'float32': np.float32,
  'bfloat16': ml_dtypes.bfloat16,
  'float16': np.float16,
}
# One below the size of a block, the others of several; with a short last one.
SHAPES = {
  'small': (60, 40),
  'rows': (3000, 701),
  'wide rows': (3, BLOCK + 5),
  'convolution': (3, 3, 300, 501),
}
LORA = surgery.LoRA(rank=3, alpha=6)


def model(shape, dtype, adapter=LORA, more=None, seed=0):
  """A model with adapters whose weights are not zero, in memory."""
  rng = np.random.default_rng(seed)
  value = rng.normal(size=shape).astype(DTYPES[dtype])
  params = bx.Params()
  params['net', 'layer', 'kernel'] = bx.Param(jnp.asarray(value))
  params = surgery.attach(params.locked(), adapter, to='**', name='one')
  if more is not None:
    params = surgery.attach(params, more, to='**', name='two')
  return models.stirred(params, size=0.1)


def bits(value):
  return np.asarray(value).tobytes()


def from_file(tmp_path, params, names=None):
  """Returns the merged kernel by way of files."""
  source, target = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  surgery.save(source, params)
  merge(surgery.open(source), names, host=surgery.default_host()).write(target)
  return surgery.open(target)['net', 'layer', 'kernel'].load()


class Layer(bx.Module):
  """Gives its kernel as it gets it."""

  def __call__(self, params):
    return self.get_param(params, 'kernel', (), jax.nn.initializers.zeros)[0]


LAYER = Layer(bx.Graph('net').child('layer'))


def seen(params):
  """Returns the kernel as a layer gets it."""
  return LAYER(params)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', SHAPES)
def test_seen_merged_and_merged_in_a_file_are_the_same_bits(
  tmp_path, shape, dtype
):
  params = model(SHAPES[shape], dtype)
  live = bits(seen(params))
  assert live == bits(seen(surgery.merge(params)))
  assert live == bits(from_file(tmp_path, params))


@pytest.mark.parametrize('dtype', DTYPES)
def test_two_adapters_on_a_large_layer_are_the_same_bits(tmp_path, dtype):
  params = model((3000, 701), dtype, more=surgery.LoRA(rank=2))
  live = bits(seen(params))
  assert live == bits(seen(surgery.merge(params)))
  assert live == bits(from_file(tmp_path, params))


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_large_merged_kernel_is_what_numpy_computes(tmp_path, dtype):
  params = model((3000, 701), dtype)
  stored = surgery.detach(params)['net', 'layer', 'kernel'].value
  a, b = (
    np.asarray(param.value, np.float64)
    for path, param in sorted(params.items())
    if models.is_weight(path, param)
  )
  wanted = np.asarray(stored, np.float64) + 2 * a @ b
  found = np.asarray(from_file(tmp_path, params), np.float64)
  eps = {'float32': 1e-6, 'float16': 2**-10, 'bfloat16': 2**-7}[dtype]
  np.testing.assert_allclose(wanted, found, rtol=eps, atol=eps)


def test_a_large_merge_reads_its_file_in_blocks():
  shape = (4, BLOCK)
  asked = []
  value = np.ones(shape, np.float32)

  def part(index):
    asked.append(value[index].size)
    return value[index]

  def load():
    raise AssertionError('read whole')

  leaf = Leaf(load, shape, 'float32', part=part)
  ckpt = Checkpoint({('layer', 'kernel'): leaf})
  host = surgery.default_host()
  merged = merge(attach(ckpt, LORA, to='**', host=host), host=host)
  found = [part.shape for part in merged['layer', 'kernel'].parts()]
  assert [(1, BLOCK)] * 4 == found
  assert [BLOCK] * 4 == asked


def test_a_block_that_is_not_finite_is_an_error_that_names_the_parameter(
  tmp_path,
):
  params = model((3000, 701), 'float32')
  weights, rest = params.split(models.is_weight)
  weights = jax.tree.map(lambda w: w.at[-1, -1].set(jnp.inf), weights)
  params = weights.merge(rest)
  source, target = tmp_path / 'in.msgpack', tmp_path / 'out.msgpack'
  surgery.save(source, params)
  merged = merge(surgery.open(source), host=surgery.default_host())
  with pytest.raises(
    surgery.SiteError,
    match=r'net/layer/kernel: the merged parameter has NaN or infinity, first inf at index \[0, 700\]; '
    r"nothing .*lora_a.one of adapter 'one' has NaN or infinity",
  ):
    merged.write(target)
  assert [source] == list(tmp_path.iterdir())


@pytest.mark.parametrize('shape', [(3000, 701), (4, 5)])
def test_what_is_infinite_in_the_base_is_not_blamed_on_the_adapter(shape):
  weights, rest = model(shape, 'float32').split(models.is_weight)
  last = tuple(n - 1 for n in shape)
  rest = jax.tree.map(
    lambda w: w.at[last].set(-jnp.inf) if w.shape == shape else w, rest
  )
  with pytest.raises(
    surgery.SiteError,
    match=rf'-inf at index \[{last[0]}, {last[1]}\]; .* The base has NaN or '
    'infinity itself, before any adapter',
  ):
    surgery.merge(weights.merge(rest))
  merged = surgery.merge(weights.merge(rest), check_finite=False)
  assert -np.inf == merged['net', 'layer', 'kernel'].value[last]


def test_a_merge_that_is_too_large_says_so():
  weights, rest = model((4, 5), 'float32').split(models.is_weight)
  weights = jax.tree.map(lambda w: jnp.full_like(w, 1e30), weights)
  with pytest.raises(
    surgery.SiteError, match="'one' makes of them is too large for float32"
  ):
    surgery.merge(weights.merge(rest))


def test_jit_sees_the_large_parameter_within_rounding():
  # A traced parameter is computed whole, as a part of the user's program.
  params = model((3000, 701), 'float32')
  traced = jax.jit(seen)(params)
  np.testing.assert_allclose(seen(params), traced, rtol=1e-6, atol=1e-6)
