"""An observer: a line of JSON for each verb that ended, in a file."""

import json
import pathlib
from typing import Any

import surgery


class Provenance:
  """Writes down what was done.

  Args:
    path: the file, to which lines are added.

  Example:
    host = surgery.Host(plugins=[Provenance('done.jsonl')])
  """

  def __init__(self, path: Any) -> None:
    self._path = pathlib.Path(path)

  @surgery.hookimpl
  def surgery_finished(self, event: Any) -> None:
    """Called when a verb has ended, well or not."""
    said = {
      'verb': event.verb,
      'arguments': dict(event.arguments),
      'failed': None if event.failed is None else str(event.failed),
    }
    with self._path.open('a') as file:
      file.write(json.dumps(said, default=str) + '\n')
