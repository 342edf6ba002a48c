"""Completion in shells: verbs, adapters, dtypes, paths inside of files.

Scripts and protocol are Click's, with one addition: behind a name that ends in
`/` no space is put, as for folders. Nothing here may import JAX, or print
anything but completions.
"""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
  from surgery.model.checkpoint import Checkpoint
  from surgery.naming.paths import Path

VARIABLE = '_SURGERY_COMPLETE'

Found = list[Any]
Complete = Callable[[click.Context, click.Parameter, str], Found]

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response

    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \
%(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"

        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            if [[ $value == */ ]]; then
                compopt -o nospace
            fi
            COMPREPLY+=("$value")
        fi
    done

    return 0
}

%(complete_func)s_setup() {
    complete -o nosort -F %(complete_func)s %(prog_name)s
}

%(complete_func)s_setup;
"""

_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a completions
    local -a completions_open
    local -a completions_with_descriptions
    local -a response
    (( ! $+commands[%(prog_name)s] )) && return 1

    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s)}")

    for type key descr in ${response}; do
        if [[ "$type" == "plain" ]]; then
            if [[ "$key" == */ ]]; then
                completions_open+=("$key")
            elif [[ "$descr" == "_" ]]; then
                completions+=("$key")
            else
                completions_with_descriptions+=("$key":"$descr")
            fi
        elif [[ "$type" == "dir" ]]; then
            _path_files -/
        elif [[ "$type" == "file" ]]; then
            _path_files -f
        fi
    done

    if [ -n "$completions_with_descriptions" ]; then
        _describe -V unsorted completions_with_descriptions -U
    fi

    if [ -n "$completions_open" ]; then
        compadd -U -V unsorted -S '' -a completions_open
    fi

    if [ -n "$completions" ]; then
        compadd -U -V unsorted -a completions
    fi
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


def answer(cli: click.Command, instruction: str) -> int:
  """Prints a shell's script, or what completes a command line.

  Args:
    cli: the command.
    instruction: what a shell asks for, e.g. `bash_source`.

  Returns:
    The exit code.
  """
  import warnings

  from click import shell_completion

  class Bash(shell_completion.BashComplete):
    source_template = _BASH

  class Zsh(shell_completion.ZshComplete):
    source_template = _ZSH

  shell_completion.add_completion_class(Bash)
  shell_completion.add_completion_class(Zsh)
  # Verbs warn of broken plugins, not completion in the middle of a line.
  warnings.simplefilter('ignore')
  try:
    return shell_completion.shell_complete(
      cli, {}, 'surgery', VARIABLE, instruction
    )
  except Exception:
    # A traceback would appear in the middle of the line that is being edited.
    if os.environ.get('SURGERY_DEBUG'):
      raise
    return 1


def items(texts: Iterable[str], incomplete: str) -> Found:
  """Returns those of some texts that complete what was written."""
  from click.shell_completion import CompletionItem

  return [CompletionItem(t) for t in texts if t.startswith(incomplete)]


def _opened(ctx: click.Context) -> Checkpoint | None:
  """Returns the file on the command line, if it can be read."""
  from surgery import errors
  from surgery.model import checkpoint

  # While an option waits for its value, Click has not parsed all arguments.
  given = [ctx.params.get('file'), ctx.params.get('a'), *ctx.args]
  file = next((one for one in given if one), None)
  if file is None:
    return None
  with warnings.catch_warnings():
    # A warning would appear in the middle of the line that is being edited.
    warnings.simplefilter('ignore')
    try:
      return checkpoint.open_checkpoint(pathlib.Path(file))
    except (OSError, errors.SurgeryError):
      return None


def _depth(text: str) -> int:
  r"""Returns the number of `/` that are not escaped by a `\`."""
  count, escaped = 0, False
  for char in text:
    count += char == '/' and not escaped
    escaped = char == '\\' and not escaped
  return count


def _places(checkpoint: Iterable[Path], depth: int) -> Iterator[str]:
  """Yields layers and parameters at one depth, as a selector names them."""
  from surgery.naming import paths

  ends = {p for p in checkpoint if len(p) == depth + 1}
  layers = {p[: depth + 1] for p in checkpoint if len(p) > depth + 1}
  for place in sorted(ends | layers):
    if place in ends:
      yield paths.literal(place)
    if place in layers:
      yield paths.literal(place) + '/'


def selectors(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> Found:
  """Completes a path inside of FILE by one segment."""
  del param
  opened = _opened(ctx)
  if opened is None:
    return []
  bare = incomplete.removeprefix('!')
  negation = incomplete[: len(incomplete) - len(bare)]
  places = _places(opened, _depth(bare))
  return items((negation + place for place in places), incomplete)


def adapters(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> Found:
  """Completes the name of an adapter in FILE."""
  del param
  opened = _opened(ctx)
  if opened is None:
    return []
  names = (str(one.get('name')) for one in opened.manifest.adapters)
  return items(names, incomplete)


def adapter_types(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> Found:
  """Completes an adapter type, without importing any."""
  del ctx, param
  from surgery.host.manager import default_host

  return items(default_host().adapter_names(), incomplete)


def plugins(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> Found:
  """Completes the name of an adapter type or a plugin."""
  del ctx, param
  from surgery.host.manager import default_host

  names = dict.fromkeys(info.name for info in default_host().plugins())
  return items(names, incomplete)


def formats(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> Found:
  """Completes the name of a file format."""
  del ctx, param
  from surgery.host.manager import default_host

  return items(default_host().formats, incomplete)


def maps(ctx: click.Context, param: click.Parameter, incomplete: str) -> Found:
  """Completes the name of a map."""
  del ctx, param
  from surgery.host.manager import default_host

  return items(default_host().maps, incomplete)


def dtypes(
  ctx: click.Context, param: click.Parameter, incomplete: str
) -> Found:
  """Completes a dtype to which tensors can be cast."""
  del ctx, param
  from surgery.passes import cast

  return items(cast.names(), incomplete)


def kept(ctx: click.Context, param: click.Parameter, incomplete: str) -> Found:
  """Completes `SELECTOR` or `SELECTOR=DTYPE`."""
  selector, sign, dtype = incomplete.rpartition('=')
  if not sign:
    return selectors(ctx, param, incomplete)
  from surgery.passes import cast

  return items(
    (f'{selector}={name}' for name in cast.names()), f'{selector}={dtype}'
  )
