"""The laws of methods that combine models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from surgery import errors
from surgery.contract.method import Method
from surgery.host.manager import Host
from surgery.live import combining
from surgery.methods import parameters, streaming
from surgery.model.checkpoint import Checkpoint, Leaf, open_checkpoint
from surgery.naming import paths
from surgery.testing import suites
from surgery.testing.suites import Fault, law

_SHAPES = {
  ('net', 'h0', 'kernel'): (6, 5),
  ('net', 'h1', 'kernel'): (5, 7),
  ('net', 'h1', 'bias'): (7,),
  ('net', 'conv'): (3, 2, 4),
  ('net', 'scalar'): (),
  # Of more than one piece, and more than one block.
  ('net', 'large'): (1100, 1000),
}


class MethodConformance(suites.Suite):
  """The laws of methods; set `plugin` and `name`.

  Attributes:
    plugin: the plugin: a module, a class or an object.
    name: name of the method.
    options: options that it is checked with; those without a default.
    models: number of models; by default three, or as many as it takes.
    alike: whether models that are alike come out as they are.
    symmetric: whether the order of models does not matter.
    refused: options that it refuses, each with a part of the message.

  Example:
    class TestMedian(MethodConformance):
      plugin = my_package
      name = 'median'
      symmetric = True
  """

  options: ClassVar[Mapping[str, Any]] = {}
  models: ClassVar[int | None] = None
  alike: ClassVar[bool] = True
  symmetric: ClassVar[bool] = False
  refused: ClassVar[Iterable[tuple[Mapping[str, Any], str]]] = ()

  def _class(self, host: Host) -> type[Method]:
    known = host.methods
    if self.name not in known:
      raise Fault(f'the plugin offers {sorted(known)}.')
    return known[self.name]

  def _count(self, cls: type[Method]) -> int:
    if self.models is not None:
      return self.models
    return min(max(3, cls.least), cls.most or max(3, cls.least))

  def _given(
    self, dtype: str = 'float32', alike: bool = False
  ) -> tuple[list[Checkpoint], Checkpoint | None, Host]:
    """Returns models, a base if the method takes one, and the host."""
    host = self.host()
    cls = self._class(host)
    base = _drawn(0, dtype)
    models = [
      base if alike else _drawn(k + 1, dtype, base)
      for k in range(self._count(cls))
    ]
    return models, base if cls.base != 'none' else None, host

  def _combined(
    self,
    models: list[Checkpoint],
    base: Checkpoint | None,
    host: Host,
    **more: Any,
  ) -> dict[Any, np.ndarray]:
    found = combining.combine(
      models, base=base, method=self.name, host=host, **self.options, **more
    )
    return {path: np.asarray(leaf.load()) for path, leaf in found.items()}

  @law
  def test_it_says_what_it_is(self) -> None:
    """A method has a docstring, its own name, and a word on each option."""
    cls = self._class(self.host())
    if cls.name != self.name:
      raise Fault(f'its name is {cls.name!r}, offered as {self.name!r}.')
    if not (cls.__doc__ or '').strip() or 'Method(' in (cls.__doc__ or ''):
      raise Fault('it has no docstring, which `plugins --methods` shows.')
    fields: Any = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in fields:
      if not field.metadata.get('doc'):
        raise Fault(f'option {field.name!r} has no doc.')

  @law
  def test_blocks_are_the_whole(self) -> None:
    """A block of the result is the same however the result is cut."""
    models, base, host = self._given()
    cls = self._class(host)
    options = parameters.Parameters(
      cls, self.options, len(models), models[0], host
    )
    for path, leaf in models[0].items():

      def made(path: Any = path, leaf: Leaf = leaf) -> streaming.Combined:
        method = options.at(path)
        sources = [
          streaming.Source('x', _flat(one[path]), False)
          for one in [*models, *([] if base is None else [base])]
        ]
        tensor = streaming.Tensor(
          path, leaf.shape or (), sources[: len(models)],
          sources[-1] if base is not None else None, rows=method.rows,
          uniform=streaming.Uniform(0, path), finite=True,
        )  # fmt: skip
        return streaming.Combined(method, tensor, 'float32')

      whole = made().span(0, leaf.size)
      for step in (7, 1000, 65_537):
        if leaf.size // step > 2000:
          continue
        other = made()
        ends = [
          other.span(k, min(k + step, leaf.size))
          for k in range(0, leaf.size, step)
        ]
        if whole.tobytes() != np.concatenate(ends).tobytes():
          raise Fault(
            f'{paths.show(path)}: in blocks of {step} elements it is another '
            'result. What a block needs of others belongs into `prepare`.'
          )

  @law
  def test_a_result_is_made_again(self) -> None:
    """The same models and seed give the same bits."""
    first = self._combined(*self._given(), seed=3)
    again = self._combined(*self._given(), seed=3)
    for path, value in first.items():
      if value.tobytes() != again[path].tobytes():
        raise Fault(
          f'{paths.show(path)}: another result the second time. Random numbers '
          'come from block.uniform.'
        )

  @law
  def test_the_dtype_stays(self) -> None:
    """The result has the models' dtype, near that of float64."""
    exact = self._combined(*self._given('float64'))
    for dtype in ('bfloat16', 'float16', 'float32'):
      found = self._combined(*self._given(dtype))
      for path, value in found.items():
        if value.dtype.name != dtype or value.shape != exact[path].shape:
          raise Fault(f'{paths.show(path)}: {value.dtype}{value.shape}.')
        if not np.isfinite(value.astype(np.float64)).all():
          raise Fault(f'{paths.show(path)}: NaN or infinity in {dtype}.')

  @law
  def test_models_that_are_alike_stay(self) -> None:
    """Models that are alike come out as they are, unless `alike` is False."""
    if not self.alike:
      return
    models, base, host = self._given(alike=True)
    for path, value in self._combined(models, base, host).items():
      expected = np.asarray(models[0][path].load())
      if not np.allclose(value, expected, rtol=1e-6, atol=0):
        raise Fault(f'{paths.show(path)}: it is another tensor.')

  @law
  def test_the_order_of_models_does_not_matter(self) -> None:
    """In another order models give the same, where `symmetric` is True."""
    if not self.symmetric:
      return
    models, base, host = self._given()
    first = self._combined(models, base, host)
    other = self._combined(models[::-1], base, host)
    for path, value in first.items():
      if not np.allclose(value, other[path], rtol=1e-5, atol=1e-6):
        raise Fault(f'{paths.show(path)}: it is another tensor.')

  @law
  def test_live_is_file(self) -> None:
    """Files and values in memory give the same bits."""
    models, base, host = self._given()
    expected = self._combined(models, base, host)
    every = [*models, *([] if base is None else [base])]
    with suites.folder() as folder:
      opened = []
      for k, one in enumerate(every):
        one.write(folder / f'{k}.msgpack')
        opened.append(open_checkpoint(folder / f'{k}.msgpack'))
      saved = combining.combine(
        opened[: len(models)],
        base=opened[-1] if base is not None else None,
        method=self.name,
        host=host,
        **self.options,
      )
      saved.write(folder / 'out.msgpack')
      found = open_checkpoint(folder / 'out.msgpack')
      for path, value in expected.items():
        if value.tobytes() != np.asarray(found[path].load()).tobytes():
          raise Fault(f'{paths.show(path)}: the file has other values.')

  @law
  def test_what_cannot_be_is_refused(self) -> None:
    """Options in `refused` are a `ConfigError` that says why."""
    models, base, host = self._given()
    for options, wanted in self.refused:
      given = {**self.options, **options}
      call = functools.partial(
        combining.combine, models, base=base, method=self.name, host=host
      )
      said = suites.refusal(functools.partial(call, **given))
      if not isinstance(said, errors.ConfigError) or wanted not in str(said):
        raise Fault(f'{dict(options)}: expected {wanted!r}, found: {said}')


def _flat(leaf: Leaf) -> streaming.Flat:
  value = np.asarray(leaf.load()).reshape(-1)
  return lambda start, stop: value[start:stop]


def _leaf(value: np.ndarray) -> Leaf:
  return Leaf(lambda: value, value.shape, value.dtype.name)


def _drawn(seed: int, dtype: str, base: Checkpoint | None = None) -> Checkpoint:
  """Returns a model of random numbers, near a base if there is one."""
  import ml_dtypes

  kind = ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.dtype(dtype)
  numbers = np.random.default_rng(seed)
  leaves = {}
  for path, shape in _SHAPES.items():
    value = np.asarray(numbers.normal(size=shape))
    if base is not None:
      value = np.asarray(base[path].load(), np.float64) + 0.3 * value
    leaves[path] = _leaf(np.asarray(value).astype(kind))
  return Checkpoint(leaves)
