"""Attention of image tokens to prompt tokens."""

from .api import image_to_token_attention

__all__ = ["image_to_token_attention"]
