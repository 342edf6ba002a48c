"""Makes folders of PEFT for tests, with PEFT 0.21 and torch 2.13 on the CPU.

`python tests/data/peft_cases/make.py [CASE…]` writes each case as PEFT saves
it, into a folder of its model beside this file or beside the tests of a plugin:
there lie `base.safetensors` and `inputs.safetensors`, and in a case's folder,
beside the two files of PEFT, the outputs with the adapter and the tensors that
PEFT's merge changed (`y.safetensors`, `merged_changed.safetensors`).
"""

import copy
import json
import pathlib
import shutil
import sys
import warnings

import peft
import torch
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
PLUGINS = HERE.parents[2] / 'plugins'


class Net(nn.Module):
  """An embedding, matrices, and a head that is smaller than the rank."""

  def __init__(self):
    super().__init__()
    self.emb = nn.Embedding(12, 8)
    self.fc0 = nn.Linear(8, 12)
    self.fc1 = nn.Linear(12, 8)
    self.head = nn.Linear(8, 3)

  def forward(self, x):
    h = torch.relu(self.fc0(self.emb(x)))
    return self.head(torch.relu(self.fc1(h)))


class Tied(nn.Module):
  """An embedding whose matrix is that of the head, as transformers ties it."""

  def __init__(self):
    super().__init__()
    self.config = {'tie_word_embeddings': True, 'model_type': 'tied'}
    self.model = nn.Module()
    self.model.embed_tokens = nn.Embedding(12, 8)
    self.model.fc = nn.Linear(8, 8)
    self.lm_head = nn.Linear(8, 12, bias=False)
    self.lm_head.weight = self.model.embed_tokens.weight
    self._tied_weights_keys = ['lm_head.weight']

  def get_input_embeddings(self):
    return self.model.embed_tokens

  def get_output_embeddings(self):
    return self.lm_head

  def forward(self, x):
    h = self.model.embed_tokens(x)
    return self.lm_head(h + torch.tanh(self.model.fc(h)))


class Experts(nn.Module):
  """Matrices of several experts in one parameter.

  They are `(experts, out, in)`, or `(experts, in, out)` where `is_transposed`,
  by which PEFT tells them apart.
  """

  def __init__(self, transposed, inner):
    super().__init__()
    self.is_transposed = transposed
    shape = lambda i, o: (3, i, o) if transposed else (3, o, i)
    self.gate_up_proj = nn.Parameter(torch.randn(shape(6, 2 * inner)) * 0.4)
    self.down_proj = nn.Parameter(torch.randn(shape(inner, 6)) * 0.4)

  def forward(self, x, scores):
    turn = lambda w: w if self.is_transposed else w.transpose(1, 2)
    h = torch.einsum('bi,eio->ebo', x, turn(self.gate_up_proj))
    gate, up = h.chunk(2, -1)
    h = torch.tanh(gate) * up
    h = torch.einsum('ebo,eoi->ebi', h, turn(self.down_proj))
    return torch.einsum('ebi,be->bi', h, scores)


class Moe(nn.Module):
  """A layer with experts, a matrix before them, and a router."""

  def __init__(self, transposed=False, inner=10):
    super().__init__()
    layer = nn.Module()
    layer.q_proj = nn.Linear(6, 6)
    layer.router = nn.Linear(6, 3)
    layer.experts = Experts(transposed, inner)
    self.layers = nn.ModuleList([layer])

  def forward(self, x):
    layer = self.layers[0]
    x = x + layer.q_proj(x)
    return x + layer.experts(x, torch.softmax(layer.router(x), -1))


class Conv(nn.Module):
  """Convolutions: a plain one, one of single taps, one in groups."""

  def __init__(self):
    super().__init__()
    self.conv = nn.Conv2d(4, 8, 3)
    self.point = nn.Conv2d(8, 8, 1)
    self.groups = nn.Conv2d(8, 12, 3, groups=2)

  def forward(self, x):
    h = torch.relu(self.conv(x))
    h = torch.relu(self.point(h))
    return self.groups(h).mean((2, 3))


def tokens(generator):
  return torch.randint(0, 12, (4, 5), generator=generator)


def vectors(generator):
  return torch.randn(5, 6, generator=generator)


def images(generator):
  return torch.randn(3, 4, 7, 7, generator=generator)


MODELS = {
  'net': (Net, tokens),
  'tied': (Tied, tokens),
  'moe': (Moe, vectors),
  'moe_turned': (lambda: Moe(transposed=True), vectors),
  # As in GPT-OSS one of both is square.
  'moe_square': (lambda: Moe(transposed=True, inner=6), vectors),
  'conv': (Conv, images),
  'residual': (Net, tokens),
}

EXPERTS = ['experts.gate_up_proj', 'experts.down_proj']
# By case: whose test it is of, the model, and the configuration.
CASES = {
  'large_rank': ('', 'net', peft.LoraConfig(
    r=9, lora_alpha=6, target_modules=['emb', 'fc0', 'head'])),
  'experts': ('', 'moe', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['q_proj'],
    target_parameters=EXPERTS)),
  'experts_one': ('', 'moe', peft.LoraConfig(
    r=2, lora_alpha=5, use_rslora=True, target_modules=[],
    target_parameters=['layers.0.experts.down_proj'])),
  'experts_patterns': ('', 'moe', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=[], target_parameters=EXPERTS,
    rank_pattern={'experts.down_proj': 4},
    alpha_pattern={'experts.gate_up_proj': 7})),
  'experts_turned': ('', 'moe_turned', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=[], target_parameters=EXPERTS)),
  'experts_square': ('', 'moe_square', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['q_proj'],
    target_parameters=EXPERTS)),
  'matrix': ('', 'net', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=[],
    target_parameters=['fc0.weight', 'head.weight'])),
  'rows': ('', 'net', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['fc0', 'head'],
    trainable_token_indices={'emb': [7, 2, 9]})),
  'rows_tied': ('', 'tied', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['fc'],
    trainable_token_indices=[0, 11, 3])),
  'rows_ensured': ('', 'tied', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['fc'], ensure_weight_tying=True,
    trainable_token_indices={'embed_tokens': [0, 11, 3]})),
  'saved_ensured': ('', 'tied', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['fc'], ensure_weight_tying=True,
    modules_to_save=['embed_tokens'])),
  # PEFT merges both into the one parameter, which then has the update twice.
  'lora_ensured': ('', 'tied', peft.LoraConfig(
    r=2, lora_alpha=5, target_modules=['fc', 'embed_tokens'],
    ensure_weight_tying=True)),
  'large_rank_dora': ('lora-family', 'net', peft.LoraConfig(
    r=9, lora_alpha=6, use_dora=True, target_modules=['fc0', 'head'])),
  'large_rank_loha': ('products', 'net', peft.LoHaConfig(
    r=9, alpha=3, target_modules=['fc0', 'head'])),
  'miss': ('shared', 'net', peft.MissConfig(
    r=4, target_modules=['fc0', 'head'])),
  # Five does not divide the numbers of inputs.
  'miss_rest': ('shared', 'net', peft.MissConfig(
    r=5, target_modules=['fc0', 'fc1'])),
  'miss_mini': ('shared', 'net', peft.MissConfig(
    r=4, mini_r=4, init_weights='mini', target_modules=['fc0', 'fc1'])),
  'miss_bat': ('shared', 'net', peft.MissConfig(
    r=4, init_weights='bat', target_modules=['fc0', 'fc1'])),
  'tokens': ('scaling', 'net', peft.TrainableTokensConfig(
    target_modules=['emb'], token_indices=[7, 2, 9])),
  'tokens_tied': ('scaling', 'tied', peft.TrainableTokensConfig(
    token_indices=[0, 11, 3])),
  'hra_conv': ('orthogonal', 'conv', peft.HRAConfig(
    r=4, target_modules=['conv', 'point'])),
  'boft_conv': ('orthogonal', 'conv', peft.BOFTConfig(
    boft_block_size=4, target_modules=['conv', 'point'])),
  'oft_conv': ('orthogonal', 'conv', peft.OFTConfig(
    oft_block_size=4, target_modules=['point'])),
  # Its merge is not what it computes.
  'oft_conv_taps': ('orthogonal', 'conv', peft.OFTConfig(
    oft_block_size=4, target_modules=['conv'])),
  'lokr_conv': ('products', 'conv', peft.LoKrConfig(
    r=1, alpha=3, target_modules=['conv', 'point'])),
  'lokr_conv_whole': ('products', 'conv', peft.LoKrConfig(
    r=8, alpha=3, target_modules=['conv', 'groups'])),
  'lokr_both': ('products', 'conv', peft.LoKrConfig(
    r=1, alpha=3, decompose_both=True, decompose_factor=4,
    target_modules=['conv', 'point', 'groups'])),
  'loha_groups': ('products', 'conv', peft.LoHaConfig(
    r=3, alpha=5, target_modules=['groups'])),
  'ia3_groups': ('scaling', 'conv', peft.IA3Config(
    target_modules=['groups'], feedforward_modules=[])),
  # PEFT does not merge it: the update of a group is not of its shape.
  'lora_groups': ('', 'conv', peft.LoraConfig(
    r=4, lora_alpha=5, target_modules=['conv', 'groups'])),
  'mica': ('', 'net', peft.LoraConfig(
    r=2, lora_alpha=5, init_lora_weights='mica',
    target_modules=['emb', 'fc0'])),
  # Saved as a difference from the unchanged base, and with the changed one.
  'pissa_niter': ('', 'net', peft.LoraConfig(
    r=2, lora_alpha=5, init_lora_weights='pissa_niter_4',
    target_modules=['fc0', 'fc1'])),
  'pissa_residual': ('', 'residual', peft.LoraConfig(
    r=2, lora_alpha=5, init_lora_weights='pissa_niter_4',
    target_modules=['fc0', 'fc1'])),
}  # fmt: skip


def write(name):
  """Writes one case."""
  owner, kind, config = CASES[name]
  whole = PLUGINS / f'surgery-{owner}' / 'tests' / 'data' if owner else HERE
  home = whole / kind
  home.mkdir(exist_ok=True)
  cls, draw = MODELS[kind]
  torch.manual_seed(0)
  model = cls().eval()
  base = {k: v.detach().clone() for k, v in model.state_dict().items()}
  for tied in getattr(model, '_tied_weights_keys', ()):
    del base[tied]
  save_file(base, home / 'base.safetensors')
  x = draw(torch.Generator().manual_seed(1))
  save_file({'x': x}, home / 'inputs.safetensors')
  adapted = peft.get_peft_model(model, copy.deepcopy(config)).eval()
  options = {}
  if name == 'pissa_niter':
    # PEFT wants the adapter as it began; its own changes the base no more.
    before = home / 'before'
    begun = adapted.peft_config['default']
    begins, begun.init_lora_weights = begun.init_lora_weights, True
    adapted.save_pretrained(before)
    begun.init_lora_weights = begins
    options['path_initial_model_for_weight_conversion'] = str(before)
  elif kind == 'residual':
    plain = copy.deepcopy(adapted).unload().state_dict()
    base = {k: v.detach().clone() for k, v in plain.items()}
    save_file(base, home / 'base.safetensors')
  torch.manual_seed(2)
  with torch.no_grad():
    for one in adapted.parameters():
      if one.requires_grad:
        one.add_(torch.randn_like(one) * 0.3)
    y = adapted(x)
  folder = home / name
  shutil.rmtree(folder, ignore_errors=True)
  adapted.save_pretrained(folder, **options)
  shutil.rmtree(home / 'before', ignore_errors=True)
  (folder / 'README.md').unlink()
  # Sets have another order in each process.
  path = folder / 'adapter_config.json'
  said = json.loads(path.read_text())
  for key, value in said.items():
    if key.startswith('target_') and isinstance(value, list):
      said[key] = sorted(value)
  path.write_text(json.dumps(said, indent=2, sort_keys=True))
  save_file({'y': y.contiguous()}, folder / 'y.safetensors')
  try:
    merged = adapted.merge_and_unload().state_dict()
  except NotImplementedError as error:
    print(f'{name}: PEFT does not merge it: {error}')
    return
  changed = {
    key: value.detach().clone().contiguous()
    for key, value in merged.items()
    if key in base and not torch.equal(value, base[key])
  }
  save_file(changed, folder / 'merged_changed.safetensors')


if __name__ == '__main__':
  warnings.simplefilter('ignore')
  for case in sys.argv[1:] or CASES:
    write(case)
