"""Attention of SAM's image encoder with decomposed relative position."""

from .api import rel_pos_attention

__all__ = ["rel_pos_attention"]
