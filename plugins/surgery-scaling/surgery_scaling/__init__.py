"""IA3: learned scaling of a layer's outputs or inputs."""

from __future__ import annotations

from surgery_scaling.ia3 import IA3

__all__ = ['IA3']
