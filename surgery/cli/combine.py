"""`surgery combine`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import click

from surgery import errors
from surgery.cli import completion, shared, writing
from surgery.cli.command import Command
from surgery.recipes.spec import Step


def _numbers(weights: tuple[str, ...]) -> dict[str, float]:
  """Returns the weight of each adapter.

  Raises:
    UsageError: for a weight that is no number.
  """
  numbers: dict[str, float] = {}
  for name, value in shared.pairs(weights, '--weight'):
    try:
      numbers[name] = float(value)
    except ValueError:
      raise click.UsageError(
        f'--weight {name}={value}: expected a number, found {value!r}.'
      ) from None
  return numbers


def _settings(settings: tuple[str, ...]) -> dict[str, Any]:
  """Returns options of a method: `weight=0.7,0.3`, `'**/mlp:density=0.5'`.

  Raises:
    UsageError: for a value that cannot be read.
  """
  from surgery.recipes import text

  general: dict[str, Any] = {}
  some: dict[str, dict[str, Any]] = {}
  for key, written in shared.pairs(settings, '--set'):
    # Options are identifiers, so the text before the last ':' is a selector.
    selector, _, option = key.rpartition(':')
    bare = ',' in written and written.lstrip()[:1] not in ('[', '{', '"', "'")
    try:
      value = text.read(f'[{written}]' if bare else written, f'--set {key}')[0]
    except errors.RecipeError as error:
      raise click.UsageError(str(error)) from None
    if selector:
      some.setdefault(option, {})[selector] = value
    else:
      general[option] = value
  for option, values in some.items():
    # A value without selector is for all tensors that no selector matches.
    rest = {'**': general[option]} if option in general else {}
    general[option] = {**values, **rest}
  return general


def _methods(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[Any]:
  """Completes the name of a method."""
  from surgery.host.manager import default_host

  del ctx, param
  return completion.items(default_host().methods, incomplete)


@click.command(cls=Command)
@click.argument(
  'files', nargs=-1, required=True, type=shared.FILE, metavar='FILE…'
)
@click.option(
  '--base',
  type=shared.FILE,
  help='For models: the model from which all were trained.',
)
@click.option(
  '--method',
  default='linear',
  show_default=True,
  metavar='NAME',
  shell_complete=_methods,
  help='The method: linear, mean, slerp, task_arithmetic, ties, dare_ties, …; '
  '`surgery plugins --methods` lists them. For adapters also cat and svd.',
)
@click.option(
  '--set',
  'settings',
  multiple=True,
  metavar='[SELECTOR:]KEY=VALUE',
  help='An option of the method: t=0.3, weight=0.7,0.3 (one for each model), '
  "t=0,0.5,1 (over the depth), '**/mlp:density=0.5' (for some tensors).",
)
@click.option(
  '--only',
  type=click.Choice(['all', 'common']),
  help='For models: `common` leaves out tensors that some model lacks.',
)
@click.option(
  '--nonfinite',
  type=click.Choice(['refuse', 'allow']),
  help='For models: `allow` accepts NaN and infinity.',
)
@click.option(
  '--tokens',
  metavar='union|base|ids|FILE',
  help='Of models: whose tokens the result has, where tokenizers differ: those '
  'of all models, of the base, or of one of the FILEs. Rows of embeddings and '
  'heads then follow tokens; `ids` combines rows of one number. Into a folder '
  'the tokenizer goes along.',
)
@click.option(
  '--missing-rows',
  type=click.Choice(['other', 'mean', 'zero', 'parts']),
  help='Of models: what a row holds that a model lacks: that of the other '
  'models, the mean of its rows, zeros, or the mean of the rows of the smaller '
  'tokens that a token consists of.',
)
@click.option(
  '--tokenizer',
  'tokenizers',
  multiple=True,
  metavar='FILE',
  help='Of models: the tokenizer.json of each, in their order, the base at '
  'last; by default those beside them.',
)
@click.option(
  '--vocab',
  multiple=True,
  metavar='SELECTOR=AXIS',
  help="Of models: tensors with a place for each token, '**/head/kernel=-1', "
  'where names do not tell.',
)
@click.option(
  '--no-check-tokenizers',
  'unchecked',
  is_flag=True,
  help='Of models: match tokens of tokenizers that do not cut text alike.',
)
@click.option(
  '--weight',
  'weights',
  multiple=True,
  metavar='NAME=NUMBER',
  shell_complete=completion.adapters,
  help='For adapters: the weight of one in the sum; once for each.',
)
@click.option(
  '--with',
  'sources',
  multiple=True,
  metavar='NAME=FILE',
  help='For adapters: first attach the one in FILE as NAME; may be repeated.',
)
@click.option(
  '--rank', type=click.IntRange(1), help='For adapters: rank of the result.'
)
@click.option(
  '--density',
  type=float,
  help='For adapters: share of an update that is kept, e.g. 0.5.',
)
@click.option(
  '--seed', type=int, help='Random seed of methods that drop elements.'
)
@click.option(
  '--name', help="For adapters: the result's name; `combined` by default."
)
@click.option(
  '--keep', is_flag=True, help='For adapters: keep the others, disabled.'
)
@writing.writes
def command(
  files: tuple[pathlib.Path, ...],
  base: pathlib.Path | None,
  settings: tuple[str, ...],
  weights: tuple[str, ...],
  sources: tuple[str, ...],
  output: writing.Output,
  **given: Any,
) -> None:
  r"""Combine several models into one, or adapters of a model into one.

  \b
  surgery combine a.safetensors b.safetensors --method slerp --set t=0.3 \
    -o ab.safetensors
  surgery combine a.safetensors b.safetensors --base base.safetensors \
    --method ties --set weight=0.7,0.3 --set density=0.5 -o ab.safetensors
  surgery combine ckpt-*.safetensors --method mean -o mean.safetensors
  surgery combine a/ b/ --tokens union --missing-rows mean -o out/

  With --weight NAME=NUMBER (and --with), adapters of one file are combined into
  a LoRA; otherwise the files are models with the same tensors.

  \b
  surgery combine adapted.msgpack --weight a=0.7 --weight b=0.3 -o one.msgpack
  surgery combine base.msgpack --with a=a.msgpack --with b=b.msgpack \
    --weight a=1 --weight b=1 --method ties --density 0.5 -o one.msgpack
  """
  if weights or sources:
    names = ('only', 'nonfinite', *_OF_TOKENS)
    refused = {'base': base, **{n: given[n] for n in names}}
    _check_free(refused, 'they are for models, and --weight is for adapters')
    if len(files) > 1:
      raise click.UsageError(
        f'--weight is for adapters of one file, found {len(files)} files. Give '
        'the files of adapters by --with NAME=FILE; or the weights of models '
        'by --set weight=0.7,0.3.'
      )
    _adapters(files[0], weights, sources, _settings(settings), output, given)
    return
  refused = {n: given[n] for n in ('rank', 'density', 'name', 'keep')}
  _check_free(
    refused,
    'they are for adapters, which are named by --weight NAME=NUMBER. Options '
    'of a method for models are given by --set, e.g. --set density=0.5',
  )
  if len(files) == 1 and base is None and not settings:
    raise click.UsageError(
      "Missing option '--weight', to combine adapters of the file; or further "
      'files or --base, to combine models.'
    )
  _models(files, base, _settings(settings), output, given)


def _check_free(options: dict[str, Any], why: str) -> None:
  """Raises if one of some options is given."""
  shown = {'tokenizers': 'tokenizer', 'unchecked': 'no-check-tokenizers'}
  given = [
    f'--{shown.get(name, name).replace("_", "-")}'
    for name, value in options.items()
    if value
  ]
  if given:
    raise click.UsageError(f'{", ".join(given)} cannot be given here: {why}.')


def _models(
  files: tuple[pathlib.Path, ...],
  base: pathlib.Path | None,
  settings: dict[str, Any],
  output: writing.Output,
  given: dict[str, Any],
) -> None:
  """Combines whole models."""
  first, *rest = files
  others = {f'model{k + 2}': shared.opened(one) for k, one in enumerate(rest)}
  value: dict[str, Any] = {'with': list(others), 'method': given['method']}
  if base is not None:
    others['base'] = shared.opened(base)
    value['base'] = 'base'
  if settings:
    value['set'] = settings
  value.update(_given(given, 'only', 'seed', 'nonfinite'))
  value.update(_of_tokens([*files, *([base] if base else [])], given))
  step = Step('combine', value)
  writing.carry_out(output, [step], shared.model(first), others)


# Options that say how rows follow tokens.
_OF_TOKENS = ('tokens', 'missing_rows', 'tokenizers', 'vocab', 'unchecked')


def _of_tokens(
  files: Sequence[pathlib.Path], given: dict[str, Any]
) -> dict[str, Any]:
  """Returns what is said of tokens, as a step has it.

  Raises:
    UsageError: for an axis that is no number.
  """
  found = {
    name.replace('_', '-'): given[name] for name in _OF_TOKENS if given[name]
  }
  if found.pop('unchecked', False):
    found['check-tokenizers'] = False
  tokens = found.get('tokens')
  if tokens not in (None, 'union', 'base', 'ids'):
    same = [k for k, one in enumerate(files) if one == pathlib.Path(tokens)]
    if not same:
      raise click.UsageError(
        f'--tokens {tokens}: expected union, base, ids, or one of the files: '
        f'{", ".join(map(str, files))}.'
      )
    found['tokens'] = same[0]
  if 'tokenizers' in found:
    found['tokenizers'] = list(found['tokenizers'])
  if 'vocab' in found:
    axes = {}
    for selector, axis in shared.pairs(found['vocab'], '--vocab'):
      try:
        axes[selector] = int(axis)
      except ValueError:
        raise click.UsageError(
          f'--vocab {selector}={axis}: expected the number of an axis.'
        ) from None
    found['vocab'] = axes
  return found


def _given(given: dict[str, Any], *names: str) -> dict[str, Any]:
  return {name: given[name] for name in names if given[name] is not None}


def _adapters(
  file: pathlib.Path,
  weights: tuple[str, ...],
  sources: tuple[str, ...],
  settings: dict[str, Any],
  output: writing.Output,
  given: dict[str, Any],
) -> None:
  """Combines adapters of one model."""
  if not weights:
    raise click.UsageError("Missing option '--weight'.")
  steps: list[Step] = []
  others = {}
  for number, (attached, path) in enumerate(shared.pairs(sources, '--with')):
    alias = f'adapter{number}'
    others[alias] = shared.opened(pathlib.Path(path))
    # The same adapter may be given twice: each has a weight of its own.
    step = {'from': alias, 'name': attached, 'check-same': False}
    steps.append(Step('attach', step))
  value: dict[str, Any] = {
    'weights': _numbers(weights),
    'method': given['method'],
    'name': given['name'] or 'combined',
    **_given(given, 'rank', 'density', 'seed'),
  }
  if settings:
    value['set'] = settings
  if given['keep']:
    value['keep'] = True
  steps.append(Step('combine-adapters', value))
  writing.carry_out(output, steps, shared.model(file), others)
