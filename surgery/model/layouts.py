"""How the axes of tensors that PyTorch wrote are meant.

Nothing in a file says it, so it is taken from what does not leave it open, and
each answer says from what: a bias has as many places as its layer has outputs;
layers of one name are alike; embeddings, and transformers' Conv1D, are known by
their names. What none of these decides is taken as PyTorch usually has it, and
is not certain.
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
  """How the axes of a tensor are meant.

  Attributes:
    letters: a letter an axis, `s` stacked (in front), `i` input, `o` output.
    why: what tells it, for plans.
    sure: whether that leaves nothing open.
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
  for path, leaf in leaves.items():
    if path[-1:] != ('weight',) or len(leaf.shape or ()) != 2:
      continue
    if not _is_conv1d(path) and _by_bias(path, leaf, leaves) == 'io':
      return FLAX
  return TORCH


def is_torch(leaves: Mapping[Path, Leaf], manifest: Manifest) -> bool:
  """Whether a checkpoint says that PyTorch wrote it.

  By the metadata of its file, or by names that others hardly have, or because
  a bias proves the layout. A matrix that is called `weight` alone proves
  nothing: layers of blox and equinox may call theirs so.
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


# What takes features, which an embedding has as many of as columns.
_TAKES_FEATURES = re.compile(
  r'[qkv]_proj|gate_proj|up_proj|lm_head|fc1|wi(_\d)?'
)


def _is_turned(leaves: Mapping[Path, Leaf]) -> bool:
  """Whether a kernel takes features by its first axis, which PyTorch's do not.

  Programs of JAX may have taken PyTorch's names over, and not its layout.
  """
  features = {
    leaf.shape[1]
    for path, leaf in leaves.items()
    if len(path) > 1
    and leaf.shape is not None
    and len(leaf.shape) == 2
    and _EMBEDDING.fullmatch(path[-2])
  }
  if len(features) != 1:
    return False
  [size] = features
  return any(
    leaf.shape[0] == size != leaf.shape[1]
    for path, leaf in leaves.items()
    if len(path) > 1
    and leaf.shape is not None
    and len(leaf.shape) == 2
    and _TAKES_FEATURES.fullmatch(path[-2])
    # One whose bias proves PyTorch's layout only happens to be of that size.
    and _by_bias(path, leaf, leaves) != 'oi'
  )


def found(
  leaves: Mapping[Path, Leaf], manifest: Manifest
) -> dict[Path, Layout]:
  """Returns the layouts of a checkpoint that PyTorch wrote; else nothing.

  Args:
    leaves: the tensors; none is read.
    manifest: what is known beside them. Of layers whose type is known nothing
      is said here.
  """
  if not is_torch(leaves, manifest):
    return {}
  matrices = {
    path: leaf
    for path, leaf in leaves.items()
    if len(leaf.shape or ()) > 1
    and leaf.codes is None
    and 'adapter' not in leaf.metadata
    and not _is_known(path, manifest)
    # What others call so is theirs, whatever wrote the file.
    and path[-1] not in ('kernel', 'embedding')
    # Of stacked layers it has two axes.
    and 'bias' not in path[-1]
  }
  proven = {
    path: letters
    for path, leaf in matrices.items()
    if (letters := _by_bias(path, leaf, leaves))
  }
  alike: dict[tuple[str, int], set[str]] = collections.defaultdict(set)
  for path, letters in proven.items():
    alike[_kind(path, matrices[path])].add(letters)
  said = {}
  for path, leaf in matrices.items():
    if path in proven:
      said[path] = Layout(proven[path], 'its bias')
      continue
    like = alike.get(_kind(path, leaf), set())
    said[path] = _by_name(path, leaf, like)
  return said


def _is_known(path: Path, manifest: Manifest) -> bool:
  """Whether the type of a layer, or what a step made of it, is known."""
  one = manifest.layer_types.get(path[:-1])
  return one is not None and (bool(one.names) or path[-1] in one.layouts)


def _kind(path: Path, leaf: Leaf) -> tuple[str, int]:
  return path[-2] if len(path) > 1 else '', len(leaf.shape or ())


def _is_conv1d(path: Path) -> bool:
  return len(path) > 1 and path[-2].startswith('c_')


def _by_bias(path: Path, leaf: Leaf, leaves: Mapping[Path, Leaf]) -> str | None:
  """Returns the letters that a bias leaves no other choice for, if any."""
  shape = leaf.shape or ()
  if len(shape) < 2 or not path or 'weight' not in path[-1]:
    return None
  bias = leaves.get((*path[:-1], path[-1].replace('weight', 'bias')))
  if bias is None or not bias.shape:
    return None
  # A stack of layers has as many biases in front.
  stacked = len(bias.shape) - 1
  core = shape[stacked:]
  if len(core) < 2 or bias.shape[:-1] != shape[:stacked]:
    return None
  front, taps = 's' * stacked, 'i' * (len(core) - 2)
  first, second = (bias.shape[-1] == size for size in core[:2])
  if first != second:
    return f'{front}{"oi" if first else "io"}{taps}'
  return None


def _by_name(path: Path, leaf: Leaf, like: set[str]) -> Layout:
  """Returns the layout that names tell, or what is usual."""
  shape, (name, rank) = leaf.shape or (), _kind(path, leaf)
  if len(like) == 1:
    return Layout(next(iter(like)), f'the bias of another {name}')
  if 'weight' not in path[-1]:
    # A parameter of its own, e.g. of fused experts: programs differ.
    return Layout('i' * (rank - 1) + 'o', 'no name tells it', sure=False)
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
  """Returns a manifest that knows the layouts of tensors with other axes.

  Args:
    leaves: the tensors before.
    manifest: what was known of them.
    orders: by path which axis each new one was.
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
  """Returns `described`, and warns of what is not certain.

  Args:
    found: tensors by layout.
    verb: what uses them.
  """
  open_ = {one: some for one, some in found.items() if not one.sure}
  for line in described(open_):
    warnings.warn(f'{verb}: {line}.', errors.SiteWarning, stacklevel=3)
  return tuple(described(found))


def described(found: Mapping[Layout, Iterable[Path]]) -> Iterator[str]:
  """Yields what layouts are taken for what they are, a sentence a kind.

  Args:
    found: tensors by layout.
  """
  for layout, some in found.items():
    axes = ', '.join(_WORDS[letter] for letter in layout.letters)
    names = [paths.literal(path) for path in some]
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    shown = ', '.join(names[:3]) + more
    if layout.sure:
      yield f'layout ({axes}), as {layout.why} tells: {shown}'
    else:
      yield (
        f'layout ({axes}) is not certain ({layout.why}), and taken as PyTorch '
        f"usually has it: {shown}. Say it with --layout '{names[0]}="
        f"{layout.letters}', or other letters"
      )


_WORDS = {'s': 'stacked', 'i': 'in', 'o': 'out'}
