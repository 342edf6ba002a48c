"""Figures about the code: how long functions are, how branched, how commented.

    python docs/tools/figures.py

Docstrings count as no lines of code. Complexity is McCabe's (1976): one more
than the number of places where a function branches.
"""

from __future__ import annotations

import ast
import io
import pathlib
import statistics
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2] / 'surgery'
_BRANCHES = (
  ast.If,
  ast.For,
  ast.AsyncFor,
  ast.While,
  ast.ExceptHandler,
  ast.IfExp,
  ast.Assert,
  ast.comprehension,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
  """Yields all functions, those in others too."""
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield node


def body(function: Function) -> int:
  """Returns the number of lines of a function's body without docstring."""
  first = function.body[0]
  documented = isinstance(first, ast.Expr) and isinstance(
    first.value, ast.Constant
  )
  statements = function.body[1:] if documented else function.body
  if not statements:
    return 0
  return (statements[-1].end_lineno or 0) - statements[0].lineno + 1


def complexity(function: Function) -> int:
  """Returns the number of independent ways through a function.

  A function that lies in it is one of its own.
  """
  count, todo = 1, list(ast.iter_child_nodes(function))
  while todo:
    node = todo.pop()
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
      continue
    if isinstance(node, _BRANCHES):
      count += 1
    if isinstance(node, ast.BoolOp):
      count += len(node.values) - 1
    if isinstance(node, ast.comprehension):
      count += len(node.ifs)
    todo += ast.iter_child_nodes(node)
  return count


def annotated(function: Function) -> Iterator[tuple[str, str]]:
  """Yields the kind and the text of each annotation."""
  arguments = function.args
  for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
    if one.annotation is not None:
      yield 'arguments', ast.unparse(one.annotation)
  if function.returns is not None:
    yield 'returns', ast.unparse(function.returns)


def share(values: list[bool]) -> str:
  """Returns how many are true, in percent."""
  return f'{100 * sum(values) / len(values):.1f} %'


def main() -> None:
  """Prints the figures."""
  bodies: list[tuple[int, str]] = []
  branched: list[tuple[int, str]] = []
  lengths: list[int] = []
  comments = code = 0
  kinds: dict[str, list[bool]] = {'arguments': [], 'returns': []}
  for file in sorted(ROOT.rglob('*.py')):
    text = file.read_text()
    lengths.append(text.count('\n'))
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    comments += sum(t.type == tokenize.COMMENT for t in tokens)
    code += len({t.start[0] for t in tokens if t.type == tokenize.NAME})
    for one in functions(ast.parse(text)):
      where = f'{file.relative_to(ROOT.parent)}:{one.lineno} {one.name}'
      bodies.append((body(one), where))
      branched.append((complexity(one), where))
      for kind, written in annotated(one):
        kinds[kind].append(written == 'Any')
  print(f'lines {sum(lengths)}, modules {len(lengths)}')
  print(f'module lines: {statistics.median(lengths)} / {max(lengths)}')
  print(f'body, mean lines: {statistics.mean(n for n, _ in bodies):.1f}')
  print(f'bodies over 40 lines: {share([n > 40 for n, _ in bodies])}')
  print(f'complexity over 10: {share([n > 10 for n, _ in branched])}')
  print(f'comments per 100 lines of code: {100 * comments / code:.1f}')
  for kind, values in kinds.items():
    print(f'{kind} that are Any: {share(values)}')
  for title, rows in (('longest', bodies), ('most branched', branched)):
    print(f'\n{title}:')
    for number, where in sorted(rows, reverse=True)[:25]:
      print(f'  {number:4} {where}')


if __name__ == '__main__':
  main()
