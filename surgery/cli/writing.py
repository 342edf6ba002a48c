"""Verbs that write: their options, the plan, and writing it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import progress, shared, showing
from surgery.host import location
from surgery.host.manager import default_host
from surgery.recipes.spec import Spec, Step, Target, is_folder

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint
  from surgery.recipes import running


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
  """How a recipe is carried out, whatever its outputs.

  Attributes:
    force: whether existing files are replaced.
    dry_run: whether only the plan is shown.
    as_json: whether the plan is printed as JSON.
    quiet: whether stderr gets nothing but warnings.
  """

  force: bool = False
  dry_run: bool = False
  as_json: bool = False
  quiet: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Manner):
  """Where a verb writes, and how.

  Attributes:
    target: the file and its options.
  """

  target: Target

  def to(self, **changes: Any) -> Output:
    """Returns the same with other attributes of the target."""
    return dataclasses.replace(
      self, target=dataclasses.replace(self.target, **changes)
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
      shared.quiet_option,
      click.option(
        '--shard-size',
        callback=shared.nbytes,
        metavar='SIZE',
        help='Write several files of at most SIZE bytes (5GB, 2GiB) and an '
        'index.',
      ),
      click.option(
        '--strict-flax',
        is_flag=True,
        help='Write the file as flax would: without flags, metadata, digests '
        'and history.',
      ),
      click.option(
        '--no-manifest',
        is_flag=True,
        help='Leave out our metadata: flags, digests and history.',
      ),
      click.option(
        '--metadata',
        multiple=True,
        metavar='KEY=VALUE',
        help="Metadata for other programs, e.g. 'format=pt'. May be repeated.",
      ),
      click.option(
        '--config',
        multiple=True,
        metavar='KEY=VALUE',
        help='Value of a key in the config.json of a folder. May be repeated.',
      ),
      click.option(
        '--like',
        type=shared.FILE,
        metavar='FOLDER',
        help='Model folder whose config.json, tokenizer and licences are '
        'copied; by default that of the input.',
      ),
    )
  ):
    target = option(target)
  return target


def writes(function: Callable[..., Any]) -> Callable[..., Any]:
  """Adds the options of verbs that write; passes them as `output`."""
  return _writing(
    function,
    click.option(
      '-o',
      '--output',
      'target',
      required=True,
      help='The file to write, or a new folder: out/.',
    ),
  )


def converts(function: Callable[..., Any]) -> Callable[..., Any]:
  """Adds the argument OUT and the options of verbs that write."""
  return _writing(function, click.argument('target', metavar='OUT'))


def _writing(
  function: Callable[..., Any], argument: Callable[..., Any]
) -> Callable[..., Any]:
  # These options are attributes of `Manner` under their own names.
  manner = [f.name for f in dataclasses.fields(Manner)]

  @functools.wraps(function)
  def wrapped(
    *args: Any,
    target: str,
    shard_size: int | None,
    strict_flax: bool,
    no_manifest: bool,
    metadata: tuple[str, ...],
    config: tuple[str, ...],
    like: pathlib.Path | None,
    **kwargs: Any,
  ) -> Any:
    from surgery.interop import configs
    from surgery.recipes import running

    if strict_flax and shard_size is not None:
      raise click.UsageError(
        '--strict-flax does not go with --shard-size: flax writes one file.'
      )
    output = Output(
      target=Target(
        pathlib.Path(target),
        shard_size=shard_size,
        strict_flax=strict_flax,
        manifest=not no_manifest,
        metadata=texts(metadata, '--metadata'),
        config={
          key: configs.value_of(value)
          for key, value in texts(config, '--config').items()
        },
        like=like,
        # A path forgets the slash.
        folder=is_folder(target),
      ),
      **{name: kwargs.pop(name) for name in manner},
    )
    # Before anything is opened, which may take long.
    running.check_target(output.target, output.force)
    return function(*args, output=output, **kwargs)

  return argument(_options(wrapped))


def carry_out(
  output: Output,
  steps: Sequence[Step],
  before: Checkpoint,
  others: Mapping[str, Checkpoint] | None = None,
  saved: Mapping[str, Target] | None = None,
) -> None:
  """Carries out a verb: a recipe of one step, or a few.

  Args:
    output: where and how it is written.
    steps: the steps.
    before: the model that is changed.
    others: further inputs, by alias.
    saved: further outputs, by name.

  Raises:
    SurgeryError: if a step fails, or an output cannot be written.
  """
  given = {'model': before, **(others or {})}
  recipe = Spec(
    inputs={alias: pathlib.Path(one.origin) for alias, one in given.items()},
    vars={},
    steps=tuple(steps),
    outputs={'out': output.target, **(saved or {})},
  )
  run(recipe, output, given)


def _odd_suffixes(plan: running.Plan) -> Iterator[str]:
  """Yields a line for each output whose suffix is that of another format."""
  for one in plan.outputs:
    form, suffix = one.target.format, location.suffix(one.path)
    usual = [n for n, f in plan.host.formats.items() if suffix in f.suffixes]
    if form is not None and usual and form not in usual:
      yield (
        f'{one.path}: written as {form}, but its suffix is that of {usual[0]}. '
        'Programs that go by the suffix cannot read it; give another name.'
      )


def texts(items: Sequence[str], option: str) -> dict[str, str]:
  """Splits `KEY=VALUE` at the first `=`.

  Args:
    items: the texts.
    option: the option that they are values of, for messages.

  Raises:
    UsageError: for an item without `=`, or a key that is given twice.
  """
  found: dict[str, str] = {}
  for item in items:
    key, sign, value = item.partition('=')
    if not sign or not key:
      raise click.UsageError(f'{option} {item!r}: expected {option} KEY=VALUE.')
    if key in found:
      raise click.UsageError(f'{option}: {key!r} is given twice.')
    found[key] = value
  return found


def run(
  recipe: Spec,
  output: Manner,
  given: Mapping[str, Checkpoint] | None = None,
) -> None:
  """Carries out a recipe, or shows its plan.

  Args:
    recipe: the recipe, with all files.
    output: how it is carried out, and what is printed.
    given: inputs that are open already, by alias.

  Raises:
    SurgeryError: if a step fails, or an output cannot be written.
  """
  from surgery.recipes import running

  plan = running.plan(recipe, default_host(), given)
  if output.dry_run:
    plan.check(overwrite=output.force)
  else:
    plan.write(
      overwrite=output.force,
      watched=lambda one: progress.shown(one.values(), output.quiet),
    )
  report = plan.report()
  reports = [report, *report.get('saved', [])]
  # What a user should not miss goes to stderr, quiet or not.
  for line in (
    *(f'warning: {text}' for text in _odd_suffixes(plan)),
    *running.lost(plan),
    *itertools.chain.from_iterable(map(showing.warnings, reports)),
  ):
    click.echo(line, err=True)
  if output.as_json:
    click.echo(json.dumps(report))
  elif output.quiet and not output.dry_run:
    return
  elif not plan.outputs:
    showing.checks(report['checks'], output.dry_run)
  else:
    # The main output comes last, where a reader looks first.
    for one, part in zip(plan.outputs[::-1], reports[::-1], strict=True):
      showing.show(part, str(one.shown), output.dry_run)
