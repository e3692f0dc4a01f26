"""Attention of SAM 2's image encoder inside windows."""

from .api import window_attention

__all__ = ["window_attention"]
