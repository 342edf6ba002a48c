"""Threads at a cold start: what is made once is made once."""

import ast
import pathlib
import subprocess
import sys
import threading

import pytest

from surgery import once

ROOT = pathlib.Path(__file__).parents[1]
THREADS = 8

# What a server does with its first requests. Each thread is a request, and none
# of them has used the library before.
COLD = """
import gc
import sys
import threading

import blox as bx
import jax
import jax.numpy as jnp
import numpy as np

import surgery

sys.setswitchinterval(1e-6)
graph = bx.Graph('net')
rng = bx.Rng(graph.child('rng'))
layer = bx.Linear(graph.child('layer'), 3, rng)
x = jnp.linspace(-1, 1, 8).reshape(2, 4)
params = layer(rng.seed(bx.Params(), seed=0), x)[1].locked()
barrier = threading.Barrier({threads})
answers, failures, hosts = [], [], []


def request():
  try:
    barrier.wait()
    hosts.append(surgery.default_host())
    one, two = (
      surgery.attach(params, surgery.LoRA(rank=2), to='**', seed=seed)
      for seed in range(2)
    )
    stacked = surgery.stack_adapters([one, two])
    fast = surgery.factored(layer)
    routed = fast(surgery.route(stacked, [1, 0]), x)[0]
    cut = surgery.apply(params, {{'factorise': {{'rules': '**/kernel -> **/{{a,b}}', 'rank': 2}}}})
    answers.append((fast(one, x)[0], routed, layer(surgery.merge(one), x)[0]))
    assert len(params) + 1 == len(cut), list(cut.keys())
  except BaseException as error:
    failures.append(error)


threads = [threading.Thread(target=request) for _ in range({threads})]
for one in threads:
  one.start()
for one in threads:
  one.join()
if failures:
  raise failures[0]
assert {threads} == len(answers)
for each in answers:
  for a, b in zip(answers[0], each, strict=True):
    np.testing.assert_array_equal(a, b)
assert 1 == len(set(map(id, hosts)))
made = [
  one.name
  for one in gc.get_objects()
  if type(one).__name__ == 'Primitive'
  and one.name in ('low_rank', 'surgery_site', 'surgery_flat')
]
assert len(made) == len(set(made)), made
"""


def test_threads_of_a_fresh_process_work_at_once():
  done = subprocess.run(
    [sys.executable, '-c', COLD.format(threads=THREADS)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert 0 == done.returncode, done.stderr[-3000:]


def called_by_threads(call, making, finish):
  """Calls in several threads while the first of them is still at work."""
  answers, arrived = [], threading.Semaphore(0)

  def ask():
    arrived.release()
    answers.append(call())

  threads = [threading.Thread(target=ask) for _ in range(THREADS)]
  for one in threads:
    one.start()
  for _ in threads:
    arrived.acquire()
  assert making.wait(60)
  finish.set()
  for one in threads:
    one.join()
  return answers


def test_a_function_that_runs_once_runs_once_in_all_threads():
  making, finish, calls = threading.Event(), threading.Event(), []

  @once.once
  def made():
    """Makes it."""
    calls.append(1)
    making.set()
    assert finish.wait(60)
    return object()

  answers = called_by_threads(made, making, finish)
  assert [1] == calls
  assert {id(made())} == set(map(id, answers))
  assert 'Makes it.' == made.__doc__


def test_what_fails_the_first_time_is_tried_again():
  results = [ValueError('not yet'), 3]

  @once.once
  def made():
    result = results.pop(0)
    if isinstance(result, Exception):
      raise result
    return result

  with pytest.raises(ValueError, match='not yet'):
    made()
  assert (3, 3, []) == (made(), made(), results)


def test_an_attribute_is_made_once_for_each_object():
  making, finish, calls = threading.Event(), threading.Event(), []

  class Owner:
    def __init__(self):
      self._lock = threading.RLock()

    @once.attribute
    def made(self):
      """What is made."""
      calls.append(self)
      making.set()
      assert finish.wait(60)
      return object()

  one, two = Owner(), Owner()
  answers = called_by_threads(lambda: one.made, making, finish)
  assert [one] == calls
  assert {id(one.made)} == set(map(id, answers))
  assert two.made is not one.made
  assert 'What is made.' == Owner.made.__doc__


@pytest.mark.parametrize(
  'path',
  sorted((ROOT / 'surgery').rglob('*.py')),
  ids=lambda path: str(path.relative_to(ROOT / 'surgery')),
)
def test_what_is_made_once_is_made_under_a_lock(path):
  # The host's are compared by identity; elsewhere they are equal values.
  shared = path.name == 'host.py'
  for node in ast.walk(ast.parse(path.read_text())):
    if not isinstance(node, ast.FunctionDef):
      continue
    for decorator in map(ast.unparse, node.decorator_list):
      if decorator.startswith('functools.cached_property'):
        assert not shared, f'{node.name}: use once.attribute'
      elif decorator.startswith(('functools.cache', 'functools.lru_cache')):
        # Of no arguments there is one value, and who asks may compare by `is`.
        assert node.args.args, f'{node.name}: use once.once'
