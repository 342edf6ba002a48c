"""Patches: what a saved model has that its base has not.

A patch describes the bytes of a file, not a model: which of them are those of
the base's tensors, and all others. So what it gives back is the very file,
whoever wrote it, in whatever format.
"""

from surgery.files.patches.applying import apply_patch
from surgery.files.patches.making import make_patch

__all__ = ['apply_patch', 'make_patch']
