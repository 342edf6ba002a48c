"""An adapter of ours as a folder of PEFT."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (numpy knows the names of its dtypes then)
import numpy as np

from surgery import errors
from surgery.adapting import fitting
from surgery.contract import config as checking
from surgery.contract.adapter import Adapter
from surgery.contract.peft import (
  CONV,
  EMBEDDING,
  LINEAR,
  PeftLayer,
  PeftMapping,
  PeftModule,
  Shapes,
)
from surgery.files import atomic_folders
from surgery.files.safetensors import writing as safetensors
from surgery.host.manager import Host
from surgery.interop.peft import (
  bases,
  experts,
  places,
  reading,
  rows,
  serving,
  targets,
  twins,
)
from surgery.interop.peft import config as configs
from surgery.interop.peft import folder as folders
from surgery.model import manifest, record_json
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.manifest import Manifest
from surgery.model.records import ROUTE, AdapterRecord, SiteRecord
from surgery.naming import paths
from surgery.naming.paths import Path

# What a layer is called that looks rows up, where nothing else tells.
_EMBEDDING_NAMES = re.compile(
  r'(.*_)?(emb|embed|embeds|embedding|embeddings)|embed_tokens|wte|wpe|shared'
)

# Parameters that modules of torch are adapted by, as they or JAX call them:
# where several of one are stacked, they are those of layers.
_OF_LAYERS = ('weight', 'kernel', 'embedding', 'scale')

# The release whose folders are written; PEFT reads some as others did without.
_VERSION = '0.21.2'


def write_folder(
  checkpoint: Checkpoint, path: str | os.PathLike[str], host: Host
) -> None:
  """Writes an adapter as a folder, whole or not at all.

  Args:
    checkpoint: the adapter without its base, or an unchanged folder of PEFT.
    path: the folder: a new name, or an empty folder.
    host: knows the adapter's type.

  Raises:
    FormatError: if it is no adapter, or none that PEFT has.
    FileExistsError: if there is something in the folder, or it is a file.
    OSError: if it cannot be written.
  """
  tensors, said, base = converted(checkpoint, host)
  leaves = {tuple(name.split('.')): leaf for name, leaf in tensors.items()}
  metadata = {'format': 'pt'} | ({} if base is None else {bases.KEY: base})
  whole = Checkpoint(leaves, Manifest(metadata=metadata))
  text = json.dumps(said, indent=2, sort_keys=True)
  with atomic_folders.writing(path) as where:
    safetensors.write_file(whole, where / folders.TENSORS, manifest=False)
    (where / folders.CONFIG).write_text(text)


def notes(checkpoint: Checkpoint, host: Host) -> tuple[str, ...]:
  """Returns what other programs do not load of a folder, a sentence each.

  Args:
    checkpoint: what is to be written.
    host: knows the adapter's type.
  """
  try:
    tensors, said, _ = converted(checkpoint, host)
  except errors.SurgeryError:
    return ()  # It is raised when it is written.
  return tuple(serving.notes(said, tensors))


def converted(
  checkpoint: Checkpoint, host: Host
) -> tuple[dict[str, Leaf], dict[str, Any], str | None]:
  """Returns the tensors of a folder by name, and its configuration.

  Returns:
    Tensors, configuration, and what is known of the base, if anything is.

  Raises:
    FormatError: if it is no adapter, or none that PEFT has.
  """
  if reading.knows(checkpoint):
    same = {places.name_of(path): leaf for path, leaf in checkpoint.items()}
    about = checkpoint.manifest
    return (
      same,
      dict(about.extra[configs.KEY]),
      about.metadata.get(bases.KEY),
    )
  entries = checkpoint.manifest.adapters
  origin = checkpoint.origin or 'the model'
  if checkpoint.manifest.kind != manifest.ADAPTER or len(entries) != 1:
    raise errors.FormatError(
      f'{origin}: PEFT has folders of one adapter without its base, and this '
      'is a model. Write the adapter: surgery extract … --to peft.'
    )
  return _Writer(checkpoint, entries[0], host).converted()


class _Writer:
  """Converts one adapter.

  Args:
    checkpoint: the adapter without its base.
    entry: what its manifest says of it.
    host: knows its type.
  """

  def __init__(
    self, checkpoint: Checkpoint, entry: Mapping[str, Any], host: Host
  ) -> None:
    self._leaves = checkpoint
    self._entry = entry
    self._record: AdapterRecord = record_json.adapter_from_json(entry, host)
    told = json.loads(self._record.foreign or '{}')
    self._kept: Mapping[str, Any] = told.get(configs.KEY) or {}
    self._many = entry.get(fitting.MANY)
    layers = [path[:-1] for path in (*self._record.sites, *self._record.saved)]
    self._stacks = {
      path: _stack(checkpoint, one) for path, one in self._record.sites.items()
    }
    self._called: Mapping[Path, str] = {}
    if told.get('names') is not None:
      self._called = places.called(told['names'], dict.fromkeys(layers), host)
      self._kept = {}  # What was said last holds.
    self._origin = f'adapter {self._record.name!r}'
    self._types = checkpoint.manifest.layer_types
    mapping = configs.mapping_of(type(self._record.adapter))
    if mapping is None:
      names = ', '.join(repr(c.name) for c, _ in configs.mappings(host))
      raise errors.FormatError(
        f'{self._origin}: PEFT has no adapter type '
        f"'{self._record.adapter.name}'. It has "
        f'{names or "none that is installed"}. Merge it instead, and ship the '
        'model.'
      )
    self._mapping: PeftMapping = mapping
    for path, stack in self._stacks.items():
      self._check_stack(path, stack)
    self._wrappers = self._nested()

  def converted(self) -> tuple[dict[str, Leaf], dict[str, Any], str | None]:
    """Returns tensors, configuration, and what is known of the base."""
    if ROUTE in self._record.shared or self._many is not None:
      raise errors.FormatError(
        f'{self._origin}: it is several adapters, one for each row of a batch. '
        'PEFT has one in a folder; save them one by one.'
      )
    layers: dict[str, tuple[PeftLayer, SiteRecord]] = {}
    for path, one in self._record.sites.items():
      layer = self._layer(path, one)
      wrapper = self._wrapper(path, layer)
      if wrapper in layers:
        raise errors.FormatError(
          f'{self._origin}: two parameters of {layer.name!r} have weights, and '
          'PEFT has one for a module.'
        )
      layers[wrapper] = layer, one
    at: dict[str, tuple[Any, Shapes]] = {
      layer.name: (
        one.interceptor,
        {n: self._shape(spec.path) for n, spec in one.weights.items()},
      )
      for layer, one in layers.values()
    }
    shapes = {
      both[0].name: {n: a.shape for n, a in self._shown(*both).items()}
      for both in layers.values()
    }
    saved = self._saved(at)
    said, kept = self._config(at, shapes, list(saved))
    tensors: dict[str, Leaf] = {}
    for name, (layer, one) in layers.items():
      # What was in a configuration decides numbers as long as it is kept.
      known = dataclasses.replace(layer, config=kept)
      made = self._tensors(known, one)
      tensors.update(
        (f'{places.PREFIX}{name}.{n}', leaf) for n, leaf in made.items()
      )
    tensors.update(self._shared())
    tensors.update((f'{places.PREFIX}{n}', leaf) for n, leaf in saved.items())
    for name, (other, turned) in self._kept.get(reading.TWINS, {}).items():
      if other in tensors:
        leaf = tensors[other]
        tensors[name] = twins.turned(leaf) if turned else leaf
    return tensors, said, bases.written(self._entry, layers)

  def _shape(self, path: Path) -> tuple[int, ...]:
    return self._leaves[path].shape or ()

  def _name(self, layer: Path) -> str:
    return self._called.get(layer) or places.name_of(layer)

  def _check_stack(self, path: Path, stack: tuple[int, ...]) -> None:
    """Raises for a parameter of several layers that is none of experts.

    Raises:
      FormatError: saying what to do.
    """
    # Torch has stacked matrices under names of their own alone.
    layers = path[-1] in _OF_LAYERS or not self._mapping.experts
    if len(stack) > 1 or (stack and layers):
      raise errors.FormatError(
        f'{paths.show(path)}: its weights are those of {stack} layers that are '
        'stacked. PEFT has one module a layer: unstack the model first.'
      )

  def _modules(self) -> Mapping[str, Any]:
    """Returns what a folder had, by parameter.

    That is what tensors were called by, the kind of the module, and the name of
    the parameter if it was adapted by itself.
    """
    kept: Mapping[str, Any] = self._kept.get(reading.MODULES, {})
    return kept

  def _alone(self) -> set[str]:
    """Returns the parameters that are adapted by themselves."""
    return {
      self._layer(path, one).name
      for path, one in self._record.sites.items()
      if self._stacks[path]
      or len(self._modules().get(paths.show(path), ())) > 2
    }

  def _nested(self) -> dict[Path, str]:
    """Returns what tensors of parameters of experts are called by."""
    by_layer: dict[Path, list[Path]] = {}
    for path, stack in self._stacks.items():
      if stack and paths.show(path) not in self._modules():
        by_layer.setdefault(path[:-1], []).append(path)
    found: dict[Path, str] = {}
    for layer, params in by_layer.items():
      found |= experts.nested(self._name(layer), params, self._origin)
    return found

  def _wrapper(self, path: Path, layer: PeftLayer) -> str:
    """Returns what the tensors of a module are called by."""
    kept = self._modules().get(paths.show(path))
    return kept[0] if kept else self._wrappers.get(path, layer.name)

  def _layer(self, path: Path, one: SiteRecord) -> PeftLayer:
    """Returns the module that a site is, or the parameter of experts."""
    kept = self._modules().get(paths.show(path))
    if kept:
      name, kind, *called = kept
    elif self._stacks[path]:
      name, kind = f'{self._name(path[:-1])}.{path[-1]}', LINEAR
      called = []
    else:
      name, kind, called = self._name(path[:-1]), self._kind(path, one), []
    letters = one.site.primary.layout
    return PeftLayer(
      called[0] if called else places.plain(name),
      kind,
      one.site,
      kind == CONV and not letters.startswith('o'),
      options=reading.said_by(one.interceptor),
      stack=self._stacks[path],
    )

  def _kind(self, path: Path, one: SiteRecord) -> str:
    spec = one.site.primary
    types = one.site.types
    if spec.name == 'embedding' or 'Embed' in types:
      return EMBEDDING
    if any('Conv' in name for name in types):
      return CONV
    count = len(spec.shape)
    if spec.name == 'weight':
      if count > 2:
        return CONV
      looked = len(path) > 1 and _EMBEDDING_NAMES.fullmatch(path[-2])
      return EMBEDDING if spec.layout == 'io' and looked else LINEAR
    # A kernel of three axes may have heads, one of four is moved over images.
    return (
      CONV if count > 3 and spec.layout == 'i' * (count - 1) + 'o' else LINEAR
    )

  def _weights(self, one: SiteRecord) -> dict[str, Leaf]:
    return {name: self._leaves[s.path] for name, s in one.weights.items()}

  def _shown(self, layer: PeftLayer, one: SiteRecord) -> dict[str, Any]:
    """Returns tensors of a module, of which only shape and dtype mean much."""
    return self._mapping.tensors(layer, _zeros(self._weights(one)))

  def _tensors(self, layer: PeftLayer, one: SiteRecord) -> dict[str, Leaf]:
    weights, shown = self._weights(one), self._shown(layer, one)
    return {
      name: Leaf(
        functools.partial(_tensor, self._mapping, layer, weights, name),
        tuple(value.shape),
        str(value.dtype),
      )
      for name, value in shown.items()
    }

  def _shared(self) -> dict[str, Leaf]:
    weights = {n: self._leaves[s.path] for n, s in self._record.shared.items()}
    if not weights:
      return {}
    shown = self._mapping.shared_tensors(_zeros(weights))
    return {
      f'base_model.{self._mapping.shared[name]}': Leaf(
        functools.partial(_shared_tensor, self._mapping, weights, name),
        tuple(value.shape),
        str(value.dtype),
      )
      for name, value in shown.items()
    }

  def _saved(self, at: Mapping[str, Any]) -> dict[str, Leaf]:
    """Returns the base's own parameters that are saved, by name."""
    kept = self._kept.get(reading.SAVED, {})
    found: dict[str, Leaf] = {}
    for path, spec in self._record.saved.items():
      leaf = self._leaves[spec.path]
      if paths.show(path) in self._rows():
        module, chosen, dtype, _ = self._rows()[paths.show(path)]
        self._check_rows(path, leaf)
        found[f'{module}{rows.TENSOR}'] = rows.taken(
          leaf, chosen, rows.axis(path[-1]), dtype
        )
        continue
      module, last = self._name(path[:-1]), path[-1]
      name = kept.get(paths.show(path))
      if name is None:
        alike = {'kernel': 'weight', 'embedding': 'weight', 'scale': 'weight'}
        inner = '.base_layer' if module in at else ''
        if inner and last != 'bias':
          raise errors.FormatError(
            f'{paths.show(path)}: it is adapted, and was trained itself as '
            'well. PEFT does not save both; leave it out by modules_to_save.'
          )
        name = '.'.join(
          filter(None, (f'{module}{inner}', alike.get(last, last)))
        )
      found[name] = _as_torch(leaf) if last == 'kernel' else leaf
    return found

  def _rows(self) -> Mapping[str, Any]:
    """Returns the parameters of which some rows were trained alone."""
    kept: Mapping[str, Any] = self._kept.get(reading.ROWS, {})
    return kept

  def _check_rows(self, path: Path, leaf: Leaf) -> None:
    """Raises if other rows changed than those that were trained.

    Raises:
      FormatError: saying what to do.
    """
    _, chosen, _, rest = self._rows()[paths.show(path)]
    if rows.others(leaf, chosen, rows.axis(path[-1])) != rest:
      raise errors.FormatError(
        f'{paths.show(path)}: other rows than {chosen} have changed, and the '
        f'folder that it came from has these alone ({rows.KEY}). Give '
        'save_adapter names (--names), so that all of it is written.'
      )

  # The configuration.

  def _config(
    self,
    at: Mapping[str, tuple[Any, Shapes]],
    shapes: Mapping[str, Shapes],
    saved: list[str],
  ) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Returns what was kept where it still holds, and otherwise a new one.

    Returns:
      The configuration, and with defaults the one that was kept, if it was.
    """
    kept = self._kept.get(reading.CONFIG) or {}
    if kept and self._holds(kept, at, shapes, saved):
      return dict(kept), configs.checked(kept, self._mapping, self._origin)
    with errors.within(self._origin):
      said = self._mapping.config(self._record.adapter, at)
    conv1d = any(
      one.site.primary.layout == 'io' and one.site.primary.name == 'weight'
      for path, one in self._record.sites.items()
      if self._layer(path, one).kind == LINEAR
    )
    alone = self._alone()
    modules = list(
      dict.fromkeys(
        n.rpartition('.')[0]
        for n in saved
        if '.base_layer.' not in n and not n.endswith(rows.TENSOR)
      )
    )
    bias = any('.base_layer.' in name for name in saved)
    if bias and not self._mapping.bias:
      raise errors.FormatError(
        f'{self._origin}: biases of adapted layers were trained along, and '
        f'PEFT does not save them with {self._mapping.peft_type}. Leave them '
        'out by modules_to_save.'
      )
    fresh = {
      'peft_type': self._mapping.peft_type,
      'peft_version': _VERSION,
      'task_type': None,
      'base_model_name_or_path': None,
      'inference_mode': True,
      **{k: kept[k] for k in kept if k not in ('layers_pattern',)},
      **said,
      'target_modules': sorted(set(at) - alone),
      **({'target_parameters': sorted(alone)} if alone else {}),
      **self._tokens(saved),
      'modules_to_save': modules or None,
    }
    if not self._mapping.saves:
      del fresh['modules_to_save']
      if modules:
        raise errors.FormatError(
          f'{self._origin}: {errors.listed(modules)}: trained along, and PEFT '
          f'saves no modules with {self._mapping.peft_type}. Leave them out by '
          'modules_to_save=[], or merge the adapter and ship the model.'
        )
    if self._mapping.bias:
      # PEFT passes biases on that a folder has, under any name of this kind.
      only = f'{self._mapping.peft_type.lower()}_only'
      fresh['bias'] = only if bias else 'none'
    for key in ('exclude_modules', 'layers_to_transform', 'layers_pattern'):
      fresh.pop(key, None)
    if alone and fresh.get('lora_dropout'):
      raise errors.FormatError(
        f'{self._origin}: it has dropout, which PEFT does not have for '
        f'parameters of experts ({errors.listed(sorted(alone))}). Set it to 0.'
      )
    if conv1d and not self._mapping.conv1d:
      raise errors.FormatError(
        f'{self._origin}: PEFT has no {self._mapping.peft_type} for matrices '
        '(in, out), which are Conv1D in torch. If they are (out, in), attach '
        'it with that layout.'
      )
    if conv1d or 'fan_in_fan_out' in fresh:
      fresh['fan_in_fan_out'] = conv1d
    return fresh, {}

  def _tokens(self, saved: list[str]) -> dict[str, Any]:
    """Returns which rows of which modules were trained, if the type can."""
    if rows.KEY not in self._mapping.defaults:
      return {}
    found = {
      places.plain(module): chosen
      for module, chosen, _, _ in self._rows().values()
      if f'{module}{rows.TENSOR}' in saved
    }
    return {rows.KEY: found or None}

  def _holds(
    self,
    kept: Mapping[str, Any],
    at: Mapping[str, tuple[Any, Shapes]],
    shapes: Mapping[str, Shapes],
    saved: list[str],
  ) -> bool:
    """Whether a configuration still says what the adapter is."""
    if kept.get('peft_type') != self._mapping.peft_type:
      return False
    sites = {paths.show(path) for path in self._record.sites}
    had = {
      *self._kept.get(reading.SAVED, {}).values(),
      *(f'{one[0]}{rows.TENSOR}' for one in self._rows().values()),
    }
    if set(self._modules()) != sites or set(saved) != had:
      return False
    config = configs.checked(kept, self._mapping, self._origin)
    meant = targets.meant(config, self._origin)
    kinds = {
      (layer := self._layer(path, one)).name: layer.kind
      for path, one in self._record.sites.items()
    }
    by_itself = targets.parameters(config, self._origin)
    alone = self._alone()
    for name in at:
      if name in alone:
        if by_itself is None or not by_itself(name):
          return False
      elif meant is not None and not meant(name):
        return False
    for name, (who, _) in at.items():
      module = PeftModule(name, shapes[name], config, kinds[name])
      cls: Any = type(self._record.adapter)
      said = checking.from_json(cls, self._mapping.options(module))
      if not isinstance(who, Adapter) or cls(**said) != who:
        return False
    return all(one.drawn_rank is None for one in self._record.sites.values())


def _stack(checkpoint: Checkpoint, one: SiteRecord) -> tuple[int, ...]:
  """Returns the sizes of the axes stacked in front of a site's weights."""
  for spec in one.weights.values():
    shape = checkpoint[spec.path].shape or ()
    return shape[: len(shape) - len(spec.shape)]
  return ()


def _zeros(weights: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
  return {
    name: np.zeros(leaf.shape or (), leaf.dtype)
    for name, leaf in weights.items()
  }


def _tensor(
  mapping: PeftMapping, layer: PeftLayer, weights: Mapping[str, Leaf], name: str
) -> Any:
  """Returns one tensor of a module, computed of its site's weights."""
  loaded = {n: np.asarray(leaf.load()) for n, leaf in weights.items()}
  return np.ascontiguousarray(mapping.tensors(layer, loaded)[name])


def _shared_tensor(
  mapping: PeftMapping, weights: Mapping[str, Leaf], name: str
) -> Any:
  loaded = {n: np.asarray(leaf.load()) for n, leaf in weights.items()}
  return np.ascontiguousarray(mapping.shared_tensors(loaded)[name])


def _as_torch(leaf: Leaf) -> Leaf:
  """Returns a kernel of JAX with its outputs in front, as torch has it."""
  count = len(leaf.shape or ())
  if count < 2:
    return leaf
  order = (count - 1, count - 2, *range(count - 2))
  shape = tuple((leaf.shape or ())[a] for a in order)

  def load() -> Any:
    return np.ascontiguousarray(np.asarray(leaf.load()).transpose(order))

  return leaf.replace(load=load, shape=shape)
