"""Orbax checkpoints as a format of files."""

from surgery_orbax.plugin import Orbax

__all__ = ['Orbax']
