"""Both attentions in PyTorch operations, one after the other."""

from __future__ import annotations

from torch import Tensor

from ..cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection
from ..image_to_token_attention.eager import eager as image_to_token
from ..token_to_image_attention.eager import eager as token_to_image


def eager(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, queries: Tensor, value: ValueProjection
) -> tuple[Tensor, Tensor]:
    """Compute ``two_way_attention``."""
    tokens = image_to_token(image, absorbed, norm)
    return tokens, token_to_image(queries, ImageTokens(tokens, image.pe), value)
