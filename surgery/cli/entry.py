"""Where the command `surgery` begins, before anything else is imported."""

from __future__ import annotations

import signal


def main() -> None:
  """Runs the command and exits.

  Importing the rest takes a moment, in which there is nothing to clean up yet.
  Ctrl-C simply ends the process then, where Python's own way would be a
  traceback through whatever is being imported.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  from surgery.cli import main as rest

  rest.main()
