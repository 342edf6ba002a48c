"""Recipes as text: YAML as its version 1.2 has it, with lines for messages.

Plain words are read by YAML 1.2's core schema: `no` is text, `1e-5` a number,
`12:30` text. A selector that YAML would read as something else is an error,
which says to put it in quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery import errors

# A file that refers to its own parts over and over is not a recipe.
_MOST = 100_000
_DEPTH = 50

_INTEGER = re.compile(r'[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+')
_FLOAT = re.compile(
  r'[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?'
  r'|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)'
)
_WORDS = {
  **dict.fromkeys(('', '~', 'null', 'Null', 'NULL'), None),
  **dict.fromkeys(('true', 'True', 'TRUE'), True),
  **dict.fromkeys(('false', 'False', 'FALSE'), False),
}


class Lines:
  """The line of each part of a recipe.

  Args:
    name: name of the file; empty for a recipe that is not written as text.
  """

  def __init__(self, name: str = '') -> None:
    self.name = name
    self._lines: dict[tuple[str | int, ...], int] = {}

  def add(self, place: tuple[str | int, ...], line: int) -> None:
    """Adds the line of a part."""
    self._lines[place] = line

  def under(self, key: str) -> Lines:
    """Returns lines of parts that all lie beneath a further key."""
    new = Lines(self.name)
    new._lines = {(key, *place): n for place, n in self._lines.items()}
    return new

  def where(self, *place: str | int) -> str:
    """Returns a part's file and line."""
    for n in range(len(place), -1, -1):
      if place[:n] in self._lines:
        return f'{self.name}:{self._lines[place[:n]]}'
    return self.name


def scalar(text: str) -> Any:
  """Returns the value of a plain word of YAML 1.2."""
  if text in _WORDS:
    return _WORDS[text]
  if _INTEGER.fullmatch(text):
    base = {'0o': 8, '0x': 16}.get(text[:2], 10)
    return int(text, base) if len(text) < 4000 else text
  if _FLOAT.fullmatch(text):
    return float(text.lower().replace('.inf', 'inf').replace('.nan', 'nan'))
  return text


def read(text: str, name: str) -> tuple[Any, Lines]:
  """Reads YAML, or JSON, which is YAML.

  Args:
    text: the text.
    name: name of the file, for messages.

  Raises:
    RecipeError: if it cannot be read, with the line.
  """
  import yaml

  loader = yaml.SafeLoader(text)
  try:
    node = loader.get_single_node()
  except yaml.MarkedYAMLError as error:
    raise _unreadable(error, text, name) from None
  except (yaml.YAMLError, RecursionError, ValueError) as error:
    raise errors.RecipeError(f'{name}: not YAML: {error}.') from None
  finally:
    loader.dispose()
  if node is None:
    raise errors.RecipeError(f'{name}: expected a recipe, found nothing.')
  reading = _Reading(name)
  return reading.value(node, ()), reading.lines


def _unreadable(error: Any, text: str, name: str) -> errors.RecipeError:
  """Returns the error for text that is no YAML, with advice for selectors."""
  # A selector is the most usual mistake: YAML's own message names its syntax.
  mark = error.problem_mark or error.context_mark
  where = name if mark is None else f'{name}:{mark.line + 1}'
  problem = str(error.problem or error.context)
  lines = text.splitlines()
  line = lines[mark.line] if mark is not None and mark.line < len(lines) else ''
  if 'alias' in f'{error.context} {problem}' or re.search(r'[:\-]\s+\*', line):
    return errors.RecipeError(
      f"{where}: YAML reads a '*' at the start of a word as a reference, "
      f'found {line.strip()!r}. Put the selector in quotes: '
      f"'{_word(line)}'."
    )
  if re.search(r'\w', _word(line)) and 'flow' in str(error.context):
    return errors.RecipeError(
      f'{where}: YAML reads braces and brackets as mappings and lists, found '
      f'{line.strip()!r} ({problem}). Put the selector in quotes: '
      f"'{_word(line)}'."
    )
  return errors.RecipeError(f'{where}: not YAML: {problem}.')


def _word(line: str) -> str:
  """Returns a line without what marks items and keys in front of its value."""
  return re.sub(r'^(-\s+)*([\w-]+:\s+)*(-\s+)*', '', line.strip())


class _Reading:
  """Turns nodes of YAML into data.

  Args:
    name: name of the file.
  """

  def __init__(self, name: str) -> None:
    self.lines = Lines(name)
    self._name = name
    self._count = 0

  def _fail(self, node: Any, why: str) -> errors.RecipeError:
    return errors.RecipeError(f'{self._name}:{node.start_mark.line + 1}: {why}')

  def value(self, node: Any, place: tuple[str | int, ...]) -> Any:
    """Returns the data of a node.

    Raises:
      RecipeError: for a selector that YAML reads as something else.
    """
    import yaml

    # Aliases make small files large: each node counts as often as it is used.
    self._count += 1
    if self._count > _MOST or len(place) > _DEPTH:
      raise self._fail(node, 'too large, or too deep, for a recipe.')
    self.lines.add(place, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
      return self._scalar(node)
    self._check_tag(node)
    if isinstance(node, yaml.SequenceNode):
      return [self.value(one, (*place, k)) for k, one in enumerate(node.value)]
    return self._mapping(node, place)

  def _check_tag(self, node: Any) -> None:
    standard = node.tag.startswith('tag:yaml.org,2002:')
    if not standard or node.tag.rpartition(':')[2] not in (
      'map',
      'seq',
      'str',
      'null',
      'bool',
      'int',
      'float',
      'timestamp',
      'value',
      'merge',
    ):
      text = node.tag.removeprefix('tag:yaml.org,2002:')
      text = text if text.startswith('!') else f'!!{text}'
      rest = node.value if isinstance(node.value, str) and node.value else ''
      shown = f'{text} {rest}'.strip()
      raise self._fail(
        node,
        f"YAML reads a word that starts with '!' as a type, found {shown!r}. "
        f"Put the selector in quotes: '{shown}'.",
      )

  def _scalar(self, node: Any) -> Any:
    # What is quoted is text, whatever it looks like.
    if node.style in ("'", '"', '|', '>'):
      return node.value
    self._check_tag(node)
    return scalar(node.value)

  def _mapping(self, node: Any, place: tuple[str | int, ...]) -> dict[str, Any]:
    if node.flow_style and node.value and all(map(_has_no_colon, node.value)):
      shown = '{' + ','.join(key.value for key, _ in node.value) + '}'
      raise self._fail(
        node,
        f'YAML reads {shown!r} as a mapping, not as a pattern. Put the whole '
        f"selector in quotes: '…{shown}…'.",
      )
    result: dict[str, Any] = {}
    for key, value in node.value:
      if not isinstance(key.value, str):
        raise self._fail(
          key,
          'expected a name before the colon, found a list or a mapping. If it '
          'is a selector, put it in quotes.',
        )
      self._check_tag(key)
      if key.value in result:
        raise self._fail(key, f'{key.value!r} is given twice.')
      result[key.value] = self.value(value, (*place, key.value))
    return result


def _has_no_colon(entry: tuple[Any, Any]) -> bool:
  """Whether an entry of a mapping is a word alone, as in `{a,b}`."""
  key, value = entry
  return (
    isinstance(key.value, str)
    and value.value == ''
    and not value.style
    and value.start_mark.index <= key.end_mark.index
  )


def write(data: Mapping[str, Any] | list[Any]) -> str:
  """Returns data as YAML that `read` reads as the same data."""
  import yaml

  class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
      return True

    def increase_indent(
      self, flow: bool = False, indentless: bool = False
    ) -> None:
      super().increase_indent(flow, False)

  def words(dumper: Any, value: str) -> Any:
    # YAML 1.1, which the library writes, and 1.2 differ in what needs quotes.
    plain = re.fullmatch(r'[A-Za-z][\w./-]*', value)
    safe = plain and scalar(value) == value and not _WORD_11.fullmatch(value)
    style = None if safe else "'" if value.isprintable() else '"'
    return dumper.represent_scalar('tag:yaml.org,2002:str', value, style=style)

  def number(dumper: Any, value: float) -> Any:
    text = repr(value)
    text = {'inf': '.inf', '-inf': '-.inf', 'nan': '.nan'}.get(text, text)
    return dumper.represent_scalar('tag:yaml.org,2002:float', text)

  def items(dumper: Any, value: Any) -> Any:
    flow = all(v is None or isinstance(v, (bool, int, float)) for v in value)
    return dumper.represent_sequence(
      'tag:yaml.org,2002:seq', value, flow_style=flow
    )

  Dumper.add_representer(str, words)
  Dumper.add_representer(float, number)
  Dumper.add_representer(list, items)
  Dumper.add_representer(tuple, items)
  return str(
    yaml.dump(
      data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000
    )
  )


_WORD_11 = re.compile(r'(?i:y|n|yes|no|on|off)')
