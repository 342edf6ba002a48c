"""The folder that docs/examples/minilm writes, loaded by transformers."""

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

pytestmark = pytest.mark.filterwarnings('ignore')


def test_the_merged_folder_gives_what_was_trained(minilm, tmp_path):  # noqa: F811
  params, _ = adapt.main(minilm, tmp_path, steps=6)
  texts = [text for pair in adapt.PAIRS for text in pair]
  tokens = Tokenizer(minilm)(texts)
  model = Sentences(bx.Graph(adapt.ROOT), Config.load(minilm))
  expected, _ = model(params, *tokens)

  merged = tmp_path / 'merged'
  tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
  told = tokenizer(texts, padding=True, return_tensors='pt')
  assert tokens[0].tolist() == told['input_ids'].tolist()
  with torch.no_grad():
    found = transformers.AutoModel.from_pretrained(merged).eval()(**told)[0]
  weights = told['attention_mask'][..., None]
  mean = (found * weights).sum(1) / weights.sum(1)
  found = torch.nn.functional.normalize(mean, dim=-1)
  np.testing.assert_allclose(expected, found.numpy(), atol=1e-5)
