"""Processes that hear signals, whatever this one was told to ignore."""

import signal
import sys

# A program that `nohup` or a script's `&` started ignores some signals, and so
# do all that it starts, until one of them says otherwise.
_PROGRAM = """
import os, signal, sys
for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT'):
  signal.signal(getattr(signal, name), signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def hearing(*command):
  """Returns a command that runs another one, to which no signal is ignored."""
  return [sys.executable, '-c', _PROGRAM, *map(str, command)]


def ended_by(name):
  """Returns the exit code by which Python tells of a signal."""
  return -getattr(signal, name)
