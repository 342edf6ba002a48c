"""Where the command `surgery` begins, before anything else is imported."""

from __future__ import annotations

import gc
import signal

# Objects after which Python looks for rings of them. What is imported stays,
# and looking through it again and again takes a tenth of a start with JAX.
_OBJECTS = 20_000


def main() -> None:
  """Runs the command and exits.

  Importing the rest takes a moment, in which there is nothing to clean up yet.
  Ctrl-C simply ends the process then, where Python's own way would be a
  traceback through whatever is being imported.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
  from surgery.cli import main as rest

  rest.main()
