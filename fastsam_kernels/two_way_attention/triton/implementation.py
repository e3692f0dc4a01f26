"""Limitations of the Triton kernel of ``two_way_attention`` and the way to call it; imports no triton."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...cross_attention.limits import token_limitation
from ...cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection
from ...dispatch import triton_implementation
from ...image_to_token_attention.triton.implementation import NO_IMAGE_QUERIES


def _run(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, queries: Tensor, value: ValueProjection
) -> tuple[Tensor, Tensor]:
    from .custom_op import two_way_triton

    count, tokens = queries.shape[2], absorbed.values.shape[2]
    if count < tokens:  # the kernel has one number of tokens
        queries = F.pad(queries, (0, 0, 0, tokens - count))
    updated, learned = two_way_triton(image.tokens, image.pe, *absorbed, *norm, queries, *value, image.image_index)
    return updated, learned[:, :count]


def _limitation(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, queries: Tensor, value: ValueProjection
) -> str | None:
    if image.queries is not None:
        return NO_IMAGE_QUERIES
    return token_limitation(absorbed.values, len(value.weight) // queries.shape[1])


TRITON = triton_implementation(_run, _limitation, multiplies=True)
