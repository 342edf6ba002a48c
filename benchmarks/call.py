"""A call of a compiled function: adapted params against plain ones.

Both have the same number of tensors, and both functions do the same trivial
work, so what differs is what a call costs by itself. Prints medians of
interleaved runs and their ratio.
"""

import argparse
import statistics
import time

import blox as bx
import jax
import jax.numpy as jnp

import surgery

LAYERS = (50, 400, 2000)


def base(layers: int) -> bx.Params:
  """Returns params of that many linear layers of 4×4."""
  params = bx.Params()
  for i in range(layers):
    params[('net', f'layer{i}', 'kernel')] = bx.Param(jnp.ones((4, 4)))
  return params.locked()


def plain_twin(adapted: bx.Params) -> bx.Params:
  """Returns plain params with the same tensors and flags."""
  params = bx.Params()
  for path, param in adapted.items():
    params[path] = bx.Param(param.value, param.trainable, param.metadata)
  return params.locked()


def call(function: object, params: bx.Params, count: int) -> float:
  """Returns the seconds that a call takes, over `count` calls."""
  start = time.perf_counter()
  for _ in range(count):
    out = function(params)  # type: ignore[operator]
  jax.block_until_ready(jax.tree.leaves(out))
  return (time.perf_counter() - start) / count


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--runs', type=int, default=21)
  runs = parser.parse_args().runs
  print(
    f'{"layers":>7} {"tensors":>8} {"plain ms":>9} {"adapted ms":>11} '
    f'{"ratio":>6}'
  )
  for layers in LAYERS:
    adapted = surgery.attach(base(layers), surgery.LoRA(rank=2), to='**')
    plain = plain_twin(adapted)
    # Params in, params out: both ways through flattening.
    function = jax.jit(lambda p: p)
    count = max(4000 // layers, 5)
    for params in (plain, adapted):
      call(function, params, 2)
    seconds: dict[str, list[float]] = {'plain': [], 'adapted': []}
    for _ in range(runs):
      seconds['plain'].append(call(function, plain, count))
      seconds['adapted'].append(call(function, adapted, count))
    p, a = (statistics.median(seconds[k]) * 1e3 for k in ('plain', 'adapted'))
    ratio = statistics.median(
      y / x for x, y in zip(seconds['plain'], seconds['adapted'], strict=True)
    )
    print(f'{layers:>7} {len(plain):>8} {p:>9.3f} {a:>11.3f} {ratio:>6.2f}')


if __name__ == '__main__':
  main()
