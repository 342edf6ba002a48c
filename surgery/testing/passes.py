"""The laws of passes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from surgery import errors
from surgery.host.manager import Host
from surgery.live import saving, verbs
from surgery.live.applying import apply
from surgery.model.checkpoint import (
  Checkpoint,
  Leaf,
  open_checkpoint,
)
from surgery.model.grid import (
  grid,
)
from surgery.naming import paths
from surgery.recipes.recipe import Recipe
from surgery.testing import suites
from surgery.testing.suites import Fault, law

# How far merging before a step and behind it may be apart.
_TOLERANCES = {'bfloat16': 2e-2, 'float16': 2e-3}


class PassConformance(suites.Suite):
  """The laws of passes; derive from it and set `plugin`, `name` and `options`.

  Attributes:
    plugin: the plugin: a module, a class or an object.
    name: name of the pass.
    options: its options, as they stand in a recipe.
    changes: selector of the tensors that it may change, take or add; what
      `options` selects by default.
    refused: options that have to be refused, with a part of the message each.
    adapters: `follow` or `refuse`, if one of them is what the pass does where
      an adapter rewrites what it changes; None if either will do.
    reads: whether it has to read tensors to know what it will do.

  Example:
    class TestClip(PassConformance):
      plugin = my_package
      name = 'clip'
      options = {'select': '**/kernel', 'at': 0.5}
      refused = [({'select': '**', 'at': 0}, 'a bound above 0')]
  """

  options: ClassVar[Mapping[str, Any]] = {}
  changes: ClassVar[str | Iterable[str] | None] = None
  refused: ClassVar[Iterable[tuple[Mapping[str, Any], str]]] = ()
  adapters: ClassVar[str | None] = None
  reads: ClassVar[bool] = False

  def _step(self, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    given = self.options if options is None else options
    return {self.name: copy.deepcopy(dict(given))}

  def _done(self, model: Any, host: Host | None = None) -> Any:
    return apply(model, self._step(), host=host or self.host())

  @law
  def test_it_does_something(self) -> None:
    """With these options the pass changes the model of the suite."""
    before, after = self._both()
    if before.keys() == after.keys() and not any(
      suites.differs(leaf, after[path]) for path, leaf in before.items()
    ):
      raise Fault(
        'the model is as it was, so other laws would say nothing. Give other '
        'options, or override `model`.'
      )

  def _both(self) -> tuple[Checkpoint, Checkpoint]:
    before = suites.checkpoint(self.model())
    return before, self._done(before)

  @law
  def test_planning_reads_nothing(self) -> None:
    """A pass reads a tensor when it is loaded, not when the pass is called.

    So plans (`--dry-run`) cost nothing, and files may be larger than memory.
    """
    if self.reads:
      return
    read: list[str] = []
    before = suites.checkpoint(self.model())

    def counted(path: Any, leaf: Leaf) -> Leaf:
      def load() -> Any:
        read.append(paths.show(path))
        return leaf.load()

      def part(index: Any) -> Any:
        read.append(paths.show(path))
        return leaf.load()[index]

      return leaf.replace(load=load, part=part)

    told = {p: counted(p, one) for p, one in before.items()}
    self._done(before.replace(leaves=told))
    if read:
      raise Fault(
        f'{read[0]} was read before it was asked for. Compute in `load`, or '
        'declare reads = True.'
      )

  @law
  def test_blocks_give_the_whole(self) -> None:
    """A tensor that is computed in blocks has the bits of the whole."""
    with suites.folder() as folder:
      saving.save(folder / 'm.msgpack', self.model())
      host = self.host()
      after = self._done(open_checkpoint(folder / 'm.msgpack'), host)
      for path, leaf in after.items():
        if leaf.part is None or leaf.shape is None:
          continue
        whole = np.asarray(leaf.load())
        for index in grid(leaf.shape):
          block = leaf.part(index)
          wrong = leaf.mismatch(block, index)
          if wrong is not None:
            raise Fault(f'{paths.show(path)}, block {index}: {wrong}')
          if np.asarray(block).tobytes() != whole[index].tobytes():
            raise Fault(
              f'{paths.show(path)}: block {index} has other values than the '
              'whole. A block is `load()[index]` and nothing else: what needs '
              'all values is computed once, or `part` is None.'
            )

  @law
  def test_live_is_file(self) -> None:
    """Params and files get the same tensors, flags and metadata."""
    host, params = self.host(), self.model()
    live = suites.checkpoint(self._done(params, host))
    for suffix in ('msgpack', 'safetensors'):
      with suites.folder() as folder:
        model, out = folder / f'm.{suffix}', folder / f'o.{suffix}'
        saving.save(model, params)
        Recipe([self._step()]).run(model=model, out=out, host=host)
        found = open_checkpoint(out)
        suites.same_leaves(live, found, f'params and .{suffix} differ')

  @law
  def test_the_plan_is_what_is_done(self) -> None:
    """The plan of tensors is what is written."""
    host = self.host()
    with suites.folder() as folder:
      model, out = folder / 'm.msgpack', folder / 'o.msgpack'
      saving.save(model, self.model())
      before = open_checkpoint(model)
      planned = self._done(before, host)
      # Flags and shapes are compared before anything is computed.
      said = {path: _said(leaf) for path, leaf in planned.items()}
      kept = {p for p, leaf in before.items() if planned.get(p) is leaf}
      Recipe([self._step()]).run(model=model, out=out, host=host)
      written = open_checkpoint(out)
      for path in sorted(said.keys() ^ written.keys()):
        raise Fault(f'{paths.show(path)} is in one of plan and file only.')
      for path, leaf in written.items():
        if said[path] != _said(leaf):
          raise Fault(
            f'{paths.show(path)}: planned {said[path]}, written {_said(leaf)}.'
          )
        if path in kept and suites.differs(before[path], leaf):
          raise Fault(f'{paths.show(path)} was to be copied, and is another.')

  @law
  def test_nothing_else_changes(self) -> None:
    """Nothing is changed, taken or added but what `changes` selects.

    Nor does what the file says beside its tensors get lost.
    """
    changes = self.changes
    if changes is None:
      changes = self.options.get('select')
    if changes is None:
      raise errors.ConfigError(
        'set `changes`, a selector of the tensors that the pass may change.'
      )
    host, before = self.host(), suites.checkpoint(self.model())
    texts = {'format': 'pt', 'note': 'kept'}
    before = before.replace(manifest=before.manifest.replace(metadata=texts))
    after = self._done(before, host)
    may = suites.chosen(before, changes, host)
    may |= suites.chosen(after, changes, host)
    left = {p: leaf for p, leaf in before.items() if p not in may}
    found = {p: leaf for p, leaf in after.items() if p not in may}
    suites.same_leaves(left, found, f'outside of {changes!r}')
    for what in ('kind', 'locked', 'layer_types', 'metadata', 'adapters'):
      a, b = getattr(before.manifest, what), getattr(after.manifest, what)
      if a != b:
        raise Fault(
          f'{what} of the manifest is {b!r}, was {a!r}. Return '
          'checkpoint.replace(leaves=…), not a new Checkpoint.'
        )

  @law
  def test_what_the_caller_holds_stays(self) -> None:
    """Arrays, params, flags, metadata and options of the caller stay.

    A value that a leaf gives belongs to whoever made it: copy it before it is
    written to.
    """
    given = suites.checkpoint(self.model())
    arrays = {
      p: np.array(leaf.load())
      for p, leaf in given.items()
      if leaf.shape is not None
    }

    def held(path: Any, leaf: Leaf) -> Leaf:
      if path not in arrays:
        return leaf
      value = arrays[path]
      return leaf.replace(
        load=lambda: value, part=lambda index: value[index],
        metadata=copy.deepcopy(dict(leaf.metadata)),
      )  # fmt: skip

    before = given.replace(leaves={p: held(p, one) for p, one in given.items()})
    bits = {path: value.tobytes() for path, value in arrays.items()}
    notes = {path: repr(_said(leaf)) for path, leaf in before.items()}
    after = self._done(before)
    for leaf in after.values():
      leaf.load()
      for _ in leaf.parts():
        pass
    for path, value in arrays.items():
      if value.tobytes() != bits[path]:
        raise Fault(f'{paths.show(path)}: the array was written to.')
    for path, leaf in before.items():
      if repr(_said(leaf)) != notes[path]:
        raise Fault(f'{paths.show(path)}: flag or metadata were changed.')
    options = copy.deepcopy(dict(self.options))
    self.host().passes[self.name](before, **self._bound(options))
    if options != dict(self.options):
      raise Fault(f'its options were changed: {options}.')

  def _bound(self, options: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments of the function itself."""
    import inspect

    function = self.host().passes[self.name]
    takes = inspect.signature(function).parameters
    return {**options, **({'host': self.host()} if 'host' in takes else {})}

  @law
  def test_the_same_bytes_again(self) -> None:
    """A step that is done again writes the same file, byte by byte."""
    with suites.folder() as folder:
      saving.save(folder / 'm.msgpack', self.model())
      written = []
      for name in ('a.msgpack', 'b.msgpack'):
        opened = open_checkpoint(folder / 'm.msgpack')
        host = self.host()
        self._done(opened, host).write(folder / name, host=host)
        written.append((folder / name).read_bytes())
      if written[0] != written[1]:
        raise Fault(
          'two runs wrote other bytes. Randomness needs a seed among options.'
        )

  @law
  def test_adapters_follow_or_refuse(self) -> None:
    """Merging before the step and behind it come to the same, or it refuses."""
    if self.adapters not in (None, 'follow', 'refuse'):
      raise errors.ConfigError(
        f"adapters: expected 'follow', 'refuse' or None, found "
        f'{self.adapters!r}.'
      )
    host = self.host()
    params = suites.adapted(self.model(), host)
    done: list[Any] = []
    said = suites.refusal(lambda: done.append(self._done(params, host)))
    if said is not None and self.adapters == 'follow':
      raise Fault(f'it was declared that adapters follow, found: {said}')
    if said is None and self.adapters == 'refuse':
      raise Fault('it was declared to refuse, and there was no error.')
    if said is not None:
      return
    behind = verbs.merge(done[0], host=host)
    first = self._done(verbs.merge(params, host=host), host)
    if behind.keys() != first.keys():
      odd = min(set(behind.keys()) ^ set(first.keys()))
      raise Fault(f'{paths.show(odd)} is there in one order only.')
    for path, param in first.items():
      a, b = np.asarray(param.value), np.asarray(behind[path].value)
      if a.shape != b.shape or a.dtype != b.dtype:
        raise Fault(
          f'{paths.show(path)}: {a.dtype}{a.shape} if merged before the step, '
          f'{b.dtype}{b.shape} if merged behind it.'
        )
      x, y = a.astype(np.float64), b.astype(np.float64)
      apart = np.abs(x - y).max(initial=0)
      most = _TOLERANCES.get(a.dtype.name, 1e-5)
      if not apart <= most * max(1.0, np.abs(x).max(initial=0)):
        raise Fault(
          f'{paths.show(path)}: merged before the step and behind it it '
          f'differs by {apart:.3g}. A pass that is marked by '
          'surgery.handles_adapters has to change their records and weights, '
          'too, or to refuse.'
        )

  @law
  def test_what_is_refused(self) -> None:
    """Options that cannot be meant are refused, for params and for files."""
    host, params = self.host(), self.model()
    for options, wanted in self.refused:
      for what, model in (
        ('params', params),
        ('a checkpoint', suites.checkpoint(params)),
      ):
        step = self._step(options)
        said = suites.refusal(functools.partial(_finished, model, step, host))
        if said is None:
          raise Fault(f'{options} on {what}: expected an error, found none.')
        if wanted not in str(said):
          raise Fault(
            f'{options} on {what}: expected a message with {wanted!r}, found: '
            f'{said}'
          )


def _finished(model: Any, step: Mapping[str, Any], host: Host) -> None:
  """Does a step and computes all that it makes."""
  after = apply(model, step, host=host)
  if isinstance(after, Checkpoint):
    after.check()
    for leaf in after.values():
      leaf.load()
  else:
    jax.block_until_ready([p.value for p in after.values()])


def _said(leaf: Leaf) -> tuple[Any, ...]:
  """Returns what a leaf says without being read."""
  metadata = dict(leaf.metadata)
  return leaf.shape, leaf.dtype, leaf.trainable, leaf.key, metadata
