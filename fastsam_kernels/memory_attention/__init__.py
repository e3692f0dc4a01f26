"""Attention of SAM 2's tracking: a frame to itself, and to the memories of each object."""

from .api import memory_attention

__all__ = ["memory_attention"]
