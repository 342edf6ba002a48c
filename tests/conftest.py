"""What tests of all rooms use."""

import dataclasses

import pytest

from surgery.cli import main


@dataclasses.dataclass
class Result:
  code: int
  out: str
  err: str


@pytest.fixture
def surgery_cli(capfd):
  """Runs the command in this process; gives exit code, stdout, stderr."""

  def run(*arguments):
    capfd.readouterr()
    code = main.run([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return Result(code, out, err)

  return run
