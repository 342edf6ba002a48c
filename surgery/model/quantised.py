"""Tensors that hold codes of a quantised weight instead of numbers.

Other programs store a quantised weight as several tensors: codes, and beside
or beneath them scales, zero points, tables and so on. Arithmetic on any of them
gives nonsense, and codes without their scales mean nothing. So they are
recognised by their names and dtypes, by what torchao writes into a file's
metadata, and by the `quantization_config` of a folder's `config.json`. A leaf
that is a part of such a group has `Leaf.codes`, which passes carry along and
`Leaf.replace` refuses to compute with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from surgery import errors
from surgery.naming import paths
from surgery.naming.paths import Path

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint, Leaf


@dataclasses.dataclass(frozen=True)
class Codes:
  """The quantised weight that a tensor is a part of.

  Attributes:
    kind: how the weight is stored, for messages.
    of: path of the tensor with the codes; for that tensor its own path.
  """

  kind: str
  of: Path

  def __str__(self) -> str:
    return f'{paths.show(self.of)} ({self.kind})'


# Endings of tensors beside `x` that say how `x` is decoded (compressed-tensors,
# ModelOpt, DeepSeek, FBGEMM). The first of those found names the kind.
_ENDINGS = (
  '_scale_inv',
  '_scale',
  '_scales',
  '_absmax',
  '_scale_2',
  '_global_scale',
  '_zero_point',
  '_zeros',
  '_offset',
  '_shape',
  '_g_idx',
)
_SCALES = _ENDINGS[:4]
# `x_packed` and so on are the codes of what `x_scale` belongs to.
_PACKED = ('_packed', '_blocks', '_qdata', '_quantized', '_quant')
# Tensors that hold codes whatever they lie beside: GPTQ and AWQ, qwix, HQQ,
# quanto, QuIP#.
_ALWAYS = ('qweight', 'qvalue', 'W_q', '_data', 'Qidxs')
_USUAL = ('weight', 'kernel', 'embedding')
# What belongs to the codes of a layer under a name of its own: what tells that
# there are codes, and what there may be beside.
_TELLING = (
  'scales',
  'qzeros',
  'g_idx',
  'SCB',
  'weight_scales',
  '_scale',
  'scale',
)
_FURTHER = (
  'zero',
  'zero_point',
  'zeros',
  '_shift',
  'perm',
  'weight_format',
  'biases',
)
_INPUTS = ('input_scale', 'input_global_scale', 'input_zero_point')
# bitsandbytes writes these beneath the codes: `weight.absmax`.
_BENEATH = ('absmax', 'quant_map', 'nested_absmax', 'quant_state', 'SCB')
_NARROW = (
  'float8',
  'float6',
  'float4',
  'packed_float',
  'int2',
  'int4',
  'int8',
  'uint2',
  'uint4',
  'uint8',
)
_WORDS = ('int32', 'uint32')


def _is_narrow(dtype: str | None, words: bool = True) -> bool:
  """Whether a tensor has a dtype of codes, `words` of several codes each."""
  dtype = dtype or ''
  return dtype.startswith(_NARROW) or (words and dtype in _WORDS)


def found(
  leaves: Mapping[Path, Leaf],
  metadata: Mapping[str, str],
  config: Mapping[str, Any] | None = None,
) -> dict[Path, Codes]:
  """Returns the tensors that are parts of quantised weights.

  Args:
    leaves: the tensors by path; none is read.
    metadata: metadata that other programs wrote into the file.
    config: the `quantization_config` of the model's folder, if it has one.
  """
  codes: dict[Path, Codes] = {}
  for path, parts in _of_torchao(leaves, metadata):
    _add(codes, path, parts, 'torchao')
  layers: dict[Path, dict[str, Leaf]] = {}
  for path, leaf in leaves.items():
    if path and leaf.shape is not None and path not in codes:
      layers.setdefault(path[:-1], {})[path[-1]] = leaf
  for layer, own in layers.items():
    alike = tuple((name, leaf.dtype or '') for name, leaf in own.items())
    for name, others, kind in _in_layer(alike):
      beside = [(*layer, other) for other in others]
      _add(codes, (*layer, name), beside, kind)
  for layer, own in layers.items():
    if not own.keys().isdisjoint(_BENEATH):
      _add_beneath(codes, leaves, layer)
  if config is not None:
    _add_configured(codes, leaves, config)
  return codes


def _add_beneath(
  codes: dict[Path, Codes], leaves: Mapping[Path, Leaf], layer: Path
) -> None:
  """Adds codes whose other parts lie beneath them, as bitsandbytes has it."""
  # `weight.absmax` makes a layer of `weight`, which is a tensor, too; and
  # `weight.quant_state.…` one of what lies in it.
  above = layer
  while above and above not in leaves:
    above = above[:-1]
  if above:
    beneath = [p for p in leaves if p[: len(above)] == above and p != above]
    _add(codes, above, beneath, _kind(leaves[above].dtype, ['absmax']))


def _add_configured(
  codes: dict[Path, Codes],
  leaves: Mapping[Path, Leaf],
  config: Mapping[str, Any],
) -> None:
  """Adds tensors that only a folder's configuration says are quantised."""
  method = config.get('quant_method', 'quantization_config')
  for path, leaf in leaves.items():
    # Vectors are none: norms and biases of such models may be narrow, too.
    is_matrix = len(leaf.shape or ()) > 1
    if path not in codes and is_matrix and _is_narrow(leaf.dtype):
      codes[path] = Codes(f'{leaf.dtype}, {method}', path)


def _kind(dtype: str | None, parts: Iterable[str]) -> str:
  return f'{dtype} with {", ".join(parts)}'


def _add(
  codes: dict[Path, Codes], of: Path, parts: Iterable[Path], kind: str
) -> None:
  for path in (of, *parts):
    codes.setdefault(path, Codes(kind, of))


@functools.lru_cache(maxsize=1024)
def _in_layer(
  layer: tuple[tuple[str, str], ...],
) -> list[tuple[str, tuple[str, ...], str]]:
  """Returns the codes among the tensors of one layer.

  Cached, since most layers of a model have tensors of the same names.

  Args:
    layer: name and dtype of each tensor.

  Returns:
    For each tensor with codes its name, the names of what belongs to it, and
    how the weight is stored.
  """
  own = dict(layer)
  found = []
  for name, dtype in layer:
    if name.endswith(_ENDINGS) or name in (*_TELLING, *_FURTHER):
      continue  # It belongs to another tensor's codes.
    parts = _parts(name, dtype, own)
    if parts:
      inputs = [n for n in _INPUTS if n in own and n not in parts]
      found.append((name, (*parts, *inputs), _kind(dtype, parts)))
  return found


def _parts(name: str, dtype: str, own: Collection[str]) -> list[str]:
  """Returns the names of the tensors that decode another one's codes, if any.

  Args:
    name: name of the tensor.
    dtype: its dtype.
    own: names of all tensors of its layer.
  """
  stem, narrow = stem_of(name), _is_narrow(dtype)
  parts = [stem + e for e in _ENDINGS if stem + e in own]
  # Only quantisers write a `_scale_inv`, so it decides whatever the dtype is; a
  # float32 weight beside a `weight_scale` may be anything.
  tells = any(stem + e in own for e in (_SCALES if narrow else _SCALES[:1]))
  if narrow and name in (*_ALWAYS, *_USUAL):
    # The layer has one weight, so names without its stem are about it.
    tells |= any(n in own for n in _TELLING)
    parts += [n for n in (*_TELLING, *_FURTHER) if n in own]
  return list(dict.fromkeys(parts)) if tells else []


def _of_torchao(
  leaves: Mapping[Path, Leaf], metadata: Mapping[str, str]
) -> Iterable[tuple[Path, list[Path]]]:
  """Yields codes and their other parts, from torchao's metadata.

  The metadata has the class of each tensor: `'0.weight': '{"_type":
  "Float8Tensor", …}'`, whose parts are `0._weight_qdata`, `0._weight_scale`;
  older releases wrote `0.weight:qdata`.
  """
  for name, text in metadata.items():
    if not _is_quantised_class(text):
      continue
    whole = tuple(name.split('.'))
    starts = (f'_{whole[-1]}_', f'{whole[-1]}:')
    parts = [
      path
      for path in leaves
      if path[: len(whole)] == whole
      or (path[:-1] == whole[:-1] and path[-1].startswith(starts))
    ]
    if parts:
      narrow = [path for path in parts if _is_narrow(leaves[path].dtype)]
      first = (narrow or parts)[0]
      yield first, [path for path in parts if path != first]


def _is_quantised_class(text: str) -> bool:
  """Whether an entry of torchao's metadata is of a class of codes."""
  if '"_type"' not in text:
    return False
  try:
    entry = json.loads(text)
  except ValueError:
    return False  # Metadata may be any text of anybody's.
  kind = str(entry.get('_type')) if isinstance(entry, dict) else ''
  # All its classes of codes are called `…Tensor`; plain ones are listed, too.
  return 'ensor' in kind and kind not in ('torch.Tensor', 'Tensor')


def config_of(origin: pathlib.Path) -> Mapping[str, Any] | None:
  """Returns the `quantization_config` beside a model's file, if any."""
  beside = origin.parent / 'config.json'
  try:
    data = json.loads(beside.read_bytes())
  except (OSError, ValueError, RecursionError):
    return None  # It may be any program's file; the model is read without it.
  config = data.get('quantization_config') if isinstance(data, dict) else None
  return config if isinstance(config, dict) else None


def marked(
  checkpoint: Checkpoint, config: Mapping[str, Any] | None = None
) -> Checkpoint:
  """Returns a checkpoint whose leaves know the codes that they are a part of.

  Args:
    checkpoint: as it was opened, or params.
    config: the `quantization_config` of its folder, if it has one.
  """
  codes = found(checkpoint, checkpoint.manifest.metadata, config)
  if not any(checkpoint[path].codes is None for path in codes):
    return checkpoint
  leaves = dict(checkpoint)
  for path, one in codes.items():
    if leaves[path].codes is None:
      leaves[path] = leaves[path].replace(codes=one)
  return checkpoint.replace(leaves=leaves)


def refuse(leaf: Leaf, verb: str = '') -> None:
  """Raises if a tensor is a part of a quantised weight.

  Raises:
    QuantisedError: naming the weight.
  """
  if leaf.codes is None:
    return
  raise errors.QuantisedError(
    f'{f"{verb}: " if verb else ""}{paths.show(leaf.codes.of)} holds codes of '
    f'a quantised weight ({leaf.codes.kind}), not numbers, so nothing can be '
    'computed from it or from its scales. Leave these tensors out (by the '
    'selector, or keep= of cast), or dequantise the model first with the '
    'program that quantised it.'
  )


# Groups: what passes that move whole tensors carry along.


def groups(leaves: Mapping[Path, Leaf]) -> dict[Path, list[Path]]:
  """Returns for each tensor with codes the other parts of its weight."""
  members: dict[Path, list[Path]] = {}
  for path, leaf in leaves.items():
    if leaf.codes is not None:
      parts = members.setdefault(leaf.codes.of, [])
      if path != leaf.codes.of:
        parts.append(path)
  return members


def stem_of(name: str) -> str:
  """Returns what the names of a weight's other parts begin with."""
  ending = next((e for e in _PACKED if name.endswith(e)), '')
  return name[: len(name) - len(ending)]


def beside(part: Path, of: Path, new: Path) -> Path:
  """Returns where a part of a weight goes if its codes go elsewhere.

  Args:
    part: path of the part, e.g. `('a', 'weight_scale')`.
    of: path of the codes, `('a', 'weight')`.
    new: where these go, `('b', 'kernel')`; the part becomes
      `('b', 'kernel_scale')`.
  """
  if part[: len(of)] == of:
    return (*new, *part[len(of) :])
  if part[:-1] != of[:-1]:
    return part
  stem, name = stem_of(of[-1]), part[-1]
  if name.startswith(f'{stem}_'):
    name = stem_of(new[-1]) + name[len(stem) :]
  return (*new[:-1], name)


def moved(leaf: Leaf, new: Path) -> Leaf:
  """Returns a part of a weight whose codes are under another path."""
  if leaf.codes is None or leaf.codes.of == new:
    return leaf
  return leaf.replace(codes=dataclasses.replace(leaf.codes, of=new))


def without(leaves: Mapping[Path, Leaf], gone: Collection[Path]) -> set[Path]:
  """Returns what goes, and what goes along because its codes go.

  Args:
    leaves: all tensors.
    gone: those that are to go.

  Raises:
    QuantisedError: if codes would stay without a part that they need.
  """
  left = set(gone)
  for of, parts in groups(leaves).items():
    if of in left or of not in leaves:
      left.update(parts)
      continue
    for part in parts:
      # The scale of inputs is not needed to decode the weight.
      if part in left and part[-1] not in _INPUTS:
        raise errors.QuantisedError(
          f'{paths.show(part)} would go and {paths.show(of)} stay, '
          'whose codes mean nothing without it. Select both, or neither.'
        )
  return left
