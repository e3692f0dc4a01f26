"""Attention of prompt tokens to image tokens in few PyTorch operations, on any device and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cross_attention.blocks import block_count, per_prompt, repeat, split
from ..cross_attention.operands import ImageTokens, ValueProjection
from ..dispatch import requires_autograd


def eager(queries: Tensor, image: ImageTokens, value: ValueProjection) -> Tensor:
    """Compute two batched products over the image tokens, the scores overwritten by their softmax."""
    keys = per_prompt(image.tokens, image.image_index, len(queries))
    (prompts, heads, tokens, _), differentiates = queries.shape, requires_autograd(queries, keys)
    blocks = block_count(keys)
    keys_with_pe = split(keys + image.pe, blocks)
    scores = repeat(queries.flatten(1, 2), blocks) @ keys_with_pe.transpose(1, 2)
    if blocks > 1:
        scores = scores.transpose(0, 1).flatten(1)[None]  # [P, H * T, N]
    weights = torch.softmax(scores, -1, out=None if differentiates else scores)
    attended = (weights @ keys).unflatten(1, (heads, tokens))  # [P, H, T, C]
    values = attended.transpose(0, 1).flatten(1, 2) @ value.weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return values.unflatten(1, (prompts, tokens)).permute(1, 2, 0, 3).flatten(2) + value.bias
