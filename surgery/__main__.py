"""`python -m surgery` is the command `surgery`."""

from surgery.cli.entry import main

if __name__ == '__main__':
  main()
