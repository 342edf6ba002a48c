"""What goes with a model whose rows stand for other tokens than before."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The tokens of a model, as files beside it say them.

  Attributes:
    files: files of the tokenizer for a model folder, by name: what is copied,
      or what is written.
    numbers: the new number of each old one that a configuration may name; None
      where all stay.
  """

  files: Mapping[str, pathlib.Path | bytes]
  numbers: Mapping[int, int] | None = None
