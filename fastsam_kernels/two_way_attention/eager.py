"""The cross-attentions as few PyTorch operations, on any device and differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import requires_autograd
from .operands import AbsorbedTokens, ImageTokens, LayerNormWeights, ValueProjection

# Parts that the image tokens of a lone prompt are split into: a BLAS shares a batch among its threads, but not a
# product so narrow.
_BLOCKS = 8


def token_to_image_eager(queries: Tensor, image: ImageTokens, value: ValueProjection) -> Tensor:
    """Two batched products over the image tokens, the scores overwritten by their softmax."""
    keys = _per_prompt(image.tokens, image.image_index, len(queries))
    (prompts, heads, tokens, _), differentiates = queries.shape, requires_autograd(queries, keys)
    blocks = _block_count(keys)
    keys_with_pe = _split(keys + image.pe, blocks)
    scores = _repeat(queries.flatten(1, 2), blocks) @ keys_with_pe.transpose(1, 2)
    if blocks > 1:
        scores = scores.transpose(0, 1).flatten(1)[None]  # [P, H * T, N]
    weights = torch.softmax(scores, -1, out=None if differentiates else scores)
    attended = (weights @ keys).unflatten(1, (heads, tokens))  # [P, H, T, C]
    values = attended.transpose(0, 1).flatten(1, 2) @ value.weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return values.unflatten(1, (prompts, tokens)).permute(1, 2, 0, 3).flatten(2) + value.bias


def image_to_token_eager(image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights) -> Tensor:
    """Scores with the image tokens innermost, so that the softmax over a few tokens runs along them; in place."""
    prompts, heads, tokens, _ = absorbed.keys.shape
    keys = _per_prompt(image.tokens, image.image_index, prompts)
    blocks = _block_count(keys)
    if image.queries is None:
        bias, token_keys = (_repeat(x.flatten(1, 2), blocks) for x in (absorbed.bias[..., None], absorbed.keys))
        scratch = keys_with_pe = _split(keys + image.pe, blocks)
        scores = torch.baddbmm(bias, token_keys, keys_with_pe.transpose(1, 2)).unflatten(1, (heads, tokens))
    else:
        scratch = None
        scores = _scores_of_queries(image.queries, absorbed.keys, image.image_index).add_(absorbed.bias[..., None])
    differentiates = requires_autograd(scores, absorbed.values)
    in_place = scores.is_contiguous() and not differentiates
    weights = torch.softmax(scores, 2, out=scores if in_place else None).flatten(1, 2)
    if image.queries is not None and blocks > 1:
        weights = weights[0].unflatten(1, (blocks, -1)).transpose(0, 1)
    values = _repeat(absorbed.values.flatten(1, 2), blocks)
    if scratch is not None and (differentiates or torch.compiler.is_compiling() or not scratch.is_contiguous()):
        scratch = None  # else the sums with the positions have served, and their memory is used again
    updated = torch.bmm(weights.transpose(1, 2), values, out=scratch).add_(_split(keys, blocks))
    return F.layer_norm(updated.view(keys.shape), norm.weight.shape, norm.weight, norm.bias, norm.eps)


def two_way_eager(
    image: ImageTokens, absorbed: AbsorbedTokens, norm: LayerNormWeights, queries: Tensor, value: ValueProjection
) -> tuple[Tensor, Tensor]:
    """One attention after the other."""
    tokens = image_to_token_eager(image, absorbed, norm)
    return tokens, token_to_image_eager(queries, ImageTokens(tokens, image.pe), value)


def _scores_of_queries(image_queries: Tensor, token_keys: Tensor, index: Tensor | None) -> Tensor:
    """[I, N, H * d] and [P, H, T, d] -> [P, H, T, N]"""
    prompts, heads, tokens, _ = token_keys.shape
    queries = image_queries.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # [I, H, d, N]
    if index is None or len(queries) > 1:
        return token_keys @ (queries if index is None else queries.index_select(0, index))
    scores = token_keys.transpose(0, 1).flatten(1, 2) @ queries[0]  # the tokens of all prompts are one set
    return scores.unflatten(1, (prompts, tokens)).transpose(0, 1)


def _block_count(keys: Tensor) -> int:
    """Return how many parts to split image tokens [P, N, C] into."""
    return _BLOCKS if len(keys) == 1 and keys.shape[1] % _BLOCKS == 0 else 1


def _split(keys: Tensor, blocks: int) -> Tensor:
    """[P, N, C] -> [P * blocks, N / blocks, C]"""
    return keys if blocks == 1 else keys.reshape(blocks, -1, keys.shape[2])


def _repeat(tokens: Tensor, blocks: int) -> Tensor:
    """Repeat a prompt's tokens for each of its blocks: [P, H * T, C] -> [P * blocks, H * T, C], no copy."""
    return tokens if blocks == 1 else tokens.expand(blocks, -1, -1)


def _per_prompt(keys: Tensor, index: Tensor | None, prompts: int) -> Tensor:
    """[I, N, C] -> [P, N, C]; one image serves all prompts without a copy."""
    if index is None:
        return keys
    return keys.expand(prompts, -1, -1) if len(keys) == 1 else keys.index_select(0, index)
