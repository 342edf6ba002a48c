"""What would go on unadapted, or lose a base, is an error that says how."""

from __future__ import annotations

from typing import Any

import flax
import flax.errors
import jax
import numpy as np
import pytest

import surgery
from tests.trees.cases import CASES, Linen, X
from tests.trees.test_verbs import attached


def linen() -> Any:
  return attached(CASES['linen'])


def apply(params: Any, x: Any, **options: Any) -> Any:
  return Linen().apply({'params': params}, x, **options)


@pytest.mark.parametrize(
  'misuse',
  [
    lambda: Linen().apply({'params': linen()}, X),
    lambda: Linen().apply(linen(), X),
    lambda: surgery.factored(lambda x: apply(linen(), x))(X),
    lambda: CASES['plain'].call(attached(CASES['plain']), X),
    lambda: CASES['haiku'].call(attached(CASES['haiku']), X),
    lambda: CASES['equinox'].call(attached(CASES['equinox']), X),
    lambda: attached(CASES['equinox'])(X[0]),
    lambda: {**linen()},
    lambda: [*linen()],
  ],
)
def test_an_adapted_tree_in_the_place_of_a_model_is_an_error(misuse):
  errors = (TypeError, surgery.AdapterError, flax.errors.FlaxError)
  with pytest.raises(errors):
    misuse()


def test_an_attribute_of_the_model_says_what_to_write():
  with pytest.raises(
    surgery.AdapterError, match=r'surgery\.factored\(function'
  ):
    attached(CASES['equinox']).layers


@pytest.mark.parametrize('jit', [lambda f: f, jax.jit])
def test_adapted_params_that_come_back_are_refused(jit):
  call = lambda params: apply(params, X, mutable=True)
  with pytest.raises(surgery.AdapterError, match='out of mutable='):
    jit(surgery.factored(call))(linen())


@pytest.mark.parametrize('part', [0, 1])
def test_a_half_is_refused(part):
  half = surgery.freeze(linen()).split()[part]
  with pytest.raises(surgery.AdapterError, match=r'half\.merge\(rest\)'):
    surgery.factored(apply)(half, X)


def test_bytes_of_flax_are_refused():
  with pytest.raises(surgery.AdapterError, match=r'surgery\.save\(path'):
    flax.serialization.to_bytes({'params': linen()})


def test_a_module_without_arrays_is_refused():
  with pytest.raises(surgery.SurgeryError, match='what its init returned'):
    surgery.attach(Linen(), surgery.LoRA(rank=2), to='all')


def test_a_tree_of_data_is_not_called():
  with pytest.raises(surgery.SurgeryError, match='Wrap the function'):
    surgery.factored(linen())


def test_halves_of_two_trees_are_refused():
  half, _ = surgery.freeze(linen()).split()
  _, rest = linen().split()
  with pytest.raises(surgery.AdapterError, match='two trees'):
    half.merge(rest)


def test_two_keys_of_one_path_are_refused():
  params = {'a/b': {'kernel': X}, 'a': {'b': {'kernel': X}}}
  with pytest.raises(surgery.SurgeryError, match='two arrays of the path'):
    surgery.freeze(params)


def test_another_model_than_the_files_is_refused(tmp_path):
  surgery.save(tmp_path / 'm.msgpack', linen())
  with pytest.raises(surgery.BaseMismatchError, match='is missing'):
    surgery.load(tmp_path / 'm.msgpack', like=CASES['plain'].make())


def test_layers_without_a_model_are_refused():
  with pytest.raises(surgery.SurgeryError, match='layers='):
    surgery.freeze(surgery.AdaptedParams, layers={})
  with pytest.raises(surgery.SurgeryError, match='what Linen is called with'):
    surgery.layers(Linen())


def test_a_file_is_loaded_as_nested_dicts(tmp_path):
  tree = surgery.freeze(linen())
  surgery.save(tmp_path / 'm.msgpack', tree)
  found = surgery.load(tmp_path / 'm.msgpack', like=dict)
  np.testing.assert_array_equal(
    surgery.factored(apply)(tree, X), surgery.factored(apply)(found, X)
  )
