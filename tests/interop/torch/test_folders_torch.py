"""Folders that we write, loaded by transformers, against models cut by torch."""

import json

import numpy as np
import pytest

import surgery
from tests.interop.shapes import config_of

torch = pytest.importorskip('torch', reason='torch is not installed here')
transformers = pytest.importorskip(
  'transformers', reason='transformers is not installed here'
)

pytestmark = pytest.mark.filterwarnings('ignore')


def loaded(folder, **options):
  """The model in a folder; nothing of it is drawn, left over or of other sizes."""
  config = json.loads((folder / 'config.json').read_text())
  cls = getattr(transformers, config['architectures'][0])
  model, said = cls.from_pretrained(folder, output_loading_info=True, **options)
  for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    assert not said[what], (what, said[what])
  return model.eval()


def output(model):
  with torch.no_grad():
    if model.config.model_type == 'vit':
      return model(torch.arange(192.0).reshape(1, 3, 8, 8) / 200).logits
    ids = torch.tensor([[5, 7, 11, 2, 3]])
    if model.config.model_type == 't5':
      return model(ids, decoder_input_ids=ids[:, :3]).logits
    found = model(ids)
    return found.logits if hasattr(found, 'logits') else found[0]


def close(expected, found):
  np.testing.assert_allclose(
    expected.float().numpy(), found.float().numpy(), rtol=1e-5, atol=1e-5
  )


def written(source, steps, **target):
  out = source.with_name(f'{source.name}-out')
  outputs = {'out': {'path': f'{out}/', **target}}
  surgery.Recipe(steps, outputs=outputs).run(model=source)
  return out


LAYERS = {
  'llama': 'model/layers', 'mistral': 'model/layers', 'qwen2': 'model/layers',
  'qwen3': 'model/layers', 'gemma': 'model/layers', 'gemma2': 'model/layers',
  'gemma3': 'model/layers', 'gpt2': 'transformer/h', 'bert': 'encoder/layer',
  'bert-mlm': 'bert/encoder/layer', 'vit': 'vit/encoder/layer',
}  # fmt: skip


@pytest.mark.parametrize('name', LAYERS)
def test_a_model_without_a_layer(hf, name):
  source = hf(name)
  names = surgery.open(source)
  # What is stored may be the model without its head.
  place = LAYERS[name]
  if not any(path[0] == place.split('/')[0] for path in names):
    place = place.split('/', 1)[1]
  out = written(source, [{'drop': f'{place}/0'}, {'renumber': f'{place}/<i>'}])
  expected = loaded(source)
  layers = (m for m in expected.modules() if isinstance(m, torch.nn.ModuleList))
  del next(layers)[0]
  close(output(expected), output(loaded(out)))


@pytest.mark.parametrize('name', [*LAYERS, 't5'])
def test_a_model_in_half_precision(hf, name):
  source = hf(name)
  out = written(source, [{'cast': 'bf16'}])
  found = loaded(out, dtype='auto')
  assert found.dtype == torch.bfloat16
  close(output(loaded(source, dtype=torch.bfloat16)), output(found))


@pytest.mark.parametrize('name', [*LAYERS, 't5'])
def test_a_set_of_files(hf, name):
  source = hf(name)
  out = written(source, [], **{'shard-size': '8KB'})
  assert (out / 'model.safetensors.index.json').exists()
  close(output(loaded(source)), output(loaded(out)))


@pytest.mark.parametrize('name', ['llama', 'qwen3', 'gemma', 't5'])
def test_a_larger_vocabulary(hf, name):
  source = hf(name)
  table = 'shared/weight' if name == 't5' else '**/embed_tokens/weight'
  selected = [table, 'lm_head/weight'] if name in ('llama', 'qwen3') else table
  steps = [{'resize-vocab': {'select': selected, 'size': 48}}]
  found = output(loaded(written(source, steps)))
  assert found.shape[-1] == 48
  close(output(loaded(source)), found[..., :40])


@pytest.mark.parametrize('name', ['llama', 'mistral', 'qwen3'])
def test_heads_less(hf, name):
  source = hf(name)
  size = json.loads((source / 'config.json').read_text())['head_dim']
  # Of four heads with two keys the last two go, and with them their key.
  cut = lambda what, axis, stop: {
    'slice': {'select': f'**/{what}/weight', 'axis': axis, 'keep': f':{stop}'}
  }
  out = written(
    source,
    [
      cut('q_proj', 0, 2 * size), cut('k_proj', 0, size),
      cut('v_proj', 0, size), cut('o_proj', 1, 2 * size),
    ],
  )  # fmt: skip
  found = loaded(out)
  assert (2, 1) == (
    found.config.num_attention_heads,
    found.config.num_key_value_heads,
  )
  expected = loaded(source)
  with torch.no_grad():
    for layer in expected.model.layers:
      layer.self_attn.o_proj.weight[:, 2 * size :] = 0
  close(output(expected), output(found))


def test_a_head_of_its_own(hf):
  source = hf('gemma')
  rule = 'model/embed_tokens/weight -> lm_head/weight'
  out = written(
    source, [{'untie': rule}, {'scale': {'select': 'lm_head', 'by': 2.0}}]
  )
  close(2 * output(loaded(source)), output(loaded(out)))


def test_maps_there_and_back_are_the_model(hf, tmp_path):
  for name, one in (('llama', 'llama-flax'), ('bert', 'bert-blox')):
    source = hf(name)
    tree = tmp_path / f'{name}.msgpack'
    surgery.Recipe([{'map': one}]).run(model=source, out=tree)
    out = tmp_path / f'{name}-again'
    outputs = {'out': {'path': f'{out}/', 'like': str(source)}}
    surgery.Recipe([{'map': one}], outputs=outputs).run(model=tree)
    close(output(loaded(source)), output(loaded(out)))


def test_features_less(hf):
  source = hf('llama')
  config = json.loads((source / 'config.json').read_text())
  # As older configurations have it: the size of a head follows from others.
  del config['head_dim']
  (source / 'config.json').write_text(json.dumps(config))
  rows = ['**/embed_tokens/weight', '**/{q,k,v}_proj/weight', 'lm_head/weight']
  steps = [
    {'slice': {'select': [*rows, '**/{gate,up}_proj/weight'], 'axis': 1,
               'keep': ':12'}},
    {'slice': {'select': ['**/o_proj/weight', '**/down_proj/weight'],
               'axis': 0, 'keep': ':12'}},
    {'slice': {'select': ['**/*norm/weight'], 'axis': 0, 'keep': ':12'}},
  ]  # fmt: skip
  found = loaded(written(source, steps))
  assert (12, 4, 4) == (
    found.config.hidden_size,
    found.config.num_attention_heads,
    found.config.head_dim,
  )
  assert torch.isfinite(output(found)).all()


@pytest.mark.parametrize('name', ['bert', 'gpt2', 'llama', 'vit'])
def test_feed_forward_layers_less(hf, name):
  source = hf(name)
  into, out_of = {
    'bert': (['**/intermediate/dense'], '**/layer/*/output/dense'),
    'gpt2': (['**/c_fc'], '**/mlp/c_proj'),
    'llama': (['**/gate_proj', '**/up_proj'], '**/down_proj'),
    'vit': (['**/intermediate/dense'], '**/layer/*/output/dense'),
  }[name]
  # transformers' Conv1D has its axes the other way round.
  axis = int(name == 'gpt2')
  cut = lambda select, axis: {
    'slice': {'select': select, 'axis': axis, 'keep': ':20'}
  }
  steps = [
    cut([f'{one}/weight' for one in into], axis),
    cut(f'{out_of}/weight', 1 - axis),
  ]
  if name != 'llama':
    steps.append(cut(f'{into[0]}/bias', 0))
  expected = loaded(source)
  with torch.no_grad():
    # What takes the inner features, by whatever name.
    for one in expected.parameters():
      if one.ndim == 2 and one.shape[axis - 1] in (24, 64):
        (one.T if axis else one)[:, 20:] = 0
  close(output(expected), output(loaded(written(source, steps))))


# Configurations inside of others, and experts. The models are made here: of these
# only configurations, names and shapes are kept.


@pytest.fixture
def built(tmp_path):
  """Writes the folder of a model that transformers makes of a configuration."""

  def made(name, **changes):
    config = config_of(name)
    config.update(changes)
    folder = tmp_path / name
    torch.manual_seed(0)
    kind = transformers.AutoConfig.for_model(**config)
    model = getattr(transformers, config['architectures'][0])(kind)
    for one in model.parameters():
      one.data = torch.randn_like(one) * 0.3
    model.save_pretrained(folder)
    return folder

  return made


def seen(model):
  """Outputs for tokens, and for an image where the model takes one alone."""
  with torch.no_grad():
    ids = torch.tensor([[5, 7, 11, 2, 3]])
    if model.config.model_type in ('clip', 'siglip'):
      pixels = torch.arange(192.0).reshape(1, 3, 8, 8) / 200
      found = model(input_ids=ids, pixel_values=pixels)
      return torch.cat(
        [found.text_embeds.flatten(), found.image_embeds.flatten()]
      )
    # A model that was cut by hand has no cache for as many layers.
    model.config.get_text_config().use_cache = False
    if model.config.model_type == 'llama4':
      # The whole of it fails without an image in transformers 5.24.
      model = model.language_model
    return model(input_ids=ids).logits


# The layers of the language model, and where its configuration lies.
TEXTS = {
  'gemma3-vision': ('language_model/model/layers', 'text_config'),
  'llama4': ('language_model/model/layers', 'text_config'),
  'llava': ('language_model/model/layers', 'text_config'),
  'qwen2-vl': ('model/layers', 'text_config'),
  'qwen2.5-vl': ('model/layers', 'text_config'),
  'clip': ('text_model/encoder/layers', 'text_config'),
  'siglip': ('text_model/encoder/layers', 'text_config'),
  'mixtral': ('model/layers', ''),
  'qwen2-moe': ('model/layers', ''),
  'qwen3-moe': ('model/layers', ''),
  'roberta': ('roberta/encoder/layer', ''),
  'distilbert': ('distilbert/transformer/layer', ''),
}


@pytest.mark.parametrize('name', TEXTS)
def test_a_language_model_without_a_layer(built, name):
  source = built(name)
  place, inside = TEXTS[name]
  steps = [
    {'cast': 'f64'}, {'cast': 'f32'},
    {'drop': f'{place}/0'}, {'renumber': f'{place}/<i>'},
  ]  # fmt: skip
  found = loaded(written(source, steps))
  expected = loaded(source)
  *above, last = place.split('/')
  layers = next(
    module
    for path, module in expected.named_modules()
    if isinstance(module, torch.nn.ModuleList)
    and path.endswith(last)
    and 'vision' not in path
    and 'visual' not in path
  )
  del layers[0]
  config = getattr(expected.config, inside) if inside else expected.config
  for key in ('layer_types', 'no_rope_layers'):
    if getattr(config, key, None) is not None:
      setattr(config, key, getattr(config, key)[1:])
  for key in ('num_hidden_layers', 'n_layers'):
    if key in config.to_dict():
      setattr(config, key, len(layers))
  close(seen(expected), seen(found))


@pytest.mark.parametrize('name', ['mixtral', 'qwen2-moe', 'qwen3-moe'])
def test_experts_less(built, name):
  source = built(name)
  block = 'block_sparse_moe' if name == 'mixtral' else 'mlp'
  steps = [
    {'drop': f'model/layers/*/{block}/experts/0'},
    {'renumber': f'model/layers/*/{block}/experts/<i>'},
    {'slice': {'select': f'**/{block}/gate/weight', 'axis': 0, 'keep': '1:'}},
  ]
  found = loaded(written(source, steps))
  whole = loaded(source)
  config = whole.config
  config.num_local_experts = config.num_experts = 3
  expected = type(whole)(config).eval()
  cut = {
    key: value[1:]
    if '.experts.' in key or key.endswith('.gate.weight')
    else value
    for key, value in whole.state_dict().items()
  }
  expected.load_state_dict(cut)
  close(seen(expected), seen(found))


def test_classes_less_keep_their_names(built):
  source = built('bert-classes')
  head = ['classifier/weight', 'classifier/bias']
  found = loaded(
    written(source, [{'slice': {'select': head, 'axis': 0, 'keep': '1:'}}])
  )
  assert {0: 'neutral', 1: 'pos'} == found.config.id2label
  close(output(loaded(source))[:, 1:], output(found))
