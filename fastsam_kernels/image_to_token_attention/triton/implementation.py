"""Limitations of the Triton kernel of ``image_to_token_attention`` and the way to call it; imports no triton."""

from __future__ import annotations

from torch import Tensor

from ...cross_attention.limits import token_limitation
from ...cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights
from ...dispatch import triton_implementation

NO_IMAGE_QUERIES = "it computes scores from the image tokens, and image.queries are given"


def _run(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> Tensor:
    from .custom_op import image_to_token_triton

    return image_to_token_triton(image.tokens, image.pe, *absorbed, *norm, image.image_index)


def _limitation(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> str | None:
    return NO_IMAGE_QUERIES if image.queries is not None else token_limitation(absorbed.values, 16)


TRITON = triton_implementation(_run, _limitation, multiplies=True)
