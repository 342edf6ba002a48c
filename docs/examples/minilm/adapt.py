"""all-MiniLM-L6-v2: from its folder to blox, LoRA, and back into a folder.

    python -m docs.examples.minilm.adapt FOLDER OUT

FOLDER is the model as Hugging Face has it; in OUT there will be the adapter,
`adapter.safetensors`, the same as PEFT has it, `peft/`, and a folder with the
adapter merged, `merged/`, which `AutoModel.from_pretrained` loads.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import blox as bx
import jax
import jax.numpy as jnp
import optax

import surgery
from docs.examples.minilm.encoder import Config, Sentences, Tokenizer

ROOT = 'minilm'
MAP = {'name': 'bert-blox', 'root': ROOT}
# Questions, and what answers them: a little text to learn from.
PAIRS = [
  ('How do I merge an adapter?', 'surgery merge base --with adapter -o merged'),
  ('Which parameters train?', 'All but those that freeze has frozen.'),
  ('What is a selector?', 'A pattern of paths, such as **/query.'),
  ('Can a file be larger than memory?', 'Yes, tensors are read in blocks.'),
  ('How do I take an adapter off?', 'detach gives the base back bit for bit.'),
  ('What does a plan show?', 'What happens to each tensor, before it does.'),
  ('Where do plugins come from?', 'From entry points of distributions.'),
  ('How is a recipe written?', 'As YAML, a list of steps.'),
]


def load(folder: pathlib.Path, work: pathlib.Path) -> Any:
  """Returns the model's parameters under the encoder's names."""
  file = work / 'minilm.msgpack'
  surgery.Recipe([{'map': MAP}]).run(model=folder, out=file, overwrite=True)
  return surgery.load(file)


def train(model: Sentences, params: Any, tokens: Tokenizer, steps: int) -> Any:
  """Adapts the model to tell which answer belongs to which question.

  The loss is that of in-batch negatives (van den Oord et al. 2018).

  Returns:
    The parameters with the adapter, and the loss of each step.
  """
  lora = surgery.LoRA(rank=8)
  params = surgery.attach(params, lora, to='**/self/{query,value}')
  params = surgery.freeze(params)
  fast = surgery.factored(model)
  tx = surgery.optimizer(optax.adam(2e-3), params)
  questions, answers = (tokens(side) for side in zip(*PAIRS, strict=True))

  def loss(half: Any, rest: Any) -> Any:
    params = half.merge(rest)
    one, params = fast(params, *questions)
    two, params = fast(params, *answers)
    scores = 20 * one @ two.T
    labels = jnp.arange(len(scores))
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return losses.mean(), params.split()[1]

  @jax.jit
  def step(half: Any, rest: Any, state: Any) -> Any:
    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(half, rest)
    updates, state = tx.update(grads, state, half)
    return optax.apply_updates(half, updates), rest, state, value

  half, rest = params.split()
  state, losses = tx.init(half), []
  for _ in range(steps):
    half, rest, state, value = step(half, rest, state)
    losses.append(float(value))
  return half.merge(rest), losses


def main(folder: pathlib.Path, out: pathlib.Path, steps: int = 20) -> Any:
  """Does all of it; returns the adapted parameters and the losses."""
  out.mkdir(parents=True, exist_ok=True)
  model = Sentences(bx.Graph(ROOT), Config.load(folder))
  params = load(folder, out)
  params, losses = train(model, params, Tokenizer(folder), steps)
  adapter = out / 'adapter.safetensors'
  surgery.save_adapter(adapter, params)
  # The folder's names, the encoder's, and the folder's again, in one pass.
  surgery.Recipe(
    [
      {'map': MAP},
      {'attach': {'from': 'adapter'}},
      {'map': {**MAP, 'to': 'torch'}},
      {'extract': None, 'as': 'alone'},
      'merge',
    ],
    inputs={'model': folder, 'adapter': adapter},
    outputs={
      'merged': f'{out / "merged"}/',
      'peft': {'path': f'{out / "peft"}/', 'of': 'alone', 'format': 'peft'},
    },
  ).run()
  return params, losses


if __name__ == '__main__':
  _, told = main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
  print(f'loss: {told[0]:.3f} -> {told[-1]:.3f}')
