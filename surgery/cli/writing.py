"""What verbs that write have in common: options, the plan, writing it."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from surgery.cli import progress, shared, showing
from surgery.host import location
from surgery.host.manager import default_host
from surgery.recipes.spec import Target, is_folder

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint
  from surgery.recipes import running
  from surgery.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
  """How a recipe is carried out, wherever it writes.

  Attributes:
    force: whether files may exist.
    dry_run: whether only the plan is shown.
    as_json: whether the plan is printed as JSON.
    quiet: whether only what is lost is told of on stderr.
  """

  force: bool = False
  dry_run: bool = False
  as_json: bool = False
  quiet: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output(Manner):
  """Where a verb writes, and how.

  Attributes:
    target: the file and what it is to be.
  """

  target: Target

  def to(self, **changes: Any) -> Output:
    """Returns the same with a target of which some attributes differ."""
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
        help='Write several files of at most that size (5GB, 2GiB) and an '
        'index.',
      ),
      click.option(
        '--strict-flax',
        is_flag=True,
        help='Write what flax would: no flags, metadata, digests or history.',
      ),
      click.option(
        '--no-manifest',
        is_flag=True,
        help='Write no metadata of ours: no flags, digests or history.',
      ),
      click.option(
        '--metadata',
        multiple=True,
        metavar='KEY=VALUE',
        help="What the file tells other programs, e.g. 'format=pt'. May be "
        'repeated.',
      ),
      click.option(
        '--config',
        multiple=True,
        metavar='KEY=VALUE',
        help='What the config.json of a folder is to state. May be repeated.',
      ),
      click.option(
        '--like',
        type=shared.FILE,
        metavar='FOLDER',
        help='The model folder from which config.json, tokenizer and licences '
        'go along; by default that of the input.',
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
  steps: Sequence[Any],
  before: Checkpoint,
  others: Mapping[str, Checkpoint] | None = None,
  saved: Mapping[str, Target] | None = None,
  quiet: bool = False,
) -> None:
  """Does what a verb stands for: a recipe of one step, or two.

  Args:
    output: where and how it is written.
    steps: the steps, as in a recipe.
    before: what is read and changed.
    others: what else is read, by alias.
    saved: what else is written, by name.
    quiet: whether nothing is said of it.

  Raises:
    SurgeryError: if it cannot be done, or not be written.
  """
  from surgery.recipes.recipe import Recipe

  given = {'model': before, **(others or {})}
  recipe = Recipe(
    steps,
    inputs={alias: one.origin for alias, one in given.items()},
    outputs={'out': output.target, **(saved or {})},
    origin='',
  )
  run(recipe, output, given, quiet)


def _odd_suffixes(plan: running.Plan) -> Iterator[str]:
  """Yields which outputs are written in another format than their names say."""
  for one in plan.outputs:
    form, suffix = one.target.format, location.suffix(one.path)
    said = [n for n, f in plan.host.formats.items() if suffix in f.suffixes]
    if form is not None and said and form not in said:
      yield (
        f'{one.path}: written as {form}, and its suffix says {said[0]}. '
        f'Programs that go by the name will not read it; name it otherwise.'
      )


def texts(items: Sequence[str], option: str) -> dict[str, str]:
  """Splits `KEY=VALUE` at the first `=`.

  Args:
    items: the texts.
    option: by which they are given, for messages.

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
  recipe: Recipe,
  output: Manner,
  given: Mapping[str, Checkpoint] | None = None,
  quiet: bool = False,
) -> None:
  """Carries out a recipe, or shows its plan.

  Args:
    recipe: the recipe, with all files.
    output: whether outputs may exist, and what is shown.
    given: inputs that have been opened already, by alias.
    quiet: whether nothing is said of it.

  Raises:
    SurgeryError: if it cannot be done, or not be written.
  """
  from surgery.recipes import running

  plan = running.plan(recipe.spec, default_host(), given)
  if output.dry_run:
    plan.check(overwrite=output.force)
  else:
    plan.write(
      overwrite=output.force,
      watched=lambda one: progress.shown(one.values(), output.quiet),
    )
  for line in _odd_suffixes(plan):
    click.echo(f'warning: {line}', err=True)
  for line in running.lost(plan):
    click.echo(line, err=True)
  if quiet:
    return
  report = plan.report()
  for one in [report, *report.get('saved', [])]:
    for line in one.get('folder', {}).get('warnings', ()):
      click.echo(f'warning: {line}', err=True)
    for line in showing.found(one.get('found', [])):
      click.echo(line, err=True)
  if output.as_json:
    click.echo(json.dumps(report))
    return
  if output.quiet and not output.dry_run:
    return
  if not plan.outputs:
    showing.checks(report['checks'], output.dry_run)
    return
  others = report.get('saved', [])
  reports = [report, *others]
  # The main one is told of last.
  for one, said in reversed(list(zip(plan.outputs, reports, strict=True))):
    showing.show(said, str(one.shown), output.dry_run)
