"""What verbs that write have in common: options, the plan, writing it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import history, planning, progress, shared
from surgery.core import errors
from surgery.core.host import default_host

if TYPE_CHECKING:
  from surgery.core.checkpoint import Checkpoint

_INDEX = '.index.json'


@dataclasses.dataclass(frozen=True)
class Output:
  """Where a verb writes, and how.

  Attributes:
    path: the file.
    force: whether it may exist.
    dry_run: whether only the plan is shown.
    as_json: whether the plan is printed as JSON.
    shard_size: most bytes a file, if it becomes several.
    strict_flax: whether it is written without a manifest, as flax writes it.
    format: name of the format, where the suffix does not tell it.
  """

  path: pathlib.Path
  force: bool = False
  dry_run: bool = False
  as_json: bool = False
  shard_size: int | None = None
  strict_flax: bool = False
  format: str | None = None

  @property
  def shown(self) -> pathlib.Path:
    """The file that is opened again: that, or the index of the shards."""
    if self.shard_size is None:
      return self.path
    return self.path.with_name(self.path.name + _INDEX)

  def check(self) -> None:
    """Raises unless it can be written, as far as one can tell beforehand.

    Raises:
      UsageError: for options that exclude each other.
      SurgeryError: if the file exists, or its folder does not.
    """
    if self.strict_flax and self.shard_size is not None:
      raise click.UsageError(
        '--strict-flax does not go with --shard-size: flax writes one file.'
      )
    folder = self.path.parent
    if self.path.is_dir():
      raise errors.SurgeryError(
        f'{self.path}: expected a file, found a folder.'
      )
    if not folder.is_dir():
      raise errors.SurgeryError(
        f'{folder}: there is no such folder. Make it first: mkdir -p {folder}.'
      )
    if not os.access(folder, os.W_OK | os.X_OK):
      raise errors.SurgeryError(f'{folder}: the folder is not writable.')
    if self.shard_size is not None and self.shown.exists():
      raise errors.SurgeryError(
        f'{self.shown}: exists already, and the index of a set of files is '
        'never replaced. Remove the set, or write elsewhere.'
      )
    if self.path.exists() and not self.force:
      raise errors.SurgeryError(
        f'{self.path}: exists already. Give --force to replace it.'
      )


def _options(target: Callable[..., Any]) -> Callable[..., Any]:
  """Adds the options of verbs that write, except for the target."""
  for option in reversed(
    (
      click.option('--force', is_flag=True, help='Replace an existing file.'),
      click.option(
        '--dry-run', is_flag=True, help='Show the plan, write nothing.'
      ),
      click.option(
        '--json', 'as_json', is_flag=True, help='Print the plan as JSON.'
      ),
      click.option(
        '--shard-size',
        callback=shared.nbytes,
        metavar='SIZE',
        help='Write several files of at most that size (5GB, 2GiB) and an '
        'index.',
      ),
      click.option(
        '--strict-flax',
        is_flag=True,
        help='Write what flax would: no flags, metadata, digests or history.',
      ),
    )
  ):
    target = option(target)
  return target


def writes(function: Callable[..., Any]) -> Callable[..., Any]:
  """Adds the options of verbs that write; gives them as `output`."""
  return _writing(
    function,
    click.option(
      '-o',
      '--output',
      'target',
      type=shared.FILE,
      required=True,
      help='The file to write.',
    ),
  )


def converts(function: Callable[..., Any]) -> Callable[..., Any]:
  """Adds the argument OUT and the options of verbs that write."""
  return _writing(
    function, click.argument('target', metavar='OUT', type=shared.FILE)
  )


def _writing(
  function: Callable[..., Any], target: Callable[..., Any]
) -> Callable[..., Any]:
  names = [f.name for f in dataclasses.fields(Output) if f.name != 'path']
  names.remove('format')

  @functools.wraps(function)
  def wrapped(*args: Any, target: pathlib.Path, **kwargs: Any) -> Any:
    output = Output(target, **{name: kwargs.pop(name) for name in names})
    output.check()
    return function(*args, output=output, **kwargs)

  return target(_options(wrapped))


@dataclasses.dataclass(frozen=True)
class Step:
  """One file that is to be written.

  Attributes:
    before: what was read.
    after: what is written.
    output: where and how.
  """

  before: Checkpoint
  after: Checkpoint
  output: Output


def finish(
  before: Checkpoint,
  after: Checkpoint,
  output: Output,
  verb: str,
  arguments: Mapping[str, Any],
  others: Sequence[Checkpoint] = (),
) -> None:
  """Writes what a verb made, or shows what would be written.

  Args:
    before: what was read.
    after: what the verb made of it.
    output: where and how.
    verb: the verb's name, for the history.
    arguments: its arguments, for the history; see `history.entry`.
    others: what else was read.

  Raises:
    SurgeryError: if it cannot be written.
  """
  said = history.entry(verb, arguments, (before, *others))
  run([Step(before, history.recorded(after, said), output)])


def run(steps: Sequence[Step]) -> None:
  """Writes files, all or none, and reports; the last one is the main one.

  Raises:
    SurgeryError: if one cannot be written.
  """
  lost = [line for step in steps for line in _lost(step)]
  for step in steps:
    default_host().format_of(step.output.path, step.output.format)
  if not steps[-1].output.dry_run:
    with contextlib.ExitStack() as undo:
      for step in steps[:-1]:
        undo.enter_context(_restored(step.output.path))
        write(step)
      write(steps[-1])
  for line in lost:
    click.echo(line, err=True)
  _report(steps)


def _report(steps: Sequence[Step]) -> None:
  plans = [planning.plan(step.before, step.after) for step in steps]
  reports = [
    planning.report(rows, step.output.shown.name, planning.needed(step.after))
    for rows, step in zip(plans, steps, strict=True)
  ]
  output = steps[-1].output
  if output.as_json:
    data = reports[-1]
    if len(reports) > 1:
      data = {**data, 'saved': reports[:-1]}
    click.echo(json.dumps(data))
    return
  for rows, step, report in zip(plans, steps, reports, strict=True):
    where = str(step.output.shown)
    planning.show(rows, where, report['memory'], output.dry_run)


def write(step: Step) -> None:
  """Writes one file.

  Raises:
    OSError: naming the file, if the system says no.
  """
  output = step.output
  options: dict[str, Any] = {}
  if output.shard_size is not None:
    options['shard_size'] = output.shard_size
  if output.strict_flax:
    options['manifest'] = False
  try:
    with progress.shown(step.after.values()) as told:
      if told is not None:
        options['progress'] = told
      step.after.write(
        output.path,
        overwrite=output.force,
        format=output.format,
        host=default_host(),
        **options,
      )
  except OSError as error:
    if error.filename is not None:
      raise
    # A full disk does not say which.
    text = f'{error.strerror or error}; nothing was written'
    raise OSError(error.errno, text, str(output.path)) from error


@contextlib.contextmanager
def _restored(path: pathlib.Path) -> Iterator[None]:
  """If what follows fails, `path` is again what it was: a file, or nothing."""
  old = None
  if path.exists():
    path = path.resolve()
    old = path.with_name(f'.{path.name[:180]}.{secrets.token_hex(4)}.old')
    try:
      os.link(path, old)
    except OSError as error:
      raise errors.SurgeryError(
        f'{path}: cannot be kept until all is written ({error.strerror}). '
        'Write to another name.'
      ) from error
  try:
    yield
  except BaseException:
    if old is not None:
      old.replace(path)
    else:
      path.unlink(missing_ok=True)
    raise
  finally:
    if old is not None:
      old.unlink(missing_ok=True)


def _lost(step: Step) -> Iterator[str]:
  """Yields what `--strict-flax` leaves out.

  Raises:
    SurgeryError: if the file would not say what it is.
  """
  if not step.output.strict_flax:
    return
  form = step.output.format or step.output.path.suffix.lstrip('.')
  if form != 'msgpack':
    raise errors.SurgeryError(
      f'{step.output.path}: --strict-flax is for flax msgpack, found {form!r}.'
    )
  manifest = step.after.resolved(default_host())
  if manifest.adapters:
    names = ', '.join(repr(one['name']) for one in manifest.adapters)
    raise errors.SurgeryError(
      f'--strict-flax leaves out what adapters are, and {names} would be '
      'tensors without a meaning. Merge or detach first.'
    )
  notes = step.after.notes().values()
  counts = {
    'flags (not trainable)': sum(not n.trainable for n in notes),
    'metadata of tensors': sum(bool(n.metadata) for n in notes),
    'kinds of PRNG keys': sum(n.key is not None for n in notes),
    'digests': sum(n.digest is not None for n in notes),
    'types of layers': len(manifest.layer_types),
    'structures of values': len(manifest.trees),
    'passes of the history': len(manifest.history),
  }
  said = [f'{count} {what}' for what, count in counts.items() if count]
  yield f'--strict-flax leaves out: {", ".join(said)}.'
