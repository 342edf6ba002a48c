"""An adapter of PEFT as one of ours, beside the base that it is for.

A folder says what its modules are called and how large their weights are; which
axes of a parameter are inputs, only the base tells. So it becomes an adapter of
ours when it meets its base, and all that can be done to such a one follows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (numpy knows the names of its dtypes then)
import numpy as np

from surgery import errors
from surgery.adapting import attachment, drawing, finding
from surgery.contract import config as options
from surgery.contract.adapter import Adapter
from surgery.contract.peft import (
  CONV,
  EMBEDDING,
  LINEAR,
  PeftLayer,
  PeftMapping,
  PeftModule,
)
from surgery.contract.site import Site
from surgery.host.manager import Host
from surgery.interop.peft import (
  axes,
  bases,
  experts,
  places,
  rows,
  targets,
  twins,
)
from surgery.interop.peft import config as configs
from surgery.model import manifest, record_json
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.layers import LayerType
from surgery.model.records import AdapterRecord, SiteRecord, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path

# So many numbers a configuration may ask for whatever its tensors hold.
_MOST = 1 << 28
# The name of an adapter that has none.
NAME = 'default'
# What an entry keeps of a folder, beside its configuration.
CONFIG, MODULES, SAVED = 'config', 'modules', 'saved'
ROWS, TWINS = 'rows', 'twins'

# Layers whose embeddings PEFT saves of its own accord, as it names them and as
# models do.
_EMBEDDINGS = (
  'embed_in',
  'embed_out',
  'embed_tokens',
  'lm_head',
  'shared',
  'word_embeddings',
  'wte',
)


def knows(alone: Checkpoint) -> bool:
  """Whether a checkpoint is a folder of PEFT."""
  return configs.KEY in alone.manifest.extra


def bound(
  alone: Checkpoint, base: Checkpoint, names: Any, host: Host
) -> Checkpoint:
  """Returns an adapter of PEFT as `extract` would make it of a base.

  Args:
    alone: the folder.
    base: the model.
    names: what modules are called in the base, if otherwise.
    host: knows adapter types.

  Raises:
    FormatError: if a tensor has no place, a place no tensor, or shapes are not
      those that the configuration makes.
    ConfigError: for a configuration that cannot be done.
  """
  said = alone.manifest.extra[configs.KEY]
  origin = alone.origin or 'the folder'
  cls, mapping = configs.chosen(said, origin, host)
  config = configs.checked(said, mapping, origin)
  folder = Folder.of(alone, mapping, config, origin)
  known = bases.read(alone.manifest.metadata, origin)
  return _Binding(folder, base, names, cls, host, known).checkpoint(said)


@dataclasses.dataclass(frozen=True)
class Folder:
  """The tensors of a folder, by what they are of.

  Attributes:
    leaves: all of them.
    mapping: how the type is stored.
    config: the configuration, with defaults.
    origin: where it lies, for messages.
    modules: tensors by module and name within it.
    shared: tensors of no module, by the name that `init_shared` gives them.
    others: tensors of the base's own, by name.
    rows: rows of embeddings, by module.
    spelled: what the folder calls those of these that it calls otherwise.
    strange: names that are none of these.
  """

  leaves: Mapping[Path, Leaf]
  mapping: PeftMapping
  config: Mapping[str, Any]
  origin: str
  modules: dict[str, dict[str, Path]]
  shared: dict[str, Path]
  others: dict[str, Path]
  rows: dict[str, Path]
  strange: list[str]
  spelled: dict[str, str]

  @classmethod
  def of(
    cls,
    alone: Mapping[Path, Leaf],
    mapping: PeftMapping,
    config: Mapping[str, Any],
    origin: str,
  ) -> Folder:
    """Returns the tensors of a folder, told apart by their names."""
    found = cls(alone, mapping, config, origin, {}, {}, {}, {}, [], {})
    shared = {f'base_model.{n}': ours for ours, n in mapping.shared.items()}
    # The longest first: one may be the end of another.
    known = sorted(mapping.names, key=len, reverse=True)
    for path in alone:
      name = places.name_of(path)
      if name in shared:
        found.shared[shared[name]] = path
        continue
      if not name.startswith(places.PREFIX):
        found.strange.append(name)
        continue
      name = name[len(places.PREFIX) :]
      tensor = next((t for t in known if name.endswith(f'.{t}')), None)
      own = next((t for t in mapping.replaced if name.endswith(f'.{t}')), None)
      if name.endswith(rows.TENSOR) and rows.KEY in mapping.defaults:
        found.rows[name[: -len(rows.TENSOR)]] = path
      elif own is not None:
        plain = f'{name[: -len(own)]}{mapping.replaced[own]}'
        found.others[plain], found.spelled[plain] = path, name
      elif tensor is None:
        found.others[name] = path
      else:
        module = name[: -len(tensor) - 1]
        found.modules.setdefault(module, {})[tensor] = path
    return found

  def module(self, name: str, called: str | None = None) -> PeftModule:
    """Returns a module as mappings see it.

    Args:
      name: what its tensors are called by.
      called: what the configuration calls it, if otherwise.
    """
    shapes = {
      tensor: self.leaves[path].shape or ()
      for tensor, path in self.modules[name].items()
    }
    return PeftModule(called or places.plain(name), shapes, self.config)


class _Binding:
  """Brings a folder and a base together.

  Args:
    folder: the folder.
    base: the model.
    names: what modules are called in it, if otherwise.
    cls: the adapter type.
    host: whose hooks are asked.
    known: what the folder says of the base that it is for, if anything.
  """

  def __init__(
    self,
    folder: Folder,
    base: Checkpoint,
    names: Any,
    cls: type[Adapter],
    host: Host,
    known: Mapping[str, Any] | None = None,
  ) -> None:
    self._folder = folder
    self._base = base
    self._cls = cls
    self._host = host
    self._known = known
    self._mapping = folder.mapping
    self._config = folder.config
    self._origin = folder.origin
    self._info = attachment.info_of(base, base.records(host))
    wanted = list(folder.modules) or [
      *(name.rpartition('.')[0] for name in folder.others),
      *folder.rows,
    ]
    self._alone = targets.parameters(self._config, self._origin)
    ends = self._config.get('target_parameters') or ()
    self._places = places.Places(
      self._info,
      wanted,
      names,
      folder.origin,
      [one.rpartition('.')[2] for one in ends],
      host=host,
    )
    # Names of parameters that are adapted by themselves, by those of tensors.
    self._called: dict[str, str] = {}
    # What tensors are called by, by the parameter that they are for.
    self._raw: dict[Path, str] = {}

  def checkpoint(self, said: Mapping[str, Any]) -> Checkpoint:
    """Returns the adapter."""
    found = self._found()
    saved = self._saved()
    tokens = self._tokens()
    copies = self._check_all(found, saved, tokens)
    if not found and not saved and not tokens:
      raise errors.FormatError(
        f'{self._origin}: it holds no weights of peft_type '
        f'{self._mapping.peft_type!r}.'
      )
    self._raw = found
    layers = self._layers(found)
    adapter = self._adapter(layers)
    sites, leaves = self._sites(adapter, layers)
    shared, more = self._shared(adapter, sites)
    leaves.update(more)
    record = AdapterRecord(NAME, adapter, True, sites, shared)
    leaves.update(self._drawn(record, leaves))
    kept: dict[Path, WeightSpec] = {}
    for path, name in saved.items():
      spec, leaf = self._keep(path, name, leaves)
      kept[path] = spec
      leaves[spec.path] = leaf
    rows_told = {}
    for path, module in tokens.items():
      spec, leaf, said_of = self._keep_rows(path, module, leaves)
      kept[path] = spec
      leaves[spec.path] = leaf
      rows_told[paths.show(path)] = said_of
    told = {
      CONFIG: dict(said),
      MODULES: {
        paths.show(path): self._told(found[path], layer)
        for path, layer in layers.items()
      },
      SAVED: {
        paths.show(path): self._folder.spelled.get(name, name)
        for path, name in saved.items()
      },
      ROWS: rows_told,
      TWINS: {
        places.name_of(path): [places.name_of(other), turned]
        for path, (other, turned) in copies.items()
      },
    }
    record = dataclasses.replace(
      record, saved=kept, foreign=json.dumps({configs.KEY: told})
    )
    # PEFT does not say what it was trained on; we do.
    base = bases.expected(self._known, self._base, layers)
    entry = record_json.adapter_to_json(record, self._host, base)
    return Checkpoint(
      leaves,
      manifest.Manifest(kind=manifest.ADAPTER, locked=True, adapters=(entry,)),
      origin=self._origin,
    )

  def _told(self, wrapper: str, layer: PeftLayer) -> list[str]:
    """Returns what an adapter keeps of a module, to write it again."""
    called = self._called.get(wrapper)
    return [wrapper, layer.kind, *([] if called is None else [called])]

  # Names.

  def _found(self) -> dict[Path, str]:
    """Returns the modules that have a place, by their parameter."""
    found = self._params()
    for name in self._folder.modules:
      path = self._places.param(name)
      if path is None or name in self._called:
        continue
      if path in found:
        raise errors.FormatError(
          f'{self._origin}: modules {found[path]!r} and {name!r} are both '
          f'{paths.show(path)} in the base.'
        )
      found[path] = name
    return found

  def _meant(self) -> dict[str, dict[str, Path]]:
    """Returns parameters that are adapted by themselves, by their module."""
    found: dict[str, dict[str, Path]] = {}
    if self._alone is not None:
      for name, path in self._places.params().items():
        if self._alone(name):
          found.setdefault(name.rpartition('.')[0], {})[name] = path
    return found

  def _params(self) -> dict[Path, str]:
    """Returns modules of the folder that are for parameters by themselves."""
    wrappers: dict[str, list[str]] = {}
    for name in self._folder.modules:
      wrappers.setdefault(places.plain(name), []).append(name)
    found: dict[Path, str] = {}
    for module, params in self._meant().items():
      sizes = {
        name: self._mapping.sizes(self._folder.module(name))
        for name in wrappers.get(module, ())
      }
      shapes = {path: self._info[path].shape for path in params.values()}
      some = experts.assigned(module, sizes, shapes, self._origin)
      found.update(some)
      names = {path: name for name, path in params.items()}
      self._called.update((some[path], names[path]) for path in some)
    return found

  def _module(self, name: str) -> PeftModule:
    """Returns a module as mappings see it."""
    return self._folder.module(name, self._called.get(name))

  def _saved(self) -> dict[Path, str]:
    """Returns the tensors of the base's own that have a place there."""
    found: dict[Path, str] = {}
    for name in self._folder.others:
      path = self._places.tensor(name)
      if path is not None and self._is_meant(name):
        found[path] = name
    return found

  def _tokens(self) -> dict[Path, str]:
    """Returns the modules whose rows have a place, by their parameter."""
    found: dict[Path, str] = {}
    for module in self._folder.rows:
      path = self._places.param(module)
      if path is not None:
        found[path] = module
    return found

  def _is_meant(self, name: str) -> bool:
    """Whether the configuration says that a tensor of the base is saved."""
    if name in self._folder.spelled:
      return True
    module, _, param = name.rpartition('.')
    if targets.saved(self._config, self._origin)(places.plain(module)):
      return True
    if param == 'bias':
      return not configs.is_nothing(self._config['bias'])
    return places.plain(module).rpartition('.')[2] in _EMBEDDINGS

  def _check_all(
    self,
    found: Mapping[Path, str],
    saved: Mapping[Path, str],
    tokens: Mapping[Path, str],
  ) -> dict[Path, tuple[Path, bool]]:
    """Raises unless each tensor has a place, and each place its tensors.

    Returns:
      Tensors without a place that are copies of others, and of which.

    Raises:
      FormatError: listing both.
    """
    meant = targets.meant(self._config, self._origin)
    copies, homeless = self._without_place(found, saved, tokens)
    unmeant = [
      name
      for name in found.values()
      if meant is not None
      and name not in self._called
      and not meant(places.plain(name))
    ]
    empty = [
      name
      for params in self._meant().values()
      for name, path in params.items()
      if path not in found
    ]
    there = {places.plain(name) for name in found.values()}
    for name, path in self._places.modules().items():
      info = self._info[path]
      matrix = len(info.shape) > 1 and info.dtype.startswith(
        ('float', 'bfloat')
      )
      if meant is not None and meant(name) and name not in there and matrix:
        empty.append(name)
    empty += self._unsaved(found, saved)
    empty += self._untrained(tokens)
    problems = [
      f'{what}: {errors.listed(sorted(names), 8)}'
      for what, names in (
        ('no place in the base for', homeless),
        ('not meant by target_modules', unmeant),
        ('no tensors for', empty),
      )
      if names
    ]
    if problems:
      raise errors.FormatError(
        f'{self._origin}: the adapter does not fit the base. '
        f'{"; ".join(problems)}. Where the base calls modules otherwise, say '
        'so by names= (--names); where another class of model was adapted, '
        'take its base, or name what that class does not have in '
        'exclude_modules of adapter_config.json.'
      )
    return copies

  def _without_place(
    self,
    found: Mapping[Path, str],
    saved: Mapping[Path, str],
    tokens: Mapping[Path, str],
  ) -> tuple[dict[Path, tuple[Path, bool]], list[str]]:
    """Returns what has no place: copies of tensors that have, and the rest."""
    folder = self._folder
    at_home: list[Path] = []
    lost: dict[str, list[Path]] = {}
    for names, here in (
      (folder.modules, found.values()),
      ({n: {'': p} for n, p in folder.others.items()}, saved.values()),
      ({n: {'': p} for n, p in folder.rows.items()}, tokens.values()),
    ):
      for name, tensors in names.items():
        if name in here:
          at_home += tensors.values()
        else:
          lost[name] = list(tensors.values())
    twin: dict[Path, tuple[Path, bool]] = {}
    homeless = list(folder.strange)
    for name, some in lost.items():
      # Others may be alike by chance, as all that begins with zeros is.
      tied = any(part in _EMBEDDINGS for part in name.split('.'))
      copies = twins.found(folder.leaves, some, at_home) if tied else {}
      twin.update(copies)
      if not copies:
        homeless.append(name)
    return twin, homeless

  def _untrained(self, tokens: Mapping[Path, str]) -> list[str]:
    """Returns what should have rows of its own, and has none."""
    said = self._config.get(rows.KEY)
    if configs.is_nothing(said):
      return []
    if not isinstance(said, Mapping):
      return [] if tokens else [rows.KEY]
    return [
      name
      for name in self._places.modules()
      if any(name.endswith(key) for key in said) and name not in tokens.values()
    ]

  def _unsaved(
    self, found: Mapping[Path, str], saved: Mapping[Path, str]
  ) -> list[str]:
    """Returns parameters that the configuration says are saved, and are not."""
    whole = targets.saved(self._config, self._origin)
    bias = self._config['bias']
    layers = {path[:-1] for path in found}
    missing = []
    for path in self._info:
      if path in saved or path in found:
        continue
      module = places.name_of(path[:-1])
      alone = path[-1] == 'bias' and not configs.is_nothing(bias)
      if whole(module) or (alone and (bias == 'all' or path[:-1] in layers)):
        missing.append(places.name_of(path))
    return missing

  # Axes.

  def _layers(self, found: Mapping[Path, str]) -> dict[Path, PeftLayer]:
    """Returns modules with their sites, whose axes have roles."""
    types: dict[Path, LayerType] = {}
    kinds: dict[Path, str] = {}
    known = self._base.manifest.layer_types
    sought = {}
    for path, name in found.items():
      module, alone = self._module(name), name in self._called
      kinds[path] = LINEAR if alone else self._kind(module, path)
      shape = self._info[path].shape
      sought[path] = axes.Sought(
        paths.show(path),
        module.name,
        kinds[path],
        shape[-2:] if alone else shape,
        *self._mapping.sizes(module),
        known[path[:-1]].layouts.get(path[-1]) if path[:-1] in known else None,
        path[-1],
        alone,
      )
    letters = axes.found(
      sought, bool(self._config['fan_in_fan_out']), self._origin
    )
    for path, one in letters.items():
      told = types.get(path[:-1], known.get(path[:-1]))
      types[path[:-1]] = LayerType(
        told.names if told else (),
        {**(told.layouts if told else {}), path[-1]: one},
      )
    plain = attachment.check_adapter(self._plain())
    finder = finding.Finder(plain, self._host, types)
    params = finding.by_layer(self._info)
    layers = {}
    for path, name in found.items():
      layer = path[:-1]
      site = finder.site(layer, path[-1], params[layer], True)
      shape = self._info[path].shape
      layers[path] = PeftLayer(
        self._module(name).name,
        kinds[path],
        site,
        kinds[path] == CONV and not letters[path].startswith('o'),
        functools.partial(_stored, self._base[path], site),
        self._config,
        stack=shape[: len(shape) - len(site.primary.shape)],
      )
    return layers

  def _kind(self, module: PeftModule, path: Path) -> str:
    told = self._mapping.kind(module)
    if told is not None:
      return told
    if path[-1] == 'embedding':
      return EMBEDDING
    count = len(self._info[path].shape)
    known = self._base.manifest.layer_types.get(path[:-1])
    if known is not None and known.names:
      moved = any('Conv' in name for name in known.names)
      return CONV if moved else LINEAR
    if path[-1] == 'weight':
      return CONV if count > 2 else LINEAR
    if count == 3 and self._is_ambiguous(module, path):
      raise errors.FormatError(
        f'{self._origin}: {paths.show(path)} of shape '
        f'{self._info[path].shape} may be the kernel of a convolution or of a '
        'layer with heads, whose inputs PEFT orders in two ways. Save the '
        'model with graph=, which records what its layers are, and attach the '
        'adapter to the file.'
      )
    return CONV if count > 3 else LINEAR

  def _is_ambiguous(self, module: PeftModule, path: Path) -> bool:
    """Whether two axes of a kernel are inputs, as far as sizes tell."""
    inputs, _ = self._mapping.sizes(module)
    first, second, _ = self._info[path].shape
    return inputs in (None, first * second)

  def _plain(self) -> Adapter:
    """Returns an adapter of the type, of which only the class matters."""
    name = next(iter(self._folder.modules), None)
    said = {} if name is None else self._options(name)
    return self._made(said, {})

  # Options.

  def _options(self, name: str, kind: str = '') -> dict[str, Any]:
    module = dataclasses.replace(self._module(name), kind=kind)
    with errors.within(self._origin):
      return dict(self._mapping.options(module))

  def _made(
    self, general: Mapping[str, Any], patterns: Mapping[str, Mapping[str, Any]]
  ) -> Adapter:
    cls = self._cls
    with errors.within(f'{self._origin}: its configuration'):
      return cls(
        **options.from_json(cls, general),
        patterns={s: options.from_json(cls, v) for s, v in patterns.items()},
      )

  def _adapter(self, layers: Mapping[Path, PeftLayer]) -> Adapter:
    """Returns the adapter; what most modules have is its configuration."""
    said = {
      path: self._options(self._raw[path], layer.kind)
      for path, layer in layers.items()
    }
    general = usual(list(said.values()))
    return self._made(general, patterns_of(said, general))

  # Weights.

  def _sites(
    self, adapter: Adapter, layers: Mapping[Path, PeftLayer]
  ) -> tuple[dict[Path, SiteRecord], dict[Path, Leaf]]:
    """Returns the records of sites, and their weights as leaves.

    Raises:
      FormatError: for all tensors that are not those of the configuration.
    """
    sites: dict[Path, SiteRecord] = {}
    leaves: dict[Path, Leaf] = {}
    problems: list[str] = []
    for path, layer in layers.items():
      who = attachment.intercept(self._host, adapter, layer.site)
      try:
        record = attachment.site_record(
          adapter, NAME, layer.site, who, leaves.__contains__
        )
      except errors.SiteError as error:
        problems.append(str(error).rstrip('.'))
        continue
      told = dataclasses.replace(layer, options=said_by(who))
      weights, wrong = self._weights(told, record)
      problems += wrong
      specs = {
        name: dataclasses.replace(spec, dtype=weights[name].dtype or spec.dtype)
        if name in weights
        else spec
        for name, spec in record.weights.items()
      }
      sites[path] = dataclasses.replace(record, weights=specs)
      leaves.update((specs[n].path, leaf) for n, leaf in weights.items())
    if problems:
      raise errors.FormatError(
        f'{self._origin}: the tensors are not those that its configuration '
        f'makes. {"; ".join(problems)}.'
      )
    return sites, leaves

  def _weights(
    self, layer: PeftLayer, record: SiteRecord
  ) -> tuple[dict[str, Leaf], list[str]]:
    """Returns a site's weights, and what is wrong with its tensors."""
    mapping = self._mapping
    there = self._folder.modules[self._raw[record.site.path]]
    # A lie about the rank must not cost the memory that it asks for.
    asked = sum(
      math.prod((*layer.stack, *spec.shape))
      for name, spec in record.weights.items()
      if name not in mapping.drawn
    )
    held = sum(self._folder.leaves[path].size for path in there.values())
    if asked > max(_MOST, 64 * held):
      return {}, [
        f'{layer.name}: the configuration makes {asked:,} numbers, and its '
        f'tensors hold {held:,}'
      ]
    ours = {
      name: np.zeros((*layer.stack, *spec.shape), 'float32')
      for name, spec in record.weights.items()
      if name not in mapping.drawn
    }
    # What is written of such weights is what has to be there.
    made = mapping.tensors(layer, ours)
    found = {n: self._folder.leaves[p].shape for n, p in there.items()}
    wrong = compared(layer.name, {n: a.shape for n, a in made.items()}, found)
    if wrong:
      return {}, wrong
    tensors = {n: self._folder.leaves[p] for n, p in there.items()}
    dtype = _common(tensors.values())
    return {
      name: Leaf(
        functools.partial(_weight, mapping, layer, tensors, name, dtype),
        ours[name].shape,
        dtype,
        record.weights[name].trainable,
        {'adapter': NAME},
      )
      for name in ours
    }, []

  def _shared(
    self, adapter: Adapter, sites: Mapping[Path, SiteRecord]
  ) -> tuple[dict[str, WeightSpec], dict[Path, Leaf]]:
    """Returns what the sites share, as specifications and leaves.

    Raises:
      FormatError: for tensors that are missing or of another shape.
    """
    if type(adapter).init_shared is Adapter.init_shared:
      return {}, {}
    made = drawing.shared_shapes(adapter, [one.site for one in sites.values()])
    zeros = {n: np.zeros(shape, 'float32') for n, shape in made.items()}
    expected = {
      n: a.shape for n, a in self._mapping.shared_tensors(zeros).items()
    }
    there = {n: self._folder.leaves[p] for n, p in self._folder.shared.items()}
    named = self._mapping.shared
    wrong = compared(
      'base_model',
      {named[n]: shape for n, shape in expected.items()},
      {named[n]: leaf.shape for n, leaf in there.items()},
    )
    if wrong:
      raise errors.FormatError(
        f'{self._origin}: the shared tensors are not those that its '
        f'configuration makes. {"; ".join(wrong)}.'
      )
    specs, leaves = {}, {}
    for name, shape in made.items():
      path = attachment.shared_path(name, NAME)
      dtype = there[name].dtype or 'float32'
      trains = attachment.trains(adapter, name, dtype)
      specs[name] = WeightSpec(path, tuple(shape), dtype, trains)
      leaves[path] = Leaf(
        functools.partial(_shared_weight, self._mapping, there, name),
        tuple(shape),
        dtype,
        trains,
        {'adapter': NAME},
      )
    return specs, leaves

  def _drawn(
    self, record: AdapterRecord, leaves: Mapping[Path, Leaf]
  ) -> dict[Path, Leaf]:
    """Returns the weights that PEFT does not have, as `init` draws them."""
    if not self._mapping.drawn:
      return {}
    made = attachment.weight_leaves(
      self._base, self._base.records(self._host), record, 0, self._info
    )
    return {p: leaf for p, leaf in made.items() if p not in leaves}

  def _keep(
    self, path: Path, name: str, leaves: Mapping[Path, Leaf]
  ) -> tuple[WeightSpec, Leaf]:
    """Returns a tensor of the base's own as an adapter keeps it."""
    leaf = self._folder.leaves[self._folder.others[name]]
    shape = self._info[path].shape
    leaf = axes.as_stored(leaf, shape, path[-1], name)
    to = attachment.weight_path(
      path[:-1], path[-1], 'saved', NAME, leaves.__contains__
    )
    assert leaf.shape is not None and leaf.dtype is not None
    spec = WeightSpec(to, leaf.shape, leaf.dtype, True)
    return spec, leaf.replace(metadata={'adapter': NAME})

  def _keep_rows(
    self, path: Path, module: str, leaves: Mapping[Path, Leaf]
  ) -> tuple[WeightSpec, Leaf, list[Any]]:
    """Returns a parameter with trained rows as an adapter keeps it.

    Returns:
      What is recorded, the parameter, and what is needed to write its rows.

    Raises:
      FormatError: for rows that the parameter does not have.
    """
    chosen = rows.indices(self._config, places.plain(module), self._origin)
    tensor = self._folder.leaves[self._folder.rows[module]]
    base, where = self._base[path], rows.axis(path[-1])
    shape = list(base.shape or ())
    count = shape.pop(where) if len(shape) == 2 else 0
    expected = (len(chosen or ()), *shape)
    if not chosen or tensor.shape != expected or max(chosen) >= count:
      raise errors.FormatError(
        f'{self._origin}: {module}: expected rows of {paths.show(path)}, whose '
        f'shape is {base.shape}, by {rows.KEY} {chosen}, found a tensor of '
        f'shape {tensor.shape}. If the vocabulary was resized, resize that of '
        'the base first (resize-vocab).'
      )
    to = attachment.weight_path(
      path[:-1], path[-1], 'saved', NAME, leaves.__contains__
    )
    whole = rows.placed(base, tensor, chosen, where)
    assert whole.shape is not None and whole.dtype is not None
    # All of it would train, where PEFT trains these rows alone.
    spec = WeightSpec(to, whole.shape, whole.dtype, False)
    rest = rows.others(base, chosen, where)
    said = [module, chosen, tensor.dtype, rest]
    return spec, whole.replace(metadata={'adapter': NAME}), said


def _common(tensors: Iterable[Leaf]) -> str:
  """Returns the dtype that tensors have, float32 if they have several."""
  dtypes = {leaf.dtype or 'float32' for leaf in tensors}
  return dtypes.pop() if len(dtypes) == 1 else 'float32'


def _stored(leaf: Leaf, site: Site) -> Any:
  """Returns a parameter with its inputs in front."""
  value = np.asarray(leaf.load())
  return value.transpose(site.primary.order).astype('float32')


def _weight(
  mapping: PeftMapping,
  layer: PeftLayer,
  tensors: Mapping[str, Leaf],
  name: str,
  dtype: str,
) -> Any:
  """Returns one weight of a site, computed of its module's tensors."""
  loaded = {n: np.asarray(leaf.load()) for n, leaf in tensors.items()}
  found = mapping.weights(layer, loaded)
  if name not in found:
    raise errors.PluginError(
      f'peft_type {mapping.peft_type!r}: peft.weights returned '
      f'{", ".join(found) or "nothing"}, expected {name!r} as well, which init '
      'makes and `drawn` does not name.'
    )
  return np.ascontiguousarray(found[name]).astype(dtype, copy=False)


def _shared_weight(
  mapping: PeftMapping, tensors: Mapping[str, Leaf], name: str
) -> Any:
  loaded = {n: np.asarray(leaf.load()) for n, leaf in tensors.items()}
  return np.ascontiguousarray(mapping.shared_weights(loaded)[name])


def said_by(who: Any) -> dict[str, Any]:
  """Returns the options of an adapter at a site; none of what is no adapter."""
  return who.config() if isinstance(who, Adapter) else {}


def compared(
  where: str,
  expected: Mapping[str, tuple[int, ...]],
  found: Mapping[str, tuple[int, ...] | None],
) -> list[str]:
  """Returns what differs between expected and found names and shapes."""
  wrong = []
  for name, shape in expected.items():
    if name not in found:
      wrong.append(f'{where}.{name} is missing')
    elif found[name] != shape:
      wrong.append(
        f'{where}.{name}: expected shape {shape}, found {found[name]}'
      )
  wrong += [f'{where}.{n} is superfluous' for n in found if n not in expected]
  return wrong


def usual(said: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the options that most modules have."""
  found: dict[str, Any] = {}
  for option in said[0] if said else ():
    values = [one[option] for one in said]
    found[option] = max(values, key=values.count)
  return found


def patterns_of(
  said: Mapping[Path, Mapping[str, Any]], general: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """Returns the options that are not the usual ones, by selector.

  What all layers of a name have in common is one selector; others are named.

  Args:
    said: options by the path of the parameter.
    general: the usual ones.
  """
  others = {
    path: {k: v for k, v in one.items() if v != general[k]}
    for path, one in said.items()
  }
  alike: dict[Path, list[Path]] = {}
  for path in said:
    alike.setdefault(path[-2:], []).append(path)
  patterns: dict[str, dict[str, Any]] = {}
  for end, members in alike.items():
    first = others[members[0]]
    if all(others[one] == first for one in members):
      if first:
        patterns[f'**/{paths.literal(end)}'] = first
    else:
      patterns.update(
        (paths.literal(p), others[p]) for p in members if others[p]
      )
  return patterns
