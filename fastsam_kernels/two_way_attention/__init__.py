"""The two cross-attentions of SAM's mask decoder, apart and in one pass over the image tokens."""

from .api import (
    MAX_TOKENS,
    image_to_token_attention,
    token_to_image_attention,
    two_way_attention,
    without_unused_queries,
)
from .operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection

__all__ = [
    "MAX_TOKENS",
    "AbsorbedTokens",
    "ImageTokens",
    "LayerNormWeights",
    "ValueProjection",
    "image_to_token_attention",
    "token_to_image_attention",
    "two_way_attention",
    "without_unused_queries",
]
