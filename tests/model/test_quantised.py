"""Files with codes of quantised weights are never taken for numbers."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import surgery
from surgery.host.manager import default_host
from surgery.model import quantised
from surgery.model.checkpoint import Leaf
from surgery.naming import paths
from surgery.naming.paths import Path
from surgery.recipes.recipe import Recipe

F8 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(0)


def codes(shape, dtype):
  return RNG.integers(1, 100, shape).astype(dtype)


def scales(*shape):
  return RNG.uniform(0.01, 0.02, shape).astype(np.float32)


def _fp8_block():
  return {
    'l.weight': codes((8, 8), np.uint8).view(F8),
    'l.weight_scale_inv': scales(2, 2),
  }


def _fp8_static():
  return {
    'l.weight': codes((8, 8), np.uint8).view(F8),
    'l.weight_scale': scales(),
    'l.input_scale': scales(),
  }


def _int8():
  return {'l.weight': codes((8, 8), np.int8), 'l.weight_scale': scales(8, 1)}


def _packed():
  return {
    'l.weight_packed': codes((8, 1), np.int32),
    'l.weight_scale': scales(8, 1).astype(ml_dtypes.bfloat16),
    'l.weight_shape': np.array([8, 8]),
  }


def _nvfp4():
  return {
    'l.weight': codes((8, 4), np.uint8),
    'l.weight_scale': codes((8, 1), np.uint8).view(F8),
    'l.weight_scale_2': scales(),
    'l.input_scale': scales(),
  }


def _nf4():
  return {
    'l.weight': codes((32, 1), np.uint8),
    'l.weight.absmax': codes((4,), np.uint8),
    'l.weight.quant_map': scales(16),
    'l.weight.nested_absmax': scales(1),
    'l.weight.nested_quant_map': scales(256),
    'l.weight.quant_state.bitsandbytes__nf4': codes((90,), np.uint8),
  }


def _int8_bitsandbytes():
  return {
    'l.weight': codes((8, 8), np.int8),
    'l.SCB': scales(8),
    'l.weight_format': np.zeros((), np.uint8),
  }


def _gptq():
  return {
    'l.qweight': codes((1, 8), np.int32),
    'l.qzeros': codes((1, 1), np.int32),
    'l.scales': scales(1, 8).astype(np.float16),
    'l.g_idx': np.zeros(8, np.int32),
  }


def _awq():
  return {
    'l.qweight': codes((8, 1), np.int32),
    'l.qzeros': codes((1, 1), np.int32),
    'l.scales': scales(1, 8).astype(np.float16),
  }


def _mxfp4():
  return {
    'l.gate_up_proj_blocks': codes((2, 8, 1, 16), np.uint8),
    'l.gate_up_proj_scales': codes((2, 8, 1), np.uint8),
    'l.gate_up_proj_bias': scales(2, 8),
  }


def _mlx():
  return {
    'l.weight': codes((8, 1), np.uint32),
    'l.scales': scales(8, 1),
    'l.biases': scales(8, 1),
  }


def _qwix():
  return {
    'l.kernel.array.qvalue': codes((8, 8), np.int8),
    'l.kernel.array.scale': scales(1, 8),
  }


def _torchao():
  return {
    'l._weight_qdata': codes((8, 8), np.int8),
    'l._weight_scale': scales(8, 1),
  }


LAYOUTS = {
  f.__name__.strip('_'): f
  for f in (
    _fp8_block,
    _fp8_static,
    _int8,
    _packed,
    _nvfp4,
    _nf4,
    _int8_bitsandbytes,
    _gptq,
    _awq,
    _mxfp4,
    _mlx,
    _qwix,
    _torchao,
  )
}
TORCHAO = {
  'tensor_names': '["l.weight", "l.bias"]',
  'l.weight': '{"_type": "Int8Tensor", "_tensor_data_names": ["qdata"]}',
  'l.bias': '{"_type": "torch.Tensor"}',
}
PLAIN = {'n.weight': np.ones((4, 4), np.float32)}


@pytest.fixture(params=LAYOUTS)
def layout(request):
  return request.param


@pytest.fixture
def file(layout, tmp_path):
  """A file in one of the layouts, with one usual layer beside."""
  path = tmp_path / 'model.safetensors'
  tensors = {**LAYOUTS[layout](), **PLAIN}
  metadata = TORCHAO if layout == 'torchao' else {'format': 'pt'}
  safetensors.numpy.save_file(tensors, path, metadata)
  return path


def group(model):
  """Paths of the parts of the quantised weight."""
  return [path for path, leaf in model.items() if leaf.codes is not None]


def codes_of(model) -> set[Path]:
  """Paths of the tensors with the codes."""
  return {leaf.codes.of for leaf in model.values() if leaf.codes is not None}


def of(leaf: Leaf) -> Path | None:
  """Path of the codes that a tensor belongs to."""
  return None if leaf.codes is None else leaf.codes.of


def test_each_part_is_known(file, layout):
  model = surgery.open(file)
  expected = {
    name for name in LAYOUTS[layout]() if name != 'l.gate_up_proj_bias'
  }

  assert expected == {'.'.join(path) for path in group(model)}
  assert len(codes_of(model)) == 1


STEPS = (
  {'cast': 'bf16'},
  {'cast': 'f64'},
  {'scale': {'select': '{}', 'by': 0.5}},
  {'add': '{} -> {}'},
  {'transpose': {'select': '{}'}},
  {'slice': {'select': '{}', 'keep': 0}},
  {'fill': '{}'},
  {'random': '{}'},
  {'reshape': {'select': '{}', 'shape': [-1]}},
  {'assert': {'finite': '{}'}},
  {'assert': {'zero': '{}'}},
)


@pytest.mark.parametrize('step', STEPS, ids=lambda s: next(iter(s)))
def test_nothing_is_computed_from_codes(step, file, tmp_path):
  model = surgery.open(file)
  out = tmp_path / 'out.safetensors'
  for path in group(model):
    text = json.dumps(step).replace('{}', paths.literal(path))
    try:
      Recipe([json.loads(text)]).run(model=file, out=out, overwrite=True)
    except surgery.SurgeryError:
      assert not out.exists()
      continue
    # Integers and what is bfloat16 already are not cast.
    assert 'cast' in step
    after = surgery.open(out)
    for one in group(model):
      assert model[one].load().tobytes() == after[one].load().tobytes()
    out.unlink()


def test_a_cast_names_the_weight_and_how_it_is_stored(tmp_path):
  path = tmp_path / 'm.safetensors'
  safetensors.numpy.save_file(_fp8_block(), path)

  with pytest.raises(
    surgery.QuantisedError,
    match=r'^cast: l/weight holds codes of a quantised weight \(float8_e4m3fn with '
    r'weight_scale_inv\), not numbers, so nothing can be computed',
  ):
    surgery.cast(surgery.open(path), 'bf16')


def test_a_cast_may_leave_codes_as_they_are(file, tmp_path):
  out = tmp_path / 'out.safetensors'
  model = surgery.open(file)
  kept = [paths.literal(path) for path in group(model)]

  surgery.cast(model, 'bf16', keep=kept).write(out)

  after = surgery.open(out)
  assert after['n', 'weight'].dtype == 'bfloat16'
  assert kept
  for path in group(model):
    assert model[path].load().tobytes() == after[path].load().tobytes()


def test_an_adapter_is_not_attached_to_codes(tmp_path):
  path = tmp_path / 'm.safetensors'
  safetensors.numpy.save_file(_fp8_block(), path)

  with pytest.raises(
    surgery.QuantisedError, match='attach: l/weight holds codes of a quantised'
  ):
    surgery.attach(surgery.open(path), surgery.LoRA(rank=1), to='l')


def test_params_of_codes_take_no_adapter_either(tmp_path):
  path = tmp_path / 'm.safetensors'
  safetensors.numpy.save_file(_fp8_block(), path)
  params = surgery.load(path)

  with pytest.raises(surgery.QuantisedError, match='l/weight holds codes'):
    surgery.attach(params, surgery.LoRA(rank=1), to='l')
  with pytest.raises(surgery.QuantisedError, match='l/weight holds codes'):
    surgery.cast(params, 'bf16')


def test_loading_and_saving_keeps_the_bytes(file, tmp_path):
  model = surgery.open(file)
  out = tmp_path / 'again.safetensors'

  surgery.save(out, surgery.load(file))

  again = surgery.open(out)
  for path in model:
    assert model[path].load().tobytes() == again[path].load().tobytes()
    assert of(model[path]) == of(again[path])


def test_figures_of_codes_are_not_told(tmp_path):
  a, b = tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'
  safetensors.numpy.save_file(_fp8_block(), a)
  safetensors.numpy.save_file(_fp8_block(), b)
  from surgery.looking import diff

  found = diff.diff(surgery.open(a), surgery.open(b), host=default_host())
  [weight, scale] = sorted(found, key=lambda one: one.path)

  assert (None, None) == (weight.figures, scale.figures)
  assert weight.differs()


def test_a_group_is_renamed_together_and_stays_known(file, layout, tmp_path):
  out = tmp_path / 'out.safetensors'
  model = surgery.open(file)
  [main] = codes_of(model)
  rule = f'{paths.literal(main)} -> other/place/codes'

  surgery.rename(model, rule).write(out)

  after = surgery.open(out)
  assert len(group(model)) == len(group(after))
  for path in group(after):
    assert path[:2] == ('other', 'place')
    assert of(after[path]) == ('other', 'place', 'codes')
  with pytest.raises(surgery.QuantisedError, match='other/place/codes holds'):
    quantised.refuse(after['other', 'place', 'codes'])


def test_renaming_there_and_back_gives_the_same_file(file, tmp_path):
  there, back = tmp_path / 'there.safetensors', tmp_path / 'back.safetensors'
  surgery.rename(surgery.open(file), 'l -> other').write(there)
  surgery.rename(surgery.open(there), 'other -> l').write(back)

  before, after = surgery.open(file), surgery.open(back)
  assert {p: of(leaf) for p, leaf in before.items()} == {
    p: of(leaf) for p, leaf in after.items()
  }


def test_names_follow_the_codes():
  beside = quantised.beside
  a, b = ('a', 'weight'), ('b', 'kernel')

  assert ('b', 'kernel_scale_inv') == beside(('a', 'weight_scale_inv'), a, b)
  assert ('b', 'kernel', 'absmax') == beside(('a', 'weight', 'absmax'), a, b)
  assert ('b', 'qzeros') == beside(('a', 'qzeros'), ('a', 'qweight'), b)
  assert ('b', 'up_scales') == beside(
    ('a', 'x_scales'), ('a', 'x_blocks'), ('b', 'up_blocks')
  )


def test_codes_take_their_parts_along_when_they_are_dropped(file):
  model = surgery.open(file)
  [main] = codes_of(model)

  after = surgery.drop(model, paths.literal(main))

  assert not group(after)
  assert ('n', 'weight') in after


def test_codes_are_not_left_without_their_scales(file):
  model = surgery.open(file)
  [main] = codes_of(model)
  parts = [
    p for p in group(model) if p != main and not p[-1].startswith('input')
  ]

  for part in parts:
    with pytest.raises(
      surgery.QuantisedError, match='whose codes mean nothing without it'
    ):
      surgery.drop(model, paths.literal(part))


def test_a_part_that_is_kept_keeps_its_group(file):
  model = surgery.open(file)

  after = surgery.keep(model, paths.literal(group(model)[-1]))

  assert group(model) == group(after)


def test_a_group_is_copied_together(file, tmp_path):
  out = tmp_path / 'out.safetensors'
  model = surgery.open(file)
  [main] = codes_of(model)
  if any(p[: len(main)] == main and p != main for p in model):
    rule = f'{paths.literal(main)} -> m/weight'
  else:
    rule = f'{paths.literal(main)} -> {paths.literal(("m", *main[1:]))}'

  Recipe([{'copy': rule}]).run(model=file, out=out)

  after = surgery.open(out)
  assert 2 * len(group(model)) == len(group(after))
  assert len(codes_of(after)) == 2
  left = surgery.drop(after, paths.literal(main))
  assert len(group(model)) == len(group(left))


def test_scales_are_not_copied_without_their_codes(tmp_path):
  path = tmp_path / 'm.safetensors'
  safetensors.numpy.save_file(_fp8_block(), path)

  with pytest.raises(surgery.SurgeryError, match='l/weight holds codes'):
    Recipe([{'copy': 'l/weight_scale_inv -> m/scale'}]).run(
      model=path, out=tmp_path / 'out.safetensors'
    )


def test_layers_with_codes_are_repeated(tmp_path):
  path = tmp_path / 'm.safetensors'
  tensors = {
    f'h.{k}.{name}': value
    for k in range(2)
    for name, value in _fp8_block().items()
  }
  safetensors.numpy.save_file(tensors, path)
  step = {'repeat': {'layers': 'h/<i>', 'numbers': '0:2'}}
  Recipe([step, {'drop': 'h/3/l/weight'}]).run(
    model=path, out=tmp_path / 'out.safetensors'
  )

  after = surgery.open(tmp_path / 'out.safetensors')
  assert {('h', str(k), 'l', 'weight') for k in range(3)} == codes_of(after)
  assert len(after) == 6


def test_codes_are_not_overwritten_or_tied_alone(tmp_path):
  path = tmp_path / 'm.safetensors'
  block = _fp8_block()
  tensors = {**block, **{n.replace('l.', 'm.'): v for n, v in block.items()}}
  safetensors.numpy.save_file(tensors, path)

  for step in (
    {'copy': {'rules': 'n/weight -> l/weight', 'overwrite': True}},
    {'tie': 'l/weight -> m/weight'},
  ):
    safetensors.numpy.save_file({**tensors, **PLAIN}, path)
    with pytest.raises(surgery.SurgeryError, match='holds codes'):
      Recipe([step]).run(model=path, out=tmp_path / 'out.safetensors')


def test_the_config_of_a_folder_tells_of_other_layouts(tmp_path):
  tensors = {'l.codes': codes((8, 8), np.uint8).view(F8), **PLAIN}
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors, path)
  assert surgery.cast(surgery.open(path), 'f32')['l', 'codes'].load().any()

  config = {'quantization_config': {'quant_method': 'quip'}}
  (tmp_path / 'config.json').write_text(json.dumps(config))

  for where in (path, tmp_path):
    with pytest.raises(surgery.QuantisedError, match=r'l/codes .*e4m3fn, quip'):
      surgery.cast(surgery.open(where), 'f32')


def test_what_the_config_told_is_known_elsewhere(tmp_path):
  path = tmp_path / 'a' / 'model.safetensors'
  path.parent.mkdir()
  safetensors.numpy.save_file({'l.codes': codes((8, 8), np.int8)}, path)
  config = {'quantization_config': {'quant_method': 'quip'}}
  (path.parent / 'config.json').write_text(json.dumps(config))

  surgery.open(path).write(tmp_path / 'out.msgpack')

  assert surgery.open(tmp_path / 'out.msgpack')['l', 'codes'].codes is not None


@pytest.mark.parametrize('text', ['{', '[]', '{"quantization_config": 3}'])
def test_a_config_that_says_nothing_is_no_error(text, tmp_path):
  path = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(PLAIN, path)
  (tmp_path / 'config.json').write_text(text)

  assert not group(surgery.open(path))


def test_a_copy_that_says_nothing_has_the_same_bytes(file, tmp_path):
  out = tmp_path / 'out.safetensors'
  surgery.open(file).write(out)

  with safetensors.safe_open(out, 'numpy') as opened:
    assert '__surgery__' not in (opened.metadata() or {})


@pytest.mark.parametrize(
  'tensors',
  [
    {'weight': ('float32', (4, 4)), 'weight_scale': ('float32', ())},
    {'kernel': ('bfloat16', (4, 4)), 'scale': ('bfloat16', (4,))},
    {'kernel': ('float8_e4m3fn', (4, 4)), 'bias': ('float32', (4,))},
    {'scale': ('float32', (4,)), 'count': ('int32', ())},
    {'weight_g': ('float32', (4, 1)), 'weight_v': ('float32', (4, 4))},
    {'blocks': ('float32', (4,)), 'scales': ('float32', (4,))},
    {'embedding': ('float32', (4, 4)), 'scale': ('float32', ())},
  ],
  ids=lambda t: '-'.join(t),
)
def test_numbers_are_not_taken_for_codes(tensors):
  leaves: dict[Path, Leaf] = {
    ('l', name): Leaf(lambda: None, shape, dtype)
    for name, (dtype, shape) in tensors.items()
  }

  assert {} == quantised.found(leaves, {})
