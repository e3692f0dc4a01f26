"""Attention of image tokens to prompt tokens in few PyTorch operations, on any device and differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_attention.blocks import block_count, per_prompt, repeat, split
from ..cross_attention.operands import AbsorbedTokens, ImageTokens, LayerNormWeights
from ..dispatch import requires_autograd


def eager(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> Tensor:
    """Score with the image tokens innermost, so that the softmax over a few tokens runs along them; in place."""
    prompts, heads, tokens, _ = absorbed.keys.shape
    keys = per_prompt(image.tokens, image.image_index, prompts)
    blocks = block_count(keys)
    if image.queries is None:
        bias, token_keys = (repeat(x.flatten(1, 2), blocks) for x in (absorbed.bias[..., None], absorbed.keys))
        scratch = keys_with_pe = split(keys + image.pe, blocks)
        scores = torch.baddbmm(bias, token_keys, keys_with_pe.transpose(1, 2)).unflatten(1, (heads, tokens))
    else:
        scratch = None
        scores = _scores_of_queries(image.queries, absorbed.keys, image.image_index).add_(absorbed.bias[..., None])
    differentiates = requires_autograd(scores, absorbed.values)
    in_place = scores.is_contiguous() and not differentiates
    weights = torch.softmax(scores, 2, out=scores if in_place else None).flatten(1, 2)
    if image.queries is not None and blocks > 1:
        weights = weights[0].unflatten(1, (blocks, -1)).transpose(0, 1)
    values = repeat(absorbed.values.flatten(1, 2), blocks)
    if scratch is not None and (differentiates or torch.compiler.is_compiling() or not scratch.is_contiguous()):
        scratch = None  # else the sums with the positions have served, and their memory is used again
    updated = torch.bmm(weights.transpose(1, 2), values, out=scratch).add_(split(keys, blocks))
    return F.layer_norm(updated.view(keys.shape), norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _scores_of_queries(image_queries: Tensor, token_keys: Tensor, index: Tensor | None) -> Tensor:
    """Score tokens [P, H, T, d] against image queries [I, N, H * d]: [P, H, T, N]."""
    prompts, heads, tokens, _ = token_keys.shape
    queries = image_queries.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # [I, H, d, N]
    if index is None or len(queries) > 1:
        return token_keys @ (queries if index is None else queries.index_select(0, index))
    scores = token_keys.transpose(0, 1).flatten(1, 2) @ queries[0]  # the tokens of all prompts are one set
    return scores.unflatten(1, (prompts, tokens)).transpose(0, 1)
