"""Both cross-attentions of SAM's mask decoder in one pass over the image tokens."""

from .api import two_way_attention, without_unused_queries

__all__ = ["two_way_attention", "without_unused_queries"]
