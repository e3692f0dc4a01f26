"""The helpers of the official package, at its import paths."""

from . import amg, transforms

__all__ = ["amg", "transforms"]
