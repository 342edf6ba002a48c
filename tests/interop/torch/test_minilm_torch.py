"""What docs/examples/minilm writes, loaded by transformers and by PEFT."""

import blox as bx
import numpy as np
import pytest

from docs.examples.minilm import adapt
from docs.examples.minilm.encoder import Config, Sentences, Tokenizer
from tests.interop.test_minilm import minilm  # noqa: F401

torch = pytest.importorskip('torch', reason='torch is not installed here')
transformers = pytest.importorskip(
  'transformers', reason='transformers is not installed here'
)

peft = pytest.importorskip('peft', reason='peft is not installed here')

pytestmark = pytest.mark.filterwarnings('ignore')


def test_both_folders_give_what_was_trained(minilm, tmp_path):  # noqa: F811
  params, _ = adapt.main(minilm, tmp_path, steps=6)
  texts = [text for pair in adapt.PAIRS for text in pair]
  tokens = Tokenizer(minilm)(texts)
  model = Sentences(bx.Graph(adapt.ROOT), Config.load(minilm))
  expected, _ = model(params, *tokens)

  merged = tmp_path / 'merged'
  tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
  told = tokenizer(texts, padding=True, return_tensors='pt')
  assert tokens[0].tolist() == told['input_ids'].tolist()

  def embedded(torch_model):
    with torch.no_grad():
      found = torch_model.eval()(**told)[0]
    weights = told['attention_mask'][..., None]
    mean = (found * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1).numpy()

  load = transformers.AutoModel.from_pretrained
  np.testing.assert_allclose(expected, embedded(load(merged)), atol=1e-5)
  base = load(minilm)
  assert np.abs(expected - embedded(base)).max() > 1e-2
  adapted = peft.PeftModel.from_pretrained(base, tmp_path / 'peft')
  np.testing.assert_allclose(expected, embedded(adapted), atol=1e-5)
