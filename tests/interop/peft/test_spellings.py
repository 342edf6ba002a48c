"""Single files as kohya's scripts, ComfyUI and diffusers write them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

NAMES = {
  'linear': 'down_blocks.0.attentions.1.to_q',
  'wide': 'mid_block.ff.net.0.proj',
  'conv': 'down_blocks.0.resnets.0.conv_1',
}
SHAPES = {'linear': (12, 8), 'wide': (20, 8), 'conv': (6, 4, 3, 3)}
RANKS = {'linear': 4, 'wide': 2, 'conv': 3}
ALPHAS = {'linear': 2.0, 'wide': 2.0, 'conv': 6.0}


@pytest.fixture
def draw():
  rng = np.random.default_rng(0)
  return lambda *shape: rng.standard_normal(shape).astype('float32')


@pytest.fixture
def base(draw, tmp_path):
  tensors = {f'{NAMES[k]}.weight': draw(*SHAPES[k]) for k in NAMES}
  tensors['conv_in.weight'] = draw(4, 4, 3, 3)
  save_file(tensors, tmp_path / 'unet.safetensors')
  return tensors


@pytest.fixture
def factors(draw):
  found = {}
  for kind, (out, *inputs) in SHAPES.items():
    rank = RANKS[kind]
    taps = (1,) * (len(inputs) - 1)
    found[kind] = draw(rank, *inputs), draw(out, rank, *taps)
  return found


def updated(base, factors, alphas=None):
  """The base with each product added, scaled by alpha / rank."""
  found = dict(base)
  for kind, (down, up) in factors.items():
    rank = RANKS[kind]
    update = up.reshape(len(up), rank) @ down.reshape(rank, -1)
    scale = 1 if alphas is None else alphas[kind] / rank
    name = f'{NAMES[kind]}.weight'
    found[name] = base[name] + scale * update.reshape(SHAPES[kind])
  return found


def merged(surgery_cli, tmp_path, tensors, metadata=None, options=()):
  save_file(tensors, tmp_path / 'lora.safetensors', metadata=metadata)
  out = tmp_path / 'out.safetensors'
  result = surgery_cli(
    *('merge', tmp_path / 'unet.safetensors'),
    *('--with', tmp_path / 'lora.safetensors', '-o', out, *options),
  )
  return result, load_file(out) if result.code == 0 else None


def close(expected, found):
  assert found is not None
  assert set(expected) == set(found)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)


def kohya(factors, alphas=ALPHAS, front='lora_unet_'):
  tensors = {}
  for kind, (down, up) in factors.items():
    name = front + NAMES[kind].replace('.', '_')
    tensors[f'{name}.lora_down.weight'] = down
    tensors[f'{name}.lora_up.weight'] = up
    if alphas is not None:
      tensors[f'{name}.alpha'] = np.array(alphas[kind], 'float32')
  return tensors


def test_kohya_is_scaled_by_its_alphas(surgery_cli, tmp_path, base, factors):
  result, found = merged(surgery_cli, tmp_path, kohya(factors))
  assert result.code == 0, result.err
  close(updated(base, factors, ALPHAS), found)


def test_without_alphas_the_scale_is_one(surgery_cli, tmp_path, base, factors):
  result, found = merged(surgery_cli, tmp_path, kohya(factors, None))
  assert result.code == 0, result.err
  close(updated(base, factors), found)


@pytest.mark.parametrize('front', ['unet.', '', 'base_model.model.'])
@pytest.mark.parametrize(
  ('down', 'up'),
  [
    ('lora_A.weight', 'lora_B.weight'),
    ('lora.down.weight', 'lora.up.weight'),
  ],
)
def test_diffusers(surgery_cli, tmp_path, base, factors, front, down, up):
  tensors = {}
  for kind, (a, b) in factors.items():
    tensors[f'{front}{NAMES[kind]}.{down}'] = a
    tensors[f'{front}{NAMES[kind]}.{up}'] = b
  result, found = merged(surgery_cli, tmp_path, tensors)
  assert result.code == 0, result.err
  close(updated(base, factors), found)


def test_metadata_of_diffusers_says_the_scale(
  surgery_cli, tmp_path, base, factors
):
  tensors = {}
  for kind, (a, b) in factors.items():
    tensors[f'unet.{NAMES[kind]}.lora_A.weight'] = a
    tensors[f'unet.{NAMES[kind]}.lora_B.weight'] = b
  said = {
    'unet.r': 4,
    'unet.lora_alpha': 8,
    'unet.rank_pattern': {'proj': 2, 'conv_1': 3},
    'unet.alpha_pattern': {},
    'unet.target_modules': ['to_q'],
  }
  result, found = merged(
    *(surgery_cli, tmp_path, tensors),
    {'lora_adapter_metadata': json.dumps(said)},
  )
  assert result.code == 0, result.err
  close(updated(base, factors, dict.fromkeys(NAMES, 8.0)), found)


def test_half_precision_and_a_prefixed_base(
  surgery_cli, tmp_path, base, factors
):
  prefixed = {f'model.diffusion_model.{k}': v for k, v in base.items()}
  save_file(prefixed, tmp_path / 'unet.safetensors')
  tensors = {
    name: value.astype(ml_dtypes.bfloat16)
    for name, value in kohya(factors).items()
  }
  result, found = merged(surgery_cli, tmp_path, tensors)
  assert result.code == 0, result.err
  rounded = {
    kind: tuple(m.astype(ml_dtypes.bfloat16).astype('float32') for m in both)
    for kind, both in factors.items()
  }
  expected = updated(base, rounded, ALPHAS)
  close({f'model.diffusion_model.{k}': v for k, v in expected.items()}, found)


def test_it_becomes_a_folder_of_peft(surgery_cli, tmp_path, base, factors):
  save_file(kohya(factors), tmp_path / 'lora.safetensors')
  adapted, out = tmp_path / 'adapted.safetensors', tmp_path / 'folder'
  unet = tmp_path / 'unet.safetensors'
  result = surgery_cli(
    *('attach', unet, '--from', tmp_path / 'lora.safetensors', '-o', adapted)
  )
  assert result.code == 0, result.err
  result = surgery_cli('extract', adapted, '--to', 'peft', '-o', out)
  assert result.code == 0, result.err
  found = load_file(out / 'adapter_model.safetensors')
  name = f'base_model.model.{NAMES["linear"]}.lora_A.weight'
  np.testing.assert_array_equal(found[name], factors['linear'][0])
  again = tmp_path / 'again.safetensors'
  assert surgery_cli('merge', unet, '--with', out, '-o', again).code == 0
  close(updated(base, factors, ALPHAS), load_file(again))


@pytest.mark.parametrize(
  ('extra', 'message'),
  [
    ({'lora_unet_nowhere.lora_down.weight': (4, 8)}, 'nowhere'),
    ({'lora_unet_conv_in.lora_mid.weight': (4, 4, 3, 3)}, 'lora_mid'),
    ({'lora_unet_conv_in.diff': (4, 4, 3, 3)}, 'diff'),
    ({'lora_unet_conv_in.alpha': ()}, 'conv_in.alpha'),
    (
      {'lora_te_text_model_fc1.lora_down.weight': (4, 8)},
      'several models, lora_te and lora_unet',
    ),
    (
      {'lora_unet_conv_in.hada_w1_a': (4, 4)},
      'LOHA and LORA in one file',
    ),
  ],
)
def test_what_finds_no_place_is_named(
  surgery_cli, tmp_path, base, factors, extra, message
):
  more = {name: np.ones(shape, 'f4') for name, shape in extra.items()}
  result, _ = merged(surgery_cli, tmp_path, {**kohya(factors), **more})
  assert result.code != 0
  assert message in result.err


@pytest.mark.parametrize('alpha', [np.nan, np.inf, -1.0, 0.0])
def test_an_alpha_that_is_none_is_refused(
  surgery_cli, tmp_path, base, factors, alpha
):
  wrong = {**ALPHAS, 'linear': alpha}
  result, _ = merged(surgery_cli, tmp_path, kohya(factors, wrong))
  assert result.code != 0
  assert 'alpha' in result.err


def test_two_layers_of_one_underscored_name_are_not_guessed(
  surgery_cli, tmp_path, base, factors
):
  twice = {
    **base,
    'down_blocks.0.attentions_1.to_q.weight': base[f'{NAMES["linear"]}.weight'],
  }
  save_file(twice, tmp_path / 'unet.safetensors')
  result, _ = merged(surgery_cli, tmp_path, kohya(factors))
  assert result.code != 0
  assert 'may be down_blocks.0.attentions.1.to_q or' in result.err


def test_a_model_is_no_adapter(surgery_cli, tmp_path, base):
  result, _ = merged(surgery_cli, tmp_path, base)
  assert 'not the file of an adapter' in result.err
