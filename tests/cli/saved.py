"""Looking into files that verbs wrote."""

import json

import numpy as np

import surgery


def values(file):
  """Arrays and plain values by path."""
  return {'/'.join(p): leaf.load() for p, leaf in surgery.open(file).items()}


def flags(file):
  """Which tensors train, by path."""
  return {'/'.join(p): leaf.trainable for p, leaf in surgery.open(file).items()}


def history(file):
  return surgery.open(file).manifest.history


def steps(file):
  """The steps of the last recipe that made a file: names and values."""
  found = history(file)[-1]['recipe']['steps']
  return [
    (one, None) if isinstance(one, str) else next(iter(one.items()))
    for one in found
  ]


def assert_same(expected, actual):
  """Raises unless arrays by path are equal to the bit, in order."""
  assert list(expected) == list(actual)
  for path, value in expected.items():
    value, other = np.asarray(value), np.asarray(actual[path])
    assert (value.dtype, value.shape) == (other.dtype, other.shape), path
    assert value.tobytes() == other.tobytes(), path


def planned(run, *arguments):
  """Runs a verb dry and then for good; returns the plan, which is the same."""
  dry = run(*arguments, '--json', '--dry-run')
  assert 0 == dry.code, dry.err
  done = run(*arguments, '--json')
  assert 0 == done.code, done.err
  assert json.loads(dry.out) == json.loads(done.out)
  return json.loads(done.out)
