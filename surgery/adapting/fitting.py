"""Whether the file of an adapter holds what its record says, and fits a base.

All of it is looked at before anything is attached, by names and shapes alone,
so that nothing is found out at the first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery import errors
from surgery.adapting import drawing, ranks
from surgery.editing import following
from surgery.model import quantised
from surgery.model.checkpoint import Checkpoint, Leaf
from surgery.model.records import ROUTE, AdapterRecord, SiteRecord, WeightSpec
from surgery.naming import paths
from surgery.naming.paths import Path

# What the entry of an adapter in its own file says of its weights: how many
# adapters they are of, if `stack_adapters` made one of several.
MANY = 'many'

Shape = tuple[int, ...]


def many_of(checkpoint: Checkpoint, record: AdapterRecord) -> int | None:
  """Returns of how many adapters the weights are; None of one."""
  for one in record.sites.values():
    stack = _stack(checkpoint, one)
    for spec in one.weights.values():
      shape = checkpoint[spec.path].shape or ()
      if len(shape) == len(stack) + 1 + len(spec.shape):
        return shape[len(stack)]
  return None


def _stack(checkpoint: Checkpoint, one: SiteRecord) -> Shape:
  """Returns the sizes of the axes stacked in front of a site's parameter."""
  shape = checkpoint[one.site.path].shape or ()
  return shape[: len(shape) - len(one.site.primary.shape)]


# Against the base.


def check_base(checkpoint: Checkpoint, record: AdapterRecord) -> None:
  """Raises unless a base has the parameters that an adapter rewrites.

  Args:
    checkpoint: the base.
    record: the adapter.

  Raises:
    BaseMismatchError: naming all that are missing or of another shape.
  """
  problems: list[str] = []
  for one in record.sites.values():
    problems += _site_problems(checkpoint, one)
  for path, saved in record.saved.items():
    if path not in checkpoint:
      problems.append(f'{paths.show(path)}: there is no such parameter')
    elif checkpoint[path].shape != saved.shape:
      problems.append(
        f'{paths.show(path)}: expected shape {saved.shape}, found '
        f'{checkpoint[path].shape}'
      )
  if problems:
    raise errors.BaseMismatchError(
      f'adapter {record.name!r} was made for another base. '
      f'{_listed(problems)}. Attach it to the model that it was made for.'
    )


def _site_problems(checkpoint: Checkpoint, one: SiteRecord) -> Iterator[str]:
  """Yields what a base lacks of the parameters of one site."""
  stacks = {}
  for path, spec in zip(following.base_of(one), one.site.params, strict=True):
    if path not in checkpoint:
      yield f'{paths.show(path)}: there is no such parameter'
      continue
    quantised.refuse(checkpoint[path], 'attach')
    shape = checkpoint[path].shape
    front = len(shape or ()) - len(spec.shape)
    if shape is None or front < 0 or shape[front:] != spec.shape:
      yield f'{paths.show(path)}: expected shape {spec.shape}, found {shape}'
    else:
      stacks[path] = shape[:front]
  # Kernel and bias of stacked layers are stacked alike, or the adapter's
  # weights could not follow both.
  if len(set(stacks.values())) > 1:
    shown = ', '.join(f'{paths.show(p)} {s}' for p, s in stacks.items())
    yield f'the axes stacked in front differ: {shown}'


# Against the file.


def check_file(
  alone: Checkpoint,
  record: AdapterRecord,
  checkpoint: Checkpoint,
  many: int | None = None,
) -> None:
  """Raises unless a file holds the weights of its adapter, and no more.

  Names and shapes must be those that the adapter's `init` returns for its
  configuration and these sites.

  Args:
    alone: the file.
    record: the adapter as the file records it.
    checkpoint: the base, which has the parameters that it rewrites.
    many: number of adapters that are stacked in the weights; None for one.

  Raises:
    FormatError: naming all that is missing, superfluous or of another shape.
  """
  expected = set(record.weight_paths())
  missing = [paths.show(p) for p in sorted(expected.difference(alone))]
  others = [paths.show(p) for p in alone if p not in expected]
  problems = []
  if missing:
    problems.append(f'missing: {", ".join(missing)}')
  if others:
    problems.append(f'belonging to nothing: {", ".join(others)}')
  for one in record.sites.values():
    front = _stack(checkpoint, one)
    if many is not None:
      front = (*front, many)
    try:
      made = ranks.pruned_shapes(record, one, _made(one))
    except errors.SurgeryError as error:
      # The configuration is none that this site can have.
      problems.append(f'{str(error).rstrip(".")}; {_found(alone, one)}')
      continue
    problems += _wrong_names(paths.show(one.site.path), one.weights, made)
    problems += _wrong_shapes(alone, one.weights, made, front, one.interceptor)
  if record.shared:
    shared = {n: s for n, s in record.shared.items() if n != ROUTE}
    made = _made_shared(record)
    problems += _wrong_names('shared', shared, made)
    problems += _wrong_shapes(alone, shared, made, (), record.adapter)
  for spec in record.saved.values():
    if spec.path in alone and alone[spec.path].shape != spec.shape:
      problems.append(
        f'{paths.show(spec.path)}: expected shape {spec.shape}, found '
        f'{alone[spec.path].shape}'
      )
  if problems:
    raise errors.FormatError(
      f'{alone.origin or "the file"}: the tensors are not those of adapter '
      f'{record.name!r}, {record.adapter!r}. {_listed(problems)}. The file was '
      'changed by another program, or is damaged; save the adapter again.'
    )


def _found(alone: Mapping[Path, Leaf], one: SiteRecord) -> str:
  """Returns the shapes of a site's tensors in words."""
  specs = one.weights.values()
  shapes = [str(alone[s.path].shape) for s in specs if s.path in alone]
  return f'the tensors have the shapes {" and ".join(shapes)}'


def _made(one: SiteRecord) -> dict[str, Shape]:
  """Returns the shapes of the weights that `init` makes at a site."""
  drawn, _ = drawing.site_shapes(one.interceptor, one.site)
  return {name: tuple(struct.shape) for name, struct in drawn.items()}


def _made_shared(record: AdapterRecord) -> dict[str, Shape]:
  """Returns the shapes of the weights that `init_shared` makes."""
  sites = [one.site for one in record.sites.values()]
  return drawing.shared_shapes(record.adapter, sites)


def _wrong_names(
  where: str, weights: Mapping[str, WeightSpec], made: Mapping[str, Shape]
) -> list[str]:
  if set(weights) == set(made):
    return []
  return [
    f'{where}: the weights on record are {", ".join(weights) or "none"}, and '
    f'the configuration makes {", ".join(made) or "none"}'
  ]


def _wrong_shapes(
  alone: Mapping[Path, Leaf],
  weights: Mapping[str, WeightSpec],
  made: Mapping[str, Shape],
  front: Shape,
  who: Any,
) -> list[str]:
  """Returns what is wrong with shapes and dtypes of weights.

  Args:
    alone: the file.
    weights: the weights on record.
    made: the shapes that the configuration makes.
    front: sizes of the axes in front of them.
    who: the adapter with the options that hold there.
  """
  problems = []
  for name, spec in weights.items():
    shown = paths.show(spec.path)
    if spec.path in alone:
      leaf = alone[spec.path]
      expected, found = (*front, *made.get(name, spec.shape)), leaf.shape
      if found != expected:
        problems.append(f'{shown}: {_shapes(expected, found, who)}')
      elif _inexact(leaf.dtype) != _inexact(spec.dtype):
        problems.append(
          f'{shown}: expected {spec.dtype}, the tensor is {leaf.dtype}'
        )
    if name in made and spec.shape != made[name]:
      problems.append(
        f'{shown}: recorded shape {spec.shape}, the configuration makes '
        f'{made[name]}'
      )
  return problems


def _inexact(dtype: str | None) -> bool:
  # How many bits a number has is the user's affair, who may cast weights.
  return (dtype or '').startswith(('float', 'bfloat', 'complex'))


def _shapes(expected: Shape, found: Shape | None, who: Any) -> str:
  """Returns two shapes that differ, and the ranks if they are the reason."""
  text = f'expected shape {expected}, found {found}'
  rank = getattr(who, 'rank', None)
  if found is None or len(found) != len(expected):
    return text
  pairs = zip(expected, found, strict=True)
  differing = [(a, b) for a, b in pairs if a != b]
  if len(differing) == 1 and differing[0][0] == rank:
    other = differing[0][1]
    return f'rank {rank} is configured, the tensor has rank {other} ({text})'
  return text


def _listed(problems: Sequence[str]) -> str:
  return '; '.join(problems)
