"""Folders that we write, loaded by PEFT itself.

`nox -s torch` installs torch, PEFT and all plugins and runs this; elsewhere it
is skipped. Each type gets random weights on a torch checkpoint; what PEFT
computes with the folder has to be what the checkpoint computes that we merge.
"""

import warnings
from typing import Any

import numpy as np
import pytest

import surgery
from surgery.host.manager import default_host
from surgery.passes import attach, extract, merge

torch: Any = pytest.importorskip('torch', reason='torch is not installed here')
peft: Any = pytest.importorskip('peft', reason='peft is not installed here')

pytestmark = pytest.mark.filterwarnings('ignore')

MATRICES = ['fc0', 'fc1', 'head']


class Net(torch.nn.Module):  # type: ignore[misc]
  """An embedding, three matrices with a norm between, and a convolution."""

  def __init__(self):
    super().__init__()
    self.emb = torch.nn.Embedding(20, 16)
    self.fc0 = torch.nn.Linear(16, 24)
    self.norm = torch.nn.LayerNorm(24)
    self.fc1 = torch.nn.Linear(24, 16)
    self.head = torch.nn.Linear(16, 8)
    self.conv = torch.nn.Conv2d(2, 8, 3)

  def forward(self, x, image):
    h = self.emb(x).mean(1)
    h = torch.relu(self.norm(self.fc0(h)))
    h = torch.relu(self.fc1(h))
    return self.head(h) + torch.relu(self.conv(image)).mean((2, 3))


CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
  'lora': ('lora', {'rank': 4, 'alpha': 6.0}, [*MATRICES, 'emb', 'conv']),
  'lora-rslora': (
    'lora',
    {'rank': 4, 'rslora': True, 'patterns': {'fc1': {'rank': 2, 'alpha': 7.0}}},
    MATRICES,
  ),
  'dora': ('dora', {'rank': 3, 'alpha': 5.0}, [*MATRICES, 'emb', 'conv']),
  'lora-bias': ('lora-bias', {'rank': 3}, [*MATRICES, 'conv']),
  'pissa': ('pissa', {'rank': 3}, MATRICES),
  'olora': ('olora', {'rank': 3}, MATRICES),
  'ia3': (
    'ia3',
    {'patterns': {'fc1': {'feedforward': True}}},
    [*MATRICES, 'conv'],
  ),
  'loha': ('loha', {'rank': 3, 'alpha': 5.0}, [*MATRICES, 'conv']),
  'lokr': ('lokr', {'rank': 2, 'alpha': 3.0}, MATRICES),
  'vera': ('vera', {'rank': 4}, MATRICES),
  'vb-lora': (
    'vb-lora',
    {'rank': 2, 'num_vectors': 6, 'vector_length': 4},
    MATRICES,
  ),
  'oft': ('oft', {'block_size': 4}, MATRICES),
  'oft-series': ('oft', {'block_size': 4, 'terms': 5}, MATRICES),
  'boft': ('boft', {'block_size': 4}, MATRICES),
  'hra': ('hra', {'rank': 4}, [*MATRICES, 'conv']),
  'lokr-conv': (
    'lokr',
    {'rank': 1, 'both': True, 'taps': True},
    [*MATRICES, 'conv'],
  ),
  'boft-conv': ('boft', {'block_size': 6}, ['conv']),
  'miss': ('miss', {'rank': 5}, MATRICES),
  'miss-mini': ('miss', {'rank': 4, 'columns': 4}, MATRICES),
  'bat': ('bat', {'rank': 8}, MATRICES),
  'trainable-tokens': ('trainable-tokens', {'tokens': [7, 2]}, ['emb']),
}


@pytest.fixture
def net():
  torch.manual_seed(0)
  return Net().eval()


@pytest.fixture
def base(net, tmp_path):
  from safetensors.torch import save_file

  save_file(net.state_dict(), tmp_path / 'base.safetensors')
  return surgery.open(tmp_path / 'base.safetensors')


def inputs():
  torch.manual_seed(1)
  return torch.randint(0, 20, (5, 7)), torch.randn(5, 2, 5, 5)


def moved(adapted):
  """Gives an adapter's weights random changes."""
  rng = np.random.default_rng(0)
  leaves = dict(adapted)
  for path, leaf in adapted.items():
    if leaf.metadata.get('adapter') and leaf.trainable:
      value = np.asarray(leaf.load())
      value = value + 0.2 * rng.standard_normal(value.shape).astype('float32')
      leaves[path] = leaf.replace(load=lambda value=value: value)
  return adapted.replace(leaves=leaves)


def loaded(folder, net):
  """PEFT's output with a folder; all of its tensors have to be used."""
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    warnings.filterwarnings('ignore', category=UserWarning, module='torch')
    warnings.filterwarnings('ignore', message='Failed to load the CUDA ext')
    warnings.filterwarnings('ignore', message='Setting boft_n_butterfly')
    model = peft.PeftModel.from_pretrained(net, folder).eval()
  from safetensors.torch import load_file

  saved = load_file(f'{folder}/adapter_model.safetensors')
  found = peft.get_peft_model_state_dict(model)
  for name, value in saved.items():
    assert torch.equal(found[name], value), name
  with torch.no_grad():
    return model(*inputs()).numpy()


def merged(adapted, host):
  """The output of the model into which we merge."""
  plain = merge.merge(adapted, host=host)
  state = {
    '.'.join(path): torch.tensor(np.asarray(leaf.load()))
    for path, leaf in plain.items()
  }
  net = Net().eval()
  net.load_state_dict(state)
  with torch.no_grad():
    return net(*inputs()).numpy()


@pytest.mark.parametrize('name', CASES)
def test_peft_computes_what_we_merge(name, net, base, tmp_path):
  kind, options, to = CASES[name]
  host = default_host()
  layout = {'emb/weight': 'io'} if 'emb' in to else None
  made = attach.attach(base, kind, to=to, set=options, layout=layout, host=host)
  adapted = moved(made)
  extract.extract(adapted, host=host).write(
    tmp_path / 'folder', format='peft', host=host
  )
  expected = merged(adapted, host)
  with torch.no_grad():
    assert np.abs(net(*inputs()).numpy() - expected).max() > 1e-2
  found = loaded(tmp_path / 'folder', net)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_was_trained_along_is_used_by_peft(net, base, tmp_path):
  host = default_host()
  adapted = moved(
    attach.attach(base, 'lora', to=['fc0'], set={'rank': 2}, host=host)
  )
  rng = np.random.default_rng(3)
  leaves = dict(adapted)
  for name in ('weight', 'bias'):
    value = rng.standard_normal(leaves['head', name].shape).astype('float32')
    leaves['head', name] = leaves['head', name].replace(
      load=lambda value=value: value, base=False
    )
  trained = adapted.replace(leaves=leaves)
  extract.extract(trained, modules_to_save='head', host=host).write(
    tmp_path / 'folder', format='peft', host=host
  )
  expected = merged(trained, host)
  found = loaded(tmp_path / 'folder', net)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_that_peft_wrote_today_is_merged_alike(net, base, tmp_path):
  config = peft.LoraConfig(
    r=3,
    lora_alpha=5,
    use_rslora=True,
    target_modules=['fc0', 'fc1', 'emb', 'conv'],
    modules_to_save=['head'],
    rank_pattern={'fc1': 2},
  )
  model = peft.get_peft_model(net, config).eval()
  torch.manual_seed(4)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter.add_(torch.randn_like(parameter) * 0.2)
    expected = model(*inputs()).numpy()
  model.save_pretrained(tmp_path / 'folder')
  host = default_host()
  adapted = attach.attach(
    base, from_=surgery.open(tmp_path / 'folder'), host=host
  )
  np.testing.assert_allclose(
    merged(adapted, host), expected, rtol=1e-4, atol=1e-5
  )


class Experts(torch.nn.Module):  # type: ignore[misc]
  """Matrices of three experts, `(experts, in, out)`, or `(experts, out, in)`."""

  def __init__(self, turned):
    super().__init__()
    self.is_transposed = not turned  # PEFT's word for (in, out).
    shapes = {'gate_up_proj': (6, 20), 'down_proj': (10, 6)}
    for name, (i, o) in shapes.items():
      value = torch.randn((3, o, i) if turned else (3, i, o))
      setattr(self, name, torch.nn.Parameter(0.4 * value))

  def forward(self, x):
    first, last = self.gate_up_proj, self.down_proj
    if not self.is_transposed:
      first, last = first.transpose(1, 2), last.transpose(1, 2)
    gate, up = (x @ first).chunk(2, -1)
    return ((torch.tanh(gate) * up) @ last).sum(0)


@pytest.mark.parametrize('layout', ['sio', 'soi'])
def test_experts_are_computed_as_we_merge_them(layout, tmp_path):
  from safetensors.torch import save_file

  torch.manual_seed(0)
  model = torch.nn.ModuleDict({'experts': Experts(layout == 'soi')})
  model.forward = lambda x: model['experts'](x)
  save_file(model.state_dict(), tmp_path / 'base.safetensors')
  host = default_host()
  adapted = moved(
    attach.attach(
      surgery.open(tmp_path / 'base.safetensors'),
      'lora',
      to=['experts/gate_up_proj', 'experts/down_proj'],
      set={'rank': 2, 'alpha': 3.0, 'experts/down_proj:rank': 3},
      layout=layout,
      host=host,
    )
  )
  extract.extract(adapted, host=host).write(
    tmp_path / 'folder', format='peft', host=host
  )
  plain = {
    '.'.join(path): torch.tensor(np.asarray(leaf.load()))
    for path, leaf in merge.merge(adapted, host=host).items()
  }
  x = torch.randn(5, 6)
  with torch.no_grad():
    expected = torch.func.functional_call(model, plain, x).numpy()
    assert np.abs(model(x).numpy() - expected).max() > 1e-2
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / 'folder').eval()
    found = loaded(x).numpy()
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
