"""A float64 base stays one, whatever JAX's configuration is."""

import blox as bx
import numpy as np
import pytest

import surgery
from surgery.model.checkpoint import Checkpoint, Leaf

BASE = np.random.default_rng(0).normal(size=(6, 4))
LARGE = (1100, 1000)  # More than a block.


def file_of(path, base):
  leaves: dict[tuple[str, ...], Leaf] = {
    ('l', 'kernel'): Leaf(lambda: base, base.shape, 'float64')
  }
  Checkpoint(leaves).write(path)
  return surgery.open(path)


def trained(model):
  """The model with a LoRA whose second factor is not zero."""
  leaves = dict(model)
  b = np.random.default_rng(1).normal(size=model['l', 'lora_b'].shape)
  b = b.astype(np.float32)
  leaves['l', 'lora_b'] = leaves['l', 'lora_b'].replace(load=lambda: b)
  return model.replace(leaves=leaves), b


@pytest.mark.parametrize('shape', [(6, 4), LARGE])
@pytest.mark.parametrize('suffix', ['.msgpack', '.safetensors'])
def test_a_lora_is_merged_into_a_float64_file(suffix, shape, tmp_path):
  base = np.random.default_rng(0).normal(size=shape)
  model = file_of(tmp_path / f'm{suffix}', base)
  adapted = surgery.attach(model, surgery.LoRA(rank=2, alpha=2.0), to='l')
  adapted, b = trained(adapted)
  adapted.write(tmp_path / f'a{suffix}')

  surgery.merge(surgery.open(tmp_path / f'a{suffix}')).write(
    tmp_path / f'o{suffix}'
  )

  found = surgery.open(tmp_path / f'o{suffix}')['l', 'kernel'].load()
  a = np.asarray(adapted['l', 'lora_a'].load(), np.float64)
  assert 'float64' == found.dtype
  # The product is float32's, the sum float64's.
  np.testing.assert_allclose(base + a @ b, found, rtol=0, atol=1e-5)
  untouched = surgery.merge(
    surgery.attach(model, surgery.LoRA(rank=2), to='l')
  )['l', 'kernel'].load()
  assert base.tobytes() == np.asarray(untouched).tobytes()


def test_params_answer_and_merge_in_float64():
  params = bx.Params()
  params['l', 'kernel'] = bx.Param(BASE)
  adapted = surgery.attach(params.locked(), surgery.LoRA(rank=2), to='l')

  merged = surgery.merge(adapted)

  assert BASE.tobytes() == np.asarray(merged['l', 'kernel'].value).tobytes()


def test_numbers_beyond_float32_are_finite(tmp_path):
  model = file_of(tmp_path / 'm.msgpack', BASE * 1e200)

  merged = surgery.merge(surgery.attach(model, surgery.LoRA(rank=2), to='l'))

  assert (BASE * 1e200).tobytes() == merged['l', 'kernel'].load().tobytes()
