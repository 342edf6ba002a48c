"""Fold-norm: batch normalisation folded into the layer before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from surgery import errors
from surgery.editing import regions, tensors
from surgery.editing.nonfinite import NonFinite
from surgery.editing.regions import Reader, Region
from surgery.host.manager import Host
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.naming import paths, renaming
from surgery.naming.paths import Path
from surgery.passes import arithmetic

# What frameworks call a norm's parameters.
_NAMES: Mapping[str, tuple[str, ...]] = {
  'scale': ('scale', 'gamma', 'weight'),
  'offset': ('bias', 'beta', 'offset'),
  'mean': ('running_mean', 'mean', 'moving_mean'),
  'variance': ('running_var', 'var', 'variance', 'moving_variance'),
}
_KERNELS = ('kernel', 'weight', 'w')
_BIASES = ('bias', 'b')


def fold_norm(
  checkpoint: Checkpoint,
  rules: str | Sequence[str],
  *,
  epsilon: float = 1e-5,
  axis: int = -1,
  norm: Literal['drop', 'identity'] = 'drop',
  statistics: str | Sequence[str] | None = None,
  nonfinite: NonFinite = 'refuse',
  host: Host,
) -> Checkpoint:
  """Folds batch normalisation into the convolution or linear layer before it.

  In inference `y = scale · (W·x + b - mean) / √(variance + epsilon) + offset`,
  which is a layer with `W' = W·s` and `b' = (b - mean)·s + offset` where
  `s = scale / √(variance + epsilon)`.

  Args:
    checkpoint: the model.
    rules: `LAYER -> NORM`: for each layer the norm behind it.
    epsilon: the norm's epsilon.
    axis: the kernel's output axis: -1, or 0 of a kernel of torch.
    norm: whether the norm goes away (`drop`, and the layer gets a bias if it
      had none), or stays and does nothing more than add an offset (`identity`),
      for a model whose code still has it.
    statistics: `NORM -> LAYER` where mean and variance lie elsewhere, as in
      flax: `'params/** -> batch_stats/**'`.
    nonfinite: `allow` lets NaN and infinity be written that no parameter has.
    host: knows the adapters' types.

  Raises:
    RenameError: for a rule, or an alternative of one, that matches nothing.
    SurgeryError: if a parameter is missing, or shapes do not fit.
    AdapterError: for a layer with an adapter.
    CastError: when it is written, for a result that is too large or NaN.

  Example:
    fold-norm: '**/conv<i> -> **/norm<i>'
  """
  changed: dict[Path, Leaf] = {}
  fresh: dict[Path, Leaf] = {}
  gone: set[Path] = set()
  behind: dict[Path, Path] = {}
  pairs = _pairs(checkpoint, rules)
  if statistics is not None:
    written = tensors.texts(statistics)
    renaming.resolved(
      [renaming.parse(text) for text in written], dict.fromkeys(pairs.values())
    )
  for layer, found in pairs.items():
    elsewhere = _elsewhere(found, statistics)
    one = _read(checkpoint, layer, found, elsewhere, axis, epsilon, nonfinite)
    if one.norm_paths() & gone or one.kernel in changed:
      raise errors.RenameError(
        f'{paths.show(found)} would be folded twice. Change the rules.'
      )
    changed[one.kernel] = one.folded_kernel()
    if norm == 'drop':
      gone |= one.norm_paths()
      bias = one.bias or (*layer, 'bias')
      (changed if one.bias else fresh)[bias] = one.folded_bias(bias)
      behind[bias] = one.kernel
    else:
      changed.update(one.identity())
  # Adapters cannot follow: their update was trained beside the old kernel.
  return tensors.edited(
    checkpoint,
    'fold-norm',
    changed=changed,
    fresh=fresh,
    gone=gone,
    behind=behind,
    rearranged=True,
    host=host,
  )


def _pairs(
  checkpoint: Checkpoint, rules: str | Sequence[str]
) -> dict[Path, Path]:
  """Returns the norm that follows each layer."""
  layers = list(dict.fromkeys(p[:-1] for p in checkpoint if len(p) > 1))
  found: dict[Path, Path] = {}
  for text in tensors.texts(rules):
    rule = renaming.parse(text)
    before = len(found)
    for layer in layers:
      target = rule.apply(layer)
      # A rule that names a layer matches layers beneath it, too, but only its
      # own kernel is followed by the norm.
      direct = any((*layer, name) in checkpoint for name in _KERNELS)
      if target is None or not direct or target == layer:
        continue
      if target not in layers:
        raise errors.RenameError(
          f'rule {text!r}: there is no {paths.show(target)} to follow '
          f'{paths.show(layer)}.'
        )
      found.setdefault(layer, target)
    if len(found) == before:
      raise renaming.nothing(text, list(checkpoint))
    renaming.check_alternatives(rule, layers)
  return found


def _elsewhere(norm: Path, statistics: str | Sequence[str] | None) -> Path:
  if statistics is None:
    return norm
  for text in tensors.texts(statistics):
    target = renaming.parse(text).apply(norm)
    if target is not None:
      return target
  return norm


def _one(
  checkpoint: Checkpoint, layer: Path, names: Sequence[str], what: str
) -> Path:
  for name in names:
    if (*layer, name) in checkpoint:
      return (*layer, name)
  raise errors.SurgeryError(
    f'{paths.show(layer)} has no {what}; looked for {", ".join(names)}.'
  )


@dataclasses.dataclass(frozen=True)
class _Fold:
  """A layer and the norm that follows it.

  Attributes:
    leaves: the model.
    kernel: path of the kernel.
    bias: path of the layer's bias, if it has one.
    norm: paths of scale, offset, mean and variance, those that there are.
    axis: the kernel's output axis.
    epsilon: the norm's epsilon.
    nonfinite: whether results may be NaN or infinite where nothing else is.
  """

  leaves: Checkpoint
  kernel: Path
  bias: Path | None
  norm: Mapping[str, Path]
  axis: int
  epsilon: float
  nonfinite: NonFinite

  def norm_paths(self) -> set[Path]:
    """Returns the parameters of the norm."""
    return set(self.norm.values())

  def value(self, name: str, missing: float) -> np.ndarray:
    """Returns a parameter of the norm as float64, (out,)."""
    if name not in self.norm:
      return np.float64(missing) * np.ones(())
    return self._wide(self.norm[name])

  def _wide(self, path: Path) -> np.ndarray:
    value = arithmetic.plain(self.leaves[path].load(), path, 'fold-norm')
    return value.astype(np.float64)

  def factor(self) -> np.ndarray:
    """Returns scale / √(variance + epsilon), (out,)."""
    variance = self.value('variance', 1)
    if (variance < 0).any():
      raise errors.SurgeryError(
        f'fold-norm: {paths.show(self.norm["variance"])}: has negative numbers.'
      )
    with np.errstate(all='ignore'):  # A division by zero is found behind it.
      return self.value('scale', 1) / np.sqrt(variance + self.epsilon)

  def shift(self) -> np.ndarray:
    """Returns what is added behind the folded kernel, (out,)."""
    bias = self._wide(self.bias) if self.bias is not None else 0.0
    with np.errstate(all='ignore'):
      shift = (bias - self.value('mean', 0)) * self.factor()
      return shift + self.value('offset', 0)

  def _inputs(self) -> list[np.ndarray]:
    """Returns the parameters of the norm, and the bias, as float64."""
    known = [self.bias] if self.bias is not None else []
    return [self._wide(path) for path in (*self.norm.values(), *known)]

  def folded_kernel(self) -> Leaf:
    """Returns the kernel with the norm's factor in it."""
    leaf = self.leaves[self.kernel]
    assert leaf.shape is not None and leaf.dtype is not None
    shape, dtype, reader = leaf.shape, leaf.dtype, Reader(leaf)

    def block(region: Region) -> Any:
      value = arithmetic.plain(reader(region), self.kernel, 'fold-norm')
      sizes = [1] * len(shape)
      factor = np.broadcast_to(self.factor(), (shape[self.axis],))
      factor = factor[region[self.axis]]
      sizes[self.axis] = len(factor)
      with np.errstate(all='ignore'):
        result = value.astype(np.float64) * factor.reshape(sizes)
      return arithmetic.narrowed(
        result, dtype, self.kernel, 'fold-norm',
        inputs=[value, *self._inputs()], region=region,
        nonfinite=self.nonfinite,
      )  # fmt: skip

    return regions.computed(leaf, shape, block, [leaf])

  def folded_bias(self, path: Path) -> Leaf:
    """Returns the layer's bias with the norm's offset in it."""
    like = self.leaves[self.bias if self.bias is not None else self.kernel]
    return self._vector(tensors.as_new(like), path, self.shift)

  def identity(self) -> dict[Path, Leaf]:
    """Returns bias and norm such that the norm does nothing but add."""
    one = lambda: np.ones(())
    parts: dict[str, Any] = {
      'scale': one,
      'mean': lambda: np.zeros(()),
      'variance': lambda: np.ones(()) - self.epsilon,
      'offset': self.shift,
    }
    if self.bias is None and 'offset' not in self.norm:
      raise errors.SurgeryError(
        f'{paths.show(self.kernel)} has no bias and its norm no '
        "offset, so there is nowhere to add the mean. Give norm: 'drop'."
      )
    made = {}
    if self.bias is not None:
      # The shift goes where a bias is; the norm's offset becomes zero.
      made[self.bias] = self.folded_bias(self.bias)
      parts['offset'] = lambda: np.zeros(())
    for name, path in self.norm.items():
      made[path] = self._vector(self.leaves[path], path, parts[name])
    return made

  def _vector(self, like: Leaf, path: Path, values: Any) -> Leaf:
    kernel = self.leaves[self.kernel]
    assert kernel.shape is not None and like.dtype is not None
    shape, dtype = (kernel.shape[self.axis],), like.dtype

    def block(region: Region) -> Any:
      full = np.broadcast_to(values(), shape)[region]
      return arithmetic.narrowed(
        full, dtype, path, 'fold-norm', inputs=self._inputs(), region=region,
        nonfinite=self.nonfinite,
      )  # fmt: skip

    sources = [kernel, *(self.leaves[p] for p in self.norm.values())]
    return regions.computed(like, shape, block, sources)


def _read(
  checkpoint: Checkpoint,
  layer: Path,
  norm: Path,
  elsewhere: Path,
  axis: int,
  epsilon: float,
  nonfinite: NonFinite,
) -> _Fold:
  """Reads a layer and the norm that follows it.

  Raises:
    SurgeryError: if a parameter is missing, or shapes do not fit.
  """
  # The norm computes (y - mean) / sqrt(variance + epsilon) · scale + offset of
  # the layer's outputs y = W·x + b. All of it is affine in y, so it becomes
  # another kernel and bias.
  kernel = _one(checkpoint, layer, _KERNELS, 'kernel')
  found = {
    'mean': _one(checkpoint, elsewhere, _NAMES['mean'], 'mean'),
    'variance': _one(checkpoint, elsewhere, _NAMES['variance'], 'variance'),
  }
  for name in ('scale', 'offset'):
    for one in _NAMES[name]:
      if (*norm, one) in checkpoint:
        found.setdefault(name, (*norm, one))
  bias = next(((*layer, b) for b in _BIASES if (*layer, b) in checkpoint), None)
  leaf = checkpoint[kernel]
  arithmetic.check_number(leaf, kernel, 'fold-norm')
  assert leaf.shape is not None
  at = regions.axis_of(axis, leaf.shape, kernel)
  # One number for each output, or they would be broadcast along another axis.
  for path in (*found.values(), *([bias] if bias else [])):
    arithmetic.check_number(checkpoint[path], path, 'fold-norm')
    if checkpoint[path].shape != (leaf.shape[at],):
      raise errors.SurgeryError(
        f'{paths.show(path)} is {checkpoint[path]}; expected '
        f'[{leaf.shape[at]}], as many as {paths.show(kernel)} has outputs '
        f'(axis {axis} of {leaf.shape}).'
      )
  order = {k: found[k] for k in _NAMES if k in found}
  return _Fold(checkpoint, kernel, bias, order, at, epsilon, nonfinite)
