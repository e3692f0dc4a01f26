"""Attention of prompt tokens to image tokens."""

from .api import token_to_image_attention

__all__ = ["token_to_image_attention"]
