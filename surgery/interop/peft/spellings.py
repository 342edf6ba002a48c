"""Adapters as kohya's scripts, ComfyUI and diffusers spell them.

These are single files of tensors. A name tells module and role
(`lora_unet_…_to_q.lora_down.weight`, `unet.….to_q.lora_A.weight`), a tensor
`alpha` the scale, or a text in the file's metadata what PEFT would have in a
configuration. Such a file is brought to the names and configuration of PEFT,
and read as its folders are. Tensors whose role is not known find no place.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from surgery import errors
from surgery.contract.peft import PeftMapping
from surgery.host.manager import Host
from surgery.interop.peft import config as configs
from surgery.interop.peft import places, reading
from surgery.model import manifest
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming.paths import Path

# Ends of names, and what PEFT calls the tensor.
_ROLES = {
  'lora_down.weight': 'lora_A.weight',
  'lora_up.weight': 'lora_B.weight',
  'lora.down.weight': 'lora_A.weight',
  'lora.up.weight': 'lora_B.weight',
  'lora_A.weight': 'lora_A.weight',
  'lora_B.weight': 'lora_B.weight',
  'lora_magnitude_vector': 'lora_magnitude_vector',
  'dora_scale': 'lora_magnitude_vector',
  'hada_w1_a': 'hada_w1_a',
  'hada_w1_b': 'hada_w1_b',
  'hada_w2_a': 'hada_w2_a',
  'hada_w2_b': 'hada_w2_b',
  'lokr_w1': 'lokr_w1',
  'lokr_w2': 'lokr_w2',
  'lokr_w2_a': 'lokr_w2_a',
  'lokr_w2_b': 'lokr_w2_b',
}
_ALPHA = 'alpha'
# Attention processors of old releases of diffusers: `….processor.to_q_lora.up`.
_PROCESSOR = re.compile(r'\.processor\.(to_\w+)_lora\.(down|up)\.weight$')
# Of which model a module is, in front of its name.
_UNDERSCORED = re.compile(
  r'(?P<of>lora_unet|lora_te\d?|lora_transformer|lycoris)_'
)
_DOTTED = re.compile(
  r'(?P<of>unet|transformer|text_encoder(_\d)?|prior)\.(?=.)'
)
# Where diffusers keeps a configuration in a file.
_METADATA = 'lora_adapter_metadata'
_FIRST = {
  'lora_A.weight': 'LORA',
  'hada_w1_a': 'LOHA',
  'lokr_w1': 'LOKR',
}


def knows(alone: Checkpoint) -> bool:
  """Whether a file has names of these programs, and is no model or folder."""
  if alone.manifest.kind == manifest.ADAPTER or alone.manifest.adapters:
    return False
  found = {_split(places.name_of(path))[1] for path in alone}
  return bool(found & set(_FIRST))


def bound(
  alone: Checkpoint, base: Checkpoint, names: Any, host: Host
) -> Checkpoint:
  """Returns such an adapter as `extract` would make it of a base.

  Args:
    alone: the file.
    base: the model.
    names: what modules are called in the base, if otherwise.
    host: knows adapter types.

  Raises:
    FormatError: if a tensor has no place, or a place no tensor.
  """
  origin = alone.origin or 'the file'
  modules = _modules(alone)
  _check_one_model(modules, origin)
  called = _called(modules, base, names, origin)
  folder = _folder(alone, modules, called, origin)
  return reading.bound(folder, base, names, host)


@dataclasses.dataclass
class _Module:
  """A module of a file.

  Attributes:
    of: the model that it is of, as the file says; empty if it does not.
    name: its name without that.
    tensors: its tensors by PEFT's names for them.
    alpha: the tensor that scales it, if there is one.
    strange: ends of names that mean nothing here.
  """

  of: str
  name: str
  tensors: dict[str, Leaf] = dataclasses.field(default_factory=dict)
  alpha: Leaf | None = None
  strange: list[str] = dataclasses.field(default_factory=list)


def _split(name: str) -> tuple[str, str]:
  """Returns a module's name and PEFT's name of its tensor, or what there is."""
  name = name.removeprefix(places.PREFIX)
  old = _PROCESSOR.search(name)
  if old is not None:
    module = f'{name[: old.start()]}.{old[1]}'
    return module, _ROLES[f'lora.{old[2]}.weight']
  for end, role in (*_ROLES.items(), (_ALPHA, _ALPHA)):
    if name.endswith(f'.{end}'):
      return name[: -len(end) - 1], role
  module, _, last = name.rpartition('.')
  return module, last


def _modules(alone: Checkpoint) -> dict[str, _Module]:
  """Returns the modules of a file, by their whole names."""
  found: dict[str, _Module] = {}
  for path, leaf in alone.items():
    whole, role = _split(places.name_of(path))
    front = _UNDERSCORED.match(whole) or _DOTTED.match(whole)
    of = front['of'] if front else ''
    name = whole[front.end() :] if front else whole
    one = found.setdefault(whole, _Module(of, name))
    if role == _ALPHA:
      one.alpha = leaf
    elif role in _ROLES.values() and role not in one.tensors:
      one.tensors[role] = leaf
    else:
      one.strange.append(role)
  return found


def _check_one_model(modules: Mapping[str, _Module], origin: str) -> None:
  """Raises if a file has adapters of several models.

  Raises:
    FormatError: saying how to part them.
  """
  found = sorted({one.of for one in modules.values()})
  if len(found) > 1:
    shown = ' and '.join(one or 'no model by name' for one in found)
    first = next(one for one in found if one)
    front = f'{first}_*/**' if first.startswith('ly') or '_' in first else first
    raise errors.FormatError(
      f'{origin}: it has adapters of several models, {shown}. Part them first, '
      f"e.g. surgery keep FILE '{front}' -o {first}.safetensors, and attach "
      'each to its model.'
    )


def _called(
  modules: Mapping[str, _Module], base: Checkpoint, names: Any, origin: str
) -> dict[str, str]:
  """Returns what modules are called with dots.

  kohya writes `_` for each `.`, which only the base undoes.

  Raises:
    FormatError: if two layers of the base have the same name then.
  """
  if names is not None or not any(_is_flat(one) for one in modules.values()):
    return {whole: one.name for whole, one in modules.items()}
  flat: dict[str, set[str]] = {}
  for path in base:
    layer = path[:-1]
    # With and without names in front, as `model.diffusion_model`.
    for start in range(min(3, len(layer))):
      name = places.name_of(layer[start:])
      flat.setdefault(name.replace('.', '_'), set()).add(places.name_of(layer))
  called = {}
  for whole, one in modules.items():
    there = flat.get(one.name, set())
    if len(there) > 1:
      raise errors.FormatError(
        f'{origin}: {whole} may be {" or ".join(sorted(there))} of the base. '
        'Say which by names= (--names).'
      )
    called[whole] = next(iter(there), one.name)
  return called


def _is_flat(one: _Module) -> bool:
  return '.' not in one.name


def _folder(
  alone: Checkpoint,
  modules: Mapping[str, _Module],
  called: Mapping[str, str],
  origin: str,
) -> Checkpoint:
  """Returns the file as a folder of PEFT."""
  kinds = {
    _FIRST[role]
    for one in modules.values()
    for role in one.tensors
    if role in _FIRST
  }
  if len(kinds) > 1:
    raise errors.FormatError(
      f'{origin}: it has {" and ".join(sorted(kinds))} in one file. Separate '
      "them first, e.g. surgery keep FILE '**/lora_*' -o lora.safetensors."
    )
  leaves: dict[Path, Leaf] = {}
  for whole, one in modules.items():
    front = f'{places.PREFIX}{called[whole]}'
    for role, leaf in one.tensors.items():
      shaped = _magnitude(leaf, one) if 'magnitude' in role else leaf
      leaves[tuple(f'{front}.{role}'.split('.'))] = shaped
    for role in one.strange:
      leaves[tuple(f'{front}.{role}'.split('.'))] = alone[
        _path_of(alone, whole, role)
      ]
    if one.alpha is not None and not one.tensors:
      # An alpha without tensors is refused later, by its name.
      leaves[tuple(f'{front}.{_ALPHA}'.split('.'))] = one.alpha
  config = _config(kinds.pop(), modules, called, alone, origin)
  return Checkpoint(
    leaves,
    manifest.Manifest(kind=manifest.ADAPTER, extra={configs.KEY: config}),
    origin=origin,
  )


def _path_of(alone: Checkpoint, whole: str, role: str) -> Path:
  for path in alone:
    if _split(places.name_of(path)) == (whole, role):
      return path
  raise KeyError(whole)


def _magnitude(leaf: Leaf, one: _Module) -> Leaf:
  """Returns the scale of outputs as PEFT has it."""
  b = one.tensors.get('lora_B.weight')
  outputs = (b.shape or (0,))[0] if b is not None else 0
  if (leaf.shape or (0,))[0] != outputs or leaf.size != outputs:
    return leaf  # A magnitude of inputs: its shape is refused later.
  a = one.tensors.get('lora_A.weight')
  taps = len((a.shape if a is not None else None) or ()) - 2
  shape = (1, outputs, *(1,) * taps) if taps > 0 else (outputs,)
  if leaf.shape == shape:
    return leaf
  return leaf.replace(
    load=functools.partial(_reshaped, leaf, shape), shape=shape
  )


def _reshaped(leaf: Leaf, shape: tuple[int, ...]) -> Any:
  return np.asarray(leaf.load()).reshape(shape)


def _config(
  kind: str,
  modules: Mapping[str, _Module],
  called: Mapping[str, str],
  alone: Checkpoint,
  origin: str,
) -> dict[str, Any]:
  """Returns the configuration that such a file stands for."""
  adapted = {whole: one for whole, one in modules.items() if one.tensors}
  ranks = {called[whole]: _rank(one) for whole, one in adapted.items()}
  alphas = {
    called[whole]: _alpha(one, f'{origin}: {whole}.alpha')
    for whole, one in adapted.items()
  }
  r, rank_pattern = PeftMapping.by_pattern(ranks, 1)
  alpha, alpha_pattern = PeftMapping.by_pattern(alphas, 1)
  key = 'lora_alpha' if kind == 'LORA' else 'alpha'
  config: dict[str, Any] = {
    'peft_type': kind,
    'r': r,
    key: alpha,
    'rank_pattern': rank_pattern,
    'alpha_pattern': alpha_pattern,
    'target_modules': sorted(ranks),
  }
  roles = {role for one in modules.values() for role in one.tensors}
  if kind == 'LORA':
    config['use_dora'] = 'lora_magnitude_vector' in roles
  if kind == 'LOKR':
    config['decompose_factor'] = _factor(modules.values(), origin)
  return {**config, **_metadata(alone, modules, origin)}


def _metadata(
  alone: Checkpoint, modules: Mapping[str, _Module], origin: str
) -> dict[str, Any]:
  """Returns the configuration that diffusers writes into a file's metadata.

  Raises:
    FormatError: if it is no JSON object.
  """
  text = alone.manifest.metadata.get(_METADATA)
  if text is None or any(one.alpha for one in modules.values()):
    return {}
  try:
    data = json.loads(text)
  except (ValueError, RecursionError):
    data = None
  if not isinstance(data, dict):
    raise errors.FormatError(
      f'{origin}: expected a JSON object as {_METADATA} in its metadata.'
    )
  [of] = {one.of for one in modules.values()}
  front = f'{of}.' if of else ''
  # One file may hold adapters of several models (`unet.`, `text_encoder.`).
  inner = {
    key[len(front) :]: value
    for key, value in data.items()
    if key.startswith(front)
  }
  # These name modules of the whole model; here the tensors' names decide.
  for key in ('target_modules', 'exclude_modules', 'peft_type'):
    inner.pop(key, None)
  return inner


def _alpha(one: _Module, where: str) -> float:
  """Returns a module's alpha; by default its rank, so that the scale is one.

  kohya ignores the alpha of a LoKr whose second matrix is whole.
  """
  if one.alpha is None or 'lokr_w2' in one.tensors:
    return float(_rank(one))
  return _number(one.alpha, where)


def _rank(one: _Module) -> int:
  """Returns the rank that a module's tensors have."""
  shape = lambda role: one.tensors[role].shape or (1,)
  if 'lora_A.weight' in one.tensors:
    return shape('lora_A.weight')[0]
  if 'hada_w1_b' in one.tensors:
    return shape('hada_w1_b')[0]
  if 'lokr_w2_b' in one.tensors:
    return shape('lokr_w2_b')[0]
  # PEFT keeps a matrix whole if the rank is not below half of its size.
  return max(shape('lokr_w2')[:2], default=1) if 'lokr_w2' in one.tensors else 1


def _factor(modules: Iterable[_Module], origin: str) -> int:
  """Returns the factor by which PEFT would divide all modules.

  Raises:
    FormatError: if no single factor gives these shapes.
  """
  sizes = [pair for one in modules for pair in _divisions(one)]
  # -1 is PEFT's default: two factors that are as near to each other as can be.
  for factor in (-1, *sorted({small for small, _ in sizes})):
    if all(_divided(s * n, factor) == (s, n) for s, n in sizes):
      return factor
  raise errors.FormatError(
    f'{origin}: its LoKr is not divided by one factor, as PEFT divides it.'
  )


def _divisions(one: _Module) -> Iterable[tuple[int, int]]:
  """Returns the two factors of the sizes of outputs and inputs of a LoKr."""
  shape = lambda role: (
    tuple(one.tensors[role].shape or ()) if role in one.tensors else ()
  )
  first = shape('lokr_w1')
  if len(first) != 2:
    return ()
  large = shape('lokr_w2')[:2] or (
    *shape('lokr_w2_a')[:1],
    *shape('lokr_w2_b')[1:2],
  )
  return zip(first, large, strict=False)


def _divided(size: int, factor: int) -> tuple[int, int]:
  """Returns two factors of a size; see PEFT's `factorization`."""
  if factor > 0 and size % factor == 0:
    small, large = sorted((factor, size // factor))
    return small, large
  most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
  small = next(n for n in range(max(most, 1), 0, -1) if size % n == 0)
  return small, size // small


def _number(leaf: Leaf, where: str) -> float:
  """Returns the one number in a tensor.

  Raises:
    FormatError: if there are several, or it is not finite.
  """
  if leaf.size == 1:
    value = float(np.asarray(leaf.load()).reshape(()))
    if math.isfinite(value):
      return value
  raise errors.FormatError(
    f'{where}: expected one finite number, found {leaf}.'
  )
