"""The meaning of the axes of tensors that PyTorch wrote.

No file states it, so it is inferred, and each answer names its evidence: a bias
has as many elements as its layer has outputs; layers of one name have one
layout; embeddings, and transformers' Conv1D, are known by their names. Where
none of these decides, PyTorch's usual layout is assumed, and is not certain.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from surgery import errors
from surgery.model.layers import LayerType
from surgery.naming import paths

if TYPE_CHECKING:
  from surgery.model.checkpoint import Leaf
  from surgery.model.manifest import Manifest
  from surgery.naming.paths import Path

FORMAT = 'format'
TORCH, FLAX = 'pt', 'flax'


@dataclasses.dataclass(frozen=True)
class Layout:
  """The meaning of the axes of a tensor.

  Attributes:
    letters: a letter an axis, `s` stacked (in front), `i` input, `o` output.
    why: the evidence, for plans.
    sure: whether the evidence leaves no other choice.
  """

  letters: str
  why: str
  sure: bool = True


# Names of PyTorch programs that others hardly have.
_MARKS = re.compile(
  r'self_attn|[qkvo]_proj|c_attn|c_fc|LayerNorm|layer_?norm|embed_tokens'
  r'|word_embeddings|in_proj_weight|running_mean|num_batches_tracked'
)
_EMBEDDING = re.compile(
  r'(?:.*_)?emb(?:s|ed(?:s|ding|dings)?)?(?:_tokens|_positions|_in)?'
  r'|wte|wpe|shared'
  r'|tok_embeddings|relative_attention_bias|codebook'
)
_LINEAR = re.compile(
  r'.*(?:proj|projection|dense|query|key|value|linear|head|classifier|score'
  r'|qkv|out|embed_out|pooler|gate|router)\d*|(?:fc|w|lin)_?\d*|[qkvo]|w[qkvo]'
  r'|wi(?:_\d)?'
)
_CONV = re.compile(r'.*(?:conv|patch|proj|projection|downsample|stem).*')


def framework(leaves: Mapping[Path, Leaf]) -> str:
  """Returns `pt` if names and layout are those of PyTorch, otherwise `flax`.

  PyTorch calls a layer's matrix `weight` and stores it as `(outputs, inputs)`,
  so a bias beside it has the size of its first axis. Layers `c_…` do not count:
  transformers' Conv1D, of GPT-2, stores `(inputs, outputs)`.
  """
  names = {path[-1] for path in leaves if path}
  if not names.isdisjoint(('kernel', 'embedding')) or not any(
    name.endswith('weight') for name in names
  ):
    return FLAX
  matrices = (
    (path, leaf)
    for path, leaf in leaves.items()
    if path[-1:] == ('weight',) and len(leaf.shape or ()) == 2
  )
  for path, leaf in matrices:
    if not _is_conv1d(path) and _by_bias(path, leaf, leaves) == 'io':
      return FLAX
  return TORCH


def is_torch(leaves: Mapping[Path, Leaf], manifest: Manifest) -> bool:
  """Whether there is evidence that PyTorch wrote a checkpoint.

  The evidence is the metadata of its file, or names that other programs hardly
  use, or a bias that proves the layout. A matrix with the name `weight` alone
  proves nothing: layers of blox and equinox may use it.
  """
  if manifest.metadata.get(FORMAT) == TORCH:
    return True
  known = any(one.names for one in manifest.layer_types.values())
  if known or framework(leaves) != TORCH or _is_turned(leaves):
    return False
  return any(
    _MARKS.search('/'.join(path)) or _by_bias(path, leaf, leaves) == 'oi'
    for path, leaf in leaves.items()
    if path[-1:] != () and path[-1].endswith('weight')
  )


# Layers whose inputs are features, as many as an embedding has columns.
_TAKES_FEATURES = re.compile(
  r'[qkv]_proj|gate_proj|up_proj|lm_head|fc1|wi(_\d)?'
)


def _is_turned(leaves: Mapping[Path, Leaf]) -> bool:
  """Whether a kernel has its inputs first, which PyTorch's have not.

  Programs in JAX may have adopted PyTorch's names, but not its layout.
  """
  features = {shape[1] for _, shape in _matrices(leaves, _EMBEDDING)}
  if len(features) != 1:
    return False
  [size] = features
  return any(
    shape[0] == size != shape[1]
    # A bias that proves PyTorch's layout makes the size a coincidence.
    and _by_bias(path, leaves[path], leaves) != 'oi'
    for path, shape in _matrices(leaves, _TAKES_FEATURES)
  )


def _matrices(
  leaves: Mapping[Path, Leaf], layers: re.Pattern[str]
) -> Iterator[tuple[Path, tuple[int, ...]]]:
  """Yields path and shape of matrices in layers with certain names."""
  for path, leaf in leaves.items():
    shape = leaf.shape or ()
    if len(path) > 1 and len(shape) == 2 and layers.fullmatch(path[-2]):
      yield path, shape


def found(
  leaves: Mapping[Path, Leaf], manifest: Manifest
) -> dict[Path, Layout]:
  """Returns the layouts of a checkpoint that PyTorch wrote; else nothing.

  Args:
    leaves: the tensors; none is read.
    manifest: what is known beside them. Layers whose type is known are left
      out.
  """
  if not is_torch(leaves, manifest):
    return {}
  matrices = {
    path: leaf
    for path, leaf in leaves.items()
    if _is_open(path, leaf) and not _is_known(path, manifest)
  }
  proven = {
    path: letters
    for path, leaf in matrices.items()
    if (letters := _by_bias(path, leaf, leaves))
  }
  # A square kernel proves nothing by its bias; one of the same name that is not
  # square does, and layers of one name are made by the same code.
  alike: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
  for path, letters in proven.items():
    alike[_kind(path, matrices[path])].add(letters)
  result = {}
  for path, leaf in matrices.items():
    if path in proven:
      result[path] = Layout(proven[path], 'its bias')
      continue
    like = alike.get(_kind(path, leaf), set())
    result[path] = _by_name(path, leaf, like)
  return result


def _is_open(path: Path, leaf: Leaf) -> bool:
  """Whether a tensor has axes whose meaning its name leaves open."""
  if len(leaf.shape or ()) < 2 or leaf.codes is not None:
    return False
  if 'adapter' in leaf.metadata:
    return False  # Its record has the layout.
  # Layers of JAX use the first two names, with JAX's layout, whatever wrote the
  # file. A bias has two axes in stacked layers.
  return path[-1] not in ('kernel', 'embedding') and 'bias' not in path[-1]


def _is_known(path: Path, manifest: Manifest) -> bool:
  """Whether the type of a layer, or a layout that a step wrote, is known."""
  one = manifest.layer_types.get(path[:-1])
  return one is not None and (bool(one.names) or path[-1] in one.layouts)


def _kind(path: Path, leaf: Leaf) -> tuple[str, int]:
  return path[-2] if len(path) > 1 else '', len(leaf.shape or ())


def _is_conv1d(path: Path) -> bool:
  return len(path) > 1 and path[-2].startswith('c_')


def _by_bias(path: Path, leaf: Leaf, leaves: Mapping[Path, Leaf]) -> str | None:
  """Returns the letters of a layout if a bias leaves no other choice."""
  shape = leaf.shape or ()
  if len(shape) < 2 or not path or 'weight' not in path[-1]:
    return None
  bias = leaves.get((*path[:-1], path[-1].replace('weight', 'bias')))
  if bias is None or not bias.shape:
    return None
  # Stacked axes stand in front of the bias, too.
  stacked = len(bias.shape) - 1
  core = shape[stacked:]
  if len(core) < 2 or bias.shape[:-1] != shape[:stacked]:
    return None
  # The outputs are the axis that has the bias's size, if only one has.
  front, taps = 's' * stacked, 'i' * (len(core) - 2)
  first, second = (bias.shape[-1] == size for size in core[:2])
  if first != second:
    return f'{front}{"oi" if first else "io"}{taps}'
  return None


def _by_name(path: Path, leaf: Leaf, like: set[str]) -> Layout:
  """Returns the layout by a layer's name, or PyTorch's usual one."""
  shape, (name, rank) = leaf.shape or (), _kind(path, leaf)
  if len(like) == 1:
    return Layout(next(iter(like)), f'the bias of another {name}')
  if 'weight' not in path[-1]:
    # A bare parameter, e.g. of fused experts: programs differ in it.
    return Layout('i' * (rank - 1) + 'o', 'an unknown name', sure=False)
  usual = 'o' + 'i' * (rank - 1)
  if rank == 2:
    if _EMBEDDING.fullmatch(name):
      return Layout('io', 'the name of an embedding')
    if _LINEAR.fullmatch(name) or path[-1] != 'weight':
      return Layout(usual, 'the name of a linear layer')
    what = 'a square kernel' if shape[0] == shape[1] else 'no bias'
    return Layout(usual, f'{what} under an unknown name', sure=False)
  if _CONV.fullmatch(name):
    return Layout(usual, 'the name of a convolution')
  return Layout(usual, f'{rank} axes under an unknown name', sure=False)


def rearranged(
  leaves: Mapping[Path, Leaf],
  manifest: Manifest,
  orders: Mapping[Path, Sequence[int]],
) -> Manifest:
  """Returns a manifest with the layouts of tensors whose axes were permuted.

  Args:
    leaves: the tensors before.
    manifest: the manifest before.
    orders: by path the old axis of each new one.
  """
  before = found(leaves, manifest)
  types = dict(manifest.layer_types)
  for path, order in orders.items():
    one = types.get(path[:-1], LayerType(()))
    letters = one.layouts.get(path[-1])
    if letters is None and path in before:
      letters = before[path].letters
    if letters is None or len(letters) != len(order):
      continue
    letters = ''.join(letters[axis] for axis in order)
    types[path[:-1]] = dataclasses.replace(
      one, layouts={**one.layouts, path[-1]: letters}
    )
  return manifest.replace(layer_types=types)


def remarks(
  found: Mapping[Layout, Iterable[Path]], verb: str
) -> tuple[str, ...]:
  """Returns `described`, and warns of layouts that are not certain.

  Args:
    found: tensors by layout.
    verb: what uses them.
  """
  open_ = {one: some for one, some in found.items() if not one.sure}
  for line in described(open_):
    warnings.warn(f'{verb}: {line}.', errors.SiteWarning, stacklevel=3)
  return tuple(described(found))


def described(found: Mapping[Layout, Iterable[Path]]) -> Iterator[str]:
  """Yields a sentence about each layout and the tensors that have it.

  Args:
    found: tensors by layout.
  """
  for layout, some in found.items():
    axes = ', '.join(_WORDS[letter] for letter in layout.letters)
    names = [paths.literal(path) for path in some]
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    shown = ', '.join(names[:3]) + more
    if layout.sure:
      yield f'layout ({axes}), by {layout.why}: {shown}'
    else:
      yield (
        f'layout ({axes}) is not certain ({layout.why}); assumed as PyTorch '
        f"usually has it: {shown}. State it with --layout '{names[0]}="
        f"{layout.letters}', or other letters"
      )


_WORDS = {'s': 'stacked', 'i': 'in', 'o': 'out'}
